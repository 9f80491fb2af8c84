"""Fed-HT and FedIter-HT by hand, against naive references, and at their limits."""

import pytest
import torch

from algorithms import ServerState
from algorithms.fedht import FedHT, FedIterHT
from tests.algorithms.planted import rounds
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

ENDS = ((3.0, 1.0, 0.0), (1.0, -2.0, 4.0))


def to(*ends):
    """Clients that end there: from 0, one step of length 1."""
    return [lambda w, end=end: w - torch.tensor(end) for end in ends]


def test_the_mean_is_cut_by_hand():
    (after,) = rounds(FedHT(sparsity=2 / 3), to(*ENDS), (0, 1), size=3)
    assert after.sent == [list(end) for end in ENDS]
    assert after.weights == [2.0, 0.0, 0.0]  # the mean is (2, -.5, 2): of equals the lower index


def test_clients_cut_too_by_hand():
    (after,) = rounds(FedIterHT(sparsity=2 / 3), to(*ENDS), (0, 1), size=3)
    assert after.sent == [[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]
    assert after.weights == [0.0, 0.0, 2.0]


def test_clients_cut_after_every_step_by_hand():
    """Steps of a half towards (4, 3): without the cut between them the second weight would end at 2.25."""
    (after,) = rounds(FedIterHT(sparsity=0.5), to((4.0, 3.0)), (0,), lr=0.5, steps=2)
    assert after.sent == [[3.0, 0.0]]
    (after,) = rounds(FedHT(sparsity=0.5), to((4.0, 3.0)), (0,), lr=0.5, steps=2)
    assert after.sent == [[3.0, 2.25]]


def test_steps_are_told_or_the_local_epochs():
    state = ServerState(round=0, weights=torch.zeros(3))
    assert FedHT(steps=3).instruct(state, 5, 10).steps == 3
    assert FedIterHT().instruct(state, 5, 10).steps is None


class NaiveFedHT(NaiveFederation):
    def server(self, weights, uploads, masks, sizes, round_number):
        stepped = super().server(weights, uploads, masks, sizes, round_number)
        return self.masked(stepped, self.largest(stepped, self.kept_count(self.options.sparsity)))


class NaiveFedIterHT(NaiveFedHT):
    def after_step(self, weights, visit):
        visit.notes["mask"] = self.largest(weights, self.kept_count(self.options.sparsity))
        for name, mask in visit.notes["mask"].items():
            weights[name][~mask] = 0.0

    def upload(self, weights, received, visit):
        return weights, visit.notes["mask"]


@pytest.mark.parametrize(("name", "naive"), [("fedht", NaiveFedHT), ("fediterht", NaiveFedIterHT)])
@pytest.mark.parametrize("server", [{"name": "fedavg"}, {"name": "fedadam"}], ids=["mean", "adam"])
def test_equals_the_naive_reference(cache, tmp_path, name, naive, server):
    config = tiny_federation(cache, algorithm={"name": name, "sparsity": 0.8}, server=server)
    run = run_inline(config, tmp_path / "run")
    assert_same(run, naive(config).run())
    assert [line["sparsity/global"] for line in run.lines] == [pytest.approx(1 - 137 / 684)] * 2


@pytest.mark.parametrize("name", ["fedht", "fediterht"])
def test_at_sparsity_0_it_is_fedavg_bit_for_bit(cache, tmp_path, name):
    own = run_inline(tiny_federation(cache, algorithm={"name": name, "sparsity": 0.0}), tmp_path / "own")
    assert_identical(own, run_inline(tiny_federation(cache), tmp_path / "fedavg"))


def test_what_is_dense_travels_dense(cache, tmp_path):
    """Fed-HT: dense up, sparse down; FedIter-HT: sparse both ways."""
    sizes = {}
    for name in ("fedht", "fediterht"):
        config = tiny_federation(cache, algorithm={"name": name, "sparsity": 0.9})
        sizes[name] = run_inline(config, tmp_path / name).lines[1]
    assert sizes["fedht"]["sparsity/upload"] == 0.0
    assert sizes["fediterht"]["sparsity/upload"] == pytest.approx(1 - 68 / 684)
    assert sizes["fediterht"]["comm/uplink_bytes"] < 0.5 * sizes["fedht"]["comm/uplink_bytes"]
    for line in sizes.values():
        assert line["comm/downlink_bytes"] < 0.5 * line["comm/dense_bytes"]
