"""The report of a study: tables as Markdown, CSV and LaTeX, and a page that holds them and the pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.measures import Measure
from cluster.records.csv_text import as_csv
from cluster.statistics import SIGNIFICANCE, Difference, Interval
from tuning import plots
from tuning.folder import StudyFolder
from tuning.protocol import MethodResult, differences, intervals, on_test
from tuning.study import Plan


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: Name of its files.
        title: Its caption.
        header: Names of the columns, with units.
        rows: Cells as text.
        notes: Sentences below it.
    """

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """A pipe table."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )

    def latex(self) -> str:
        """A ``tabular`` that needs no package."""
        body = [" & ".join(map(_latex, row)) + r" \\" for row in self.rows]
        head = " & ".join(map(_latex, self.header)) + r" \\"
        columns = "l" + "r" * (len(self.header) - 1)
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", head, r"\hline", *body, r"\hline"]
        return (
            "\n".join([*(f"% {note}" for note in (self.title, *self.notes)), *lines, r"\end{tabular}"]) + "\n"
        )

    def write(self, folder: Path) -> list[Path]:
        """Write the three files."""
        paths = [folder / f"{self.name}.{kind}" for kind in ("md", "csv", "tex")]
        paths[0].write_text(
            self.markdown() + "\n" + "".join(f"\n{note}\n" for note in self.notes), encoding="utf-8"
        )
        paths[1].write_text(as_csv([self.header, *self.rows]), encoding="utf-8")
        paths[2].write_text(self.latex(), encoding="utf-8")
        return paths


def write_report(plan: Plan, folder: StudyFolder, results: Mapping[str, MethodResult]) -> list[Path]:
    """Write every table and picture into the study's ``report`` folder; returns their paths."""
    folder.report.mkdir(parents=True, exist_ok=True)
    tables = [final_table(plan, results), budget_table(plan, results), optimum_table(plan, results)]
    tables.append(trial_table(plan, results))
    paths = [path for table in tables for path in table.write(folder.report)]
    pictures = plots.draw_all(plan, results, folder.report)
    page = folder.report / "report.md"
    page.write_text(_page(plan, results, tables[:3], pictures), encoding="utf-8")
    return [page, *paths, *(path for path, _ in pictures)]


def final_table(plan: Plan, results: Mapping[str, MethodResult]) -> Table:
    """The tuned methods on test data over fresh seeds, and the paired differences to the reference."""
    values, selects = on_test(plan, results), plan.selects
    means, apart = intervals(values), differences(plan, values)
    rows = []
    for label in sorted(values, key=lambda label: -selects.merit(means[label].mean)):
        finals = list(results[label].finals.values())
        row = [label, _interval(means[label], selects)]
        if label in apart:
            found = apart[label]
            verdict = _verdict(selects.merit(found.interval.mean), found.adjusted)
            row += [_difference(found, selects), _p_value(found.adjusted), verdict]
        else:
            row += ["-", "-", "reference" if label == plan.reference else "-"]
        row += [f"{100 * _mean(finals, 'sparsity'):.1f}", f"{_mean(finals, 'uplink_bytes') / 1e6:.2f}"]
        row.append(_gflop(_mean(finals, "flops_sparse")))
        rows.append([*row, _settings(results[label])])
    seeds, points = len(next(iter(values.values()), [])), " in points" * (selects.unit == "share")
    reference = plan.reference
    notes = [
        f"Mean test {selects.title} over {seeds} fresh seeds ± half of its 95 % t interval. Differences to "
        f"{reference}{points}, paired by seed, p of the paired t test by Holm's correction, different at "
        f"{SIGNIFICANCE}. The intervals of differences are wider than 95 %: at the level at which Holm's "
        "procedure tests each, so that they hold 0 exactly where the two are not distinguishable."
    ]
    missing = [label for label in results if label not in values]
    if missing:
        notes.append(f"Without final runs so far: {', '.join(missing)}.")
    header = [
        "method",
        f"test {selects.shown_unit or selects.title}",
        f"vs {reference}",
        "p",
        "verdict",
        "sparsity %",
        "MB up",
        "GFLOP",
    ]
    header.append("tuned values")
    return Table(selects.key, f"Tuned test {selects.title}", header, rows, notes)


def budget_table(plan: Plan, results: Mapping[str, MethodResult]) -> Table:
    """What every method was given, what it spent, and how its trials ended."""
    rows = []
    for label, result in results.items():
        spent, given = result.client_rounds, plan.budget
        rows.append(
            [
                label,
                str(len(result.tried)),
                *(str(result.count(state)) for state in ("finished", "pruned", "failed")),
                str(sum(trial.rounds for trial in result.tried)),
                f"{spent:,.0f}",
                f"{max(0, given - spent):,.0f}",
                f"{sum(trial.steps for trial in result.tried):,}",
                _gflop(sum(trial.flops for trial in result.tried)),
                f"{sum(trial.seconds for trial in result.tried):.0f}",
            ]
        )
    unit = "client-rounds" if plan.pruned else "trials"
    notes = [
        f"Every method was given {plan.budget:,} client-rounds ({plan.section.trials} x {plan.base.rounds} "
        f"rounds x {plan.base.cohort} clients); the budget was counted in {unit}. A client-round is one "
        "client's training for the local epochs of the experiment. What a method trains beside them, in a "
        "stage or a warm-up of its own, is taken off its rounds."
    ]
    for label, result in results.items():
        best = result.best
        rounds = plan.base.rounds if best is None else result.contender.trial_config(best.values).rounds
        if rounds < plan.base.rounds:
            notes.append(
                f"{label}: its best configuration has {rounds} rounds of {plan.base.rounds}, for this."
            )
    for label, result in results.items():
        if not result.contender.space:
            notes.append(
                f"{label} has nothing to tune: one configuration, and the rest of its budget is unused."
            )
    for label, result in results.items():
        notes += [
            f"{label}, trial {t.number} failed: {t.reason}" for t in result.tried if t.state == "failed"
        ]
    header = [
        "method",
        "trials",
        "finished",
        "pruned",
        "failed",
        "rounds",
        "client-rounds",
        "unused",
        "local steps",
        "GFLOP",
        "seconds",
    ]
    return Table("budget", "Tuning budget", header, rows, notes)


def optimum_table(plan: Plan, results: Mapping[str, MethodResult]) -> Table:
    """Default and best value of everything tuned, with importance and optima on a boundary."""
    rows = []
    for label, result in results.items():
        boundaries = result.boundaries()
        for key, dimension in result.contender.space.items():
            share = result.importance.get(key)
            rows.append(
                [
                    label,
                    short(key),
                    dimension.describe(),
                    _value(dimension.default),
                    "-" if result.best is None else _value(result.best.values[key]),
                    "-" if share is None else f"{100 * share:.0f}",
                    boundaries.get(key, ""),
                ]
            )
    notes = [
        f"Importance: share of the variance of validation {plan.selects.title} (fANOVA), for four trials or "
        "more."
    ]
    if any(result.boundaries() for result in results.values()):
        notes.append("An optimum on the boundary of its range may lie beyond it: widen the range and look.")
    header = ["method", "key", "range", "default", "best", "importance %", "on the boundary"]
    return Table("optima", "What was tuned", header, rows, notes)


def trial_table(plan: Plan, results: Mapping[str, MethodResult]) -> Table:
    """Every configuration that each method saw."""
    selects = plan.selects
    header = [
        "method",
        "trial",
        "state",
        f"validation {selects.title} {selects.shown_unit}".strip(),
        "rounds",
        "client-rounds",
        "MB up",
        "values",
    ]
    rows = [
        [
            label,
            str(trial.number),
            trial.state,
            "-" if trial.value is None else selects.figure(trial.value, 2),
            str(trial.rounds),
            f"{trial.client_rounds:,.0f}",
            f"{trial.uplink_bytes / 1e6:.3f}",
            json.dumps(trial.values, sort_keys=True),
        ]
        for label, result in results.items()
        for trial in result.tried
    ]
    return Table("trials", "Every trial", header, rows)


def _page(
    plan: Plan,
    results: Mapping[str, MethodResult],
    tables: Sequence[Table],
    pictures: Sequence[tuple[Path, str]],
) -> str:
    section, base = plan.section, plan.base
    pruner = "" if section.pruner.name == "none" else f", pruner {section.pruner.name}"
    shared = ", ".join(section.shared) or "none"
    held_out, seeds = 100 * base.data.validation, ", ".join(map(str, plan.final_seeds))
    parts = [
        f"# Study {plan.name}",
        f"{len(results)} methods, {base.rounds} rounds a trial, {base.cohort} clients a round; sampler "
        f"{section.sampler.name}{pruner}, seed {section.seed}. Tuned for all methods alike: {shared}. "
        "Trial 0 is the published default. Configurations were selected in the last round on the "
        f"{held_out:g} % of the training data held out of the clients' data; test data was not read before "
        f"every search had ended. The best of each ran on seeds {seeds}.",
    ]
    if section.two_objectives:
        parts.append(
            f"Two objectives, validation {plan.selects.title} and uplink bytes: the final runs are those of "
            "the best configuration by the first; `pareto.png` and `trials.csv` hold the rest of the front."
        )
    for table in tables:
        parts += [f"## {table.title}", table.markdown(), *table.notes]
    for path, caption in pictures:
        parts += [f"## {caption}", f"![{caption}]({path.name})"]
    return "\n\n".join(parts) + "\n"


def _interval(interval: Interval, selects: Measure) -> str:
    """Mean and half width as they are shown; the mean alone where it is of one seed."""
    mean, half = selects.figure(interval.mean), interval.high - interval.mean
    return mean if math.isnan(half) else f"{mean} ± {selects.figure(half)}"


def _difference(found: Difference, selects: Measure) -> str:
    """With as many decimals as it takes to see on which side of 0 the interval lies."""
    if selects.unit != "share":
        half = found.interval.high - found.interval.mean
        return f"{found.interval.mean:+.4g}" + ("" if math.isnan(half) else f" ± {half:.4g}")
    mean, low, high = (selects.scale * end for end in found.interval)
    for digits in (1, 2, 3):
        shown, half = round(abs(mean), digits), round(high - mean, digits)
        if math.isnan(half) or (half < shown) == (not low <= 0.0 <= high):
            break
    return f"{mean:+.{digits}f}" if math.isnan(half) else f"{mean:+.{digits}f} ± {half:.{digits}f}"


def _gflop(flops: float) -> str:
    return f"{flops / 1e9:,.0f}" if flops >= 1e10 else f"{flops / 1e9:.2g}"


def _p_value(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _verdict(difference: float, p: float) -> str:
    if math.isnan(p):
        return "one seed: no test"
    if p > SIGNIFICANCE:
        return "not distinguishable"
    return "better" if difference > 0 else "worse"


def _mean(summaries: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(summary[key] for summary in summaries) / len(summaries))


def _settings(result: MethodResult) -> str:
    if result.best is None or not result.best.values:
        return "none"
    chosen = ", ".join(f"{short(key)} {_value(value)}" for key, value in result.best.values.items())
    return chosen + (" (default)" if result.best.number == 0 else "")


def short(key: str) -> str:
    """A tuned key in tables and pictures: a method's own without its section."""
    return key.removeprefix("algorithm.")


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _latex(text: str) -> str:
    for character in "&%#_$":
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "$<$").replace("‰", r"\textperthousand{}")
