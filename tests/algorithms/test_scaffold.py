"""SCAFFOLD by hand, against a naive reference, and at its limits."""

import numpy as np
import pytest
import torch

from algorithms.scaffold import Scaffold
from tests.algorithms.quadratics import rounds
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")
BOTH = (0, 1)


def near(*values):
    return pytest.approx(values if len(values) > 1 else values[0], abs=2e-6)


@pytest.mark.parametrize("option", ["II"])
def test_two_parabolas_by_hand(option):
    first, second, third = rounds(Scaffold(option=option), BOTH, BOTH, BOTH)
    assert first.sent == near(0.38, -0.36)
    assert first.x == near(0.01)
    assert [own["c"] for own in first.kept] == near(-1.9, 1.8)
    assert first.carried["c"] == near(-0.05)
    assert second.sent == near(0.0366, -0.0206)
    assert second.x == near(0.008)
    assert [own["c"] for own in second.kept] == near(-1.983, 2.003)
    assert second.carried["c"] == near(0.01)
    assert third.x == near(0.005835)


def test_the_gradient_at_the_start_by_hand():
    first, second = rounds(Scaffold(option="I"), BOTH, BOTH)
    assert first.sent == near(0.38, -0.36)
    assert [own["c"] for own in first.kept] == near(-2.0, 2.0)
    assert first.carried["c"] == near(0.0)
    # From .01: g - c_i + c = -1.99 + 2 and 2.02 - 2, twice.
    assert second.sent == near(0.01 - 0.1 * (0.01 + 0.009), 0.01 - 0.1 * (0.02 + 0.016))


def test_c_moves_by_the_share_of_the_population():
    only = rounds(Scaffold(), (0,))[0]
    assert only.kept[0]["c"] == near(-1.9)
    assert only.carried["c"] == near(-0.95)
    later = rounds(Scaffold(), (0,), (1,), (0,), BOTH, (1,))
    for one in later:  # c is the mean of all clients' c_i, the unseen counting 0
        assert one.carried["c"] == near(sum(own.get("c", 0.0) for own in one.kept) / 2)


def test_many_rounds_end_at_the_optimum_where_fedavg_does_not():
    assert abs(rounds(Scaffold(), *[BOTH] * 300)[-1].x) < 1e-6


class Naive:
    """SCAFFOLD in dictionaries by name, with torch's autograd and a loop over plain steps."""

    def __init__(self, run):
        self.federation, self.config = run.driver.federation, run.driver.config
        self.run, self.own = run, {}
        self.c = None

    def follow(self):
        run, config = self.run, self.config
        layout = run.driver.layout
        names = [entry.name for entry in layout.trained]
        weights = {n: t.clone() for n, t in layout.split(run.states[0].weights, layout.trained).items()}
        self.c = {n: torch.zeros_like(t) for n, t in weights.items()}
        steps_of = {}
        for number in range(1, config.rounds + 1):
            lr = config.learning_rate(number)
            cohort = [client for n, client in run.uploads if n == number]
            changes = []
            for client in cohort:
                sent, _ = run.uploads[number, client]
                rows = len(self.federation.partition.client(client))
                steps = config.local.epochs * -(-rows // config.local.batch_size)
                steps_of[client] = steps
                old = self.own.get(client, {n: torch.zeros_like(t) for n, t in weights.items()})
                new = {n: old[n] - self.c[n] + (weights[n] - sent[n]) / (steps * lr) for n in names}
                changes.append({n: new[n] - old[n] for n in names})
                self.own[client] = new
            clients = config.partition.clients
            self.c = {n: self.c[n] + sum(change[n] for change in changes) / clients for n in names}
            weights = {
                n: sum(run.uploads[number, client][0][n].double() for client in cohort) / len(cohort)
                for n in names
            }
            weights = {n: t.float() for n, t in weights.items()}
            yield number, weights, self.c


def test_a_run_at_partial_participation_keeps_its_books(cache, tmp_path):
    config = tiny_federation(cache, rounds=4, algorithm={"name": "scaffold"})
    run = run_inline(config, tmp_path / "run")
    layout, kept = run.driver.layout, run.driver._schedule.kept
    naive = Naive(run)
    for number, weights, c in naive.follow():
        state = run.states[number].weights
        for name, tensor in layout.split(state, layout.trained).items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-5)
        flat = torch.cat([tensor.reshape(-1) for tensor in c.values()])
        torch.testing.assert_close(state[layout.both[0].span], flat, atol=1e-4, rtol=1e-3)
    for client, own in naive.own.items():
        flat = torch.cat([tensor.reshape(-1) for tensor in own.values()]).numpy()
        np.testing.assert_allclose(kept.of(client)["c"], flat, atol=1e-4, rtol=1e-3)


def test_round_1_is_fedavgs_bit_for_bit(cache, tmp_path):
    equal = {"weighting": "equal"}
    runs = [
        run_inline(tiny_federation(cache, algorithm={"name": name}, aggregation=equal), tmp_path / name)
        for name in ("scaffold", "fedavg")
    ]
    size = runs[1].driver.layout.size
    first, other = (run.states[1].weights[:size].numpy().tobytes() for run in runs)
    assert first == other
    assert not torch.equal(runs[0].state.weights[:size], runs[1].state.weights)


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ({"optimizer": {"name": "adamw"}}, "local.optimizer.name: adamw does not step along the gradient"),
        ({"optimizer": {"name": "sgd", "momentum": 0.9}}, "local.optimizer.name: sgd does not step"),
        ({"clip_norm": 10.0}, "local.clip_norm: 10 cuts the steps"),
    ],
)
def test_option_ii_needs_plain_steps(cache, local, message):
    with pytest.raises(ValueError, match=message):
        tiny_federation(cache, algorithm={"name": "scaffold"}, local=local)
    tiny_federation(cache, algorithm={"name": "scaffold", "option": "I"}, local=local)


def test_rates_that_fall_inside_a_visit_are_added_up(cache, tmp_path):
    """With lr_schedule=cosine_visit, c_i of the first visit is the mean gradient of its steps."""
    local = {"lr": 0.2, "lr_final": 0.01, "lr_schedule": "cosine_visit", "epochs": 2}
    config = tiny_federation(cache, rounds=1, algorithm={"name": "scaffold"}, local=local)
    run = run_inline(config, tmp_path / "run")
    layout = run.driver.layout
    for client, state in run.driver._schedule.kept.states.items():
        sent, _ = run.uploads[1, client]
        sent = torch.cat([sent[entry.name].reshape(-1) for entry in layout.trained])
        moved = run.states[0].weights[: layout.trained_size] - sent
        ratio = moved / torch.from_numpy(state.arrays["c"])
        steps = 2 * -(-int(run.driver.federation.sizes[client]) // 8)
        angles = np.pi * np.arange(steps) / steps
        rates = 0.01 + 0.19 * (1 + np.cos(angles)) / 2
        found = float(ratio[torch.from_numpy(state.arrays["c"]).abs() > 1e-3].median())
        assert found == pytest.approx(rates.sum(), rel=0.1)


def test_it_doubles_the_bytes_and_option_i_bills_its_pass(cache, tmp_path):
    lines = {}
    for option in ("II", "I"):
        config = tiny_federation(cache, algorithm={"name": "scaffold", "option": option})
        lines[option] = run_inline(config, tmp_path / option).lines[-1]
    plain = run_inline(tiny_federation(cache), tmp_path / "fedavg")
    floats = plain.driver.layout.trained_size
    for direction in ("uplink", "downlink"):
        more = lines["II"][f"comm/{direction}_bytes"] - plain.lines[-1][f"comm/{direction}_bytes"]
        assert more == 4 * 4 * floats
    assert lines["II"]["flops/dense"] == plain.lines[-1]["flops/dense"]
    assert lines["I"]["flops/dense"] == 2 * plain.lines[-1]["flops/dense"]
