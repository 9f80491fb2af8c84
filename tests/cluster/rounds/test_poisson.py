"""Cohorts by independent coins: sizes, rounds of nobody, who counts as asked, refusals."""

import numpy as np
import pytest
import torch

from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from cluster.simulation.samplers import Candidates, Poisson, draw
from tests.tiny_experiment import run_inline, tiny_federation


def test_every_client_is_drawn_by_a_coin_of_its_own():
    pool = Candidates(np.ones(40, int), lambda clients: clients < 0, 1, 0.0, np.zeros(40, np.int8))
    drawn = np.zeros((3000, 40))
    for seed in range(3000):
        drawn[seed, draw(Poisson(), np.random.default_rng(seed), 10, pool)] = 1.0
    # 40 coins of 1/4: mean 10, variance 7.5; without replacement it would be 0. Nobody need be available.
    assert drawn.sum(1).mean() == pytest.approx(10.0, abs=0.2)
    assert drawn.sum(1).var() == pytest.approx(7.5, rel=0.15)
    assert np.abs(drawn.mean(0) - 0.25).max() < 0.04


def test_a_round_takes_all_that_were_asked_and_one_of_nobody_changes_nothing(tmp_path):
    config = tiny_federation(tmp_path, sampler={"name": "poisson"}, cohort=1, rounds=12)
    run = run_inline(config, tmp_path / "run")
    sizes = [line["clients/trained"] for line in run.lines]
    assert 0 in sizes
    assert max(sizes) > 1  # more than cohort
    assert [len([1 for number, _ in run.uploads if number == n + 1]) for n in range(12)] == sizes
    for number, size in enumerate(sizes, 1):
        same = torch.equal(run.states[number].weights, run.states[number - 1].weights)
        assert same == (size == 0)
    assert [state.round for state in run.states] == list(range(13))


def test_who_drops_out_counts_as_asked(tmp_path):
    tiers = {"only": {"share": 1.0, "dropout": 0.5}}
    config = tiny_federation(
        tmp_path, sampler={"name": "poisson"}, cohort=4, rounds=6, devices={"tiers": tiers}
    )
    plain = tiny_federation(tmp_path, sampler={"name": "poisson"}, cohort=4, rounds=6)
    lines = run_inline(config, tmp_path / "dropping").lines
    all_there = run_inline(plain, tmp_path / "plain").lines
    asked = [line["clients/trained"] + line["clients/dropped"] for line in lines]
    assert asked == [line["clients/trained"] for line in all_there]
    assert sum(line["clients/dropped"] for line in lines) > 0
    assert not any(line["clients/late"] for line in lines)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("schedule.over_selection=1.5", "schedule.over_selection: 1.5, and poisson takes everybody"),
        ("schedule.name=buffered", "sampler.name: poisson draws whole rounds"),
    ],
)
def test_schedules_that_it_does_not_fit_are_refused(override, says):
    with pytest.raises(ConfigError) as raised:
        resolve("quickstart", ["sampler.name=poisson", override])
    assert says in str(raised.value)
