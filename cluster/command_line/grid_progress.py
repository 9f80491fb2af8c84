"""What a grid shows while it works: a row for each run in progress, a line for each that has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from cluster.command_line.figures import duration, evaluated, percent
from cluster.command_line.progress import final_text
from cluster.configuration.config import Config
from cluster.execution import Result
from cluster.grid import Grid, Outcome, table
from cluster.workload.objectives import selecting

#: Seconds between two lines of one run where stdout is not a terminal.
_LINE_INTERVAL_S = 10.0


class GridDisplay:
    """Shows a grid while it works. A context manager; ``started`` and ``ended`` are called from any thread.

    Args:
        console: Where to draw.
        grid: The runs.
        complete: How many of them were complete before.
    """

    def __init__(self, console: Console, grid: Grid, complete: int = 0) -> None:
        self._console, self._grid, self._done = console, grid, complete
        self._lock = threading.Lock()
        self._begun: dict[str, float] = {}
        self._rows: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            transient=True,
        )

    def __enter__(self) -> GridDisplay:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def started(self, name: str, config: Config) -> Callable[[dict[str, Any]], None]:
        """Take in that a run starts; returns what takes its lines."""
        last = config.stop_after or config.rounds
        with self._lock:
            self._begun[name] = time.monotonic()
            self._rows[name] = self._progress.add_task(name, total=last, state="starting")
        if not self._console.is_terminal:
            self._print(f"{name}  started")
        printed, state, selects = time.monotonic(), "starting", selecting(config)

        def on_line(line: dict[str, Any]) -> None:
            nonlocal printed, state
            if (value := evaluated(line, selects)) is not None:
                state = f"{selects.title} {selects.text(value)}  sparsity {percent(line['sparsity/global'])}"
            self._progress.update(self._rows[name], completed=line["round"], state=state)
            now = time.monotonic()
            if not self._console.is_terminal and now - printed >= _LINE_INTERVAL_S:
                printed = now
                self._print(f"{name}  round {line['round']}/{last}  {state}")

        return on_line

    def ended(self, name: str, result: Result | Exception) -> None:
        """Take in a run's result, or why it failed."""
        with self._lock:
            self._done += 1
            place = f"[{self._done}/{len(self._grid.runs)}]"
        self._progress.remove_task(self._rows[name])
        took = duration(time.monotonic() - self._begun[name])
        if isinstance(result, Exception):
            self._print(f"{place} {name}  failed after {took}: {_first_line(result)}")
        else:
            summary = result.summary
            self._print(
                f"{place} {name}  {summary['rounds']} rounds in {took}  "
                f"{final_text(summary)}  sparsity {percent(summary['sparsity'])}"
            )

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)
        self._console.file.flush()


def conclude_grid(console: Console, outcome: Outcome) -> None:
    """The table of all runs."""
    header, *rows = table(outcome.there)
    shown = Table(*header)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
