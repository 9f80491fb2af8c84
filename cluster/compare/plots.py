"""The pictures of a comparison, sized and coloured for a column of a paper.

3.4 inches wide, 8 point type, TrueType fonts in the PDF, units on every axis. The colours are those of Okabe
and Ito (2008), which the colour-blind tell apart; line styles and markers tell lines apart without colour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from cluster.compare.groups import Group
from cluster.compare.reading import Run, Series
from cluster.compare.table import GIGA, HOUR, MEGA, bytes_to_reach, merits, selecting, total_bytes
from cluster.measures import Measure
from cluster.records.plots import COLOURS, MARKERS
from cluster.statistics import mean_interval

_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)), (0, (8, 2, 2, 2)))

_MOST_TICKS = 7

#: A logarithmic axis where the longest line is this many times as long as the shortest.
_SQUEEZED = 8.0

_PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:g}")

#: More lines than this in one picture are a thicket: the best are drawn.
MOST_LINES = 14

_WIDTH, _HEIGHT, _LEGEND_LINE = 3.4, 2.35, 0.155
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture on every machine
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.2,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a dollar in a label is a dollar
}

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


def figures(groups: Sequence[Group]) -> Iterator[tuple[Plot, Figure | None]]:
    """Every picture, one after the other; None where no group has what it shows."""
    drawn = best_of(groups)
    styles = styles_of(drawn)
    for plot in (*_curves(selecting(drawn)), *_others(drawn)):
        with rc_context(_STYLE):
            yield plot, _figure(plot, drawn, styles)


def _figure(plot: Plot, groups: Sequence[Group], styles: Sequence[dict[str, Any]]) -> Figure | None:
    figure = Figure()
    axes = figure.subplots()
    if not plot.draw(axes, groups, styles):
        return None
    plot.finish(axes)
    handles, labels = axes.get_legend_handles_labels()
    # Below the axes, where it can hide nothing: as many columns as the longest name allows.
    columns = max(1, min(len(labels), int(_WIDTH / (0.48 + 0.062 * max(map(len, labels))))))
    lines = -(-len(labels) // columns)
    figure.set_size_inches(_WIDTH, _HEIGHT + _LEGEND_LINE * lines)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=2.6
    )
    return figure


def best_of(groups: Sequence[Group]) -> list[Group]:
    """The groups that are drawn, in their order: all, or the :data:`MOST_LINES` best on test data.

    Groups of several objectives take turns: first the best of each.
    """
    if len(groups) <= MOST_LINES:
        return list(groups)
    ranks: dict[int, int] = {}
    for measure in selecting(groups):
        own = [place for place, group in enumerate(groups) if group.runs[0].metrics[:1] == (measure,)]
        own.sort(key=lambda place: -_final_merit(groups[place], measure))
        ranks |= {place: rank for rank, place in enumerate(own)}
    kept = sorted(range(len(groups)), key=lambda place: ranks.get(place, len(groups)))[:MOST_LINES]
    return [groups[place] for place in sorted(kept)]


def _final_merit(group: Group, measure: Measure) -> float:
    key = f"test/{measure.key}"
    finals = [merits(run.series[key], measure)[-1] for run in group.runs if key in run.series]
    return float(np.mean(finals)) if finals else -np.inf


def styles_of(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A colour a method and a line style for each of its groups; a colour a group if there is one method."""
    methods = list(dict.fromkeys(group.method for group in groups))
    by_method = 1 < len(methods) < len(groups) and len(methods) <= len(COLOURS)
    seen: dict[str, int] = {}
    styles = []
    for place, group in enumerate(groups):
        if by_method:
            colour, turn = methods.index(group.method), seen.get(group.method, 0)
            seen[group.method] = turn + 1
        else:
            colour, turn = place % len(COLOURS), place // len(COLOURS)
        styles.append(
            {
                "color": COLOURS[colour],
                "linestyle": _STYLES[turn % len(_STYLES)] if by_method or turn else "-",
                "marker": MARKERS[(turn if by_method else colour) % len(MARKERS)],
            }
        )
    return styles


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


# ----------------------------------------------------------------------------------------------- curves


def _total(run: Run) -> Series | None:
    own = total_bytes(run)
    return None if own is None else Series(own.rounds, own.values / MEGA)


def _on_test(measure: Measure) -> Callable[[Run], Series | None]:
    return metric(f"test/{measure.key}", measure.scale)


def _curves(selects: Sequence[Measure]) -> tuple[Plot, ...]:
    """Metrics over rounds, and what selects over what it costs."""
    costs = (
        ("mb-up", "MB sent by clients", metric("comm/uplink_bytes_total", 1 / MEGA)),
        ("mb-down", "MB sent to clients", metric("comm/downlink_bytes_total", 1 / MEGA)),
        ("mb-total", "MB sent up and down", _total),
        ("simulated-time", "simulated time (h)", metric("time/simulated_s", 1 / HOUR)),
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


def _each(draw: Callable[[Any, Group, dict[str, Any]], bool]) -> Draw:
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

    return _each(draw)


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
            axes.xaxis.set_major_formatter(_PLAIN_NUMBERS)
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
        axes.yaxis.set_major_formatter(_PLAIN_NUMBERS)

    return finish


# ----------------------------------------------------------------------------------------- other pictures


def _others(groups: Sequence[Group]) -> tuple[Plot, ...]:
    return (
        Plot(
            "sparsity-layers",
            "Sparsity of every layer after the last round",
            _each(_draw_layers),
            _layer_axes(groups),
        ),
        *(
            plot
            for place, measure in enumerate(selecting(groups))
            for plot in _others_of(measure, groups, f"-{measure.key}" if place else "")
        ),
    )


def _others_of(measure: Measure, groups: Sequence[Group], mark: str) -> tuple[Plot, ...]:
    """What else is drawn of what selects; ``mark`` tells the files of several objectives apart."""
    key, title = measure.key, measure.title

    def cost_axes(axes: Any) -> None:
        axes.set(xlabel=f"test {title} reached{_unit(measure)}", ylabel="MB sent up and down", yscale="log")
        axes.yaxis.set_major_formatter(_PLAIN_NUMBERS)
        axes.yaxis.set_minor_formatter(NullFormatter())
        if measure.better == "lower":
            axes.invert_xaxis()

    def client_axes(axes: Any) -> None:
        across = f"{title} of the global model on a client{_unit(measure)}"
        axes.set(xlabel=across, ylabel="share of clients", ylim=(0, 1))

    return (
        Plot(
            f"{key}-sparsity",
            f"{title[:1].upper()}{title[1:]} against the sparsity reached",
            _sparsities(measure),
            _sparsity_axes(measure),
        ),
        Plot(
            f"mb-to-{key}",
            f"MB sent until {_a(title)} was first reached, by all seeds",
            _each(_costs(measure, _levels(measure, groups))),
            cost_axes,
        ),
        Plot(
            f"clients{mark}",
            f"Share of clients with at most {_a(title)}",
            _each(_clients(measure)),
            client_axes,
        ),
    )


def _a(title: str) -> str:
    return f"an {title}" if title[0] in "aeiou" else f"a {title}"


def _unit(measure: Measure) -> str:
    return measure.label.removeprefix(measure.title)


def _levels(measure: Measure, groups: Sequence[Group]) -> list[float]:
    """Values whose cost is drawn, worse ones first: every 5 % of a share, else twenty of what there is."""
    if measure.unit == "share":
        return sorted(np.arange(0.05, 1.0, 0.05).tolist(), key=measure.merit)
    key = f"test/{measure.key}"
    found = [run.series[key].values for group in groups for run in group.runs if key in run.series]
    if not found:
        return []
    ends = np.concatenate(found)
    return sorted(np.linspace(ends.min(), ends.max(), 20).tolist(), key=measure.merit)


def _draw_layers(axes: Any, group: Group, style: dict[str, Any]) -> bool:
    runs = [run for run in group.runs if run.layers]
    if not runs:
        return False
    names = list(runs[0].layers)
    means = [100 * float(np.mean([run.layers.get(name, np.nan) for run in runs])) for name in names]
    axes.plot(range(1, len(names) + 1), means, label=group.label, **style)
    return True


def _layer_axes(groups: Sequence[Group]) -> Callable[[Any], None]:
    every = {tuple(run.layers) for group in groups for run in group.runs if run.layers}

    def finish(axes: Any) -> None:
        axes.set(xlabel="layer, from the input", ylabel="sparsity (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(every) == 1 and len(names := next(iter(every))) <= 24:
            axes.set_xticks(range(1, len(names) + 1))
            axes.set_xticklabels([name.removesuffix(".weight") for name in names])
            axes.tick_params(axis="x", rotation=90 if len(names) > 6 else 0, labelsize=6)

    return finish


def _costs(measure: Measure, levels: Sequence[float]) -> Callable[[Any, Group, dict[str, Any]], bool]:
    def draw(axes: Any, group: Group, style: dict[str, Any]) -> bool:
        points = []
        for level in levels:
            costs = [bytes_to_reach(run, measure, level) for run in group.runs]
            if None in costs:
                break
            interval = mean_interval([cost for cost in costs if cost is not None])
            points.append((measure.scale * level, *(np.array(interval) / MEGA)))
        if not points:
            return False
        across, mean, low, high = np.array(points).T
        axes.plot(across, mean, label=group.label, **style)
        axes.fill_between(
            across, np.maximum(low, 0.3 * mean), high, color=style["color"], alpha=0.16, linewidth=0
        )
        return True

    return draw


def _clients(measure: Measure) -> Callable[[Any, Group, dict[str, Any]], bool]:
    def draw(axes: Any, group: Group, style: dict[str, Any]) -> bool:
        own = [run for run in group.runs if len(run.clients) and run.metrics[:1] == (measure,)]
        if not own:
            return False
        values = measure.scale * np.concatenate([run.clients for run in own])
        axes.ecdf(values, label=group.label, **(style | {"marker": ""}))
        return True

    return draw


def _sparsities(measure: Measure) -> Draw:
    """One line through the groups that differ in their target sparsity alone."""
    key = f"test/{measure.key}"

    def draw(axes: Any, groups: Sequence[Group], styles: Sequence[dict[str, Any]]) -> bool:
        lines: dict[str, list[tuple[float, Any]]] = {}
        looks: dict[str, dict[str, Any]] = {}
        for group, style in zip(groups, styles, strict=True):
            finals = [
                (run.series["sparsity/global"].values[-1], measure.scale * run.series[key].values[-1])
                for run in group.runs
                if "sparsity/global" in run.series and key in run.series
            ]
            if finals:
                sparsities, values = zip(*finals, strict=True)
                lines.setdefault(group.family, []).append(
                    (max(1.0 - float(np.mean(sparsities)), 1e-6), mean_interval(values))
                )
                looks.setdefault(group.family, style)
        if len({round(density, 3) for points in lines.values() for density, _ in points}) < 2:
            return False
        for name, points in lines.items():
            densities, intervals = zip(*sorted(points), strict=True)
            mean, low, _ = np.array(intervals).T
            spread = np.nan_to_num(mean - low)
            axes.errorbar(densities, mean, yerr=spread, label=name, capsize=2, **looks[name])
        return True

    return draw


def _sparsity_axes(measure: Measure) -> Callable[[Any], None]:
    """Equal steps for equal factors of density: 0, 90, 99, 99.9 %."""

    def finish(axes: Any) -> None:
        up = f"test {measure.label}"
        axes.set(xlabel="sparsity of the global model (%)", ylabel=up, xscale="log")
        axes.invert_xaxis()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda density, _: f"{100 * (1 - density):.6g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        reached = {float(f"{density:.2g}") for line in axes.get_lines() for density in line.get_xdata()}
        if len(reached) <= _MOST_TICKS:
            axes.set_xticks(sorted(reached))
            axes.minorticks_off()

    return finish
