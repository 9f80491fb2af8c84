"""A round costs what it does, not what was done before it: calls made and bytes read and written, counted."""

import sys
from pathlib import Path

from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from tests.tiny_experiment import tiny_federation

#: Rounds that are counted; ten and more apart, as every tenth round measures more.
EARLY, LATE = 14, 34


class Counter:
    """Counts function calls, and bytes where the system does, between the lines of two rounds."""

    def __init__(self):
        self.calls, self.moved = {}, {}

    def on_line(self, line):
        number = line["round"]
        sys.setprofile(None)
        if number in (EARLY, LATE):
            self.moved[number] = tuple(now - then for now, then in zip(moved(), self._moved, strict=True))
        if number + 1 in (EARLY, LATE):
            self.calls[number + 1], self._moved = 0, moved()
            sys.setprofile(lambda frame, event, argument: self._count(number + 1, event))

    def _count(self, number, event):
        self.calls[number] += event in ("call", "c_call")


def moved():
    """Bytes that this process has read and written so far."""
    counts = Path("/proc/self/io")
    if not counts.is_file():
        return 0, 0
    values = dict(line.split(": ") for line in counts.read_text().splitlines())
    return int(values["rchar"]), int(values["wchar"])


def test_a_late_round_does_what_an_early_one_does(cache, tmp_path):
    # All clients in every round and equal shares, so that rounds have the same work.
    config = tiny_federation(cache, rounds=LATE + 1, cohort=6, checkpoint_every=1, partition={"name": "iid"})
    federation, counter = Federation.of(config), Counter()
    folder = RunFolder.create(tmp_path / "run", config)
    Driver(folder, federation, InlineEngine(federation.setup()), on_line=counter.on_line).run()
    # Less than one call for each round that lies between, and less than a line.
    assert abs(counter.calls[LATE] - counter.calls[EARLY]) < LATE - EARLY
    length = len(folder.rounds_file.read_bytes().splitlines()[EARLY])
    for early, late in zip(counter.moved[EARLY], counter.moved[LATE], strict=True):
        assert abs(late - early) < length
