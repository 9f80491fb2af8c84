"""FedDyn by hand and at its limits."""

import numpy as np
import pytest
import torch

from algorithms.feddyn import FedDyn
from cluster.configuration.trees import ConfigError
from tests.algorithms.quadratics import rounds
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")
BOTH = (0, 1)


def near(*values):
    return pytest.approx(values if len(values) > 1 else values[0], abs=2e-6)


def h(state):
    return float(state.arrays["h"][0])


def test_two_parabolas_by_hand():
    first, second, third = rounds(FedDyn(alpha=1.0), BOTH, BOTH, BOTH)
    assert first.sent == near(0.36, -0.34)
    assert [own["h"] for own in first.kept] == near(-0.36, 0.34)
    assert h(first.state) == near(-0.01)
    assert first.x == near(0.02)
    assert second.sent == near(0.3116, -0.269)
    assert h(second.state) == near(-0.0113)
    assert second.x == near(0.0326)
    assert third.x == pytest.approx(0.03659, abs=5e-6)


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_it_ends_at_the_exact_optimum(alpha):
    assert abs(rounds(FedDyn(alpha=alpha), *[BOTH] * 500)[-1].x) < 1e-5  # FedAvg stays at .0364


def test_h_moves_by_the_share_of_the_population():
    only = rounds(FedDyn(alpha=1.0), (0,))[0]
    assert only.sent == [near(0.36)]
    assert h(only.state) == near(-0.18)
    assert only.x == near(0.54)
    assert only.kept[1] == {}


def test_a_strong_pull_holds_the_clients_at_the_global_model():
    strong = rounds(FedDyn(alpha=50.0), BOTH, lr=0.01, steps=40)[0]
    assert max(abs(x) for x in strong.sent) < 0.05


def test_the_server_holds_the_sum_of_what_clients_keep(cache, tmp_path):
    """h is the mean of all clients' h_i, the unseen counting 0; the model follows from it and the mean."""
    config = tiny_federation(cache, rounds=4, algorithm={"name": "feddyn", "alpha": 0.1})
    run = run_inline(config, tmp_path / "run")
    kept, layout = run.driver._schedule.kept.states, run.driver.layout
    mean = sum(state.arrays["h"].astype(np.float64) for state in kept.values()) / 6
    np.testing.assert_allclose(run.state.arrays["h"].numpy(), mean, atol=1e-5)
    cohort = [client for number, client in run.uploads if number == 4]
    for name, tensor in layout.split(run.state.weights, layout.trained).items():
        sent = sum(run.uploads[4, client][0][name].double() for client in cohort) / len(cohort)
        own = layout.split(run.state.arrays["h"], layout.trained)[name].double()
        torch.testing.assert_close(tensor.double(), sent - own / 0.1, atol=1e-5, rtol=1e-4)
    assert len(run.lines[-1]["drift/layers"]) == len(layout.prunable)


def test_it_costs_fedavgs_bytes(cache, tmp_path):
    dyn = run_inline(tiny_federation(cache, algorithm={"name": "feddyn"}), tmp_path / "dyn").lines[-1]
    plain = run_inline(tiny_federation(cache), tmp_path / "plain").lines[-1]
    for key in ("comm/uplink_bytes", "comm/downlink_bytes", "flops/dense"):
        assert dyn[key] == plain[key]


@pytest.mark.parametrize("server", [{"name": "fedadam"}, {"name": "fedavg", "lr": 0.5}])
def test_a_server_optimizer_is_refused(cache, server):
    with pytest.raises((ConfigError, ValueError), match=r"server.name: .* feddyn takes the server"):
        tiny_federation(cache, algorithm={"name": "feddyn"}, server=server)
