"""FLASC by hand, against a naive reference, and at its limits."""

import numpy as np
import pytest
import torch
from torch import nn

from algorithms import Grid, Instructions, ServerOptimizer, ServerState
from algorithms.core.server_optimizers import FedAdamW
from algorithms.flasc import Flasc, FlascClient
from cluster.clients.local_training import LocalSettings, Trainer
from cluster.exchange import Broadcast
from cluster.transport.downlink import Sender
from cluster.workload.datasets import Split
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


class Walking(FlascClient):
    """Ends where it is told to."""

    def train(self, batches):
        self.visit.weights.copy_(torch.tensor([4.5, 0.2, 3.0]))
        return torch.zeros(())


def test_a_round_by_hand():
    """v = (4, -1, 3); down 2: (4, 0, 3); it ends at (4.5, .2, 3): (.5, .2, 0); up 1: (.5, 0, 0)."""
    method = type("Own", (Flasc,), {"client": Walking, "name": ""})(sparsity=2 / 3, down_sparsity=1 / 3)
    split = Split(np.ones((1, 3), np.float32), np.zeros(1, np.int64), None)
    model, settings = nn.Linear(3, 1, bias=False), LocalSettings(0, 1, 1, 0.0, 0.0)
    trainer = Trainer(model, method, settings, split, torch.device("cpu"))
    layout, state = trainer.layout, ServerState(0, torch.tensor([4.0, -1.0, 3.0]))
    told, flat, grid = Instructions(round=1, rounds=1), state.weights.numpy(), Grid(8.0, 1)
    parcel = Sender(layout, "float32").parcel(state)
    support = method.submodel(state.weights, told, 0, 1 / 3, layout)
    part = parcel.parts[parcel.part(support.numpy(), known=False, confined=False)]
    assert part.weights.tolist() == [4, 0, 3]
    broadcast = Broadcast(flat, flat, None, told, 1.0, 8.0, 1, parts=(part,))
    trained = trainer.visit(0, np.arange(1), method.sparsity, broadcast, part=part)
    assert trained.values.tolist() == [0.5, 0, 0]
    total = method.zero(grid, layout)
    total.fold(0, trained.values, trained.support, 1, layout)
    assert method.advance(state, total, ServerOptimizer(), layout).weights.tolist() == [4.5, -1, 3]


class NaiveFlasc(NaiveFederation):
    def begin(self, weights, visit):
        mask = self.largest(weights, self.kept_count(self.options.down_sparsity))
        for name, kept in mask.items():
            weights[name].masked_fill_(~kept, 0.0)
        visit.notes["start"] = {name: tensor.clone() for name, tensor in weights.items()}

    def upload(self, weights, received, visit):
        start = visit.notes["start"]
        differences = {name: weights[name] - start[name] for name in self.trained}
        mask = self.largest(differences, self.kept_count(self.options.sparsity))
        buffers = {name: tensor for name, tensor in weights.items() if name not in differences}
        return self.masked(differences | buffers, mask), mask

    def server(self, weights, uploads, masks, sizes, round_number):
        mean = {name: sum(sent[name] for sent in uploads.values()) / len(uploads) for name in weights}
        return {name: mean[name] + (weights[name] if name in self.trained else 0.0) for name in weights}


@pytest.mark.parametrize("model", [None, "tests.tiny_experiment:tiny_model"], ids=["plain", "batch norm"])
def test_equals_the_naive_reference(cache, tmp_path, model):
    more = {} if model is None else {"model": {"name": model}}
    algorithm = {"name": "flasc", "sparsity": 0.8, "down_sparsity": 0.4}
    config = tiny_federation(cache, rounds=3, algorithm=algorithm, **more)
    assert_same(run_inline(config, tmp_path / "run"), NaiveFlasc(config).run())


def test_both_densities_1_are_fedavg_of_differences(cache, tmp_path):
    equal = {"aggregation": {"weighting": "equal"}}
    whole = {"name": "flasc", "sparsity": 0.0, "down_sparsity": 0.0}
    runs = [
        run_inline(tiny_federation(cache, algorithm=algorithm, **equal), tmp_path / algorithm["name"])
        for algorithm in (whole, {"name": "fedavg"})
    ]
    for name, tensor in runs[1].weights.items():
        torch.testing.assert_close(runs[0].weights[name], tensor, atol=1e-6, rtol=1e-5)
    assert [line["comm/downlink_bytes"] for line in runs[0].lines] == [
        line["comm/downlink_bytes"] for line in runs[1].lines
    ]
    dense = {"name": "fedef", "sparsity": 0.0}
    assert_identical(runs[0], run_inline(tiny_federation(cache, algorithm=dense, **equal), tmp_path / "ef"))


def test_only_the_cut_is_downloaded_and_judged(cache, tmp_path):
    algorithm = {"name": "flasc", "sparsity": 0.5, "down_sparsity": 0.9}
    run = run_inline(tiny_federation(cache, algorithm=algorithm), tmp_path / "run")
    layout, line = run.driver.layout, run.lines[1]
    kept = round(0.1 * layout.prunable_size) + layout.size - layout.prunable_size
    assert 44 + 4 * kept < line["comm/downlink_bytes"] / 4 <= 44 + 4 * kept + (layout.trained_size + 7) // 8
    assert line["comm/uplink_bytes"] > 2 * line["comm/downlink_bytes"]
    judged = run.driver.method.effective_weights(run.state.weights, layout)[: layout.prunable_size]
    assert int((judged != 0).sum()) == round(0.1 * layout.prunable_size)
    assert int((run.state.weights[: layout.prunable_size] != 0).sum()) > 5 * int((judged != 0).sum())
    # Weights that nobody was sent have moved: uploads reach what the download does not.
    before, after = (state.weights[: layout.prunable_size] for state in run.states[:2])
    cut = before.abs() < before.abs().sort(descending=True).values[round(0.1 * len(before)) - 1]
    assert (before != after)[cut].any()


@pytest.mark.parametrize("steps", [1, 5])
def test_fedadamw_is_torchs(steps):
    """From 4 along .5 with lr 1e-3: 4.00095999998 after one step."""
    rng = torch.Generator().manual_seed(1)
    weights, moments = torch.tensor([4.0, -1.0, 0.0]), ()
    parameter = nn.Parameter(weights.double().clone())
    torchs = torch.optim.AdamW([parameter], lr=1e-3)
    for step in range(steps):
        delta = torch.tensor([0.5, 0.0, -2.0]) if step == 0 else torch.randn(3, generator=rng)
        parameter.grad = -delta.double()
        torchs.step()
        weights, moments = FedAdamW().step(weights, weights + delta, moments)
        if step == 0:
            assert weights[0].item() == pytest.approx(4.00095999998, abs=5e-7)
    torch.testing.assert_close(weights.double(), parameter.detach(), atol=2e-6, rtol=1e-6)


def test_a_weight_that_comes_back_into_a_mask_is_corrected_anew():
    method, delta = FedAdamW(weight_decay=0.0), torch.tensor([1.0, 1.0])
    weights, moments = torch.zeros(2), ()
    for _ in range(3):
        weights, moments = method.step(weights, weights + delta, moments)
    moments = tuple(m * torch.tensor([1.0, 0.0]) for m in moments)  # as ``advance`` does outside a mask
    after, _ = method.step(torch.zeros(2), delta, moments)
    assert after.tolist() == pytest.approx([1e-3, 1e-3], rel=1e-4)
