"""Top-K: a round worked by hand, the naive reference, and FedAvg at sparsity 0."""

from __future__ import annotations

import pytest
import torch

from algorithms.topk import TopK
from tests.algorithms.by_hand import one_round
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation


class NaiveTopK(NaiveFederation):
    """Dense training; one global cut, by sorting."""

    def upload(self, weights, received, visit):
        mask = self.largest(weights, self.kept_count(self.options.sparsity))
        return self.masked(weights, mask), mask


ZEROS = [[0.0, 0.0], [0.0, 0.0]]


def test_a_round_worked_by_hand():
    # W = 0: p = 1/2, dL/dW = (p - onehot) x^T. K = 2 of 4.
    # Client 0, one sample of class 0, x = (1, 1/2): W = [[1/2, 1/4], [-1/2, -1/4]].
    # Client 1, three samples of class 1, x = (1/2, 1): W = [[-1/4, -1/2], [1/4, 1/2]].
    clients = [([1.0, 0.5], 0, 1), ([0.5, 1.0], 1, 3)]
    uploads, [after] = one_round(TopK(sparsity=0.5), ZEROS, clients)
    assert uploads == [[[0.5, 0.0], [-0.5, 0.0]], [[0.0, -0.5], [0.0, 0.5]]]
    # Absent counts as 0: 1 * 1/2 / 4 = 1/8 and 3 * 1/2 / 4 = 3/8.
    assert after == [[0.125, -0.375], [-0.125, 0.375]]


def test_ties_are_broken_by_the_lower_index():
    # x = (1, 1): all four magnitudes are 1/2, and K = round(0.75 * 4) = 3 remain.
    uploads, _ = one_round(TopK(sparsity=0.25), ZEROS, [([1.0, 1.0], 0, 1)])
    assert uploads == [[[0.5, 0.5], [-0.5, 0.0]]]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"local": {"epochs": 2, "lr_final": 0.05, "weight_decay": 0.01}},
        {"model": {"name": "tests.tiny_experiment:tiny_model"}},
        {"algorithm": {"name": "topk", "sparsity": 0.95}, "server": {"name": "fedavg", "momentum": 0.9}},
    ],
    ids=["plain", "schedule", "batch norm", "momentum"],
)
def test_equals_the_naive_reference(tmp_path, overrides):
    config = tiny_federation(tmp_path, **{"algorithm": {"name": "topk", "sparsity": 0.8}, **overrides})
    assert_same(run_inline(config, tmp_path / "run"), NaiveTopK(config).run())


def test_every_upload_holds_exactly_k(tmp_path):
    config = tiny_federation(tmp_path, algorithm={"name": "topk", "sparsity": 0.9})
    run = run_inline(config, tmp_path / "run")
    # round(0.1 * 684) = 68
    assert {sum(int(mask.sum()) for mask in support.values()) for _, support in run.uploads.values()} == {68}
    assert all(line["sparsity/upload"] == pytest.approx(1 - 68 / 684) for line in run.lines)


def test_at_sparsity_0_it_is_fedavg_bit_for_bit(tmp_path):
    topk = run_inline(tiny_federation(tmp_path, algorithm={"name": "topk", "sparsity": 0.0}), tmp_path / "t")
    fedavg = run_inline(tiny_federation(tmp_path), tmp_path / "f")
    assert_identical(topk, fedavg)
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(topk.states, fedavg.states, strict=True))
