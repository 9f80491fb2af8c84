"""What a picture of a comparison is, and those over rounds and costs: means with intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from cluster.compare.costs import BYTES, GIGA, HOUR, KILO, MEGA
from cluster.compare.groups import Group
from cluster.compare.reading import Run, Series
from cluster.measures import Measure
from cluster.statistics import mean_interval

#: A logarithmic axis where the longest line is this many times as long as the shortest.
_SQUEEZED = 8.0

PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:g}")

#: A line with its uncertainty: x, mean, low, high; the bounds are NaN where there is one seed.
Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


#: Draws the groups, each in its style, and says whether there was anything to draw.
Draw = Callable[[Any, Sequence[Group], Sequence[dict[str, Any]]], bool]


@dataclass(frozen=True)
class Plot:
    """One picture: the name of its files, its caption, and how it is drawn and its axes dressed."""

    name: str
    caption: str
    draw: Draw
    finish: Callable[[Any], None]


def mean_curve(group: Group, of: Callable[[Run], Series | None]) -> Curve:
    """A metric's mean and 95 % interval after each round that every run of the group measured."""
    series = [own for run in group.runs if (own := of(run)) is not None]
    if not series:
        empty = np.empty(0)
        return empty, empty, empty, empty
    rounds = series[0].rounds
    for own in series[1:]:
        rounds = np.intersect1d(rounds, own.rounds)
    values = np.array([own.values[np.searchsorted(own.rounds, rounds)] for own in series])
    mean, low, high = np.array([mean_interval(column) for column in values.T]).reshape(-1, 3).T
    return rounds, mean, low, high


def metric(key: str, scale: float = 1.0, first: int = 0) -> Callable[[Run], Series | None]:
    """Reads a metric from round ``first`` on."""

    def of(run: Run) -> Series | None:
        own = run.series.get(key)
        if own is None:
            return None
        kept = own.rounds >= first
        return Series(own.rounds[kept], own.values[kept] * scale) if kept.any() else None

    return of


def _total(run: Run) -> Series | None:
    own = BYTES.spent(run)
    return None if own is None else Series(own.rounds, own.values / MEGA)


def _on_test(measure: Measure) -> Callable[[Run], Series | None]:
    return metric(f"test/{measure.key}", measure.scale)


def curves(selects: Sequence[Measure]) -> tuple[Plot, ...]:
    """Metrics over rounds, and what selects over what it costs."""
    costs = (
        ("mb-up", "MB sent by clients", metric("comm/uplink_bytes_total", 1 / MEGA)),
        ("mb-down", "MB sent to clients", metric("comm/downlink_bytes_total", 1 / MEGA)),
        ("mb-total", "MB sent up and down", _total),
        ("simulated-time", "simulated time (h)", metric("time/simulated_s", 1 / HOUR)),
        ("energy", "energy (kJ)", metric("energy/joules_total", 1 / KILO)),
        ("flops", "training cost (GFLOP)", metric("flops/sparse_total", 1 / GIGA)),
    )
    # Round 1 starts from a dense model: what masks do is shown from round 2 on.
    of_masks = (
        ("regrowth", "Regrowth: weights that were 0 before the round and are not after it",
         metric("masks/regrowth_share", 1000, first=2), _log_axes("regrowth (‰ of weights)", 0.1)),
        ("client-cut", "Client cut: weights of a client that its final cut sets to 0",
         metric("masks/client_cut", first=2), _log_axes("client cut (weights)", 10.0)),
        ("consensus", "Agreement of the cohort's masks, 1 where all are equal",
         metric("masks/consensus", first=2), _axes("round", "consensus")),
        ("overlap", "Overlap of the global mask with that of 10 rounds before, 1 where both are equal",
         metric("masks/overlap_10"), _axes("round", "overlap (intersection over union)")),
    )  # fmt: skip
    sparsity = metric("sparsity/global", 100)
    return (
        *(
            Plot(
                f"{measure.key}-{name}",
                f"Test {measure.title} " + (f"against {label.partition(' (')[0]}" if cost else "over rounds"),
                _line(_on_test(measure), against=cost),
                _axes(label, f"test {measure.label}", share=measure.unit == "share"),
            )
            for measure in selects
            for name, label, cost in (
                ("rounds", "round", None),
                *costs,
            )
        ),
        Plot(
            "sparsity-rounds", "Sparsity of the global model", _line(sparsity), _axes("round", "sparsity (%)")
        ),
        *(Plot(f"{name}-rounds", caption, _line(of), finish) for name, caption, of, finish in of_masks),
    )


def each(draw: Callable[[Any, Group, dict[str, Any]], bool]) -> Draw:
    """Draws one group after the other."""

    def draw_all(axes: Any, groups: Sequence[Group], styles: Sequence[dict[str, Any]]) -> bool:
        drawn = [draw(axes, group, style) for group, style in zip(groups, styles, strict=True)]
        return any(drawn)

    return draw_all


def _line(of: Callable[[Run], Series | None], against: Callable[[Run], Series | None] | None = None) -> Draw:
    def draw(axes: Any, group: Group, style: dict[str, Any]) -> bool:
        rounds, mean, low, high = mean_curve(group, of)
        across = rounds
        if against is not None:
            measured, cost, _, _ = mean_curve(group, against)
            _, at, at_cost = np.intersect1d(rounds, measured, return_indices=True)
            across, mean, low, high = cost[at_cost], mean[at], low[at], high[at]
        if not len(mean):
            return False
        axes.plot(across, mean, label=group.label, markevery=max(1, len(mean) // 6), **style)
        axes.fill_between(across, low, high, color=style["color"], alpha=0.16, linewidth=0)
        return True

    return each(draw)


def _axes(across: str, up: str, *, share: bool = False) -> Callable[[Any], None]:
    def finish(axes: Any) -> None:
        axes.set(xlabel=across, ylabel=up)
        if share:  # the interval of few seeds may go beyond what there is
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, 0.0), min(high, 102.0))
        if across == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        elif _ends_differ(axes):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(left=0)

    return finish


def _ends_differ(axes: Any) -> bool:
    """Whether some line would be squeezed against the axis by another one that is many times as long."""
    ends = [float(line.get_xdata()[-1]) for line in axes.get_lines()]
    return max(ends) > _SQUEEZED * min(ends) > 0


def _log_axes(up: str, smallest: float) -> Callable[[Any], None]:
    """Methods differ by orders of magnitude here, and some have none at all: linear below ``smallest``."""

    def finish(axes: Any) -> None:
        _axes("round", up)(axes)
        axes.set_yscale("symlog", linthresh=smallest)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PLAIN_NUMBERS)

    return finish
