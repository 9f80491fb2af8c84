"""No visit is over before its lower bound, which decides who arrives when before all are played."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import cluster
from algorithms import Algorithm, Client, registry
from cluster.exchange import ClientError
from cluster.rounds.engine import InlineEngine
from cluster.rounds.schedule import Schedule
from tests.tiny_experiment import tiny_federation


@dataclass(frozen=True, kw_only=True)
class FewSteps(Algorithm):
    """Four local steps, whatever a client holds."""

    asynchronous = True

    def instruct(self, state, rounds, clients):
        return replace(super().instruct(state, rounds, clients), steps=4)


class _Nothing(Client):
    def train(self, batches):
        return torch.tensor(1.0)


@dataclass(frozen=True, kw_only=True)
class NoTraining(Algorithm):
    """Sends what it got, at once."""

    client = _Nothing
    asynchronous = True


@dataclass(frozen=True, kw_only=True)
class Boasting(NoTraining):
    """Says that it makes a pass over its data, and makes none."""

    least_passes = 1.0


METHODS = {
    # But those of one round, or of a model of their own.
    **{name: {"name": name} for name in registry() if name not in ("ma_echo", "masha1", "masha2", "sgda")},
    "splitmix": {"name": "splitmix", "bases": 2},
    "robust_bird": {"name": "robust_bird", "draw_rounds": 1},
    "flying_bird, adaptive": {"name": "flying_bird", "adaptive": True, "readjust_interval": 1},
    "fedsam without ascent": {"name": "fedsam", "rho": 0.0},
    "flash sensitivity": {"name": "flash", "stage1": "sensitivity", "init_fraction": 0.5, "init_epochs": 2},
    **{kind.__name__: {"name": f"{__name__}:{kind.__name__}"} for kind in (FewSteps, NoTraining)},
}
SYNCHRONOUS = {"over_selection": 1.5}
BUFFERED = {"name": "buffered", "buffer": 2, "concurrency": 3}
CASES = [(name, "synchronous") for name in METHODS] + [
    (name, "buffered")
    for name, section in METHODS.items()
    if ":" in section["name"] or registry()[section["name"]].asynchronous
]


@pytest.mark.parametrize(("name", "schedule"), CASES)
@pytest.mark.parametrize("flops", ["dense", "sparse"])
def test_a_visit_takes_at_least_as_long_as_was_promised(name, schedule, flops, tmp_path, monkeypatch):
    promised, taken = {}, []
    assignments, run = Schedule.assignments, InlineEngine.run

    def note_promises(self, clients, *arguments):
        found, bounds = assignments(self, clients, *arguments)
        promised.update(zip(clients.tolist(), bounds.tolist(), strict=True))
        return found, bounds

    def note_visits(self, *arguments):
        outcome = run(self, *arguments)
        taken.extend((promised[report.client], report.visit_s) for report in outcome.reports)
        return outcome

    monkeypatch.setattr(Schedule, "assignments", note_promises)
    monkeypatch.setattr(InlineEngine, "run", note_visits)
    config = tiny_federation(
        tmp_path / "data",
        algorithm=METHODS[name],
        rounds=2,
        schedule=SYNCHRONOUS if schedule == "synchronous" else BUFFERED,
        devices={"profile": "phones", "flops": flops},
        cohort=2,
    )
    cluster.run(config, tmp_path / "run")
    assert taken
    assert all(bound <= seconds for bound, seconds in taken)
    if flops == "dense" and name in ("fedavg", "fedsam", "FewSteps"):
        # The upload is what the bound leaves out: it is no empty promise.
        assert all(bound > 0.3 * seconds for bound, seconds in taken), taken


def test_a_promise_that_is_not_kept_is_an_error(tmp_path):
    config = tiny_federation(tmp_path / "data", algorithm={"name": f"{__name__}:Boasting"}, rounds=1)
    with pytest.raises(ClientError, match=r"Boasting.least_passes promises 1 over \d+ samples; .* made 0"):
        cluster.run(config, tmp_path / "run")
