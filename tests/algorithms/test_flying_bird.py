"""Flying Bird: its schedule and limits, the naive reference under attack, and Flying Bird+ worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from algorithms import ServerState
from algorithms.flying_bird import FlyingBird
from cluster.configuration.trees import ConfigError
from tests.algorithms.masked import bools, play
from tests.algorithms.test_feddst import NaiveFedDST
from tests.cluster.clients.test_adversary import PGD_SECTION, Attacked
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation, tiny_images

# ------------------------------------------------------------------------------------------- the schedule


def told(method: FlyingBird, round_number: int, rounds: int = 40, **state):
    before = ServerState(round=round_number - 1, weights=torch.zeros(4), mask=bools("1100"), **state)
    return method.instruct(before, rounds, 100)


def test_the_schedule():
    method = FlyingBird(readjust_interval=10, readjust_fraction=0.4, final_fraction=0.2)
    # Every tenth round but the last; .2 + .1 (1 + cos(pi t/40)): at a quarter .3 + .1/sqrt 2, at a half .3.
    assert [t for t in range(1, 41) if told(method, t).phase == "readjust"] == [10, 20, 30]
    assert told(method, 10).value == pytest.approx(0.3 + 0.1 / math.sqrt(2))
    assert told(method, 20).value == pytest.approx(0.3)
    assert told(method, 30).value == pytest.approx(0.3 - 0.1 / math.sqrt(2))


# ------------------------------------------------------------------------------- limits, and the reference


def test_death_rates_of_zero_are_a_fixed_mask_bit_for_bit(cache, tmp_path):
    options = {"sparsity": 0.7, "layer_density": "igq"}
    still = {"readjust_interval": 1, "readjust_fraction": 0.0, "final_fraction": 0.0}
    runs = [
        run_inline(
            tiny_federation(cache, rounds=3, algorithm=each, attack=PGD_SECTION), tmp_path / each["name"]
        )
        for each in ({"name": "flying_bird", **options, **still}, {"name": "fixed_mask", **options})
    ]
    assert_identical(*runs)


def test_on_feddsts_schedule_it_is_feddst_bit_for_bit(cache, tmp_path, monkeypatch):
    options = {"sparsity": 0.7, "layer_density": "erk", "readjust_interval": 1, "readjust_fraction": 0.5}
    monkeypatch.setattr(FlyingBird, "instruct", FlyingBird.__mro__[1].instruct)
    runs = [
        run_inline(tiny_federation(cache, rounds=6, algorithm={"name": name, **options}), tmp_path / name)
        for name in ("flying_bird", "feddst")
    ]
    assert_identical(*runs)
    assert runs[0].state.mask_version > 0


class NaiveFlyingBird(Attacked, NaiveFedDST):
    """Gradients are all under attack, that of the batch that tells where to grow included."""

    def fraction(self, round_number):
        options, rounds = self.options, self.config.rounds
        if round_number % options.readjust_interval or round_number == rounds:
            return 0.0
        wave = (1 + math.cos(math.pi * round_number / rounds)) / 2
        return options.readjust_fraction * wave + options.final_fraction * (1 - wave)


def test_equals_the_naive_reference_under_attack(cache, tmp_path):
    algorithm = {
        "name": "flying_bird",
        "sparsity": 0.7,
        "layer_density": "uniform",
        "readjust_interval": 2,
        "final_fraction": 0.2,
    }
    config = tiny_federation(cache, algorithm=algorithm, rounds=5, attack=PGD_SECTION)
    run = run_inline(config, tmp_path / "run")
    assert_same(run, NaiveFlyingBird(config).run(), atol=2e-5)
    assert [state.mask_version for state in run.states] == [0, 0, 1, 1, 2, 2]


def test_random_growth_is_the_same_for_the_cohort_and_another_each_round():
    method = FlyingBird(sparsity=0.5, growth="random", readjust_interval=1, readjust_fraction=1.0)
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(rng.normal(size=40).astype(np.float32))
    mask = bools("10" * 20)
    state = ServerState(round=0, weights=weights.masked_fill(~mask, 0.0), mask=mask)
    clients = [(rng.normal(size=10).tolist(), label, 5) for label in (0, 1, 2)]
    grown, states = [], [state, replace(state, weights=state.weights * 2)]
    for each in states:
        sent, after = play(method, each, clients, classes=4, lr=0.01)
        new = [trained.support & ~mask.numpy() for trained in sent]
        assert all(np.array_equal(new[0], other) for other in new[1:])
        assert int(after.mask.sum()) == 20
        grown.append(new[0])
    assert not np.array_equal(*grown)


# ------------------------------------------------------------------------------------------ Flying Bird+


def exchanged(phase: str, n: int) -> int:
    """What the largest layer holds after an exchange at rate .5, of n positions before it."""
    method = FlyingBird(sparsity=0.5, adaptive=True)
    trainer = trainer_of(method)
    layer = max(trainer.layout.prunable, key=lambda entry: entry.size)
    broadcast = broadcast_of(trainer, method, None, 1)
    weights, mask = broadcast.weights.copy(), np.ones(trainer.layout.prunable_size, bool)
    mask[layer.span] = np.arange(layer.size) < n
    weights[: len(mask)][~mask] = 0.0
    orders = replace(broadcast.instructions, phase=phase, value=0.5)
    broadcast = replace(broadcast, weights=weights, mask=mask, instructions=orders)
    return int(trainer.visit(0, np.arange(20), 0.5, broadcast).support[layer.span].sum())


@pytest.mark.parametrize(
    ("phase", "hundred", "ten"),
    [
        ("readjust", 100, 10),
        ("readjust, prune more", 80, 8),
        ("readjust, grow more", 102, 10),
        ("readjust, prune more, grow more", 82, 8),
    ],
)
def test_what_a_layer_holds_after_an_exchange_by_hand(phase, hundred, ten):
    # n; n (1 - .4 r); n (1 + .05 r), of which int(52.5) = 52 grow; n (1 - .35 r). Of 10 int(5.25) = 5 grow.
    assert exchanged(phase, 100) == hundred
    assert exchanged(phase, 10) == ten


def after_changes(gaps: list[float], losses: list[float], round_number: int = 20) -> str:
    method = FlyingBird(readjust_interval=1, adaptive=True)
    history = torch.tensor([[0.0, 1.0], *([0.0, 1.0] for _ in range(4))])
    history[1:, 0] = torch.tensor(gaps).cumsum(0)
    history[1:, 1] += torch.tensor(losses).cumsum(0)
    return told(method, round_number, arrays={"robustness": history}).phase


def test_two_of_four_changes_ask_for_more():
    down, half = [-0.1] * 4, [0.1, -0.1, 0.1, -0.1]
    assert after_changes(down, down) == "readjust"
    assert after_changes(half, down) == "readjust, prune more"
    assert after_changes([0.1, -0.1, -0.1, -0.1], down) == "readjust"
    assert after_changes(down, half) == "readjust, grow more"
    assert after_changes(half, half) == "readjust, prune more, grow more"
    # No change: of the gap none is above 0, of the loss each is at least 0.
    assert after_changes([0.0] * 4, [0.0] * 4) == "readjust, grow more"
    assert after_changes(half, half, round_number=19) == "readjust"  # not before half of the rounds


def test_before_five_rounds_are_known_nothing_more_is_asked_for():
    method = FlyingBird(readjust_interval=1, adaptive=True)
    history = torch.zeros(5, 2)
    history[0] = math.nan
    assert told(method, 20, arrays={"robustness": history}).phase == "readjust"


def test_clients_measure_the_received_model_on_every_tenth_row_and_never_train_on_it():
    method = FlyingBird(sparsity=0.5, adaptive=True)
    trainer, taken = trainer_of(method), []
    trainer.module.register_forward_hook(
        lambda module, inputs, _: taken.append(inputs[0].detach().clone()) if module.training else None
    )
    broadcast = broadcast_of(trainer, method, None, 1)
    trained = trainer.visit(0, np.arange(33), 0.5, broadcast)
    assert trained.measured.samples == 30
    assert trained.measured.steps == 2 * 4
    images = torch.from_numpy(tiny_images()["train_images"][:33, None]).float() / 127.5 - 1
    seen = {tuple(image.flatten().tolist()) for batch in taken for image in batch.round(decimals=4)}
    held = {tuple(image.flatten().tolist()) for image in images[[9, 19, 29]].round(decimals=4)}
    assert len(seen) == 30
    assert not seen & held
    # Without an attack: accuracy on rows 0, 11 and 22 of the others, less that on 9, 19 and 29.
    trainer.layout.bind(trainer.module, torch.from_numpy(broadcast.weights.copy()))
    trainer.module.eval()
    labels = torch.from_numpy(tiny_images()["train_labels"][:33])
    others = [row for row in range(33) if row % 10 != 9]
    rows = [torch.tensor(own) for own in (others[::10], [9, 19, 29])]
    with torch.no_grad():
        outputs = [trainer.module(images[own]) for own in rows]
    right = [float((o.argmax(1) == labels[own]).float().mean()) for o, own in zip(outputs, rows, strict=True)]
    gap, loss = trained.values[trainer.layout.model_size :].tolist()
    assert gap == pytest.approx(right[0] - right[1])
    assert loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(outputs[1], labels[rows[1]])), rel=1e-4
    )


def test_the_sparsity_moves_with_what_clients_measure(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(FlyingBird, "_more", lambda self, history: ["prune more"])
    algorithm = {"name": "flying_bird", "sparsity": 0.5, "adaptive": True, "readjust_interval": 1}
    run = run_inline(
        tiny_federation(cache, rounds=6, algorithm=algorithm, attack=PGD_SECTION), tmp_path / "run"
    )
    held = [int(state.mask.sum()) for state in run.states]
    assert held[0] == held[1] == held[2]  # rounds 1 and 2 of 6: the first half
    assert held[2] > held[3] > held[4] > held[5] == held[6]  # and none in the last round
    known = run.state.arrays["robustness"]
    assert torch.isfinite(known).all()
    assert "method/held_out_accuracy" in run.lines[-1]


def test_it_needs_classes_to_adapt(cache):
    with pytest.raises(ConfigError, match="adaptive: true judges by accuracy"):
        tiny_federation(
            cache,
            algorithm={"name": "flying_bird", "adaptive": True},
            objective={"name": "regression"},
            partition={"name": "iid", "clients": 6, "seed": 5},
        )
