"""Samplers: distinct clients, those that may be asked, with the chances that are promised."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cluster
from cluster.configuration.choices import build_choice, names
from cluster.configuration.trees import ConfigError
from cluster.simulation.samplers import (
    ByAvailability,
    BySize,
    Candidates,
    SamplerError,
    Stratified,
    draw,
)


def candidates(sizes, available=lambda clients: np.ones(len(clients), bool)):
    return Candidates(
        np.asarray(sizes), available, round=7, simulated_s=0.0, tiers=np.zeros(len(sizes), np.int8)
    )


@pytest.mark.parametrize("name", [name for name in names("sampler") if name != "poisson"])
@given(clients=st.integers(1, 60), count=st.integers(1, 80), seed=st.integers(0, 2**32))
def test_a_cohort_is_distinct_ascending_and_as_large_as_can_be(name, clients, count, seed):
    cohort = draw(
        build_choice("sampler", name, {}), np.random.default_rng(seed), count, candidates([3] * clients)
    )
    assert len(cohort) == min(count, clients)
    assert (np.diff(cohort) > 0).all()
    assert cohort[0] >= 0
    assert cohort[-1] < clients


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 2**32))
def test_only_available_clients_are_drawn_and_no_fewer_than_there_are(awake, count, seed):
    awake, count = np.array(awake), min(count, len(awake))
    found = ByAvailability()(
        np.random.default_rng(seed), count, candidates([1] * len(awake), lambda clients: awake[clients])
    )
    assert awake[found].all()
    assert len(found) == min(count, awake.sum())


def test_every_available_client_has_the_same_chance():
    counts = np.zeros(8)
    pool = candidates([1] * 8, lambda clients: clients % 2 == 0)
    for seed in range(4000):
        counts[ByAvailability()(np.random.default_rng(seed), 2, pool)] += 1
    # 2 of the 4 even ones: each in half of the draws, 2,000 with a standard deviation of 32.
    assert counts[1::2].sum() == 0
    assert np.abs(counts[::2] - 2000).max() < 160


def test_of_a_large_population_few_are_looked_at():
    looked_at = []

    def available(clients):
        looked_at.append(len(clients))
        return clients % 3 == 0

    found = ByAvailability()(np.random.default_rng(0), 100, candidates(np.ones(10**6), available))
    assert len(found) == 100
    assert sum(looked_at) <= 2000


def test_by_size_the_first_is_drawn_in_proportion():
    counts = np.zeros(3)
    for seed in range(6000):
        counts[BySize()(np.random.default_rng(seed), 1, candidates([1, 2, 3]))] += 1
    # Chances 1/6, 2/6, 3/6: 1,000, 2,000 and 3,000 with standard deviations below 39.
    assert np.abs(counts - [1000, 2000, 3000]).max() < 200


def test_stratified_draws_so_many_of_each_tier():
    tiers = np.random.default_rng(1).permutation(np.repeat(np.arange(3, dtype=np.int8), [34, 33, 33]))
    population = replace(candidates([1] * 100), tiers=tiers)
    seen = np.zeros(100, int)
    for seed in range(300):
        cohort = draw(Stratified(), np.random.default_rng(seed), 10, population)
        # 3.4, 3.3 and 3.3: the largest remainder is the first tier's.
        assert np.bincount(tiers[cohort]).tolist() == [4, 3, 3]
        seen[cohort] += 1
    assert seen.min() > 0
    assert len(draw(Stratified(), np.random.default_rng(0), 100, population)) == 100


def own(last=2):
    """A user's own factory."""
    return lambda rng, count, candidates: np.arange(candidates.clients)[-last:]


def test_a_sampler_of_ones_own_is_built_with_its_options(cache):
    config = cluster.resolve(
        "quickstart",
        ["sampler.name=tests.cluster.simulation.test_samplers:own", "sampler.last=3", "partition.clients=10"],
    )
    cohort = draw(config.build_sampler(), np.random.default_rng(0), 4, candidates([1] * 10))
    assert cohort.tolist() == [7, 8, 9]


@pytest.mark.parametrize("returned", [[1, 1], [0, 10], [-1, 0], [0, 1, 2]])
def test_what_is_no_cohort_is_refused(returned):
    with pytest.raises(SamplerError, match=r"at most 2 different clients of 0 to 9 in round 7, found \["):
        draw(lambda *_: np.array(returned), np.random.default_rng(0), 2, candidates([1] * 10))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler.name=unifrom"], r"sampler.name: 'unifrom' is unknown; .*did you mean uniform\?"),
        (["sampler.name=size", "sampler.power=2"], "sampler.power: size has no such field"),
        (
            ["sampler.name=tests.cluster.simulation.test_samplers:own", "sampler.lats=3"],
            "sampler.name = .*unexpected keyword argument 'lats'",
        ),
        (
            ["sampler.name=tests.cluster.simulation.test_samplers:owm"],
            "did you mean own",
        ),
    ],
)
def test_a_wrong_sampler_is_one_clear_error(overrides, message):
    with pytest.raises(ConfigError, match=message):
        cluster.resolve("quickstart", overrides)
