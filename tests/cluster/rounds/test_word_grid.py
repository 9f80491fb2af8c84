"""Whole runs on a grid of words: who ends where, what is refused, what a round's line says."""

import pytest

from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.simulation.byzantine import Byzantine
from cluster.transport.words import GridError
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation

MASKED = {"name": "fixed_mask", "sparsity": 0.8}


def run(cache, folder, **keys):
    return run_inline(tiny_federation(cache, algorithm=MASKED, **keys), folder)


def test_words_of_64_bits_end_where_the_exact_grid_does_and_shorter_ones_near_it(tmp_path):
    exact = run(tmp_path, tmp_path / "exact")
    long = run(tmp_path, tmp_path / "64", wire={"grid": 64})
    short = run(tmp_path, tmp_path / "32", wire={"grid": 32})
    assert_identical(exact, long)
    gaps = [(short.weights[name] - tensor).abs().max() for name, tensor in exact.weights.items()]
    assert 0.0 < max(gaps) < 1e-5
    header = 44
    sizes = [
        line["comm/uplink_bytes"] - 4 * header for line in (exact.lines[1], long.lines[1], short.lines[1])
    ]
    assert sizes == [sizes[0], 2 * sizes[0], sizes[0]]
    assert "comm/clamped_values" not in exact.lines[0]
    assert [line["comm/clamped_values"] for line in long.lines] == [0, 0]


def test_what_a_device_clamps_is_counted_and_what_is_not_finite_it_withholds(tmp_path, monkeypatch):
    def planted(self, client, number, values, received, support):
        if client in (0, 1) and number == 2:
            values[:1] = 1e9 if client == 0 else float("nan")

    monkeypatch.setattr(Byzantine, "corrupt", planted)
    lines = run(tmp_path, tmp_path / "run", wire={"grid": 48}, cohort=6).lines
    assert [line["comm/clamped_values"] for line in lines] == [0, 1]
    assert lines[1]["clients/refused_list"] == [[1, "its update cannot be averaged: a value is not finite"]]
    assert lines[0]["comm/uplink_bytes"] * 5 == lines[1]["comm/uplink_bytes"] * 6


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["wire.grid=32", "wire.uplink=int8"], "leave wire.uplink=int8 out"),
        (["wire.grid=48", "schedule.name=buffered", "algorithm.name=topk"], "set schedule.name=synchronous"),
        (["wire.grid=16"], "wire.grid: "),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides, found):
    with pytest.raises(ConfigError) as error:
        resolve("quickstart", overrides)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_the_grid_is_part_of_what_an_experiment_is():
    plain = resolve("quickstart").digest()
    assert resolve("quickstart", ["wire.grid=exact"]).digest() == plain
    assert (
        len({plain, *(resolve("quickstart", [f"wire.grid={bits}"]).digest() for bits in (64, 48, 32))}) == 4
    )


def test_a_cohort_that_is_too_heavy_is_refused_before_anything_starts(tmp_path):
    sampled = {"name": "sampled", "seed": 1, "clients": 400_000, "samples_per_client": 400, "alpha": None}
    config = tiny_federation(tmp_path, partition=sampled, cohort=400_000, wire={"grid": 32})
    with pytest.raises(GridError, match="has 160,000,000"):
        Federation.of(config)
