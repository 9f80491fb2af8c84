"""Robust Bird: when the mask is drawn, worked by hand, and the naive reference of both phases."""

from __future__ import annotations

import pytest
import torch

from algorithms import ServerState
from algorithms.robust_bird import RobustBird
from cluster.configuration.trees import ConfigError
from tests.algorithms.masked import NaiveMasked, bools, play
from tests.cluster.clients.test_adversary import PGD_SECTION, Attacked
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_same, run_inline, tiny_federation


def settled(method: RobustBird, *masks: str) -> bool:
    return method._settled(torch.stack([bools(mask) for mask in masks]), 5)


def test_the_newest_mask_is_compared_with_each_of_the_four_before():
    # Masks of 5 of 10: in one other position they differ in a share of 1/5, in two in 2/5.
    newest, near, far = "1111100000", "1111010000", "1110011000"
    method = RobustBird()
    assert settled(method, near, newest, near, newest, newest)
    assert not settled(method, far, newest, near, newest, newest)
    assert not settled(method, near, newest, near, far, newest)
    assert not settled(RobustBird(stop_distance=0.19), near, newest, newest, newest, newest)
    assert settled(RobustBird(stop_distance=0.4), far, newest, newest, newest, newest)
    # Fewer than five are known: one that is not holds nothing.
    assert not settled(RobustBird(stop_distance=1.0), "0000000000", newest, newest, newest, newest)


def test_a_sparse_mask_is_not_near_by_being_small():
    # At sparsity .96 the authors' rule, at most .08 of all positions, holds of any two masks.
    masks = torch.zeros(5, 100, dtype=torch.bool)
    for row in range(5):
        masks[row, 4 * row : 4 * row + 4] = True
    assert int((masks[0] ^ masks[4]).sum()) <= 0.08 * 100
    assert not RobustBird()._settled(masks, 4)


def test_the_mask_is_drawn_worked_by_hand():
    # p = 1/2, class 0, x = (1, 1/4): W = [[1/2, 1/8], [-1/2, -1/8]]; half of it is kept.
    method = RobustBird(sparsity=0.5, draw_rounds=1)
    weights = torch.zeros(4)
    before = ServerState(round=0, weights=weights, arrays={"masks": torch.zeros(5, 4, dtype=torch.bool)})
    sent, after = play(method, before, [([1.0, 0.25], 0, 1)])
    assert sent[0].support is None  # dense
    assert after.mask.tolist() == bools("1010").tolist()
    assert after.weights.tolist() == [0.5, 0.0, -0.5, 0.0]
    assert (after.mask_version, dict(after.arrays)) == (1, {})
    sent, last = play(method, after, [([1.0, 0.25], 0, 1)])
    assert sent[0].support.tolist() == after.mask.tolist()
    assert last.mask is after.mask


def test_the_attack_is_off_until_there_is_a_mask():
    method, state = RobustBird(), ServerState(round=0, weights=torch.zeros(4))
    drawing = method.instruct(state, 10, 5)
    assert (drawing.phase, drawing.attack) == ("draw", False)
    training = method.instruct(ServerState(round=3, weights=torch.zeros(4), mask=bools("1010")), 10, 5)
    assert (training.phase, training.attack) == ("train", True)


class NaiveRobustBird(Attacked, NaiveMasked):
    """Dense and plain rounds, then attacked ones inside the mask of the largest weights."""

    def initial(self, weights):
        self.drawn = []
        return weights

    def gradients(self, weights, images, labels, visit):
        own = Attacked if self.mask is not None else NaiveFederation
        return own.gradients(self, weights, images, labels, visit)

    def sent(self, weights, mask):
        return (weights, None) if mask is None else super().sent(weights, mask)

    def server(self, weights, uploads, masks, sizes, round_number):
        if self.mask is not None:
            return super().server(weights, uploads, masks, sizes, round_number)
        stepped = self.server_step(weights, self.mean(uploads, sizes))
        newest = self.largest(stepped, self.kept_count(self.options.sparsity))
        self.drawn.append({name: mask.flatten().tolist() for name, mask in newest.items()})
        if len(self.drawn) >= self.options.draw_rounds or self.near():
            self.mask, self.moments = newest, []
            return self.masked(stepped, newest)
        return stepped

    def near(self):
        *before, newest = self.drawn[-5:]
        if len(before) < 4:
            return False
        kept = sum(map(sum, newest.values()))
        pairs = ([zip(newest[name], each[name], strict=True) for name in newest] for each in before)
        apart = [sum(a and not b for layer in layers for a, b in layer) for layers in pairs]
        return max(apart) <= self.options.stop_distance * kept


@pytest.mark.parametrize(
    ("options", "drawn"),
    [({"draw_rounds": 2}, 2), ({"stop_distance": 1.0, "draw_rounds": 7}, 5)],
    ids=["at the latest", "settled"],
)
def test_equals_the_naive_reference(cache, tmp_path, options, drawn):
    config = tiny_federation(
        cache,
        rounds=drawn + 2 if "stop_distance" not in options else 8,
        stop_after=drawn + 2,
        algorithm={"name": "robust_bird", "sparsity": 0.7, **options},
        server={"name": "fedavg", "momentum": 0.5},
        attack=PGD_SECTION,
    )
    run = run_inline(config, tmp_path / "run")
    assert_same(run, NaiveRobustBird(config).run(drawn + 2), atol=2e-5)
    assert [state.mask is not None for state in run.states] == [False] * drawn + [True] * 3
    kinds = [line["flops/dense"] / line["clients/samples"] for line in run.lines]
    assert kinds[drawn] > 2 * kinds[drawn - 1]  # attacks are billed where they are


def test_a_run_that_may_end_before_there_is_a_mask_is_refused(cache):
    with pytest.raises(ConfigError, match="draw_rounds: 10, but rounds is 10: there may be no mask"):
        tiny_federation(cache, rounds=10, algorithm={"name": "robust_bird"})
