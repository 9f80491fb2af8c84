"""The table of a comparison: means with 95 % intervals over seeds, and which are worse than the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cluster.compare.contest import Contest, Verdict, contest
from cluster.compare.groups import Group, Grouped, group_runs
from cluster.compare.measures import differences, newest, outdated
from cluster.compare.reading import Run, Series
from cluster.statistics import Interval, mean_interval

_PAGE_COLUMNS = 7

MEGA, GIGA, HOUR = 1e6, 1e9, 3600.0

#: What counts as better; None where it is no contest.
Better = Literal["higher", "lower"] | None


@dataclass(frozen=True)
class Column:
    """One figure of a run.

    Attributes:
        key: Its name in CSV files.
        header: Its name in print, with its unit.
        of: Computes it from a run; None where the run lacks what it takes.
        metrics: What it is computed from.
        better: What counts as better; None where it is no contest.
        digits: Decimals in print.
    """

    key: str
    header: str
    of: Callable[[Run], float | None]
    metrics: tuple[str, ...]
    better: Better = None
    digits: int = 1


@dataclass(frozen=True)
class Cell:
    """One figure of a group.

    Attributes:
        values: By seed.
        interval: Their mean and its 95 % interval; None without values.
        verdict: Against the best of those it competes with.
        adjusted: Adjusted p-value of being worse than the best; NaN without a verdict.
        outdated: Whether it was measured by an older rule than others of its column.
    """

    values: Mapping[str, float]
    interval: Interval | None
    verdict: Verdict = ""
    adjusted: float = math.nan
    outdated: bool = False


@dataclass(frozen=True)
class Table:
    """Cells by group (in order) and column.

    Attributes:
        groups: Its rows.
        columns: Its columns.
        cells: By row and column.
        target: The accuracy whose cost is a column; None where there is none.
        contests: Those for accuracy.
    """

    groups: tuple[Group, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]
    target: float | None
    contests: tuple[Contest, ...]

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
        columns, by_column, contests = [], [], {}
        versions = newest(run for group in groups for run in group.runs)
        for column in columns_for(target):
            values = [_values(group, column) for group in groups]
            if any(values):
                columns.append(column)
                measured = [[run for run in group.runs if run.seed in own]
                            for group, own in zip(groups, values, strict=True)]  # fmt: skip
                old = [outdated(runs, column.metrics, versions) for runs in measured]
                cells, contests[column.key] = _cells(groups, column, values, old)
                by_column.append(cells)
        cells_of = tuple(zip(*by_column, strict=True))
        return cls(tuple(groups), tuple(columns), cells_of, target, tuple(contests.get("accuracy", ())))

    @property
    def parts(self) -> list[Table]:
        """The same in tables that fit a page: all groups, at most :data:`_PAGE_COLUMNS` columns each."""
        places = range(len(self.columns))
        return [self.only(places[start : start + _PAGE_COLUMNS]) for start in places[::_PAGE_COLUMNS]]

    def only(self, places: Sequence[int]) -> Table:
        """The same with the columns at these places alone."""
        cells = tuple(tuple(row[place] for place in places) for row in self.cells)
        return replace(self, columns=tuple(self.columns[place] for place in places), cells=cells)

    @property
    def verdicts(self) -> frozenset[Verdict]:
        """Which verdicts there are."""
        return frozenset(cell.verdict for row in self.cells for cell in row if cell.verdict)

    @property
    def differing_rules(self) -> list[str]:
        """A sentence for each measure whose rule is not the same in all runs."""
        return differences([run for group in self.groups for run in group.runs])


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
        _last("accuracy", "accuracy (%)", "test/accuracy", 100, better="higher"),
        Column("best_accuracy", "best (%)", _best_accuracy, ("test/accuracy", "val/accuracy")),
        _last("clients_accuracy", "clients' mean (%)", "clients/accuracy_mean", 100, better="higher"),
        _last("clients_after", "after local (%)", "clients/accuracy_mean_after", 100, better="higher"),
        _last("worst_decile", "worst decile (%)", "clients/accuracy_worst_decile", 100, better="higher"),
        *cost,
        _last("sparsity", "sparsity (%)", "sparsity/global", 100),
        _last("uplink_mb", "MB up", "comm/uplink_bytes_total", 1 / MEGA, digits=2),
        _last("downlink_mb", "MB down", "comm/downlink_bytes_total", 1 / MEGA, digits=2),
        Column("downlink_ratio", "dense ÷ down", _downlink_ratio, _DOWN, digits=2),
        Column("downlink_ratio_last", "dense ÷ down, last", _last_downlink_ratio, _DOWN, digits=2),
        _last("gflop", "GFLOP", "flops/sparse_total", 1 / GIGA, digits=0),
        _last("simulated_hours", "simulated h", "time/simulated_s", 1 / HOUR, digits=2),
        _mean("regrowth", "regrowth (‰)", "masks/regrowth_share", 1000, digits=2),
        _mean("client_regrowth", "client regrowth (‰)", "masks/client_regrowth_share", 1000, digits=2),
        _mean("client_cut", "client cut (weights)", "masks/client_cut", digits=0),
        _mean("consensus", "consensus", "masks/consensus", digits=3),
        _last("overlap_10", "overlap, 10 rounds", "masks/overlap_10", digits=3),
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


def _cells(
    groups: Sequence[Group], column: Column, values: Sequence[Mapping[str, float]], old: Sequence[bool]
) -> tuple[list[Cell], list[Contest]]:
    cells = [
        Cell(own, mean_interval(list(own.values())) if own else None, outdated=is_old)
        for own, is_old in zip(values, old, strict=True)
    ]
    if column.better is None:
        return cells, []
    competing: dict[tuple[str, ...], list[int]] = {}
    for place, group in enumerate(groups):
        # A cost that some seeds never paid has no mean to compare.
        if len(values[place]) == len(group.runs) and not old[place]:
            competing.setdefault(group.contest, []).append(place)
    contests = []
    for places in competing.values():
        found = contest(places, [values[place] for place in places], column.better)
        if found is None:
            continue
        contests.append(found)
        for place, verdict, p in zip(found.places, found.verdicts, found.p_values, strict=True):
            cells[place] = replace(cells[place], verdict=verdict, adjusted=p)
    return cells, contests


# ------------------------------------------------------------------------------------ what a run amounts to


def _values(group: Group, column: Column) -> dict[str, float]:
    computed = {run.seed: column.of(run) for run in group.runs}
    return {seed: value for seed, value in computed.items() if value is not None}


def _last(
    key: str, header: str, metric: str, scale: float = 1.0, better: Better = None, digits: int = 1
) -> Column:
    """A metric after the last round."""

    def of(run: Run) -> float | None:
        return scale * float(run.series[metric].values[-1]) if metric in run.series else None

    return Column(key, header, of, (metric,), better, digits)


def _mean(key: str, header: str, metric: str, scale: float = 1.0, digits: int = 1) -> Column:
    """A metric's mean over the rounds but the first, which starts from a dense model."""

    def of(run: Run) -> float | None:
        if metric not in run.series:
            return None
        values = run.series[metric].values[run.series[metric].rounds > 1]
        return scale * float(values.mean()) if len(values) else None

    return Column(key, header, of, (metric,), digits=digits)


def _best_accuracy(run: Run) -> float | None:
    """Test accuracy of the round with the best validation accuracy, of the best round without validation."""
    accuracy = run.series.get("test/accuracy")
    if accuracy is None:
        return None
    chosen_by = run.series.get("val/accuracy", accuracy)
    best = chosen_by.rounds[int(np.argmax(chosen_by.values))]
    at = np.flatnonzero(accuracy.rounds == best)
    return 100 * float(accuracy.values[at[0]]) if len(at) else None


def _downlink_ratio(run: Run) -> float | None:
    """How many times as much dense messages to the clients would have been, over all rounds."""
    return _ratio(run, slice(None))


def _last_downlink_ratio(run: Run) -> float | None:
    """The same of the last round alone: the total is ruled by the dense broadcast of the first one."""
    return _ratio(run, slice(-1, None))


_DOWN = ("comm/dense_bytes", "comm/downlink_bytes_total")


def _ratio(run: Run, rounds: slice) -> float | None:
    dense, down = (run.series.get(metric) for metric in _DOWN)
    if dense is None or down is None or not np.array_equal(dense.rounds, down.rounds):
        return None
    sent = float(np.diff(down.values, prepend=0.0)[rounds].sum())
    return float(dense.values[rounds].sum()) / sent if sent else None


def _cost_column(target: float) -> Column:
    def of(run: Run) -> float | None:
        cost = bytes_to_reach(run, target)
        return None if cost is None else cost / MEGA

    metrics = ("test/accuracy", "comm/uplink_bytes_total", "comm/downlink_bytes_total")
    return Column("mb_to_target", f"MB to {100 * target:g} %", of, metrics, "lower")
