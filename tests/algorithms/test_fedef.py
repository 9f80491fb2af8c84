"""Error feedback by hand, its books, and its limits."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from algorithms.fedef import FedEF, FedEFClient
from cluster.clients.client import ClientHost
from cluster.transport.uplink import Uplink
from tests.algorithms.planted import rounds
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


def moves(*updates):
    """A client whose visits move it by these, in turn, with a learning rate of 1."""
    waiting = [torch.tensor(update) for update in updates]
    return lambda _: -waiting.pop(0)


def near(values):
    return pytest.approx(values, abs=1e-6)


def test_what_waits_is_sent_later_by_hand():
    client = moves((3.0, 2.0), (1.0, -1.5))
    nothing = moves()
    first, second = rounds(FedEF(sparsity=0.5), [client, nothing], (0,), (0,))
    assert first.sent == [[3.0, 0.0]]
    assert first.kept[0]["residual"] == [0.0, 2.0]
    assert second.sent == [[1.0, 0.0]]
    assert second.kept[0]["residual"] == [0.0, 0.5]
    assert second.kept[1] == {}


def test_a_decayed_residual_by_hand():
    first, second = rounds(
        FedEF(sparsity=0.5, residual_decay=0.5), [moves((3.0, 2.0), (1.0, -1.5))], (0,), (0,)
    )
    assert first.kept[0]["residual"] == [0.0, 2.0]
    assert second.sent == [[1.0, 0.0]]  # u = (1, -1.5 + 1)
    assert second.kept[0]["residual"] == [0.0, -0.5]


@pytest.mark.parametrize(("ahead", "residual"), [(0.5, [0.1, 0.0]), (0.0, [0.1, 0.0])])
def test_a_step_ahead_by_hand(ahead, residual):
    method = FedEF(sparsity=0.5, step_ahead=ahead)
    kept = {0: {"residual": [0.0, 2.0]}}
    (only,) = rounds(method, [lambda w: w - 1.0], (0,), lr=0.1, kept=kept)
    # Half ahead: from (0, 1) to (.1, 1), u = (.1, 2); behind: to (.1, .1), u = (.1, 2.1).
    assert only.sent == [near([0.0, 2.0 if ahead else 2.1])]
    assert only.kept[0]["residual"] == near(residual)


def test_a_mean_over_those_that_sent_a_weight_by_hand():
    clients = [moves((3.0, 2.0)), moves((1.0, -4.0))]
    (plain,) = rounds(FedEF(sparsity=0.5), clients, (0, 1))
    assert plain.weights == near([1.5, -2.0])
    clients = [moves((3.0, 2.0)), moves((1.0, -4.0))]
    (masked,) = rounds(FedEF(sparsity=0.5, averaging="masked"), clients, (0, 1))
    assert masked.weights == near([3.0, -4.0])


#: A third of the clients too slow to be among the first, and one in five that never answers.
LOSING = {
    "devices": {
        "tiers": {
            "a": {"share": 0.6, "dropout": 0.2},
            "b": {"share": 0.4, "compute": 1e6, "dropout": 0.2},
        }
    },
    "schedule": {"over_selection": 2.0},
    "cohort": 3,
}


@pytest.mark.parametrize(
    ("lost", "after_loss"),
    [("nothing", "keep"), ("refused", "keep"), ("refused", "restore"), ("late", "keep"), ("late", "restore")],
)
def test_all_that_was_sent_and_what_waits_are_all_updates(cache, tmp_path, monkeypatch, lost, after_loss):
    """For every client, but for one rounding a visit: what arrived and what waits is what it was moved by.

    A refused visit never happened, nor one of a device that drops out. Of a late one, which nobody adds up,
    all waits (``restore``), or what it sent is gone (``keep``).
    """
    finish, fold, train = FedEFClient.finish, Uplink.fold, ClientHost._train
    last, moved, sent, arrived = {}, defaultdict(list), defaultdict(list), defaultdict(list)

    def noting(self):
        visit = self.visit
        last["moved"] = (visit.prunable - visit.global_weights[: len(visit.prunable)]).double().numpy()
        support = finish(self)
        last["sent"] = visit.prunable.double().numpy()
        return support

    def training(self, broadcast, assignment):
        trained = train(self, broadcast, assignment)
        moved[assignment.client].append(last["moved"])
        sent[assignment.client].append(last["sent"])
        return trained

    def folding(self, total, client, *others):
        if lost == "refused" and client == 2 and len(moved[2]) % 2:
            moved[client].pop()
            sent[client].pop()
            return "planted"
        arrived[client].append(sent[client][-1])
        return fold(self, total, client, *others)

    monkeypatch.setattr(FedEFClient, "finish", noting)
    monkeypatch.setattr(ClientHost, "_train", training)
    monkeypatch.setattr(Uplink, "fold", folding)
    algorithm = {"name": "fedef", "sparsity": 0.9, "after_loss": after_loss}
    config = tiny_federation(cache, rounds=6, algorithm=algorithm, **(LOSING if lost == "late" else {}))
    run = run_inline(config, tmp_path / "run")
    for name in ("refused", "late", "dropped"):
        expected = name == lost or (name, lost) == ("dropped", "late")
        assert (sum(line[f"clients/{name}"] for line in run.lines) > 0) == expected, name
    states = run.driver._schedule.kept.states
    assert states.keys() == {client for client, visits in moved.items() if visits}
    for client, state in states.items():
        counted = arrived if after_loss == "restore" else sent
        waits = state.arrays["residual"].astype(np.float64)
        np.testing.assert_allclose(sum(counted[client]) + waits, sum(moved[client]), atol=5e-7)
    if lost == "late":
        assert any(len(arrived[client]) < len(sent[client]) for client in moved)


def test_a_late_client_has_sent_all_the_same(cache, tmp_path):
    tiers = {"a": {"share": 0.5}, "b": {"share": 0.5, "compute": 1e6}}
    more = {"devices": {"tiers": tiers}, "schedule": {"over_selection": 1.5}, "cohort": 3}
    algorithm = {"name": "fedef", "sparsity": 0.9}
    run = run_inline(tiny_federation(cache, rounds=2, algorithm=algorithm, **more), tmp_path / "run")
    assert sum(line["clients/late"] for line in run.lines) > 0
    visits = sum(line["clients/trained"] for line in run.lines)
    assert visits > len(run.driver._schedule.kept.states) > 3
    assert not FedEF.kept_is_summed
    for state in run.driver._schedule.kept.states.values():
        size = run.driver.layout.prunable_size
        assert np.count_nonzero(state.arrays["residual"]) <= size - round(0.1 * size)


def test_at_sparsity_0_it_is_fedavg_of_differences(cache, tmp_path):
    equal = {"weighting": "equal"}
    ef = run_inline(tiny_federation(cache, algorithm={"name": "fedef", "sparsity": 0.0}), tmp_path / "ef")
    plain = run_inline(tiny_federation(cache, aggregation=equal), tmp_path / "plain")
    torch.testing.assert_close(ef.state.weights, plain.state.weights, atol=1e-6, rtol=1e-5)
    assert all(not state.arrays["residual"].any() for state in ef.driver._schedule.kept.states.values())


def test_one_visit_a_client_is_a_cut_of_its_difference(cache, tmp_path):
    """With nothing waiting yet, the support is that of the largest |w_i - w_t|."""
    run = run_inline(
        tiny_federation(cache, rounds=1, algorithm={"name": "fedef", "sparsity": 0.8}), tmp_path / "ef"
    )
    dense = run_inline(
        tiny_federation(cache, rounds=1, aggregation={"weighting": "equal"}), tmp_path / "dense"
    )
    layout = run.driver.layout
    start = run.states[0].weights[: layout.prunable_size]
    keep = round(0.2 * layout.prunable_size)
    for key, (values, support) in run.uploads.items():
        flat = torch.cat([values[entry.name].reshape(-1) for entry in layout.prunable])
        trained = torch.cat([dense.uploads[key][0][entry.name].reshape(-1) for entry in layout.prunable])
        moved = trained - start
        order = moved.abs().argsort(descending=True, stable=True)[:keep]
        expected = torch.zeros_like(moved)
        expected[order] = moved[order]
        torch.testing.assert_close(flat, expected, atol=1e-7, rtol=0)
        assert sum(int(part.sum()) for part in support.values()) == keep


def test_a_tier_of_another_budget_holds_the_dense_model(cache, tmp_path):
    tiers = {"few": {"share": 0.5, "sparsity": 0.99}, "many": {"share": 0.5, "sparsity": 0.5}}
    algorithm = {"name": "fedef", "sparsity": 0.5}
    config = tiny_federation(cache, rounds=3, algorithm=algorithm, devices={"tiers": tiers})
    for line in run_inline(config, tmp_path / "run").lines:
        assert line["tiers/few/accuracy"] == line["tiers/many/accuracy"] == line["test/accuracy"]
