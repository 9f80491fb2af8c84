"""A million clients without a list: what each holds is a function of (seed, client) alone."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster import seeding
from cluster.workload.partition import SampledPartition
from cluster.workload.partition_picture import picture
from tests.cluster.workload.divided import partition
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_same, run_inline, tiny_federation

LABELS = np.arange(600) % 4


def sampled(labels=LABELS, **options):
    defaults = {"clients": 1_000_000, "seed": 7, "samples_per_client": 40, "alpha": None}
    return partition("sampled", labels, **(defaults | options))


@settings(max_examples=60, deadline=None)
@given(
    client=st.integers(0, 999_999),
    seed=st.integers(0, 2**32),
    alpha=st.none() | st.floats(1e-3, 1e3),
    samples=st.integers(1, 700),
    kept=st.sets(st.integers(0, 599), min_size=1),
)
def test_a_clients_samples_depend_on_seed_and_client_alone(client, seed, alpha, samples, kept):
    options = {"seed": seed, "alpha": alpha, "samples_per_client": samples, "available": np.array([*kept])}
    parts = sampled(**options)
    rows = parts.client(client)
    assert rows.size == samples == parts.sizes[client]
    assert rows.dtype == np.int64
    assert set(rows) <= kept
    assert np.all(np.diff(rows) >= 0)
    # In any order of asking, in any process, in a population of any size.
    parts.client(0)
    np.testing.assert_array_equal(parts.client(client), rows)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(parts)).client(client), rows)
    np.testing.assert_array_equal(sampled(clients=client + 1, **options).client(client), rows)


def test_without_alpha_rows_are_drawn_uniformly_from_the_pool():
    """By hand: the stream of (seed, "partition", 0, client) picks places of the pool, class after class."""
    pool = np.concatenate([np.flatnonzero(label == LABELS) for label in range(4)])
    places = seeding.generator(7, "partition", client=123_456).integers(600, size=40)
    np.testing.assert_array_equal(sampled().client(123_456), np.sort(pool[places]))
    counts = np.bincount(np.concatenate([sampled().client(index) for index in range(3000)]), minlength=600)
    # 120,000 draws of probability 1/600: 200 each, a standard deviation of 14.1; five of them.
    assert np.abs(counts - 200).max() < 71


def test_with_alpha_class_shares_follow_the_dirichlet_distribution():
    """E[q^2] = (alpha + 1) / (C (C alpha + 1)); alpha 0.5, C 4: 0.125.

    m = 40 draws add E[q (1 - q)] / m = (0.25 - 0.125) / 40 = 0.003125. The mean over 3,000 clients of
    the four classes' squared shares has a standard deviation below 0.25 / sqrt(3000) = 0.0046.
    """
    shares = sampled(alpha=0.5).class_histogram(LABELS, 4, np.arange(3000)) / 40
    assert np.mean(shares**2) == pytest.approx(0.128125, abs=0.005)
    np.testing.assert_allclose(shares.mean(axis=0), 0.25, atol=0.03)


def test_within_a_class_every_row_is_as_likely():
    # Two classes of 1 and 9 rows: with a mixture near (1/2, 1/2) the lone row gets half of the draws.
    labels = np.array([1] + [0] * 9)
    rows = np.concatenate([sampled(labels, alpha=1e6).client(index) for index in range(500)])
    counts = np.bincount(rows, minlength=10)
    assert counts[0] == pytest.approx(10_000, abs=500)  # a standard deviation of 71
    assert np.abs(counts[1:] - 10_000 / 9).max() < 160  # of 31


def test_a_million_clients_take_the_memory_of_the_pool():
    tracemalloc.start()
    try:
        parts = sampled()
        assert parts.sizes.shape == (1_000_000,)
        assert int(parts.sizes.max()) == 40
        assert len(parts.digest()) == 16
        parts.client(999_999)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    # As shipped to an actor: 600 positions of 8 bytes and a few numbers.
    assert len(pickle.dumps(parts)) < 8_000


def test_clients_outside_the_population_are_refused_and_rows_cannot_be_written():
    parts = sampled()
    for index in (-1, 1_000_000):
        with pytest.raises(IndexError, match="1000000 clients"):
            parts.client(index)
    with pytest.raises(ValueError, match="read-only"):
        parts.client(0)[:] = 0


def test_the_digest_tells_apart_what_clients_are_drawn_from():
    variants = [
        sampled(),
        sampled(seed=8),
        sampled(clients=10),
        sampled(samples_per_client=41),
        sampled(alpha=1.0),
        sampled(available=np.arange(599)),
        sampled((LABELS + np.arange(600) // 300) % 4),
    ]
    assert len({parts.digest() for parts in variants}) == len(variants)
    assert sampled().digest() == sampled().digest()


def test_the_picture_of_a_million_clients_is_drawn_from_a_thousand(tmp_path, monkeypatch):
    asked = []
    draw = SampledPartition.client
    monkeypatch.setattr(SampledPartition, "client", lambda self, i: asked.append(i) or draw(self, i))
    path = tmp_path / "partition.png"
    picture(sampled(alpha=0.3), LABELS, list("abcd"), path)
    assert asked == list(range(0, 1_000_000, 1000))
    with Image.open(path) as image:
        assert np.asarray(image.convert("L")).std() > 10


def test_a_run_over_a_million_clients_is_that_of_the_reference(tmp_path):
    few = {"name": "sampled", "clients": 1_000_000, "samples_per_client": 20, "alpha": 0.5}
    config = tiny_federation(tmp_path, partition=few)
    assert_same(run_inline(config, tmp_path / "run"), NaiveFederation(config).run())


def test_a_rounds_memory_does_not_grow_with_the_population(tmp_path):
    """Ten thousand times the clients cost less than two bytes for each; one int64 a client would be eight."""
    peaks = {}
    for clients in (100, 1_000_000):
        section = {"name": "sampled", "clients": clients, "samples_per_client": 20, "alpha": None}
        masked = {"name": "fixed_mask", "sparsity": 0.5}
        config = tiny_federation(tmp_path, algorithm=masked, partition=section, checkpoint_every=1)
        tracemalloc.start()
        try:
            run_inline(config, tmp_path / str(clients))
            peaks[clients] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peaks[1_000_000] - peaks[100] < 2_000_000
