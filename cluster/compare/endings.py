"""The pictures of where runs ended: layers, sparsity, what a value cost, the distribution over clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from cluster.compare.costs import BYTES, MEGA
from cluster.compare.curves import PLAIN_NUMBERS, Draw, Plot, each
from cluster.compare.groups import Group
from cluster.compare.table import selecting
from cluster.measures import Measure
from cluster.statistics import mean_interval

_MOST_TICKS = 7


def endings(groups: Sequence[Group]) -> tuple[Plot, ...]:
    """Every picture of some groups' ends."""
    return (
        Plot(
            "sparsity-layers",
            "Sparsity of every layer after the last round",
            each(_draw_layers),
            _layer_axes(groups),
        ),
        *(
            plot
            for place, measure in enumerate(selecting(groups))
            for plot in _endings_of(measure, groups, f"-{measure.key}" if place else "")
        ),
    )


def _endings_of(measure: Measure, groups: Sequence[Group], mark: str) -> tuple[Plot, ...]:
    """What else is drawn of what selects; ``mark`` tells the files of several objectives apart."""
    key, title = measure.key, measure.title

    def cost_axes(axes: Any) -> None:
        axes.set(xlabel=f"test {title} reached{_unit(measure)}", ylabel="MB sent up and down", yscale="log")
        axes.yaxis.set_major_formatter(PLAIN_NUMBERS)
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
            each(_costs(measure, _levels(measure, groups))),
            cost_axes,
        ),
        Plot(
            f"clients{mark}",
            f"Share of clients with at most {_a(title)}",
            each(_clients(measure)),
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
            costs = [BYTES.to_reach(run, measure, level) for run in group.runs]
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
