"""The turn itself: which items, in which order, each within its share of the minutes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from cluster.configuration.identity import code_digest
from cluster.references import UserError
from cluster.workload.shards import parquet_files
from tests.benchmarks.gpu import checks, paper, report, speed
from tests.benchmarks.gpu.worker import Found, Item, Outcome, Worker
from tests.benchmarks.report import machine

#: Share of the minutes by whose end a part is over; what a part leaves goes to the next.
ENDS = {"checks": 0.25, "speed": 0.6, "paper": 1.0}

#: Seconds kept for writing and leaving.
MARGIN_S = 6.0


class GpuBenchmarkError(UserError):
    """The benchmark cannot begin; the message says what to do."""


@dataclass(frozen=True)
class Options:
    """What the command line says; the minutes begin with this process where nothing else is said."""

    minutes: float
    data: Path | None
    runs: Path
    device: str
    began: float | None = None


def run(options: Options) -> int:
    """Measure; returns the exit status: 0, 1 where a check failed, 128 + the signal that ended it."""
    total = 60 * options.minutes
    began = time.monotonic() - (time.time() - (options.began or psutil.Process().create_time()))
    deadline = began + total - MARGIN_S
    _check(options)
    # Where a process is killed, Python's tracker of its semaphores would complain about them at the end.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    options.runs.mkdir(parents=True, exist_ok=True)
    name = "gpu.json" if options.device == "cuda" else "rehearsal.json"
    book = report.Book(options.runs / name, _turn(options))
    print(f"until {options.minutes:g} minutes are over; results go to {book.path} and .md", flush=True)
    with _signals() as caught:
        worker = Worker(options.device, lambda: bool(caught))
        decoder = Worker(options.device, lambda: bool(caught))
        try:
            if options.data is not None:
                decoder.begin(_decoding(options))
            for part, items in _parts(options, book):
                end = began + ENDS[part] * total
                for item in items:
                    # Without the device nothing can be told from an earlier turn.
                    until = deadline if item.key == "device" else min(end, deadline)
                    _one(item, until, worker, book, caught)
        finally:
            worker.close()
            decoder.close()
            book.turn["ended"] = _now() + (f", by {signal.Signals(caught[0]).name}" if caught else "")
            book.write()
    _say_what_is_missing(book)
    if caught:
        return 128 + caught[0]
    return int(any(result["state"] == "failed" for result in book.results.values()))


def _check(options: Options) -> None:
    """Refuse what cannot work, before anything starts."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise GpuBenchmarkError(
            f"--device cuda: torch {torch.__version__} sees no GPU here; --device cpu rehearses on the CPU"
        )
    if options.data is not None:
        for split in ("train", "test"):
            parquet_files(options.data, split)


def _turn(options: Options) -> dict[str, Any]:
    about = machine(gpu=False)
    kept = ("processor", "cores", "torch", "commit")
    turn = {"began": _now(), "minutes": options.minutes, **{key: about[key] for key in kept}}
    return {**turn, "code": code_digest()}


def _parts(options: Options, book: report.Book) -> Iterator[tuple[str, Iterator[Item]]]:
    yield "checks", iter(checks.items())
    yield "speed", iter(speed.items(options.device))
    settings = {method: paper.fastest(book.results, method) for method in report.METHODS}
    yield "paper", iter(paper.items(options.runs.absolute(), options.data, settings))


def _one(item: Item, until: float, worker: Worker, book: report.Book, caught: list[int]) -> None:
    if book.done(item.key) and item.part != "paper":
        return
    left = until - time.monotonic()
    if caught:
        outcome = Outcome("left out", "stopped by a signal before")
    elif left < item.seconds:
        outcome = Outcome("left out", "the time of its part was over")
    else:
        outcome = worker.run(
            item, until, lambda found: book.put(item.key, item.part, Outcome("going on", "", found))
        )
    if "device" in outcome.found:
        book.on(outcome.found["device"])
    book.put(item.key, item.part, outcome)
    if outcome.state != "left out":
        print(f"{outcome.seconds:6.1f} s  {item.key}: {_in_short(outcome)}", flush=True)


def _in_short(outcome: Outcome) -> str:
    found: Found = outcome.found
    known = {"steps/s": "{:,.1f} steps/s", "client ms": "{:,.1f} ms a client", "MiB": "{:,.0f} MiB"}
    known |= {"found": "{}", "device": "{}", "rounds": "round {}", "seconds a round": "{:.2f} s a round"}
    words = [form.format(found[key]) for key, form in known.items() if key in found]
    if found.get("accuracy"):
        words.append(f"accuracy {100 * found['accuracy'][-1][1]:.1f} %")
    state = [] if outcome.state == "done" else [f"{outcome.state}, {outcome.why}"]
    return "; ".join([*state, *words])


def _decoding(options: Options) -> Item:
    arguments = {"data": str(options.data)}
    return Item("decoding", "paper", "tests.benchmarks.gpu.paper:decode", arguments)


def _say_what_is_missing(book: report.Book) -> None:
    states: dict[str, list[str]] = {}
    for key, result in book.results.items():
        if result["state"] != "done":
            states.setdefault(result["state"], []).append(key)
    for state, keys in states.items():
        shown = "; ".join(keys[:3]) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")
        print(f"{state}: {len(keys)} ({shown})")
    print(
        f"table     {book.path.with_suffix('.md')}\npicture   sparsyfed bench gpu --draw {book.path}",
        flush=True,
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came; a second one ends at once."""
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        print(f"ending: {signal.Signals(number).name}", file=sys.stderr, flush=True)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
