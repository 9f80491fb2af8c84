"""EF21 by hand, its books, and its limits."""

import numpy as np
import pytest
import torch

from algorithms.ef21 import EF21
from tests.algorithms.planted import rounds
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


def constant(*update):
    return lambda _: -torch.tensor(update)


def estimate(one):
    return one.state.arrays["estimate"].tolist()


def test_two_clients_of_constant_updates_by_hand():
    clients = [constant(3.0, 2.0), constant(1.0, -4.0)]
    first, second, third = rounds(EF21(sparsity=0.5, step=0.5), clients, (0, 1), (0, 1), (0, 1))
    assert first.sent == [[3.0, 0.0], [0.0, -4.0]]
    assert estimate(first) == [1.5, -2.0]
    assert first.weights == [0.75, -1.0]
    assert second.sent == [[0.0, 2.0], [1.0, 0.0]]
    assert estimate(second) == [2.0, -1.0]
    assert third.sent == [[0.0, 0.0], [0.0, 0.0]]
    assert estimate(third) == [2.0, -1.0]
    assert third.kept == [{"estimate": [3.0, 2.0]}, {"estimate": [1.0, -4.0]}]


def test_who_is_away_goes_on_pushing():
    clients = [constant(2.0, 0.0), constant(0.0, 4.0)]
    first, second = rounds(EF21(sparsity=0.5, step=1.0), clients, (0,), (1,))
    assert estimate(first) == [1.0, 0.0]
    assert estimate(second) == [1.0, 2.0]
    assert second.weights == [2.0, 2.0]


def test_the_server_holds_the_mean_of_what_clients_keep(cache, tmp_path):
    algorithm = {"name": "ef21", "sparsity": 0.9, "step": 0.3}
    run = run_inline(tiny_federation(cache, rounds=5, algorithm=algorithm), tmp_path / "run")
    kept = run.driver._schedule.kept.states
    mean = sum(state.arrays["estimate"].astype(np.float64) for state in kept.values()) / 6
    np.testing.assert_allclose(run.state.arrays["estimate"].numpy(), mean, atol=1e-6)


def test_dense_and_with_everybody_it_is_fedavg_of_differences(cache, tmp_path):
    everybody = {"rounds": 3, "cohort": 6}
    algorithm = {"name": "ef21", "sparsity": 0.0, "step": 1.0}
    ef = run_inline(tiny_federation(cache, algorithm=algorithm, **everybody), tmp_path / "ef")
    plain = tiny_federation(cache, aggregation={"weighting": "equal"}, **everybody)
    weights = run_inline(plain, tmp_path / "plain").state.weights
    torch.testing.assert_close(ef.state.weights, weights, atol=2e-5, rtol=1e-4)


def test_a_client_computes_with_its_whole_estimate(cache, tmp_path):
    """Dense and with everybody, a client's own model is that of FedAvg from the same start."""
    judged = {"evaluate_clients": {"every": 3, "after": 6}, "rounds": 3, "cohort": 6}
    slow = {"local": {"lr": 0.02}}
    ef = tiny_federation(cache, algorithm={"name": "ef21", "sparsity": 0.0, "step": 1.0}, **judged, **slow)
    plain = tiny_federation(cache, aggregation={"weighting": "equal"}, **judged, **slow)
    ends = [run_inline(c, tmp_path / n).lines[-1] for c, n in ((ef, "ef21"), (plain, "fedavg"))]
    assert ends[0]["clients/accuracy_gain"] == pytest.approx(ends[1]["clients/accuracy_gain"], abs=0.01)


def test_a_lossy_uplink_is_refused(cache):
    with pytest.raises(ValueError, match=r"wire.uplink: int8 rounds what the server adds"):
        tiny_federation(cache, algorithm={"name": "ef21"}, wire={"uplink": "int8"})
    with pytest.raises(ValueError, match=r"wire.grid: 32 rounds what the server adds"):
        tiny_federation(cache, algorithm={"name": "ef21"}, wire={"grid": 32})


def test_a_server_optimizer_is_refused(cache):
    with pytest.raises(ValueError, match=r"server.name: fedadam, but ef21 takes the server's step itself"):
        tiny_federation(cache, algorithm={"name": "ef21"}, server={"name": "fedadam"})


def test_a_tier_of_another_budget_holds_the_dense_model(cache, tmp_path):
    tiers = {"few": {"share": 0.5, "sparsity": 0.99}, "many": {"share": 0.5, "sparsity": 0.5}}
    algorithm = {"name": "ef21", "sparsity": 0.5}
    config = tiny_federation(cache, rounds=3, algorithm=algorithm, devices={"tiers": tiers})
    for line in run_inline(config, tmp_path / "run").lines:
        assert line["tiers/few/accuracy"] == line["tiers/many/accuracy"] == line["test/accuracy"]
