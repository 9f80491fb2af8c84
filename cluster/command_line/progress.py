"""What a run shows: what is about to run, its rounds as they finish, and what it left.

On a terminal one status line and the last rounds are redrawn in place; elsewhere each round is a plain line.
"""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cluster.command_line.figures import (
    amount,
    duration,
    evaluated,
    fitting,
    megabytes,
    number,
    percent,
    shown,
)
from cluster.configuration.config import Config
from cluster.records.run_folder import RunFolder
from cluster.records.sqlite_store import sqlite_uri
from cluster.workload.objectives import selecting, selects_of

if TYPE_CHECKING:
    from cluster.execution import Result

Line = dict[str, Any]

#: Rounds shown in the table above the status line.
_ROUNDS_SHOWN = 6
#: Runs up to this long print every round where stdout is not a terminal; longer ones a line every 2 s.
_EVERY_LINE_UP_TO = 100
_LINE_INTERVAL_S = 2.0
#: Columns of the table and parts of the status line, by their places, in the order in which a narrow terminal
#: keeps them.
_WANTED, _WANTED_STATUS = (0, 1, 3, 7, 4, 5, 2, 6), (0, 1, 4, 2, 3)
#: Columns that a progress bar is worth drawing in.
_BAR_FROM = 8
#: Rounds whose time the remaining time is estimated from.
_RECENT = 10


class RunDisplay:
    """Shows a run while it works. A context manager; ``on_line`` takes each round's line.

    Args:
        console: Where to draw.
        config: The run's configuration.
        done: Rounds that were done before, of a resumed run.
    """

    def __init__(self, console: Console, config: Config, done: int = 0) -> None:
        self._console, self._done = console, done
        self._last = config.stop_after or config.rounds
        self._start = "preparing data" + (", starting Ray and its actors" * (config.execution == "ray"))
        self._started = self._arrived = time.monotonic()
        self._lines: list[Line] = []
        self._value: float | None = None  # what selects, as it was last evaluated
        self._selects = selecting(config)
        self._config = config
        self._printed_at, self._unprinted = 0.0, 0
        self._spinner = Spinner("dots" if console.encoding.startswith("utf") else "line")
        self._live = Live(get_renderable=self._picture, console=console, refresh_per_second=5, transient=True)

    def __enter__(self) -> RunDisplay:
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        else:
            self._print(f"{self._start} ...")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            # The table of the last rounds stays; a half-drawn start or a status line that has ended does not.
            self._live.stop()
            if self._lines:
                self._console.print(self._table())
        elif self._unprinted:
            self._print_lines()

    def on_line(self, line: Line) -> None:
        """Take in one round's line."""
        self._lines.append(line)
        self._arrived, self._done = time.monotonic(), line["round"]
        self._selects = selecting(self._config, line)
        value = evaluated(line, self._selects)
        self._value = self._value if value is None else value
        if self._console.is_terminal:
            return  # redrawn five times a second by its own thread
        due = self._last <= _EVERY_LINE_UP_TO or self._arrived - self._printed_at >= _LINE_INTERVAL_S
        self._unprinted += 1
        if due or line["round"] == self._last:
            self._print_lines()

    def remaining_s(self) -> float | None:
        """Seconds until the last round is in; None before the first one is.

        Start-up is left out: what counts is the time of recent rounds, since the last line arrived.
        """
        if not self._lines:
            return None
        recent = [line["time/round_s"] for line in self._lines[-_RECENT:]]
        # An evaluated round's line arrives when the next round, which hides its evaluation, is computed too.
        ahead = 1 if evaluated(self._lines[-1], self._selects) is not None else 0
        rounds = max(0, self._last - self._done - ahead)
        return max(0.0, rounds * sum(recent) / len(recent) - (time.monotonic() - self._arrived))

    # ------------------------------------------------------------------------------------- on a terminal

    def _picture(self) -> RenderableType:
        if not self._lines:
            return self._waiting(f"{self._start}, computing round {self._done + 1}")
        if self._done >= self._last:
            status: RenderableType = self._waiting("writing model and pictures, delivering to MLflow")
        else:
            status = self._status()
        refused = refusals(self._lines)
        warnings = [Text(refused, style="yellow", no_wrap=True, overflow="ellipsis")] if refused else []
        return Group(self._table(), *warnings, status)

    def _waiting(self, text: str) -> RenderableType:
        self._spinner.update(text=f"{text}  {duration(time.monotonic() - self._started)}")
        return self._spinner

    def _table(self) -> Table:
        heads = ["round", self._selects.title, "loss", "sparsity", "up MB", "down MB", "seconds"]
        private = self._config.privacy.dp.asked
        rows = [[*heads, *["epsilon"] * private]]
        for line in self._lines[-_ROUNDS_SHOWN:]:
            row = [
                str(line["round"]),
                self._selects.text(evaluated(line, self._selects)),
                number(line["train/loss"], ".3f"),
                percent(line["sparsity/global"]),
                number(line["comm/uplink_bytes"] / 1e6, ".2f"),
                number(line["comm/downlink_bytes"] / 1e6, ".2f"),
                number(line["time/round_s"], ".2f"),
                *([number(line["privacy/epsilon"], ".3g")] if private else []),
            ]
            rows.append(row)
        widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
        places = fitting(widths, _WANTED, self._console.width - 2)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for place in places:
            table.add_column(rows[0][place], justify="right", no_wrap=True)
        for row in rows[1:]:
            table.add_row(*(row[place] for place in places))
        return table

    def _status(self) -> Table:
        line = self._lines[-1]
        sent = f"up {megabytes(line, 'uplink')} down {megabytes(line, 'downlink')} MB{_epsilon(line, 'eps')}"
        passed = duration(time.monotonic() - self._started)
        texts = [
            Text(f"round {self._done}/{self._last}", style="bold"),
            Text(f"{self._selects.title[:3]} {self._selects.text(self._value)}", style="bold green"),
            Text(f"sparse {percent(line['sparsity/global'])}"),
            Text(sent),
            Text(f"{passed} eta {duration(self.remaining_s())}", style="dim"),
        ]
        widths = [len(text) + 1 for text in texts]
        places = fitting(widths, _WANTED_STATUS, self._console.width)
        parts: list[RenderableType] = [texts[place] for place in places]
        bar = self._console.width - sum(widths[place] for place in places) >= _BAR_FROM
        if bar:
            parts.insert(1, ProgressBar(total=self._last, completed=self._done))
        grid = Table.grid(padding=(0, 1), expand=bar)
        for place in range(len(parts)):
            grid.add_column(no_wrap=True, ratio=1 if bar and place == 1 else None)
        grid.add_row(*parts)
        return grid

    # ----------------------------------------------------------------------------------------- elsewhere

    def _print_lines(self) -> None:
        """Print the last round, with the updates refused since the round that was printed before."""
        refused = refusals(self._lines[-self._unprinted :])
        self._print(self._plain(self._lines[-1]) + ("  " + refused if refused else ""))
        self._printed_at, self._unprinted = self._arrived, 0

    def _plain(self, line: Line) -> str:
        width = len(str(self._last))
        left = "" if self._done >= self._last else f"  eta {duration(self.remaining_s())}"
        return (
            f"round {line['round']:>{width}}/{self._last}"
            f"  {self._selects.title} {self._selects.text(evaluated(line, self._selects)):>6}"
            f"  loss {number(line['train/loss'], '.3f')}  sparsity {percent(line['sparsity/global'])}"
            f"  up {megabytes(line, 'uplink')} MB  down {megabytes(line, 'downlink')} MB{_epsilon(line)}"
            f"  simulated {duration(line['time/simulated_s'])}"
            f"  {duration(time.monotonic() - self._started)}{left}"
        )

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)
        self._console.file.flush()


def _epsilon(line: Line, name: str = " epsilon") -> str:
    """What all models so far tell of one client, where they are private."""
    return f" {name} {number(line['privacy/epsilon'], '.3g')}" if "privacy/epsilon" in line else ""


def announce(console: Console, config: Config, folder: Path, title: str) -> None:
    """Say what is about to run, before the seconds that starting takes."""
    declared = config.values("algorithm").items()
    options = ", ".join(f"{key} {_short(value)}" for key, value in declared if value != ())
    section, local = config.partition, config.local
    alpha = "" if section.skew is None else f"(alpha {section.skew:g})"
    last = f", stopping after {config.stop_after}" if config.stop_after else ""
    rows = [
        ("method", f"{config.algorithm.name}  {options}"),
        ("model", " ".join([config.model.name, *(f"{k}={v}" for k, v in config.model.options.items())])),
        (
            "data",
            f"{config.data.path or config.data.name}, {section.name}{alpha} over {section.clients} clients",
        ),
        ("rounds", f"{config.rounds}{last}, {config.cohort} clients each, {local.epochs} local epochs"),
        ("on", place(config)),
        ("folder", shown(folder)),
    ]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for key, value in rows:
        grid.add_row(key, Text(value))
    console.print(Text(title, style="bold"))
    console.print(grid)
    console.file.flush()


def place(config: Config) -> str:
    """Where a configuration runs, as far as it can be told without asking the cluster."""
    device = f"{config.gpus_per_actor:g} GPU" if config.gpus_per_actor else f"{config.cpus_per_actor:g} CPU"
    if config.execution == "inline":
        return f"this process, {config.threads} thread{'s' * (config.threads > 1)}"
    if config.actors is not None:
        count = f"{config.actors} actors"
    elif config.address == "local" and not config.gpus_per_actor:
        count = f"{local_actors(config)} actors"
    else:
        count = "as many actors as fit"
    where = "on this machine" if config.address == "local" else f"at {config.address}"
    return f"Ray {where}, {count} with {device} each"


def local_actors(config: Config) -> int:
    """Actors on a private cluster of this machine's cores: one a core share, at most one a cohort client."""
    if config.execution == "inline":
        return 1
    fitting = int((os.cpu_count() or 1) // config.cpus_per_actor)
    return config.actors or max(1, min(fitting, config.cohort))


def conclude(console: Console, result: Result) -> None:
    """The summary table, and what to do next."""
    summary, folder = result.summary, RunFolder(result.folder)
    config, lines = folder.config(inert=True), folder.rounds()
    selects = selects_of(summary)
    split = "validation" if summary["selected_by"].startswith("val") else "test"
    best = f" (round {summary['best_round']} by {split} {selects.title})"
    kind, final = selects.title, summary[selects.key]
    if final is None:
        kind, final = f"validation {selects.title}", summary[f"val_{selects.key}"]
    console.print()
    console.print(
        Text(
            f"{summary['method']}, seed {summary['seed']}: {summary['rounds']} of {config.rounds} rounds",
            "bold",
        )
        + Text(f"  in {duration(summary['seconds'])}", "dim")
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_row(
        kind,
        Text(selects.text(final), "bold green")
        + Text(f" final, {selects.text(summary[f'best_{selects.key}'])} best{best}", "not bold default"),
    )
    if summary.get("stopped_by"):
        grid.add_row("ended by", str(summary.get("stopped_by")))
    grid.add_row("sparsity", percent(summary["sparsity"]))
    grid.add_row("simulated", f"{duration(summary['simulated_s'])} on the devices' clock")
    if (joules := summary.get("joules")) is not None:
        grid.add_row("energy", f"{amount(joules, 'J')} of the devices")
    console.print(grid)
    costs = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for head in ("", "this run", "dense", "dense is"):
        costs.add_column(head, justify="right" if head else "left", no_wrap=True)
    dense = sum(line["comm/dense_bytes"] for line in lines)
    for name, spent, full, unit in (
        ("upload", summary["uplink_bytes"], dense, "B"),
        ("download", summary["downlink_bytes"], dense, "B"),
        ("training", summary["flops_sparse"], summary["flops_dense"], "FLOP"),
    ):
        ratio = f"{full / spent:.1f}x" if spent else "-"
        costs.add_row(name, amount(spent, unit), amount(full, unit), ratio)
    console.print(costs)
    for warning in (refusals(lines), emptied(lines[-1]["sparsity/layers"])):
        if warning:
            console.print(warning, style="yellow", soft_wrap=True)
    for key, value in _next_steps(config, result):
        console.print(Text(f"{key:<10}", "dim") + Text(value), soft_wrap=True)


def final_text(summary: Mapping[str, Any]) -> str:
    """What selects, with its name, as a result has it: on test data, else on validation data."""
    selects = selects_of(summary)
    final = summary[selects.key]
    if final is None:
        return f"validation {selects.title} {selects.text(summary[f'val_{selects.key}'])}"
    return f"{selects.title} {selects.text(final)}"


def refusals(lines: Sequence[Line]) -> str:
    """How many updates were refused in these rounds, and why those of most; empty where none was."""
    refused = [each for line in lines for each in line.get("clients/refused_list", ())]
    if not refused:
        return ""
    reason = Counter(str(reason) for _, reason in refused).most_common(1)[0][0]
    clients = sorted({client for client, _ in refused})
    named = ", ".join(map(str, clients[:5])) + ", ..." * (len(clients) > 5)
    return (
        f"{len(refused)} update{'s' * (len(refused) > 1)} refused: {reason.partition(chr(10))[0]} "
        f"(client{'s' * (len(clients) > 1)} {named})"
    )


def emptied(sparsities: Sequence[float]) -> str:
    """A warning of layers without any weight, of which a global cut takes those with small weights first."""
    layers = [str(place) for place, sparsity in enumerate(sparsities, 1) if sparsity == 1.0]
    if not layers:
        return ""
    return (
        f"warning: prunable layer {', '.join(layers)} of {len(sparsities)} has no weight left and passes "
        "nothing on; see sparsity_per_layer.csv, and try a lower algorithm.sparsity or other widths"
    )


def _next_steps(config: Config, result: Result) -> list[tuple[str, str]]:
    steps = [("folder", shown(result.folder))]
    uri = config.tracking.uri
    if config.tracking.enabled and uri is not None:
        beside = uri == sqlite_uri(result.folder.parent / "mlflow.db")
        if beside:
            root = shown(result.folder.parent)
            steps.append(("compare", "sparsyfed ui" + ("" if root == "runs" else f" --root {root}")))
        else:
            steps.append(("compare", f"sparsyfed ui --store {shlex.quote(uri)}"))
    if not result.summary.get("tracking_delivered", True):
        sinks = ["MLflow"] * (uri is not None) + list(config.tracking.also)
        behind = (
            f"{' or '.join(sinks)} has not everything yet; deliver it: sparsyfed sync {shown(result.folder)}"
        )
        steps.append(("tracking", behind))
    if result.summary.get("stopped_by"):
        rule = "target" if config.stop.target is not None else "patience"
        steps.append(("go on", f"sparsyfed resume {shown(result.folder)} stop.{rule}=null"))
    elif not result.summary["complete"]:
        ended = config.stop_after is not None and result.summary["rounds"] >= config.stop_after
        on = " stop_after=null" if ended else ""
        steps.append(("go on", f"sparsyfed resume {shown(result.folder)}{on}"))
    return steps


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(value) if isinstance(value, tuple) else str(value)
