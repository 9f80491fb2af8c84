"""A comparison of runs that go on is drawn anew with every round, all as they were after the same one."""

import json
import os
import time
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.compare import Comparison, watch, watching
from tests.cluster.compare.made import line, write_run


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LOOK_S", 0.01)


def end(run: Path) -> None:
    (run / "result.json").write_text(json.dumps({"complete": True, "measures": {}}))


def go_on(run: Path, number: int, accuracy: float) -> None:
    with (run / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(line(number, accuracy)) + "\n")


def accuracies(comparison: Comparison) -> dict[str, float]:
    """Of each method, the mean of its runs as they are compared."""
    return {
        group.runs[0].params["algorithm.name"]: group.runs[0].series["test/accuracy"].values[-1]
        for group in comparison.table.groups
    }


def test_all_are_compared_after_the_round_that_the_slowest_has_reached(tmp_path: Path) -> None:
    done = write_run(tmp_path / "a", [0.2, 0.4, 0.6], "algorithm.name=topk")
    end(done)
    slow = write_run(tmp_path / "b", [0.1], "algorithm.name=flash", rounds=3)
    (tmp_path / "c").mkdir()  # no run yet
    seen = watch([tmp_path], "runs")
    first = next(seen)
    assert isinstance(first, Comparison)
    assert first.source == "runs, after round 1"
    assert accuracies(first) == {"topk": 0.2, "flash": 0.1}
    go_on(slow, 2, 0.3)
    second = next(seen)
    assert isinstance(second, Comparison)
    assert second.source == "runs, after round 2"
    assert accuracies(second) == {"topk": 0.4, "flash": 0.3}
    go_on(slow, 3, 0.5)
    end(slow)
    with pytest.raises(StopIteration):
        next(seen)


def test_nothing_new_is_not_drawn_and_runs_may_be_yet_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch([tmp_path], "runs")
    assert "no run lies in" in str(next(seen))
    looks = []

    def look(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            write_run(tmp_path / "a", [0.2], "algorithm.name=topk", rounds=3)

    monkeypatch.setattr(watching.time, "sleep", look)
    assert isinstance(next(seen), Comparison)
    assert len(looks) == 3


def test_a_run_that_fell_silent_holds_up_nobody(tmp_path: Path) -> None:
    dead = write_run(tmp_path / "a", [0.2], "algorithm.name=topk", rounds=3)
    write_run(tmp_path / "b", [0.1, 0.3], "algorithm.name=flash", rounds=3)
    long_ago = time.time() - 2 * watching.SILENT_S
    for name in ("rounds.jsonl", "config.yaml"):
        os.utime(dead / name, (long_ago, long_ago))
    (found,) = [next(watch([tmp_path], "runs"))]
    assert isinstance(found, Comparison)
    assert found.source == "runs, after round 2"
    assert accuracies(found) == {"flash": 0.3}


def test_the_command_ends_with_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end(write_run(tmp_path / "runs" / "a", [0.2, 0.4], "algorithm.name=topk"))
    output = ["--output", str(tmp_path / "report")]
    assert main(["compare", str(tmp_path / "runs"), "--watch", *output]) == 0
    assert (tmp_path / "report" / "report.html").exists()
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "runs"), "--watch", "--round", "1", *output])
    assert "--watch takes folders of runs" in capsys.readouterr().err
