"""FedPM by hand, against a naive reference, its wire, its limits and what it refuses."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from algorithms import Grid, ParameterLayout, ServerOptimizer, ServerState, Total
from algorithms.core.local_optimizers import AdamW
from algorithms.fedpm import FedPM, FedPMClient, FedPMReg, entropy_bytes
from cluster import seeding
from cluster.transport.uplink import Uplink
from tests.algorithms.by_hand import one_round
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

# ------------------------------------------------------------------------------------------- by hand


class WatchedClient(FedPMClient):
    """The first mask is (1, 0) where theta is between .1 and .9; what happens is noted."""

    def _draw(self):
        self.uniform.copy_(torch.tensor([0.1, 0.9]))
        return self.uniform

    def after_backward(self):
        super().after_backward()
        self.method.seen.append(self.visit.gradient.tolist())

    def after_step(self):
        self.method.seen.append(self.visit.prunable.tolist())
        super().after_step()


@dataclass(frozen=True, kw_only=True)
class Watched(FedPM):
    """Frozen weights of size 2."""

    client = WatchedClient
    seen: ClassVar[list] = []

    def scale(self, layout):
        return torch.full((layout.prunable_size,), 2.0)


def watched(x, optimizer=None, lr=1.0, **fields):
    """Gradient of the scores, scores after the step, the upload: two outputs, w0 = (2, -2), s = (0, 0)."""
    Watched.seen.clear()
    uploads, _ = one_round(Watched(**fields), [[1.0], [-1.0]], [([x], 0, 1)], lr=lr, optimizer=optimizer)
    return *Watched.seen, [row[0] for row in uploads[0]]


def test_a_step_by_hand():
    """Logits (2, 0), so p_0 = .880797; dL/dm = -.238406 twice, and sigmoid'(0) = 1/4."""
    gradient, scores, upload = watched(1.0)
    np.testing.assert_allclose(gradient, [-0.0596015, -0.0596015], atol=1e-7)
    np.testing.assert_allclose(scores, [0.0596015, 0.0596015], atol=1e-7)
    assert upload == [2.0, 0.0]  # w0 where theta = .515 is above .1 and not above .9
    gradient, *_ = watched(1.0, estimator="scaled")
    np.testing.assert_allclose(gradient, [-0.0298007, -0.0298007], atol=1e-7)
    gradient, *_ = watched(1.0, penalty=1.0)
    np.testing.assert_allclose(gradient, [0.0653985, 0.0653985], atol=1e-7)  # the sign turns


def test_the_penalty_alone_moves_scores_by_the_rate_under_adam():
    gradient, scores, _ = watched(0.0, AdamW(), 0.1, penalty=1.0)
    assert gradient == [0.125, 0.125]
    np.testing.assert_allclose(scores, [-0.1, -0.1], atol=1e-6)
    _, scores, _ = watched(0.0, AdamW(), 0.1, penalty=1e-7)  # g = 1.25e-8 is no longer well above eps
    np.testing.assert_allclose(scores, [-0.1 / 1.8] * 2, atol=1e-4)


THREE = ParameterLayout.of(nn.Linear(3, 1, bias=False))
ALL, NONE = [True] * 3, [False] * 3


def after(method, *masks, samples=None, state=None):
    """The state after a round of these masks of three weights, and its thetas; w0 = (1, -1, 1) c."""
    state = state or method.initial_state(torch.tensor([1.0, -2.0, 3.0]), THREE, np.random.default_rng(0))
    total = Total.zero(Grid(2.0**20, 100), THREE)
    frozen = method.frozen(state.weights, THREE).numpy()
    for client, mask in enumerate(masks):
        values = np.where(mask, frozen, np.float32(0))
        total.fold(client, values, np.array(mask), (samples or [1] * 9)[client], THREE)
    state = method.advance(state, total, ServerOptimizer(), THREE)
    return state, (state.weights / torch.from_numpy(frozen)).tolist()


def test_the_squash_by_hand():
    state, theta = after(FedPM(), [True, True, False], [True, False, False], [True, False, False])
    np.testing.assert_allclose(theta, [0.99, 0.336667, 0.01], atol=1e-6)
    assert torch.sign(state.weights).tolist() == [1.0, -1.0, 1.0]
    _, theta = after(FedPM(), NONE, ALL, samples=[1, 3])
    np.testing.assert_allclose(theta, 0.745, atol=1e-6)


def test_the_prior_by_hand():
    one, _ = after(FedPM(prior_reset=9), ALL)
    _, theta = after(FedPM(prior_reset=9), NONE, state=one)  # Beta(2, 2), its mode
    np.testing.assert_allclose(theta, 0.5, atol=1e-6)
    two, _ = after(FedPM(prior_reset=2), NONE, state=after(FedPM(prior_reset=2), ALL)[0])
    _, theta = after(FedPM(prior_reset=2), NONE, state=two)  # the prior was reset
    np.testing.assert_allclose(theta, 0.01, atol=1e-6)
    assert not after(FedPM(), ALL)[0].arrays
    # Round 3 brought nothing: the prior is reset in round 4 all the same.
    lost = ServerState(round=3, weights=two.weights, arrays=two.arrays)
    np.testing.assert_allclose(after(FedPM(prior_reset=2), ALL, state=lost)[1], 0.99, atol=1e-6)


def test_the_size_of_frozen_weights():
    layout = ParameterLayout.of(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 2)))
    c = FedPM().scale(layout)
    assert c[0] == pytest.approx(math.e / math.sqrt(18))
    assert c[-1] == pytest.approx(math.e / math.sqrt(6))
    assert FedPM(constant="kaiming").scale(layout)[-1] == pytest.approx(math.sqrt(2 / 6))


def test_first_scores_are_bounded():
    """theta in [.01, .99], |s| <= logit .99 = 4.59512, and normal: half of them within .6745."""
    layout = ParameterLayout.of(nn.Linear(100, 100))
    start = layout.flatten(nn.Linear(100, 100))
    weights = FedPM().initial_state(start, layout, np.random.default_rng(0)).weights
    scores = torch.logit(weights[:10_000] / FedPM().frozen(weights, layout))
    assert torch.equal(torch.sign(weights), torch.sign(start))
    assert scores.abs().max() <= 4.59513
    assert float((scores.abs() < 0.6745).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_entropy_by_hand():
    """H2(3/8) = .954434 bits for each of eight weights; a second layer that is off costs nothing."""
    layout = ParameterLayout.of(nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1, bias=False)))
    mask = torch.tensor([True, False, True, True] + [False] * 8)
    assert entropy_bytes(mask, layout) == pytest.approx(0.954434, abs=1e-6)
    assert entropy_bytes(~mask, layout) == pytest.approx(0.954434, abs=1e-6)


# --------------------------------------------------------------------------------- a naive reference


class NaiveFedPM(NaiveFederation):
    """Scores by name, gradients through a draw by autograd, the mean of masks."""

    def constant(self, name):
        """c, from torch's own fan-in."""
        fan_in, _ = nn.init._calculate_fan_in_and_fan_out(self.layers[name].weight)
        return math.e / fan_in**0.5

    def draw(self, rng):
        """A uniform number for every prunable weight."""
        sizes = [self.layers[name].weight.numel() for name in self.prunable]
        parts = np.split(rng.random(sum(sizes), dtype=np.float32), np.cumsum(sizes)[:-1])
        shapes = [self.layers[name].weight.shape for name in self.prunable]
        return {n: torch.from_numpy(p).view(s) for n, p, s in zip(self.prunable, parts, shapes, strict=True)}

    def initial(self, weights):
        rng = seeding.generator(self.config.seed, "server")
        flat = rng.standard_normal(sum(weights[n].numel() for n in self.prunable), np.float32)
        for name in self.prunable:
            scores, flat = flat[: weights[name].numel()], flat[weights[name].numel() :]
            theta = 0.01 + 0.98 / (1 + np.exp(-scores.astype(np.float64)))
            signs = np.where(weights[name].numpy() > 0, 1, -1)
            weights[name] = torch.tensor(theta.reshape(signs.shape) * signs * self.constant(name)).float()
        return weights

    def begin(self, weights, visit):
        for name in self.prunable:
            theta = weights[name].abs().double() / self.constant(name)
            weights[name] = torch.log(theta / (1 - theta)).float()

    def effective(self, weights, visit):
        uniform, result = self.draw(visit.rng), {}
        for name in self.prunable:
            theta = torch.sigmoid(weights[name])
            mask = (uniform[name] < theta).float() + theta - theta.detach()
            result[name] = mask * torch.sign(visit.received[name]) * self.constant(name)
        return result

    def change_gradients(self, weights, gradients, visit):
        with torch.enable_grad():
            scores = {name: weights[name].detach().requires_grad_() for name in self.prunable}
            everything = torch.cat([torch.sigmoid(one).flatten() for one in scores.values()])
            pull = torch.autograd.grad(self.options.penalty * everything.mean(), list(scores.values()))
        for name, more in zip(scores, pull, strict=True):
            gradients[name] += more
        for name in set(gradients) - set(scores):
            gradients[name].zero_()

    def upload(self, weights, received, visit):
        uniform = self.draw(visit.rng)
        mask = {name: uniform[name] < torch.sigmoid(weights[name]) for name in self.prunable}
        constants = {n: torch.sign(received[n]) * self.constant(n) for n in self.prunable}
        return self.masked({**weights, **constants}, mask), mask

    def server(self, weights, uploads, masks, sizes, round_number):
        result, total = dict(weights), sum(sizes.values())
        for name in self.prunable:
            share = sum(sizes[c] * masks[c][name].double() for c in uploads) / total
            theta = sum(w * v for w, v in ((1 - share, 0.01), (share, 0.99)))
            result[name] = (theta * torch.sign(weights[name]) * self.constant(name)).float()
        return result


@pytest.mark.parametrize("name", ["fedpm", "fedpm_reg"])
def test_equals_the_naive_reference(cache, tmp_path, name):
    config = tiny_federation(cache, algorithm={"name": name}, local={"lr": 20.0})
    run = run_inline(config, tmp_path / "run")
    assert_same(run, NaiveFedPM(config).run())
    # Its masks are those of the model that is evaluated, saved and loads into the plain module.
    model = load_file(run.driver.folder.model_file)
    layout, method = run.driver.layout, config.method
    saved = torch.cat([model[entry.name].flatten() for entry in layout.prunable])
    frozen = method.frozen(run.state.weights, layout)
    assert torch.equal(saved[saved != 0], frozen[saved != 0])
    before = method.effective_weights(run.states[-2].weights, layout)[: layout.prunable_size]
    assert run.lines[-1]["sparsity/global"] == 1.0 - int((saved != 0).sum()) / len(saved)
    assert run.lines[-1]["masks/regrowth"] == int(((before == 0) & (saved != 0)).sum()) > 0
    assert 0.4 < run.lines[-1]["flops/sparse"] / run.lines[-1]["flops/dense"] < 0.7


# -------------------------------------------------------------------------------------------- limits


def test_without_a_penalty_the_second_paper_is_the_first(cache, tmp_path):
    ends = [{"name": "fedpm"}, {"name": "fedpm_reg", "penalty": 0.0}, {"name": "fedpm", "penalty": 1.0}]
    first, second, third = (
        run_inline(tiny_federation(cache, algorithm=one, local={"lr": 5.0}), tmp_path / str(place))
        for place, one in enumerate(ends)
    )
    assert_identical(first, second)
    assert not torch.equal(first.state.weights, third.state.weights)
    assert FedPMReg() == FedPMReg(penalty=1.0)


def test_one_clients_mask_is_the_global_model_at_the_threshold(cache, tmp_path):
    alone = {"cohort": 1, "rounds": 1, "algorithm": {"name": "fedpm", "evaluate": "threshold"}}
    run = run_inline(tiny_federation(cache, **alone), tmp_path / "run")
    ((values, support),) = run.uploads.values()
    layout = run.driver.layout
    effective = layout.split(run.driver.method.effective_weights(run.state.weights, layout), layout.prunable)
    for name, mask in support.items():
        assert torch.equal(effective[name], values[name])
        chances = run.weights[name].abs() / values[name].abs().max()
        torch.testing.assert_close(chances, 0.01 + 0.98 * mask.float())


def test_ways_to_evaluate():
    weights = FedPM().frozen(torch.ones(3), THREE) * torch.tensor([0.01, 0.6, 0.99])
    on = [FedPM(evaluate=how).nonzeros(weights, THREE).tolist() for how in ("threshold", "mean")]
    assert on == [[False, True, True], [True, True, True]]
    wide = ParameterLayout.of(nn.Linear(100, 100, bias=False))
    v = FedPM().frozen(torch.ones(10_000), wide) * 0.3
    drawn = FedPM().nonzeros(v, wide)
    assert float(drawn.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(drawn, FedPM().nonzeros(v, wide))
    assert not (drawn & ~FedPM().nonzeros(v * 1.1, wide)).any()  # one uniform number a weight for good


# ------------------------------------------------------------------------------------------- the wire


def test_a_message_is_its_mask(cache, tmp_path):
    """684 weights at a density near one half: 86 bytes, and the header."""
    run = run_inline(tiny_federation(cache, algorithm={"name": "fedpm"}), tmp_path / "run")
    for line in run.lines:
        assert line["comm/uplink_bytes_per_client"] == 44 + 86
        assert line["comm/downlink_bytes_per_client"] == 44 + 4 * run.driver.layout.size
        assert 84 < line["method/entropy_bytes"] < 85.5  # 684 / 8 at most
    # Statistics of BatchNorm travel as floats: 2 (4 + 4 + 6) of them more or less.
    model = {"name": "tests.tiny_experiment:tiny_model"}
    batch = run_inline(tiny_federation(cache, algorithm={"name": "fedpm"}, model=model), tmp_path / "batch")
    assert batch.lines[0]["comm/uplink_bytes_per_client"] == 44 + 47 + 4 * 8


def test_masks_that_the_server_decodes_itself(cache, tmp_path, monkeypatch):
    """Who is first is told by the clock: the driver folds what actors cannot, and knows the values too."""
    decided = []
    take = Uplink.take
    monkeypatch.setattr(Uplink, "take", lambda *args: decided.append(args[3]) or take(*args))
    tiers = {"slow": {"share": 0.5, "compute": 1e9}, "fast": {"share": 0.5, "compute": 2e9}}
    devices = {"tiers": tiers, "flops": "sparse"}
    asked = {"cohort": 2, "devices": devices, "schedule": {"over_selection": 2.0}}
    run = run_inline(tiny_federation(cache, algorithm={"name": "fedpm"}, **asked), tmp_path / "run")
    assert decided
    assert all(len(message) == 44 + 86 for message in decided)
    assert all(line["clients/refused"] == 0 for line in run.lines)
    frozen = run.driver.method.frozen(run.states[0].weights, run.driver.layout)
    assert torch.equal(run.driver.method.frozen(run.state.weights, run.driver.layout), frozen)


@pytest.mark.parametrize("downlink", ["float16", "int8"])
def test_a_lossy_downlink_keeps_the_signs(cache, tmp_path, downlink):
    config = tiny_federation(cache, algorithm={"name": "fedpm"}, wire={"downlink": downlink})
    run = run_inline(config, tmp_path / "run")
    assert run.lines[-1]["comm/uplink_bytes_per_client"] == 44 + 86
    with pytest.raises(ValueError, match=r"algorithm.epsilon: 0.001 times the largest weight rounds to 0"):
        tiny_federation(cache, algorithm={"name": "fedpm", "epsilon": 0.001}, wire={"downlink": "int8"})


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"local": {"weight_decay": 0.1}}, r"local.weight_decay: 0.1 pulls at weights, and fedpm_reg trains"),
        ({"local": {"proximal": 0.1}}, r"local.proximal: 0.1 pulls at weights"),
        ({"server": {"name": "fedadam"}}, r"server.name: fedadam, but fedpm_reg averages masks"),
        ({"wire": {"uplink": "int8"}}, r"wire.uplink: int8, but fedpm_reg sends no values"),
        ({"wire": {"grid": 32}}, r"wire.grid: 32, but fedpm_reg sends no values"),
    ],
)
def test_settings_that_act_on_weights_are_refused(cache, keys, says):
    with pytest.raises(ValueError, match=says):
        tiny_federation(cache, algorithm={"name": "fedpm_reg"}, **keys)
