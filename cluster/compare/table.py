"""The table of a comparison: means with 95 % intervals over seeds, and which are worse than the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster.compare.contest import Contest, Verdict, contest
from cluster.compare.costs import COSTS, GIGA, HOUR, KILO, MEGA, Cost, budgets_for, merits
from cluster.compare.groups import Group, Grouped, group_runs
from cluster.compare.reading import ComparisonError, Run
from cluster.compare.versions import differences, newest, outdated
from cluster.measures import Better, Measure
from cluster.statistics import Interval, mean_interval

_PAGE_COLUMNS = 7


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
        target: The value of what selects, of the first objective, whose costs are columns; None for none.
        contests: Those for what selects, each with its measure.
    """

    groups: tuple[Group, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]
    target: float | None
    contests: tuple[tuple[Measure, Contest], ...]

    @classmethod
    def of(
        cls, groups: Sequence[Group], target: float | None = None, budgets: Mapping[str, float] | None = None
    ) -> Table:
        """Compute it.

        Args:
            groups: The groups compared.
            target: Value of what selects, of the first objective, whose costs are columns, such as an
                accuracy in [0, 1]; by default a round one that every run of half of the groups reaches.
            budgets: What may be spent, by unit of :data:`cluster.compare.costs.COSTS`, as it is stored; by
                default what the cheapest run spends.
        """
        selects = selecting(groups)
        if target is None and selects:
            target = default_target(groups, selects[0])
        columns, by_column, contests = [], [], {}
        versions = newest(run for group in groups for run in group.runs)
        spendable = budgets_for([run for group in groups for run in group.runs], budgets or {})
        for column in columns_for(selects, target, spendable):
            values = [_values(group, column) for group in groups]
            if any(values):
                columns.append(column)
                measured = [[run for run in group.runs if run.seed in own]
                            for group, own in zip(groups, values, strict=True)]  # fmt: skip
                old = [outdated(runs, column.metrics, versions) for runs in measured]
                cells, contests[column.key] = _cells(groups, column, values, old)
                by_column.append(cells)
        cells_of = tuple(zip(*by_column, strict=True))
        found = tuple((measure, each) for measure in selects for each in contests.get(measure.key, ()))
        return cls(tuple(groups), tuple(columns), cells_of, target, found)

    @property
    def parts(self) -> list[Table]:
        """The same in tables that fit a page: all groups, at most :data:`_PAGE_COLUMNS` columns."""
        tables = -(-len(self.columns) // _PAGE_COLUMNS)
        parts = np.array_split(np.arange(len(self.columns)), tables) if tables else []
        return [self.only(part.tolist()) for part in parts]

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
        cls,
        runs: Sequence[Run],
        source: str,
        *,
        after: int | None = None,
        target: float | None = None,
        budgets: Mapping[str, float] | None = None,
    ) -> Comparison:
        """Group runs and compute their table; see :func:`group_runs` and :meth:`Table.of`."""
        grouped = group_runs(runs, after=after)
        if after is not None:
            source += f", after round {after}"
        shared = grouped.shared
        data = Path(shared.get("data.path") or shared.get("data.name", "")).name
        partition = shared.get("partition.name", "")
        if "partition.alpha" in shared:
            partition += f" {shared['partition.alpha']}"
        title = "Comparison" + "".join(f", {text}" for text in (data, partition) if text)
        return cls(title, source, grouped, Table.of(grouped.groups, target, budgets))


def selecting(groups: Sequence[Group]) -> list[Measure]:
    """What selects in the runs of some groups, each once, in the order of the groups."""
    found = [run.metrics[0] for group in groups for run in group.runs if run.metrics]
    return list({measure.key: measure for measure in found}.values())


def columns_for(
    selects: Sequence[Measure], target: float | None, budgets: Mapping[str, float]
) -> tuple[Column, ...]:
    """Every column that there may be, in order.

    Args:
        selects: What selects, of one objective after the other.
        target: Value of the first one whose costs are columns; None for no such columns.
        budgets: What may be spent, by unit: how good the first one is for it are columns.
    """
    costs = () if target is None else [_cost_column(cost, selects[0], target) for cost in COSTS]
    bought = [
        _budget_column(cost, selects[0], budgets[cost.unit])
        for cost in COSTS
        if selects and cost.unit in budgets
    ]
    return (
        *(column for place, measure in enumerate(selects) for column in _columns_of(measure, place)),
        *costs,
        *bought,
        _last("sparsity", "sparsity (%)", "sparsity/global", 100),
        _last("uplink_mb", "MB up", "comm/uplink_bytes_total", 1 / MEGA, digits=2),
        _last("downlink_mb", "MB down", "comm/downlink_bytes_total", 1 / MEGA, digits=2),
        Column("downlink_ratio", "dense ÷ down", _downlink_ratio, _DOWN, digits=2),
        Column("downlink_ratio_last", "dense ÷ down, last", _last_downlink_ratio, _DOWN, digits=2),
        _last("gflop", "GFLOP", "flops/sparse_total", 1 / GIGA, digits=0),
        _last("simulated_hours", "simulated h", "time/simulated_s", 1 / HOUR, digits=2),
        _last("kilojoules", "kJ", "energy/joules_total", 1 / KILO, digits=2),
        _mean("regrowth", "regrowth (‰)", "masks/regrowth_share", 1000, digits=2),
        _mean("client_regrowth", "client regrowth (‰)", "masks/client_regrowth_share", 1000, digits=2),
        _mean("client_cut", "client cut (weights)", "masks/client_cut", digits=0),
        _mean("consensus", "consensus", "masks/consensus", digits=3),
        _last("overlap_10", "overlap, 10 rounds", "masks/overlap_10", digits=3),
    )


def target_of(runs: Iterable[Run], shown: float | None) -> float | None:
    """A target as it is stored, from one as it is shown: an accuracy from its percentage.

    Raises:
        ComparisonError: There is no such percentage.
    """
    selects = next((run.metrics[0] for run in runs if run.metrics), None)
    if shown is None or selects is None:
        return None
    if selects.unit == "share" and not 0 < shown <= 100:
        raise ComparisonError(f"--target {shown:g}: expected a percentage, such as 80")
    return shown / selects.scale


def default_target(groups: Sequence[Group], selects: Measure) -> float | None:
    """The best round value that every run of half of the groups reaches on test data.

    Of a share that is a multiple of 5 %, None where that is 0; of anything else one of two digits.
    """
    key = f"test/{selects.key}"
    reached = sorted(
        min(float(merits(run.series[key], selects).max()) for run in group.runs)
        for group in groups
        if all(key in run.series for run in group.runs)
    )
    if not reached:
        return None
    middle = reached[len(reached) // 2]
    if selects.unit == "share":
        return selects.merit(math.floor(middle * 20 + 1e-9) / 20) or None
    if middle == 0.0 or not math.isfinite(middle):
        return None
    step = 10.0 ** (math.floor(math.log10(abs(middle))) - 1)
    return selects.merit(math.floor(middle / step + 1e-9) * step)


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


def _columns_of(selects: Measure, place: int) -> tuple[Column, ...]:
    """What there is of one objective; the columns of a second one say in their names whose they are."""
    key, scale, better = selects.key, selects.scale, selects.better
    unit = selects.label.removeprefix(selects.title)
    digits = 1 if selects.unit == "share" else 3
    mark, of = (f"_{key}", f" {selects.title}") if place else ("", "")

    def last(name: str, header: str, metric: str) -> Column:
        return _last(name, header + of + unit, metric, scale, better, digits)

    def best(run: Run) -> float | None:
        value = best_value(run, selects)
        return None if value is None else scale * value

    on_test, on_validation = f"test/{key}", f"val/{key}"
    return (
        _last(key, selects.label, on_test, scale, better, digits),
        Column(f"best_{key}", f"best{of}{unit}", best, (on_test, on_validation), digits=digits),
        last(f"clients_{key}", "clients' mean", f"clients/{key}_mean"),
        last(f"clients_after{mark}", "after local", f"clients/{key}_mean_after"),
        last(f"worst_decile{mark}", "worst decile", f"clients/{key}_worst_decile"),
    )


def best_value(run: Run, selects: Measure) -> float | None:
    """What selects on test data, of the round that is best on validation data, else on test data."""
    measured = run.series.get(f"test/{selects.key}")
    if measured is None:
        return None
    chosen_by = run.series.get(f"val/{selects.key}", measured)
    best = chosen_by.rounds[int(np.argmax(merits(chosen_by, selects)))]
    at = np.flatnonzero(measured.rounds == best)
    return float(measured.values[at[0]]) if len(at) else None


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


def _cost_column(cost: Cost, selects: Measure, target: float) -> Column:
    def of(run: Run) -> float | None:
        spent = cost.to_reach(run, selects, target)
        return None if spent is None else spent / cost.scale

    metrics = (f"test/{selects.key}", *cost.metrics)
    shown = f"{100 * target:g} %" if selects.unit == "share" else f"{selects.title} {target:g}"
    digits = 1 if cost.unit == "MB" else 2
    return Column(f"{cost.unit.lower()}_to_target", f"{cost.shown} to {shown}", of, metrics, "lower", digits)


def _budget_column(cost: Cost, selects: Measure, budget: float) -> Column:
    def of(run: Run) -> float | None:
        value = cost.bought(run, selects, budget)
        return None if value is None else selects.scale * value

    metrics = (f"test/{selects.key}", *cost.metrics)
    header = f"{selects.label} for {budget / cost.scale:.4g} {cost.shown}"
    digits = 1 if selects.unit == "share" else 3
    return Column(f"for_{cost.unit.lower()}", header, of, metrics, selects.better, digits)
