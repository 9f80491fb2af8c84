"""The table of a comparison: means with 95 % intervals over seeds, and which values are really the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cluster.compare.groups import Group, Grouped, group_runs
from cluster.compare.reading import Run, Series
from cluster.statistics import (
    SIGNIFICANCE,
    Interval,
    holm,
    mean_interval,
    paired_p_value,
    welch_p_value,
)

#: "best": significantly better than all it competes with; "tied": not distinguishable from the best mean.
Mark = Literal["best", "tied", ""]

_PAGE_COLUMNS = 7

MEGA, GIGA, HOUR = 1e6, 1e9, 3600.0


@dataclass(frozen=True)
class Column:
    """One figure of a run.

    Attributes:
        key: Its name in CSV files.
        header: Its name in print, with its unit.
        of: Computes it from a run; None where the run lacks what it takes.
        better: What counts as better; None where it is no contest.
        digits: Decimals in print.
    """

    key: str
    header: str
    of: Callable[[Run], float | None]
    better: Literal["higher", "lower"] | None = None
    digits: int = 1


@dataclass(frozen=True)
class Cell:
    """One figure of a group: by seed, its interval, and its mark; the interval is None without values."""

    values: Mapping[str, float]
    interval: Interval | None
    mark: Mark = ""
    adjusted: float = math.nan


@dataclass(frozen=True)
class Table:
    """Cells by group (in order) and column; ``target`` is the accuracy whose cost is a column."""

    groups: tuple[Group, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]
    target: float | None

    @classmethod
    def of(cls, groups: Sequence[Group], target: float | None = None) -> Table:
        """Compute it.

        Args:
            groups: The groups compared.
            target: Accuracy in [0, 1] whose cost in bytes is a column; by default the highest multiple of
                5 % that every run of half of the groups reaches.
        """
        if target is None:
            target = default_target(groups)
        columns, by_column = [], []
        for column in columns_for(target):
            values = [_values(group, column) for group in groups]
            if any(values):
                columns.append(column)
                by_column.append(_cells(groups, column, values))
        return cls(tuple(groups), tuple(columns), tuple(zip(*by_column, strict=True)), target)

    @property
    def parts(self) -> list[Table]:
        """The same in tables that fit a page: all groups, at most :data:`_PAGE_COLUMNS` columns each."""
        starts = range(0, len(self.columns), _PAGE_COLUMNS)
        return [
            replace(
                self,
                columns=self.columns[start : start + _PAGE_COLUMNS],
                cells=tuple(row[start : start + _PAGE_COLUMNS] for row in self.cells),
            )
            for start in starts
        ]

    @property
    def marks(self) -> frozenset[Mark]:
        """Which marks there are."""
        return frozenset(cell.mark for row in self.cells for cell in row if cell.mark)


@dataclass(frozen=True)
class Comparison:
    """Groups and their table, and where they come from in words.

    Attributes:
        title: Heads the report.
        source: Which runs were asked for.
        grouped: The groups, and the runs left out.
        table: Their table.
    """

    title: str
    source: str
    grouped: Grouped
    table: Table

    @classmethod
    def of(
        cls, runs: Sequence[Run], source: str, *, after: int | None = None, target: float | None = None
    ) -> Comparison:
        """Group runs and compute their table; see :func:`group_runs` and :meth:`Table.of`."""
        grouped = group_runs(runs, after=after)
        if after is not None:
            source += f", after round {after}"
        shared = grouped.shared
        data = Path(shared.get("data.path") or shared.get("data.name", "")).name
        partition = shared.get("partition.name", "")
        if partition in ("lda", "dirichlet") and "partition.alpha" in shared:
            partition += f" {shared['partition.alpha']}"
        title = "Comparison" + "".join(f", {text}" for text in (data, partition) if text)
        return cls(title, source, grouped, Table.of(grouped.groups, target))


def columns_for(target: float | None) -> tuple[Column, ...]:
    """Every column that there may be, in order."""
    cost = () if target is None else (_cost_column(target),)
    return (
        Column("accuracy", "accuracy (%)", _percent("test/accuracy"), "higher"),
        Column("best_accuracy", "best (%)", _best_accuracy),
        Column("clients_accuracy", "clients' mean (%)", _percent("clients/accuracy_mean"), "higher"),
        Column("clients_after", "after local (%)", _percent("clients/accuracy_mean_after"), "higher"),
        Column("worst_decile", "worst decile (%)", _percent("clients/accuracy_worst_decile"), "higher"),
        *cost,
        Column("sparsity", "sparsity (%)", _percent("sparsity/global")),
        Column("uplink_mb", "MB up", _last("comm/uplink_bytes_total", 1 / MEGA), digits=2),
        Column("downlink_mb", "MB down", _last("comm/downlink_bytes_total", 1 / MEGA), digits=2),
        Column("gflop", "GFLOP", _last("flops/sparse_total", 1 / GIGA), digits=0),
        Column("simulated_hours", "simulated h", _last("time/simulated_s", 1 / HOUR), digits=2),
        Column("regrowth", "regrowth (‰)", _mean("masks/regrowth_share", 1000), digits=2),
        Column(
            "client_regrowth", "client regrowth (‰)", _mean("masks/client_regrowth_share", 1000), digits=2
        ),
        Column("consensus", "consensus", _mean("masks/consensus"), digits=3),
    )


def total_bytes(run: Run) -> Series | None:
    """Bytes up and down so far, where both were measured."""
    up, down = run.series.get("comm/uplink_bytes_total"), run.series.get("comm/downlink_bytes_total")
    if up is None or down is None:
        return None
    rounds, at_up, at_down = np.intersect1d(up.rounds, down.rounds, return_indices=True)
    return Series(rounds, up.values[at_up] + down.values[at_down]) if len(rounds) else None


def bytes_to_reach(run: Run, target: float) -> float | None:
    """Bytes up and down until test accuracy first was at least ``target``; None where it never was."""
    accuracy, cost = run.series.get("test/accuracy"), total_bytes(run)
    if accuracy is None or cost is None:
        return None
    there = accuracy.rounds[accuracy.values >= target]
    at = np.flatnonzero(cost.rounds == there[0]) if len(there) else there
    return float(cost.values[at[0]]) if len(at) else None


def default_target(groups: Sequence[Group]) -> float | None:
    """The highest multiple of 5 % that every run of half of the groups reaches; None where that is 0."""
    reached = sorted(
        min(float(run.series["test/accuracy"].values.max()) for run in group.runs)
        for group in groups
        if all("test/accuracy" in run.series for run in group.runs)
    )
    if not reached:
        return None
    return math.floor(reached[len(reached) // 2] * 20 + 1e-9) / 20 or None


# ------------------------------------------------------------------------------------------ the contest


def _cells(groups: Sequence[Group], column: Column, values: Sequence[Mapping[str, float]]) -> list[Cell]:
    cells = [Cell(own, mean_interval(list(own.values())) if own else None) for own in values]
    if column.better is None:
        return cells
    contests: dict[tuple[str, ...], list[int]] = {}
    for place, group in enumerate(groups):
        # A cost that some seeds never paid has no mean to compare.
        if len(values[place]) == len(group.runs):
            contests.setdefault(group.contest, []).append(place)
    for places in contests.values():
        for place, (mark, p) in _marks([values[i] for i in places], column.better).items():
            old = cells[places[place]]
            cells[places[place]] = Cell(old.values, old.interval, mark, p)
    return cells


def _marks(
    values: Sequence[Mapping[str, float]], better: Literal["higher", "lower"]
) -> dict[int, tuple[Mark, float]]:
    """Mark the best mean and those not distinguishable from it; with their adjusted p-values against it."""
    if len(values) < 2:
        return {}
    means = [float(np.mean(list(own.values()))) for own in values]
    best = int(np.argmax(means) if better == "higher" else np.argmin(means))
    others = [place for place in range(len(values)) if place != best]
    adjusted = dict(zip(others, holm([p_value(values[best], values[i]) for i in others]), strict=True))
    # NaN, where nothing could be tested, distinguishes nothing.
    tied = [place for place in others if not adjusted[place] <= SIGNIFICANCE]
    marks: dict[int, tuple[Mark, float]] = {place: ("", adjusted[place]) for place in others}
    marks |= {place: ("tied", adjusted[place]) for place in tied}
    marks[best] = ("tied" if tied else "best", math.nan)
    return marks


def p_value(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """That two groups have one mean: paired over the seeds they share, by Welch's test where they share none.

    Args:
        first: Values by seed.
        second: Values by seed.

    Returns:
        The two-sided p-value; NaN where too few seeds are there to tell.
    """
    shared = [seed for seed in first if seed in second]
    if len(shared) >= 2:
        return paired_p_value([first[seed] for seed in shared], [second[seed] for seed in shared])
    return welch_p_value(list(first.values()), list(second.values()))


# ------------------------------------------------------------------------------------ what a run amounts to


def _values(group: Group, column: Column) -> dict[str, float]:
    computed = {run.seed: column.of(run) for run in group.runs}
    return {seed: value for seed, value in computed.items() if value is not None}


def _last(key: str, scale: float = 1.0) -> Callable[[Run], float | None]:
    return lambda run: scale * float(run.series[key].values[-1]) if key in run.series else None


def _percent(key: str) -> Callable[[Run], float | None]:
    return _last(key, 100.0)


def _mean(key: str, scale: float = 1.0) -> Callable[[Run], float | None]:
    """Mean over the rounds but the first, which starts from a dense model."""

    def of(run: Run) -> float | None:
        if key not in run.series:
            return None
        values = run.series[key].values[run.series[key].rounds > 1]
        return scale * float(values.mean()) if len(values) else None

    return of


def _best_accuracy(run: Run) -> float | None:
    """Test accuracy of the round with the best validation accuracy, of the best round without validation."""
    accuracy = run.series.get("test/accuracy")
    if accuracy is None:
        return None
    chosen_by = run.series.get("val/accuracy", accuracy)
    best = chosen_by.rounds[int(np.argmax(chosen_by.values))]
    at = np.flatnonzero(accuracy.rounds == best)
    return 100 * float(accuracy.values[at[0]]) if len(at) else None


def _cost_column(target: float) -> Column:
    def of(run: Run) -> float | None:
        cost = bytes_to_reach(run, target)
        return None if cost is None else cost / MEGA

    return Column("mb_to_target", f"MB to {100 * target:g} %", of, "lower")
