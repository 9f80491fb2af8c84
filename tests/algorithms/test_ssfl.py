"""SSFL by hand, against a naive reference, and at its limits."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algorithms import Grid, ServerOptimizer
from algorithms.ssfl import SSFL
from cluster.clients.local_training import LocalSettings, Trainer
from cluster.configuration.trees import ConfigError
from cluster.exchange import Broadcast
from cluster.rounds.setbacks import DivergedError
from cluster.workload.datasets import Split
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

#: Client A: x = (1, 1), label 0. Client B: x = (1, 0), label 1.
DATA = Split(np.array([[1, 1], [1, 0], [1, 0], [1, 0]], np.float32), np.array([0, 1, 1, 1]), None)
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 1.0])


def stage(method, samples_of_b):
    """The scores that two clients send, and the state after the stage."""
    trainer = Trainer(
        nn.Linear(2, 2, bias=False), method, LocalSettings(0, 1, 16, 0.0, 0.0), DATA, torch.device("cpu")
    )
    layout = trainer.layout
    state = method.initial_state(WEIGHTS, layout, np.random.default_rng(0))
    told = method.instruct(state, 5, 2)
    assert (told.round, told.phase, told.cohort, told.steps) == (0, "saliency", 2, method.saliency_batches)
    flat, grid = state.weights.numpy(), Grid(2.0**20, 8)
    broadcast = Broadcast(flat, flat, None, told, 0.1, grid.limit, 8)
    total, sent = method.zero(grid, layout), []
    for client, rows in enumerate(([0], range(1, 1 + samples_of_b))):
        trained = trainer.visit(client, np.array(rows), method.sparsity, broadcast)
        assert (trained.support, trained.measured.steps) == (None, 0)
        sent.append(trained.values.tolist())
        total.fold(client, trained.values, None, trained.measured.samples, layout)
    return sent, method.advance(state, total, ServerOptimizer(), layout)


def test_scores_of_two_clients_by_hand():
    sent, after = stage(SSFL(sparsity=0.5), 1)
    assert sent[0] == pytest.approx([0.924142, 1.848284, 0.462071, 0.924142], abs=2e-6)
    assert sent[1] == pytest.approx([0.622459, 0.0, 0.311230, 0.0], abs=2e-6)
    # The mean is ((.773301, .924142), (.386650, .462071)).
    assert after.mask.tolist() == [True, True, False, False]
    assert after.weights.tolist() == [1.0, -2.0, 0.0, 0.0]
    assert (after.round, after.mask_version) == (0, 1)


@pytest.mark.parametrize(
    ("weighting", "mask"),
    # With n = (1, 3): ((.697880, .462071), (.348940, .231035)).
    [("samples", [True, False, False, False]), ("equal", [False, True, False, False])],
)
def test_the_best_weight_depends_on_the_weighting(weighting, mask):
    _, after = stage(SSFL(sparsity=0.75, saliency_weighting=weighting), 3)
    assert after.mask.tolist() == mask


def test_a_run_masks_what_a_naive_reference_scores_best(cache, tmp_path):
    """Batches of all of a client's rows, so that their order does not matter."""
    config = tiny_federation(
        cache, rounds=2, algorithm={"name": "ssfl", "sparsity": 0.8}, local={"batch_size": 512}
    )
    run = run_inline(config, tmp_path / "run")
    federation, layout = run.driver.federation, run.driver.layout
    model, split = federation.model.eval(), federation.dataset.train
    scores = {entry.name: torch.zeros(entry.shape, dtype=torch.float64) for entry in layout.prunable}
    for client in range(6):
        rows = federation.partition.client(client)
        inputs = torch.from_numpy(split.inputs[rows].astype(np.float32))
        if split.inputs.dtype == np.uint8:
            inputs = (inputs / 255 - 0.5) / 0.5
        model.zero_grad()
        F.cross_entropy(model(inputs), torch.from_numpy(split.targets[rows])).backward()
        for name, parameter in model.named_parameters():
            if name in scores:
                scores[name] += len(rows) * (parameter.grad * parameter.detach()).abs().double()
    flat = torch.cat([scores[entry.name].reshape(-1) for entry in layout.prunable])
    keep = round(0.2 * layout.prunable_size)
    best = torch.zeros(len(flat), dtype=torch.bool)
    best[flat.argsort(descending=True)[:keep]] = True
    mask = run.states[1].mask
    assert int(mask.sum()) == keep
    assert int((mask != best).sum()) <= 2  # in float32 the last score may be another's
    for state in run.states[1:]:
        assert torch.equal(state.mask, mask)
        assert not state.weights[: layout.prunable_size][~mask].any()
    assert run.lines[0]["round"] == 0
    assert run.lines[0]["clients/trained"] == 6


def test_the_stage_is_billed(cache, tmp_path):
    algorithm = {"name": "ssfl", "sparsity": 0.8}
    run = run_inline(tiny_federation(cache, rounds=1, algorithm=algorithm), tmp_path / "run")
    layout, stage, first = run.driver.layout, run.lines[0], run.lines[1]
    sizes = run.driver.federation.sizes
    assert stage["flops/dense"] == run.driver.federation.flops.dense(int(np.minimum(sizes, 8).sum()))
    assert stage["flops/sparse"] == stage["flops/dense"]
    assert stage["comm/uplink_bytes"] > 6 * 4 * layout.size  # dense scores
    assert first["comm/uplink_bytes"] < 4 * 4 * layout.size * 0.5
    assert first["clients/steps"] > 0 == stage["clients/steps"]


def test_at_sparsity_0_it_is_fedavg_bit_for_bit(cache, tmp_path):
    dense = run_inline(tiny_federation(cache, algorithm={"name": "ssfl", "sparsity": 0.0}), tmp_path / "ssfl")
    plain = run_inline(tiny_federation(cache), tmp_path / "fedavg")
    assert dense.state.weights.numpy().tobytes() == plain.state.weights.numpy().tobytes()


def test_with_a_given_mask_it_is_the_fixed_mask(cache, tmp_path, monkeypatch):
    fixed = run_inline(
        tiny_federation(cache, algorithm={"name": "fixed_mask", "sparsity": 0.8}), tmp_path / "fixed"
    )
    mask = fixed.states[0].mask
    monkeypatch.setattr("algorithms.ssfl.top_k_mask", lambda scores, keep: mask)
    ssfl = run_inline(tiny_federation(cache, algorithm={"name": "ssfl", "sparsity": 0.8}), tmp_path / "ssfl")
    assert ssfl.state.weights.numpy().tobytes() == fixed.state.weights.numpy().tobytes()


def test_some_clients_are_asked_where_that_is_said():
    state = SSFL().initial_state(WEIGHTS, None, None)
    assert SSFL(saliency_clients=0.25).instruct(state, 5, 100).cohort == 25
    assert SSFL(saliency_clients=0.001).instruct(state, 5, 100).cohort == 1


def test_the_stage_leaves_batch_norms_statistics(cache, tmp_path):
    model = {"name": "small_cnn", "channels": [4, 6], "hidden": 16, "norm": "batch"}
    config = tiny_federation(cache, rounds=1, model=model, algorithm={"name": "ssfl", "sparsity": 0.5})
    run = run_inline(config, tmp_path / "run")
    layout = run.driver.layout
    before, stage, after = (state.weights[layout.trained_size :] for state in run.states)
    assert torch.equal(before, stage)
    assert not torch.equal(stage, after)


def test_scores_have_no_distance_from_the_model(cache, tmp_path):
    """The scores of the tiny model are 5.5 away from its weights, an update of a round less than 2."""
    algorithm = {"name": "ssfl", "sparsity": 0.8}
    plain = run_inline(tiny_federation(cache, algorithm=algorithm), tmp_path / "plain")
    limited = run_inline(tiny_federation(cache, algorithm=algorithm, max_update_norm=2.0), tmp_path / "run")
    assert_identical(plain, limited)
    config = tiny_federation(cache, rounds=3, algorithm=algorithm, max_update_norm=1e-3)
    with pytest.raises(DivergedError, match=r"max_update_norm is 0.001"):
        run_inline(config, tmp_path / "small")  # rounds of training are limited as ever


def test_the_server_weighs_by_samples(cache):
    """The clients divide by what the server multiplies with."""
    with pytest.raises(ConfigError, match=r"aggregation.weighting: equal, and ssfl weighs by samples"):
        tiny_federation(cache, algorithm={"name": "ssfl"}, aggregation={"weighting": "equal"})
