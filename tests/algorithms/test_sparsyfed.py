"""SparsyFed: rounds worked by hand, the naive reference, limit cases, regrowth."""

from __future__ import annotations

from fnmatch import fnmatch
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from algorithms import ParameterLayout
from algorithms.core.layers import spectral_exponent
from algorithms.sparsyfed import SparsyFed
from tests.algorithms.by_hand import one_round
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation


class NaiveSparsyFed(NaiveFederation):
    """theta = sign(w) |w|^beta by autograd, pruned activations by autograd, a global cut by sorting."""

    def plain(self, name):
        return any(fnmatch(name.removesuffix(".weight"), p) for p in self.options.plain_layers)

    def exponent(self, name, weight):
        if self.plain(name):
            return 1.0
        if self.options.exponent == "constant":
            return self.options.beta
        matrix = weight.detach().double().abs().flatten(1)
        counted = matrix[matrix > 0] if self.options.spectral_mean == "nonzeros" else matrix
        return 1.0 + float(counted.mean() / torch.linalg.svdvals(matrix).max())

    def initial(self, weights):
        raised = dict(weights)
        for name in self.prunable:
            u = weights[name]
            raised[name] = u.sign() * u.abs() ** (1.0 / self.exponent(name, u))
        return raised

    def begin(self, weights, visit):
        visit.notes = {name: self.exponent(name, weights[name]) for name in self.prunable}

    def effective(self, weights, visit):
        theta = {}
        for name in self.prunable:
            w, beta = weights[name], visit.notes[name]
            theta[name] = w if beta == 1.0 else w.sign() * w.abs() ** beta
        return theta

    def activation_density(self, name, weight, visit):
        if not self.options.activation_pruning or self.plain(name):
            return None
        own = Fraction(int((weight != 0).sum()), weight.numel())
        return max(own, Fraction(self.options.min_activation_density))

    def reuses_threshold(self, name):
        if self.options.threshold == "first_batch_conv":
            return not isinstance(self.layers[name], nn.Linear)
        return self.options.threshold == "first_batch"

    def upload(self, weights, received, visit):
        mask = self.largest(weights, self.kept_count(self.options.sparsity))
        return self.masked(weights, mask), mask


# ------------------------------------------------------------------------------------------ by hand

# Both rows are equal, so both classes have probability 1/2 whatever the input is. theta = w^2 = 1/4 at
# columns 0 and 2: half of the layer is zero, so ceil(4/2) = 2 entries of x = (1, 1/2, 1/4, 2) stay: 1 and 2.
# dL/dtheta = (p - onehot) x^T = -+1/2 (1, 0, 0, 2); dL/dw = 2 |w| dL/dtheta = -+1/2 (1, 0, 0, 0), because
# 2 |w| = 1 at columns 0 and 2 and 0 elsewhere. One step with lr 1/2:
#   row 0: (1/2 + 1/4, 0, 1/2, 0), row 1: (1/2 - 1/4, 0, 1/2, 0)
W = [[0.5, 0.0, 0.5, 0.0], [0.5, 0.0, 0.5, 0.0]]
CLIENT = ([1.0, 0.5, 0.25, 2.0], 0, 1)


def test_a_step_worked_by_hand():
    uploads, [after] = one_round(SparsyFed(beta=2.0, sparsity=0.5), W, [CLIENT], lr=0.5)
    assert uploads == [[[0.75, 0.0, 0.5, 0.0], [0.25, 0.0, 0.5, 0.0]]]
    assert after == uploads[0]
    # K = round(0.375 * 8) = 3: the 1/4 goes.
    uploads, _ = one_round(SparsyFed(beta=2.0, sparsity=0.625), W, [CLIENT], lr=0.5)
    assert uploads == [[[0.75, 0.0, 0.5, 0.0], [0.0, 0.0, 0.5, 0.0]]]


def test_a_step_without_activation_pruning_worked_by_hand():
    # Column 2 sees x = 1/4 now: dL/dw = -+1/8, w = 1/2 +- 1/16.
    method = SparsyFed(beta=2.0, sparsity=0.5, activation_pruning=False)
    uploads, _ = one_round(method, W, [CLIENT], lr=0.5)
    assert uploads == [[[0.75, 0.0, 0.5625, 0.0], [0.25, 0.0, 0.4375, 0.0]]]


def test_decay_acts_on_w_not_on_theta():
    # No signal at all (x = 0): w - lr * decay * w = 1/2 - 1/2 * 1/4 * 1/2 = 7/16.
    method = SparsyFed(beta=2.0, sparsity=0.5)
    uploads, _ = one_round(method, W, [([0.0, 0.0, 0.0, 0.0], 0, 1)], lr=0.5, weight_decay=0.25)
    assert uploads == [[[0.4375, 0.0, 0.4375, 0.0]] * 2]


def test_with_beta_1_zeros_regrow():
    # No power: dL/dw = -+1/2 (1, 0, 0, 2), the last column regrows to +-1/2 and column 2 stays at 1/2.
    uploads, _ = one_round(SparsyFed(beta=1.0, sparsity=0.0), W, [CLIENT], lr=0.5)
    assert uploads == [[[0.75, 0.0, 0.5, 0.5], [0.25, 0.0, 0.5, -0.5]]]


def test_the_initial_weights_compute_the_common_initialisation():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    layout = ParameterLayout.of(model)
    common = torch.tensor([4.0, -9.0, 0.0, 1.0, 0.25, 16.0, 4.0, 9.0, -4.0, 25.0, 3.0, -3.0])
    method = SparsyFed(beta=2.0, plain_layers=("1",))
    state = method.initial_state(common, layout, None)
    assert state.weights.tolist() == [2, -3, 0, 1, 0.5, 4, 4, 9, -4, 25, 3, -3]
    assert torch.equal(method.effective_weights(state.weights, layout), common)
    assert common[0] == 4.0


def test_copied_weights_are_w_and_the_first_pass_meets_their_power():
    layout = ParameterLayout.of(nn.Linear(3, 2))
    given = torch.tensor([4.0, -9.0, 0.0, 1.0, 0.25, 16.0, 4.0, 9.0])
    method = SparsyFed(beta=2.0, copied_weights=True)
    state = method.initial_state(given, layout, None)
    assert torch.equal(state.weights, given)
    assert state.weights is not given
    assert method.effective_weights(state.weights, layout).tolist() == [16, -81, 0, 1, 0.0625, 256, 4, 9]


# ---------------------------------------------------------------------------------- the naive reference

NAIVE = {
    "first_batch": {},
    "every_batch": {"threshold": "every_batch"},
    "first_batch_conv": {"threshold": "first_batch_conv"},
    "beta 1": {"beta": 1.0, "threshold": "every_batch"},
    "beta 2, no pruning": {"beta": 2.0, "activation_pruning": False},
    "spectral": {"exponent": "spectral"},
    "plain layers": {"plain_layers": ["4", "*9"]},
    "min density": {"min_activation_density": 0.6},
}


@pytest.mark.parametrize("case", NAIVE)
def test_equals_the_naive_reference(tmp_path, case):
    config = tiny_federation(
        tmp_path,
        rounds=3,
        algorithm={"name": "sparsyfed", "sparsity": 0.8, **NAIVE[case]},
        local={"epochs": 2, "lr_final": 0.05, "weight_decay": 0.01},
    )
    assert_same(run_inline(config, tmp_path / "run"), NaiveSparsyFed(config).run(), atol=5e-6)


@pytest.mark.parametrize("threshold", ["first_batch", "every_batch", "first_batch_conv"])
def test_equals_the_naive_reference_with_batch_norm_groups_and_strides(tmp_path, threshold):
    config = tiny_federation(
        tmp_path,
        model={"name": "tests.tiny_experiment:tiny_model"},
        algorithm={"name": "sparsyfed", "sparsity": 0.7, "threshold": threshold},
        server={"name": "fedavg", "momentum": 0.5},
    )
    assert_same(run_inline(config, tmp_path / "run"), NaiveSparsyFed(config).run(), atol=5e-6)


def test_the_three_thresholds_differ(tmp_path):
    # Otherwise the references above would prove nothing.
    finals = []
    for threshold in ("first_batch", "every_batch", "first_batch_conv"):
        config = tiny_federation(
            tmp_path, algorithm={"name": "sparsyfed", "sparsity": 0.8, "threshold": threshold}
        )
        finals.append(run_inline(config, tmp_path / threshold).state.weights)
    assert not torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])
    assert not torch.equal(finals[1], finals[2])


# ------------------------------------------------------------------------------------------ limit cases


def test_at_sparsity_0_with_beta_1_it_is_fedavg_bit_for_bit(tmp_path):
    limit = {"name": "sparsyfed", "sparsity": 0.0, "beta": 1.0}
    run = run_inline(tiny_federation(tmp_path, algorithm=limit), tmp_path / "s")
    assert_identical(run, run_inline(tiny_federation(tmp_path), tmp_path / "f"))


@pytest.mark.parametrize("local", [{}, {"epochs": 2, "weight_decay": 0.01, "proximal": 0.1}])
def test_with_beta_1_and_no_activation_pruning_it_is_topk_bit_for_bit(tmp_path, local):
    limit = {"name": "sparsyfed", "sparsity": 0.9, "beta": 1.0, "activation_pruning": False}
    run = run_inline(tiny_federation(tmp_path, algorithm=limit, local=local, rounds=3), tmp_path / "s")
    topk = {"name": "topk", "sparsity": 0.9}
    assert_identical(
        run, run_inline(tiny_federation(tmp_path, algorithm=topk, local=local, rounds=3), tmp_path / "t")
    )


# --------------------------------------------------------------------------------------------- regrowth


def _regrown(run, names):
    """Positions that were 0 in what a client of round 2 or later received and are not in its upload."""
    count = 0
    for (round_number, _), (values, _) in run.uploads.items():
        if round_number > 1:
            layout = run.driver.layout
            received = layout.split(run.states[round_number - 1].weights)
            count += sum(int(((received[n] == 0) & (values[n] != 0)).sum()) for n in names)
    return count


def test_zeros_never_regrow_locally(tmp_path):
    algorithm = {"name": "sparsyfed", "sparsity": 0.9}
    local = {"epochs": 2, "weight_decay": 0.01}
    run = run_inline(tiny_federation(tmp_path, algorithm=algorithm, local=local, rounds=3), tmp_path / "run")
    names = [entry.name for entry in run.driver.layout.prunable]
    assert _regrown(run, names) == 0
    for line in run.lines[1:]:
        assert line["masks/client_regrowth_before_cut"] == 0
        assert line["masks/client_regrowth"] == 0
        assert line["masks/regrowth"] == 0


def test_zeros_regrow_in_plain_layers_only(tmp_path):
    # In small_cnn layer 4 is the second convolution.
    algorithm = {"name": "sparsyfed", "sparsity": 0.9, "plain_layers": ["4"]}
    run = run_inline(tiny_federation(tmp_path, algorithm=algorithm, rounds=3), tmp_path / "run")
    names = [entry.name for entry in run.driver.layout.prunable]
    assert "4.weight" in names
    assert _regrown(run, ["4.weight"]) > 0
    assert _regrown(run, [name for name in names if name != "4.weight"]) == 0


def test_zeros_regrow_with_beta_1(tmp_path):
    algorithm = {"name": "sparsyfed", "sparsity": 0.9, "beta": 1.0}
    run = run_inline(tiny_federation(tmp_path, algorithm=algorithm), tmp_path / "run")
    assert run.lines[1]["masks/client_regrowth_before_cut"] > 0


# ------------------------------------------------------------------------------------ what it leaves behind


@pytest.mark.parametrize("exponent", ["constant", "spectral"])
def test_the_models_file_holds_theta_and_reproduces_the_logged_accuracy(tmp_path, exponent):
    algorithm = {"name": "sparsyfed", "sparsity": 0.8, "exponent": exponent}
    run = run_inline(tiny_federation(tmp_path, algorithm=algorithm), tmp_path / "run")
    stored = load_file(tmp_path / "run" / "model.safetensors")
    federation = run.driver.federation
    for entry in run.driver.layout.prunable:
        w = run.weights[entry.name]
        assert torch.equal(stored[entry.name] == 0, w == 0)
        if exponent == "constant":
            torch.testing.assert_close(stored[entry.name], w.sign() * w.abs() ** 1.25)
    model = federation.model
    model.load_state_dict(stored)
    test = federation.dataset.test
    images = (torch.tensor(test.inputs.copy()).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        correct = int((model.eval()(images).argmax(1) == torch.tensor(test.targets)).sum())
    assert run.lines[-1]["test/accuracy"] == correct / len(test.targets)


def test_a_client_leaves_nothing_behind_for_the_next(tmp_path):
    # The same client after different predecessors, hence in another cohort: the same upload.
    config = tiny_federation(tmp_path, algorithm={"name": "sparsyfed", "sparsity": 0.8})
    everyone = tiny_federation(tmp_path, algorithm={"name": "sparsyfed", "sparsity": 0.8}, cohort=6)
    some, all_of_them = run_inline(config, tmp_path / "4"), run_inline(everyone, tmp_path / "6")
    for (round_number, client), (values, _) in some.uploads.items():
        if round_number == 1:
            other = all_of_them.uploads[1, client][0]
            assert all(torch.equal(value, other[name]) for name, value in values.items())


@pytest.mark.parametrize(("mean_over", "beta"), [("entries", 1 + 0.75 / 2), ("nonzeros", 1 + 1.5 / 2)])
def test_a_spectral_exponent_by_hand(mean_over, beta):
    # |W| = diag(2, 1): sigma 2, mean 3/4 over four entries, 3/2 over two nonzeros.
    weight = torch.tensor([[-2.0, 0.0], [0.0, 1.0]])
    assert spectral_exponent(weight, mean_over=mean_over) == pytest.approx(beta)


def test_spectral_exponents_over_nonzeros_equal_the_naive_reference_and_are_logged(tmp_path):
    algorithm = {"name": "sparsyfed", "sparsity": 0.8, "exponent": "spectral", "spectral_mean": "nonzeros"}
    config = tiny_federation(tmp_path, algorithm=algorithm)
    run, reference = run_inline(config, tmp_path / "run"), NaiveSparsyFed(config)
    assert_same(run, reference.run())
    for line, weights in zip(run.lines, reference.history[1:], strict=True):
        expected = [reference.exponent(name, weights[name]) for name in reference.prunable]
        assert line["exponent/layers"] == pytest.approx(expected, rel=2e-3)  # 20 power iterations


def test_the_gradient_of_zeros_costs_nothing_where_they_cannot_regrow(tmp_path):
    """One client, one batch: FLOPs of round 2 from the densities received, layer by layer."""
    for beta, plain, spared in ((1.25, (), [1, 1, 1, 1]), (1.0, (), [0] * 4), (1.25, ("0",), [0, 1, 1, 1])):
        config = tiny_federation(
            tmp_path,
            cohort=1,
            algorithm={
                "name": "sparsyfed", "sparsity": 0.8, "beta": beta, "plain_layers": list(plain),
                "activation_pruning": False,
            },
            model={"name": "tests.tiny_experiment:tiny_model"},
            partition={"clients": 1},
            local={"batch_size": 120, "lr": 1e-30},
        )  # fmt: skip
        run = run_inline(config, tmp_path / f"run-{beta}-{len(plain)}")
        layout, w = run.driver.layout, run.states[1].weights
        density = np.array([len(w[e.span].nonzero()) / e.size for e in layout.prunable])
        forward, first = run.driver.federation.flops.forward, np.array([0, 1, 1, 1])
        gradient = np.where(spared, density, 1.0)
        expected = 120 * forward * ((1 + first) * density + gradient)
        np.testing.assert_allclose(run.lines[1]["flops/layers"], expected)
