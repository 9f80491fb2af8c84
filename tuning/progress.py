"""What a study shows while it goes on, and the table at its end.

On a terminal a table of the methods is redrawn in place; elsewhere every run that ends is a plain line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from cluster.command_line.figures import duration, shown
from cluster.command_line.progress import place
from tuning import dashboard
from tuning.coordinator import Job, Outcome
from tuning.protocol import MethodResult
from tuning.report import Table
from tuning.storage import JOURNAL
from tuning.study import Plan

Line = dict[str, Any]


class StudyDisplay:
    """Shows a study while it works. A context manager, and the coordinator's display.

    Args:
        console: Where to draw.
        plan: The study.
        known: What was known of every method before.
    """

    def __init__(self, console: Console, plan: Plan, known: Mapping[str, MethodResult]) -> None:
        self._console, self._plan = console, plan
        self._started = time.monotonic()
        self._runs: dict[Job, Line | None] = {}
        self._seconds = 0.0  # of the runs that ended here
        self._ended = 0
        self._trials = {label: len(r.tried) - r.count("running") for label, r in known.items()}
        self._finals = {label: len(r.finals) for label, r in known.items()}
        self._best = {label: (r.best.value, r.best.number) if r.best else None for label, r in known.items()}
        self._odd = {label: [r.count("pruned"), r.count("failed")] for label, r in known.items()}
        self._begun: dict[Job, float] = {}
        self._live = Live(get_renderable=self._picture, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> StudyDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def started(self, job: Job) -> None:
        """A run begins, or goes on."""
        self._runs[job], self._begun[job] = None, time.monotonic()

    def line(self, job: Job, line: Line) -> None:
        """A round of a run is done."""
        self._runs[job] = line

    def ended(self, job: Job, outcome: Outcome, value: float | None, reason: str | None) -> None:
        """A run is done."""
        self._runs.pop(job, None)
        seconds = time.monotonic() - self._begun.pop(job)
        self._seconds, self._ended = self._seconds + seconds, self._ended + 1
        if job.trial is None:
            self._finals[job.label] += outcome == "finished"
            count, of, split = self._finals[job.label], len(self._plan.final_seeds), "test"
        else:
            self._trials[job.label] += 1
            count, of, split = self._trials[job.label], self._expected(job.label), "validation"
            if outcome == "finished" and value is not None:
                best = self._best[job.label]
                merit = self._plan.selects.merit
                if best is None or best[0] is None or merit(value) > merit(best[0]):
                    self._best[job.label] = (value, job.number)
            elif outcome != "finished":
                self._odd[job.label][outcome == "failed"] += 1
        if self._console.is_terminal:
            return
        known, shown = self._best[job.label], self._plan.selects.text
        best_text = f"  best {shown(known[0])} (trial {known[1]})" if known and job.trial else ""
        text = reason if outcome == "failed" else f"{split} {shown(value)}"
        self._console.print(
            f"{job.shown:<24} {outcome:<8} {text}{best_text}  {count}/{of}  {duration(seconds)}"
            f"  eta {duration(self.remaining_s())}",
            soft_wrap=True,
        )
        self._console.file.flush()

    def remaining_s(self) -> float | None:
        """Seconds until the study is complete, from the mean time of its runs; None before the first."""
        if not self._ended:
            return None
        left = sum(max(0, self._expected(label) - done) for label, done in self._trials.items())
        left += sum(len(self._plan.final_seeds) - done for done in self._finals.values())
        # Runs side by side: what they took in all, over the time that went by, is how many there were.
        elapsed = time.monotonic() - self._started
        side_by_side = max(1.0, self._seconds / elapsed)
        return left * self._seconds / self._ended / side_by_side

    def _expected(self, label: str) -> int:
        return self._plan.section.trials if self._plan.contenders[label].space else 1

    def _picture(self) -> RenderableType:
        table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for head in ("method", "trials", "pruned", "failed", "best validation", "final seeds", "running"):
            table.add_column(head, justify="left" if head in ("method", "running") else "right", no_wrap=True)
        for label, done in self._trials.items():
            best, running = self._best[label], [job for job in self._runs if job.label == label]
            now = ", ".join(self._now(job) for job in running)
            table.add_row(
                label,
                f"{done}/{self._expected(label)}",
                *(str(count) if count else "" for count in self._odd[label]),
                f"{self._plan.selects.text(best[0])} (trial {best[1]})" if best else "-",
                f"{self._finals[label]}/{len(self._plan.final_seeds)}",
                now,
            )
        elapsed = duration(time.monotonic() - self._started)
        return Group(table, Text(f"{elapsed}  eta {duration(self.remaining_s())}", "dim"))

    def _now(self, job: Job) -> str:
        line = self._runs[job]
        name = f"trial {job.number}" if job.trial else f"seed {job.config.seed}"
        return f"{name} {line['round'] if line else 0}/{job.config.rounds}"


def announce(console: Console, plan: Plan, folder: Path, title: str) -> None:
    """Say what is about to be tuned."""
    section, base = plan.section, plan.base
    console.print(Text(title, style="bold"))
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    shared = ", ".join(section.shared) or "nothing"
    rows = [
        (
            "budget",
            f"{section.trials} trials of {base.rounds} rounds a method, {plan.budget:,} client-rounds",
        ),
        ("search", f"{section.sampler.name}, pruner {section.pruner.name}, {shared} tuned for all alike"),
        ("final", f"the best of each on seeds {', '.join(map(str, plan.final_seeds))}"),
        ("on", place(base)),
        ("folder", shown(folder)),
    ]
    for label, contender in plan.contenders.items():
        space = [f"{key.removeprefix('algorithm.')} {d.describe()}" for key, d in contender.space.items()]
        rows.append((label, "; ".join(space) or "nothing to tune: one configuration"))
    for key, value in rows:
        grid.add_row(key, Text(value))
    console.print(grid)
    _row(console, "watch", dashboard.command(folder, JOURNAL, section.storage))
    console.file.flush()


def conclude(console: Console, table: Table, folder: Path, trials: str, go_on: str | None) -> None:
    """The final table, and what to do next.

    Args:
        console: Where to show it.
        table: The table.
        folder: The study's folder.
        trials: The command that shows its trials.
        go_on: The command that goes on with it; None where there is nothing left.
    """
    if table.rows:
        rich = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for column, head in enumerate(table.header):
            rich.add_column(head, no_wrap=column < len(table.header) - 1)
        for row in table.rows:
            rich.add_row(*row)
        console.print()
        console.print(rich)
        for note in table.notes:
            console.print(Text(note, "dim"))
    steps = [("report", f"{shown(folder / 'report' / 'report.md')}, tables and pictures beside it")]
    steps.append(("trials", trials))
    if go_on is not None:
        steps.append(("go on", go_on))
    for key, value in steps:
        _row(console, key, value)


def _row(console: Console, key: str, value: str) -> None:
    console.print(Text(f"{key:<10}", "dim") + Text(value), soft_wrap=True)
