"""The pictures of a study: a colour and a marker for each method, told apart by the colour-blind too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cluster.measures import Measure
from cluster.records.plots import finish, style
from tuning.protocol import MethodResult, intervals, on_test
from tuning.study import Plan

Results = Mapping[str, MethodResult]


def draw_all(plan: Plan, results: Results, folder: Path) -> list[tuple[Path, str]]:
    """Draw what there is to draw; returns the files with their captions."""
    title = plan.selects.title
    pictures: list[tuple[str, str, Callable[[Plan, Results], Figure | None]]] = [
        (f"{plan.selects.key}.png", f"Tuned test {title} with 95 % intervals", _finals),
        ("budget.png", f"{title[:1].upper()}{title[1:]} to expect of a tuning budget", _budget),
        ("importance.png", "Importance of hyperparameters", _importance),
        ("history.png", "Optimisation history", _history),
        ("pareto.png", f"Validation {title} against uplink", _pareto),
    ]
    drawn = []
    for name, caption, draw in pictures:
        figure = draw(plan, results)
        path = folder / name
        path.unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(path, dpi=150)
            drawn.append((path, caption))
    return drawn


def _finals(plan: Plan, results: Results) -> Figure | None:
    """Mean and interval of each method over the fresh seeds, the seeds as dots, the best on top."""
    values, selects = on_test(plan, results), plan.selects
    if not values:
        return None
    means, styles = intervals(values), _styles(results)
    order = sorted(values, key=lambda label: selects.merit(means[label].mean))
    figure = Figure(figsize=(7, 1.2 + 0.42 * len(order)), layout="constrained")
    axes = figure.subplots()
    for place, label in enumerate(order):
        mean, low, high = (selects.scale * end for end in means[label])
        own, points = styles[label], [selects.scale * value for value in values[label]]
        spread = None if math.isnan(low) else [[mean - low], [high - mean]]
        axes.errorbar(mean, place, xerr=spread, markersize=7, capsize=4, linewidth=1.8, **own)
        axes.plot(points, [place - 0.24] * len(points), "|", color=own["color"], markersize=7)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.6, len(order) - 0.4)
    if selects.unit == "share":  # an interval of few seeds may reach beyond what a share can be
        ends = [100 * end for interval in means.values() for end in interval if not math.isnan(end)]
        axes.set_xlim(max(-2.0, min(ends) - 2), min(102.0, max(ends) + 2))
    seeds = len(next(iter(values.values())))
    axes.set(xlabel=f"test {selects.label}: mean with 95 % interval, below it the {seeds} seeds")
    if plan.reference in means:
        axes.axvline(
            selects.scale * means[plan.reference].mean, color="0.6", linewidth=1, linestyle=":", zorder=0
        )
    finish(axes)
    return figure


def _budget(plan: Plan, results: Results) -> Figure | None:
    """What to expect of the best of k trials, on validation data, against trials and client-rounds."""
    curves = {label: result.curve for label, result in results.items() if result.curve[1]}
    if not curves:
        return None
    styles = _styles(results)
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    by_trials, by_cost = figure.subplots(1, 2, sharey=True)
    longest = max(len(best) for _, best in curves.values())
    dearest = max(cost[-1] for cost, _ in curves.values())
    for label, (cost, best) in curves.items():
        shown = [plan.selects.scale * value for value in best]
        for axes, across, end in (
            (by_trials, list(range(1, len(best) + 1)), longest),
            (by_cost, cost, dearest),
        ):
            axes.plot(across, shown, label=label, linewidth=1.6, markersize=5, **styles[label])
            if not results[label].contender.space:  # one configuration is as good after any budget
                axes.plot([across[-1], end], [shown[-1]] * 2, color=styles[label]["color"], linewidth=1,
                          linestyle=":")  # fmt: skip
    by_trials.set(xlabel="trials", ylabel=f"best validation {plan.selects.label} to expect")
    by_trials.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_cost.set(xlabel="client-rounds spent")
    by_cost.xaxis.set_major_locator(MaxNLocator(nbins=6))
    for axes in (by_trials, by_cost):
        finish(axes)
    figure.legend(
        *by_trials.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9
    )
    return figure


def _importance(plan: Plan, results: Results) -> Figure | None:
    """Share of the variance of what selects that each tuned key explains, a bar each."""
    bars = [
        (label, key, 100 * share)
        for label, result in results.items()
        for key, share in sorted(result.importance.items(), key=lambda item: -item[1])
    ]
    if not bars:
        return None
    styles = _styles(results)
    figure = Figure(figsize=(7, 1.1 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    places = range(len(bars), 0, -1)
    axes.barh(places, [share for _, _, share in bars], height=0.7,
              color=[styles[label]["color"] for label, _, _ in bars])  # fmt: skip
    for place, (_, _, share) in zip(places, bars, strict=True):
        axes.text(share + 1, place, f"{share:.0f}", va="center", fontsize=8)
    axes.set_yticks(places, [f"{label}   {key.removeprefix('algorithm.')}" for label, key, _ in bars])
    axes.set(xlabel=f"share of the variance of validation {plan.selects.title} (%)", xlim=(0, 108))
    finish(axes)
    axes.grid(axis="y", visible=False)
    return figure


def _history(plan: Plan, results: Results) -> Figure | None:
    """Every trial in its order and the best so far, a panel for each method that was tuned."""
    tuned = {label: result for label, result in results.items() if len(result.tried) > 1}
    if not tuned:
        return None
    columns = min(3, len(tuned))
    rows = math.ceil(len(tuned) / columns)
    figure = Figure(figsize=(3.2 * columns + 0.4, 2.4 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    styles = _styles(results)
    selects = plan.selects
    scale, share = selects.scale, selects.unit == "share"
    known = [scale * t.value for r in tuned.values() for t in r.tried if t.value is not None]
    low, high = min(known, default=0.0), max(known, default=100.0)
    margin = 6.0 if share else 0.1 * (high - low) or 1.0
    floor = max(0.0, low - margin) if share else low - margin
    ceiling = min(101.0, high + 4) if share else high + margin
    for axes, (label, result) in zip(panels.flat, tuned.items(), strict=False):
        colour, marker = styles[label]["color"], styles[label]["marker"]
        best, steps = None, []
        for trial in result.tried:
            value = None if trial.value is None else scale * trial.value
            if trial.state == "finished" and value is not None:
                best = value if best is None else max(best, value, key=selects.merit)
                axes.plot(trial.number, value, marker, color=colour, markersize=5)
            elif trial.state == "pruned" and value is not None:
                axes.plot(trial.number, value, marker, color=colour, markersize=5, fillstyle="none")
            elif trial.state == "failed":
                axes.plot(trial.number, floor + margin / 3, "x", color="black", markersize=6)
            if best is not None:
                steps.append((trial.number, best))
        axes.step(*zip(*steps, strict=True), where="post", color=colour, linewidth=1.4) if steps else None
        axes.set_title(label, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(floor, ceiling)
        finish(axes)
    for axes in list(panels.flat)[len(tuned) :]:
        axes.set_visible(False)
    figure.supxlabel("trial (0 is the published default)", fontsize=10)
    figure.supylabel(f"validation {selects.label}", fontsize=10)
    pruned = any(result.count("pruned") for result in tuned.values())
    failed = any(result.count("failed") for result in tuned.values())
    handles = [_mark("o", "finished"), _mark("", "best so far", linestyle="-")]
    handles += [_mark("o", "pruned", fillstyle="none")] * pruned + [_mark("x", "failed")] * failed
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def _pareto(plan: Plan, results: Results) -> Figure | None:
    """Every finished trial by what it sent and how good it was; the front of each method joined."""
    styles = _styles(results)
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for label, result in results.items():
        finished = [trial for trial in result.tried if trial.state == "finished"]
        if not finished:
            continue
        drawn = True
        own = styles[label]
        axes.plot(*_points(finished, plan.selects), linestyle="", marker=own["marker"],
                  color=own["color"], alpha=0.4, markersize=5, markeredgewidth=0)  # fmt: skip
        axes.plot(*_points(result.front(), plan.selects), linewidth=1.5, markersize=6, label=label, **own)
    sent = [t.uplink_bytes for r in results.values() for t in r.tried if t.state == "finished"]
    wide = bool(sent) and max(sent) > 4 * max(1, min(sent))
    axes.set(xlabel="uplink of a trial (MB)", ylabel=f"validation {plan.selects.label}")
    if wide:
        axes.set(xscale="log", xlabel="uplink of a trial (MB, logarithmic)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    finish(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9,
                  title="Pareto front of", title_fontsize=9)  # fmt: skip
    return figure if drawn else None


def _points(trials: list[Any], selects: Measure) -> tuple[list[float], list[float]]:
    return [trial.uplink_bytes / 1e6 for trial in trials], [selects.scale * trial.value for trial in trials]


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    return {label: style(place) for place, label in enumerate(results)}


def _mark(marker: str, label: str, **options: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color="black", marker=marker, label=label, **({"linestyle": ""} | options))
