"""The numbers of a round from reports small enough to count by hand."""

import math
from dataclasses import fields

import numpy as np
import pytest
from torch import nn

from algorithms import Grid, ParameterLayout, Total
from cluster.exchange import ClientReport, EvaluationChunk
from cluster.measured import Measured
from cluster.rounds.engine import Outcome
from cluster.rounds.metrics import Downlink, added_up, evaluation_metrics, round_metrics
from cluster.workload.objectives import Classification

# Two layers of 4 and 2 prunable weights; 3 biases.
LAYOUT = ParameterLayout.of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))


def report(client, **values):
    default = {
        "client": client,
        "samples": 10,
        "steps": 1,
        "loss": 1.0,
        "seconds": 0.1,
        "phases": (0.0, 0.0, 0.0, 0.0),
        "uplink_bytes": 100,
        "uplink_nonzero_bytes": 40,
        "upload_density": 0.5,
        "regrown_before_cut": 3,
        "regrown": 1,
        "deactivated": 2,
        "flops_dense": 60.0,
        "flops_sparse": np.array([10.0, 5.0]),
        "refused": None,
    }
    given = default | values
    measured = Measured(
        **{field.name: given.pop(field.name) for field in fields(Measured) if field.name in given}
    )
    return ClientReport(measured=measured, **given)


def total(*supports):
    result = Total.zero(Grid(8.0, 100), LAYOUT)
    for client, support in enumerate(supports):
        mask = np.array(support, bool)
        values = np.append(mask.astype(np.float32), np.zeros(3, np.float32))
        result.fold(client, values, mask, 10, LAYOUT)
    return result


def measure(reports, totals, before=(1, 1, 0, 0, 1, 0), after=(1, 0, 1, 1, 0, 0)):
    supports = [np.array(weights) != 0 for weights in (before, after)]
    return round_metrics(LAYOUT, *supports, Outcome(totals, reports), Downlink(50, 30, 72))


def test_masks_by_hand():
    metrics = measure([report(0), report(1)], total([1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0]))
    # 1 1 0 0 1 0 becomes 1 0 1 1 0 0: positions 2 and 3 regrow, 1 and 4 go, 0 stays.
    assert metrics["masks/regrowth"] == 2
    assert metrics["masks/deactivation"] == 2
    assert metrics["masks/regrowth_share"] == pytest.approx(2 / 6)
    assert metrics["masks/overlap"] == pytest.approx(1 / 5)
    assert metrics["sparsity/global"] == pytest.approx(0.5)
    assert metrics["sparsity/layers"] == [0.25, 1.0]
    # Each client's cut took 3 regrown weights less the 1 that stayed, and 2 that it had received.
    assert metrics["masks/client_cut"] == 3 - 1 + 2
    # Votes 2 1 1: one pair agrees on one of two positions: 1 / (1 * 2).
    assert metrics["masks/consensus"] == pytest.approx(0.5)


def test_means_and_sums_over_clients():
    reports = [
        report(0, samples=30, loss=2.0, regrown=4, uplink_bytes=10, upload_density=0.25),
        report(1, samples=10, loss=1.0, regrown=0, uplink_bytes=20, upload_density=0.75),
    ]
    metrics = measure(reports, total([1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]))
    assert metrics["train/loss"] == (30 * 2.0 + 10 * 1.0) / 40  # by samples
    assert metrics["masks/client_regrowth"] == 2.0
    assert metrics["masks/client_regrowth_share"] == pytest.approx(2 / 6)
    assert metrics["sparsity/upload"] == 0.5
    assert metrics["comm/uplink_bytes"] == 30
    assert metrics["comm/uplink_bytes_per_client"] == 15
    assert (metrics["comm/downlink_bytes"], metrics["comm/downlink_bytes_per_client"]) == (50, 25)
    assert (metrics["flops/dense"], metrics["flops/sparse"], metrics["flops/layers"]) == (120, 30, [20, 10])
    assert (metrics["clients/trained"], metrics["clients/refused"], metrics["clients/samples"]) == (2, 0, 40)


def test_a_refused_client_costs_but_does_not_count():
    reports = [report(0, loss=1.0), report(1, loss=float("nan"), refused="not finite", regrown=6)]
    metrics = measure(reports, total([1, 0, 0, 0, 0, 0]))
    assert metrics["train/loss"] == 1.0
    assert metrics["masks/client_regrowth"] == 1.0
    assert metrics["comm/uplink_bytes"] == 200  # it was sent
    assert metrics["flops/sparse"] == 30  # and trained
    assert (metrics["clients/trained"], metrics["clients/refused"], metrics["clients/samples"]) == (2, 1, 10)
    assert metrics["masks/consensus"] is None  # of fewer than two masks


def test_all_refused():
    metrics = measure([report(0, refused="x", loss=float("inf"))], None, after=(1, 1, 0, 0, 1, 0))
    assert metrics["train/loss"] is None
    assert metrics["sparsity/upload"] is None
    assert metrics["masks/consensus"] is None
    assert (metrics["masks/regrowth"], metrics["masks/deactivation"], metrics["masks/overlap"]) == (0, 0, 1.0)


def test_two_empty_masks_have_no_overlap():
    assert measure([report(0)], total([0] * 6), before=[0] * 6, after=[0] * 6)["masks/overlap"] is None


def sums(correct, samples, loss):
    return {"correct": np.array([0, correct]), "samples": np.array([1, samples - 1]), "loss": loss}


def test_chunks_in_any_order_give_the_same_bits():
    chunks = [
        (EvaluationChunk("test", 0, 4), sums(3, 4, 0.1)),
        (EvaluationChunk("test", 4, 8), sums(1, 4, 0.2)),
        (EvaluationChunk("test", 8, 10), sums(2, 2, 0.3)),
        (EvaluationChunk("val", 0, 5), sums(5, 5, 0.5)),
    ]

    def measured(chunks):
        return evaluation_metrics(Classification(), added_up(chunks))

    metrics = measured(chunks)
    assert list(metrics) == ["test/accuracy", "test/loss", "val/accuracy", "val/loss"]
    assert metrics["test/accuracy"] == 6 / 10
    assert metrics["test/loss"] == ((0.1 + 0.2) + 0.3) / 10
    assert metrics["val/accuracy"] == 1.0
    assert measured(chunks[::-1]) == metrics
    tier = (EvaluationChunk("test", 0, 10, "weak"), sums(4, 10, 0.9))
    client = (EvaluationChunk("test", 0, 10, client=3), sums(0, 10, 9.0))
    assert measured([*chunks, tier, client]) == metrics | {"tiers/weak/accuracy": 0.4}
    assert measured([]) == {}
    infinite = (EvaluationChunk("test", 0, 1), sums(0, 1, float("inf")))
    assert measured([infinite])["test/loss"] is None


def test_a_methods_own_numbers_are_weighted_means_over_the_accepted_clients():
    reports = [
        report(0, own={"norm": (6.0, 2.0), "once": (1.0, 1.0)}),
        report(1, own={"norm": (1.0, 1.0)}),
        report(2, own={"norm": (900.0, 1.0), "other": (1.0, 1.0)}, refused="non-finite values"),
        report(3, own={"empty": (0.0, 0.0), "wild": (math.inf, 1.0)}),
    ]
    nothing, outcome = np.zeros(6, bool), Outcome(None, reports)
    line = round_metrics(LAYOUT, nothing, nothing, outcome, Downlink(0, 0, 0))
    own = {key: value for key, value in line.items() if key.startswith("method/")}
    # (6 + 1) / (2 + 1); nothing of the refused client; what is no number is null.
    assert own == {"method/norm": 7 / 3, "method/once": 1.0, "method/empty": None, "method/wild": None}
