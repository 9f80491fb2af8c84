"""Sparsity schedules by hand, and what runs make of them."""

import math

import pytest

from algorithms.core.sparsity_schedules import Cosine, Cubic, SparsitySchedule
from cluster.configuration.trees import ConfigError
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (SparsitySchedule(), [0.8] * 6),
        # Three steps from .2 to .8: what is left of .6 is 1, 8/27, 1/27, 0.
        (Cubic(start=0.2, until=4), [0.2, 0.8 - 0.6 * 8 / 27, 0.8 - 0.6 / 27, 0.8, 0.8, 0.8]),
        # 1, 3/4, 1/4, 0.
        (Cosine(start=0.2, until=4), [0.2, 0.35, 0.65, 0.8, 0.8, 0.8]),
        (Cubic(start=0.2, until=1), [0.8] * 6),
        (Cosine(start=0.9, until=4), [0.8] * 6),
        # By default at half of six rounds: 1, 1/8, 0.
        (Cubic(), [0.0, 0.7, 0.8, 0.8, 0.8, 0.8]),
    ],
)
def test_by_hand(schedule, expected):
    assert [schedule.at(0.8, number, 6) for number in range(1, 7)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", [Cubic(start=0.1, until=7), Cosine(start=0.1, until=7)])
def test_it_rises_to_the_target_and_stays(schedule):
    values = [schedule.at(0.95, number, 20) for number in range(21)]
    assert values == sorted(values)
    assert values[0] == values[1] == pytest.approx(0.1)  # also before round 1
    assert values[7:] == [0.95] * 14


@pytest.mark.parametrize("name", ["topk", "sparsyfed", "fedef", "ef21"])
def test_uploads_follow_it(cache, tmp_path, name):
    ramp = {"name": "cubic", "start": 0.2, "until": 4}
    config = tiny_federation(
        cache, rounds=5, algorithm={"name": name, "sparsity": 0.8}, sparsity_schedule=ramp
    )
    run = run_inline(config, tmp_path / "run")
    expected = [Cubic(start=0.2, until=4).at(0.8, number, 5) for number in range(1, 6)]
    assert [line["sparsity/target"] for line in run.lines] == expected
    # Never more than told; a model that has fewer weights sends fewer.
    for line, told in zip(run.lines, expected, strict=True):
        assert line["sparsity/upload"] >= told - 1e-3
    if name in ("topk", "fedef"):
        assert [line["sparsity/upload"] for line in run.lines] == pytest.approx(expected, abs=1e-3)


def test_a_tiers_own_sparsity_is_a_target_like_any(cache, tmp_path):
    tiers = {"a": {"share": 0.5, "sparsity": 0.5}, "b": {"share": 0.5, "sparsity": 0.9}}
    config = tiny_federation(
        cache,
        rounds=2,
        cohort=6,
        algorithm={"name": "topk", "sparsity": 0.5},
        devices={"tiers": tiers},
        sparsity_schedule={"name": "cosine", "until": 3},
    )
    run = run_inline(config, tmp_path / "run")
    layout = run.driver.layout
    for number, share in ((1, 0.0), (2, 0.5)):
        densities = sorted(
            sum(int(part.sum()) for part in support.values()) / layout.prunable_size if support else 1.0
            for (n, _), (_, support) in run.uploads.items()
            if n == number
        )
        assert densities == pytest.approx([1 - 0.9 * share] * 3 + [1 - 0.5 * share] * 3, abs=2e-3)


def test_interrupted_in_mid_flight_it_is_the_same(cache, tmp_path):
    """Buffered rounds restore a client's sparsity from the version that it was sent."""
    from cluster.federation import Federation
    from cluster.records.run_folder import RunFolder
    from tests.cluster.records.interrupted_runs import assert_same_run, drive

    config = tiny_federation(
        cache,
        rounds=5,
        checkpoint_every=1,
        algorithm={"name": "topk", "sparsity": 0.8},
        schedule={"name": "buffered", "buffer": 2, "concurrency": 3},
        sparsity_schedule={"name": "cubic", "until": 5},
    )
    federation = Federation.of(config)
    whole, cut = (RunFolder.create(tmp_path / name, config) for name in ("whole", "cut"))
    drive(whole, federation)
    drive(cut, federation, killed_at=3)
    drive(cut, federation)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_method_that_does_not_follow_refuses_it(cache):
    with pytest.raises(ConfigError, match=r"fixed_mask does not cut .* with ef21, fedef, sparsyfed, topk"):
        tiny_federation(cache, algorithm={"name": "fixed_mask"}, sparsity_schedule={"name": "cubic"})


def test_the_default_leaves_the_hash_alone(cache):
    config = tiny_federation(cache)
    assert config.digest() == tiny_federation(cache, sparsity_schedule={"name": "constant"}).digest()
    topk = {"name": "topk", "sparsity": 0.8}
    ramped = tiny_federation(cache, algorithm=topk, sparsity_schedule={"name": "cubic"})
    assert ramped.digest() != tiny_federation(cache, algorithm=topk).digest()
    assert math.isclose(ramped.ramp.at(0.8, 9, 2), 0.8)
