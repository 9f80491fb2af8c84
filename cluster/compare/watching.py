"""Comparing runs while they go on: all of them as they were after the round that the slowest has reached."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.compare.reading import ComparisonError, Run, read_folders
from cluster.compare.table import Comparison, target_of

#: Seconds between two looks at the runs.
LOOK_S = 5.0

#: Seconds after which a run without a new round counts for interrupted, and holds up nobody.
SILENT_S = 900.0


def common_round(runs: Sequence[Run], now: float) -> int | None:
    """The last round that all have reached, of those that go on; None where none does.

    Args:
        runs: Read from their folders.
        now: Unix time, seconds.
    """
    going = [run.reached for run in runs if _goes_on(run, now) and run.reached]
    return min(going) if going else None


def watch(folders: Sequence[Path], source: str, target: float | None = None) -> Iterator[Comparison | str]:
    """A comparison whenever there is something new, until every run has ended or falls silent.

    Args:
        folders: Of runs, or folders of them.
        source: What they are, in words.
        target: See :func:`target_of`.

    Yields:
        The comparison, or why there is none yet.
    """
    seen: object = None
    while True:
        now, news = time.time(), seen
        try:
            runs = read_folders(folders)
        except ComparisonError as error:  # none has begun
            runs, news = [], str(error)
            if news != seen:
                yield str(error)
        goal = target_of(runs, target)
        if runs and not any(_goes_on(run, now) for run in runs):
            return
        if runs:
            news = [(run.place, run.reached, run.measures is None) for run in runs]
        if runs and news != seen:
            try:
                yield Comparison.of(runs, source, after=common_round(runs, now), target=goal)
            except ComparisonError as error:  # none has a round
                yield str(error)
        seen = news
        time.sleep(LOOK_S)


def _goes_on(run: Run, now: float) -> bool:
    """Whether a run has no result yet and showed a sign of life."""
    lines = Path(run.place) / "rounds.jsonl"
    signs = [path for path in (lines, lines.with_name("config.yaml")) if path.exists()]
    return run.measures is None and any(now - path.stat().st_mtime < SILENT_S for path in signs)
