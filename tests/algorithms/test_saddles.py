"""SGDA and MASHA by hand on the bilinear game and on small operators, and what a run of them is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from algorithms import Carried
from algorithms.masha import Masha1, Masha2
from algorithms.sgda import ascending
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.workload.models import ModelError
from tests.algorithms import planted
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")
LINEAR = {"name": "linear", "perturbation": True}


@dataclass(frozen=True, kw_only=True)
class Planar1(Masha1):
    """On two weights, of which none is called a perturbation."""

    name = ""

    def carries(self, layout):
        return self._carried(layout)


@dataclass(frozen=True, kw_only=True)
class Planar2(Masha2):
    name = ""

    def carries(self, layout):
        return {"w": Carried(layout.trained_size, "down")}


def game(start, *operators):
    """The operators around a start, as planted weights begin at 0."""
    start = torch.tensor(start)
    return start, [lambda w, f=f: f(w + start) for f in operators]


def bilinear(z):
    return torch.stack([z[1], -z[0]])


def played(method, start, operators, count):
    """The points that clients got and z, after each round, in the game's own coordinates."""
    start, slopes = game(start, *operators)
    everyone = tuple(range(len(slopes)))
    rounds = planted.rounds(method, slopes, *[everyone] * count)
    return [((torch.tensor(r.weights) + start), r.state.arrays["z"] + start, r) for r in rounds]


def near(*values):
    return pytest.approx(values, abs=1e-6)


def test_uncompressed_it_is_extragradient_by_hand():
    # F_1 = z, F_2 = 3 z, z0 = 1: z' = .8, mean d = -.4, z = .84.
    method = Planar1(sparsity=0.0, gamma=0.1)
    reference, step = played(method, (1.0, 1.0), [lambda z: z, lambda z: 3 * z], 2)
    assert reference[0].tolist() == near(0.8, 0.8)
    assert step[1].tolist() == near(0.84, 0.84)


def test_the_bilinear_game_by_hand():
    method = Planar1(sparsity=0.0, gamma=0.5)
    reference, step = played(method, (1.0, 0.0), [bilinear], 2)
    assert reference[0].tolist() == near(1.0, 0.5)
    assert step[1].tolist() == near(0.75, 0.5)
    assert float(step[1].square().sum()) == pytest.approx(0.8125)


@dataclass(frozen=True, kw_only=True)
class Tails(Planar1):
    """Its coins say that the reference stays."""

    def initial_state(self, weights, layout, rng):
        state = super().initial_state(weights, layout, rng)
        seeds = (s for s in range(99) if all(np.random.default_rng([s, r]).random() > 0.5 for r in (1, 2)))
        return replace(state, arrays={**state.arrays, "coin": torch.tensor([float(next(seeds))])})


def test_a_step_whose_reference_stays_by_hand():
    method = Tails(sparsity=0.0, gamma=0.5, reference_chance=0.5)
    _, first, second = played(method, (1.0, 0.0), [bilinear], 3)
    assert first[1].tolist() == near(0.75, 0.5)
    # w is still z0: zbar = (.875, .25), z' = (.875, .75), z = (.5, .6875).
    assert first[0].tolist() == near(0.875, 0.75)
    assert second[1].tolist() == near(0.5, 0.6875)


def test_error_feedback_by_hand():
    operators = [
        lambda z: torch.stack([z[0], 3 * z[1]]),
        lambda z: torch.stack([3 * z[0], z[1]]),
    ]
    method = Planar2(sparsity=0.5, gamma=0.1)
    reference, step = played(method, (1.0, 1.0), operators, 2)
    assert reference[2].state.arrays["G"].tolist() == near(2.0, 2.0)
    assert reference[0].tolist() == near(0.8, 0.8)
    sent, kept = step[2].sent, [own["error"] for own in step[2].kept]
    assert sent[0] == near(0.0, -0.06)
    assert sent[1] == near(-0.06, 0.0)
    assert kept[0] == near(-0.02, 0.0)
    assert kept[1] == near(0.0, -0.02)
    assert step[1].tolist() == near(0.83, 0.83)


def test_what_is_sent_and_what_is_left_are_the_whole_bit_for_bit():
    @dataclass(frozen=True, kw_only=True)
    class Noting(Planar2):
        name = ""

        class client(Planar2.client):
            def compressed(self, difference):
                before = difference * 0.3 + self.visit.kept.get("error", torch.zeros(2))
                sent = super().compressed(difference)
                assert torch.equal(sent + self.visit.kept["error"], before)
                assert int((sent != 0).sum()) <= 1
                return sent

    played(Noting(sparsity=0.5, gamma=0.3), (1.0, -0.7), [bilinear, lambda z: 2 * bilinear(z)], 12)


def test_random_positions_are_unbiased():
    class Visit:
        rng = np.random.default_rng(0)
        keep = 1

        class layout:
            prunable_size = 4

    client = object.__new__(Masha1.client)
    client.visit = Visit
    whole = torch.tensor([1.0, -2.0, 3.0, 0.5])
    mean = sum(client.compressed(whole.clone()) for _ in range(8000)) / 8000
    torch.testing.assert_close(mean, whole, atol=0.15, rtol=0.0)


def test_descent_ascent_runs_away_where_extragradient_and_masha_do_not():
    z = np.array([1.0, 0.0])
    other = z.copy()
    for _ in range(2000):
        z = z - 0.1 * np.array([z[1], -z[0]])
        half = other - 0.1 * np.array([other[1], -other[0]])
        other = other - 0.1 * np.array([half[1], -half[0]])
    assert np.hypot(*z) == pytest.approx(1.01**1000, rel=1e-6)
    assert np.hypot(*other) == pytest.approx(0.9901**1000, rel=1e-3)
    for kind in (Planar1, Planar2):
        method = kind(sparsity=0.5, gamma=0.2, reference_chance=0.5)
        end = played(method, (1.0, 0.0), [bilinear], 700)[-1][1]
        assert float(end.norm()) < 0.01


def test_nothing_sent_is_a_whole_gradient_step():
    # K = 0 and tau = 0: z = w - gamma F(w).
    method = Planar1(sparsity=0.9, gamma=0.1, reference_chance=1.0)
    _, step = played(method, (1.0, 1.0), [lambda z: z, lambda z: 3 * z], 2)
    assert step[1].tolist() == near(0.8, 0.8)


# ------------------------------------------------------------------------------------------ real models


def test_descent_ascent_on_a_model_against_a_loop_of_its_own(cache, tmp_path):
    config = tiny_federation(
        cache,
        rounds=1,
        cohort=1,
        model=LINEAR,
        algorithm={"name": "sgda", "ridge": 0.5, "ball": 0.03},
        local={"batch_size": 120},
    )
    run = run_inline(config, tmp_path / "run")
    ((_, client),) = run.uploads
    layout = run.driver.layout
    start = {name: t.double() for name, t in layout.split(run.states[0].weights).items()}
    assert not start["0.perturbation"].any()
    inputs, targets = run.driver.engine._host._trainer._data.of(
        run.driver.federation.partition.client(client)
    )
    leaves = {name: t.clone().requires_grad_() for name, t in start.items()}
    moved = (inputs.double() + leaves["0.perturbation"]).flatten(1)
    logits = moved @ leaves["2.weight"].T + leaves["2.bias"]
    slopes = dict(
        zip(
            leaves,
            torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), list(leaves.values())),
            strict=True,
        )
    )
    for name in ("2.weight", "2.bias"):
        torch.testing.assert_close(
            run.weights[name].double(), start[name] - 0.2 * slopes[name], atol=1e-6, rtol=1e-5
        )
    climbed = (0.2 * slopes["0.perturbation"]).clamp(-0.03, 0.03)
    torch.testing.assert_close(run.weights["0.perturbation"].double(), climbed, atol=1e-6, rtol=1e-5)
    # It is judged without.
    judged = run.driver.method.effective_weights(run.state.weights, layout)
    assert not judged[ascending(layout).span].any()


@pytest.mark.parametrize("name", ["masha1", "masha2"])
def test_rounds_are_of_two_kinds_and_bytes_follow(cache, tmp_path, name):
    own = {"name": name, "sparsity": 0.5, "gamma": 0.05, "ridge": 1.0}
    config = tiny_federation(cache, rounds=8, cohort=3, model=LINEAR, algorithm=own)
    run = run_inline(config, tmp_path / "run")
    layout = run.driver.layout
    due = [bool(state.arrays["reference"]) for state in run.states[:-1]]
    assert due[0]
    assert not all(due)
    for number, (line, dense) in enumerate(zip(run.lines, due, strict=True), start=1):
        cohort = [client for n, client in run.uploads if n == number]
        assert len(cohort) == (6 if dense else 3)
        whole = 4 * layout.trained_size
        assert line["comm/uplink_bytes"] / len(cohort) == pytest.approx(
            whole + 40 if dense else whole - 2 * layout.prunable_size + layout.prunable_size / 8, abs=60
        )
        # One whole gradient at w, or one each at z' and w.
        samples = sum(len(run.driver.federation.partition.client(c)) for c in cohort)
        flops = run.driver.federation.flops.dense(samples)
        assert line["flops/dense"] == pytest.approx(flops * (1 if dense else 2))
    assert_identical(run, run_inline(config, tmp_path / "again"))


@pytest.mark.parametrize("name", ["sgda", "masha1", "masha2"])
def test_plain_minimisation_is_refused(cache, name):
    with pytest.raises(
        ModelError, match=f"{name} solves saddle problems, and the model has no parameter called"
    ):
        Federation.of(tiny_federation(cache, model={"name": "linear"}, algorithm={"name": name}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server": {"name": "fedadam"}}, r"server.name: fedadam; masha2 takes the server's step"),
        ({"local": {"weight_decay": 0.1}}, r"local: masha2 takes no local step"),
        ({"algorithm": {"name": "masha2", "ball": 0.1}}, r"algorithm.ball: 0.1; masha2 has no ball"),
    ],
)
def test_what_they_cannot_do_is_refused(cache, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_federation(cache, **{"model": LINEAR, "algorithm": {"name": "masha2"}, **options})
