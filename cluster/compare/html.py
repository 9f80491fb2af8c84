"""The report: one HTML page that holds its pictures and style and refers to nothing outside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from cluster.compare.formats import MEANINGS, METHOD_NOTE, OUTDATED_MEANING, cell_text, findings
from cluster.compare.plots import MOST_LINES
from cluster.compare.table import Comparison, Table

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; color: #1b1b1b;
  background: #fff; max-width: 1180px; margin: 2.2rem auto; padding: 0 1.4rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p.source { color: #555; margin: .2rem 0 0; } p.note { color: #555; font-size: .85rem; max-width: 62rem; }
div.wide { overflow-x: auto; }
div.wide + div.wide { margin-top: 1.1rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 1.5px solid #333; font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, table.words td, table.words th { text-align: left; }
table.words td { white-space: normal; overflow-wrap: anywhere; }
td.best { font-weight: 700; }
span.interval { color: #666; font-weight: 400; } sup { color: #0072B2; font-weight: 700; line-height: 0; }
div.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1.4rem; }
figure { margin: 0; break-inside: avoid; } figure img { width: 100%; max-width: 408px; display: block; }
figcaption { font-size: .82rem; color: #333; margin-top: .2rem; }
summary { cursor: pointer; font-weight: 600; margin-top: 1.6rem; }
@media print { body { margin: 0; max-width: none; } details { display: none; } }
"""


@dataclass(frozen=True)
class Picture:
    """A drawn plot: name of its files, caption and PNG bytes."""

    name: str
    caption: str
    png: bytes


def page(comparison: Comparison, pictures: Sequence[Picture], missing: Sequence[str]) -> str:
    """The whole report.

    Args:
        comparison: What is reported.
        pictures: Its plots, embedded as they are.
        missing: Captions of plots for which no run has the data.
    """
    groups, left_out = comparison.table.groups, comparison.grouped.left_out
    runs = sum(len(group.runs) for group in groups)
    counts = f"{_count(runs, 'run')} in {_count(len(groups), 'group')}"
    parts = [
        f"<h1>{escape(comparison.title)}</h1>",
        f'<p class="source">{escape(comparison.source)}: {counts}'
        + (f", {len(left_out)} left out" if left_out else "")
        + "</p>",
        "<h2>Results</h2>",
        *map(_table, comparison.table.parts),
        f'<p class="note">{_legend(comparison.table)}</p>',
        *(f'<p class="note">{escape(line)}.</p>' for line in findings(comparison.table)),
        f'<p class="note">{escape(METHOD_NOTE)}</p>',
        "<h2>Plots</h2>",
        f'<p class="note">{_plots_note(comparison.table)}</p>',
        '<div class="pictures">',
        *map(_figure, pictures),
        "</div>",
    ]
    if missing:
        listed = "; ".join(f"{text[:1].lower()}{text[1:]}" for text in missing)
        parts.append(f'<p class="note">Not drawn, for no run has the data: {escape(listed)}.</p>')
    if left_out:
        rows = [(run.name, reason, run.place) for run, reason in left_out]
        parts += ["<h2>Runs left out</h2>", _words(("run", "why", "place"), rows)]
    parts += _details(comparison)
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(comparison.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    heads = ["group", "seeds", *(column.header for column in table.columns)]
    lines = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    for group, cells in zip(table.groups, table.cells, strict=True):
        row = f"<td>{escape(group.label)}</td><td>{len(group.runs)}</td>"
        for cell, column in zip(cells, table.columns, strict=True):
            mean, sign, rest = cell_text(cell, column, len(group.runs)).partition(" ")
            text = escape(mean) + (f' <span class="interval">{escape(rest)}</span>' if sign else "")
            text += _SIGNS.get(cell.verdict, "") + ("<sup>≠</sup>" if cell.outdated else "")
            row += f'<td class="{cell.verdict}">{text}</td>' if cell.verdict else f"<td>{text}</td>"
        lines.append(f"<tr>{row}</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


#: Signs of verdicts beside bold type.
_SIGNS: dict[str, str] = {"tied": "<sup>†</sup>", "worse": "<sup>↓</sup>"}


def _legend(table: Table) -> str:
    texts = [
        f"{_SIGNS.get(verdict, '<b>Bold</b>:')} {escape(meaning)}. "
        for verdict, meaning in MEANINGS.items()
        if verdict in table.verdicts
    ]
    if any(cell.outdated for row in table.cells for cell in row):
        texts.append(f"<sup>≠</sup> {escape(OUTDATED_MEANING)}.")
    return "".join(texts)


def _plots_note(table: Table) -> str:
    text = "Lines are means over seeds, bands 95 % intervals (none for a single seed)."
    if len(table.groups) > MOST_LINES:
        text += f" Of the {len(table.groups)} groups the {MOST_LINES} best are drawn."
    if table.differing_rules:
        text += f" {'. '.join(table.differing_rules)}."
    return escape(text)


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = escape(picture.caption)
    return (
        f'<figure id="{escape(picture.name)}"><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _details(comparison: Comparison) -> list[str]:
    """What differs, what is shared and every run, folded away."""
    groups = comparison.table.groups
    keys = list(dict.fromkeys(key for group in groups for key in group.params))
    differing = [[group.label, *(group.params.get(key, "") for key in keys)] for group in groups]
    runs = [
        (group.label, run.seed, run.reached, run.name, run.place) for group in groups for run in group.runs
    ]
    parts = []
    if keys:
        parts += [*_folded("What the groups differ in", _words(("group", *keys), differing))]
    parts += _folded(
        "What all runs share", _words(("key", "value"), sorted(comparison.grouped.shared.items()))
    )
    return parts + _folded("Every run", _words(("group", "seed", "rounds", "run", "place"), runs))


def _folded(summary: str, content: str) -> list[str]:
    return [f"<details><summary>{escape(summary)}</summary>", content, "</details>"]


def _words(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="words">\n<tr>{head}</tr>\n{body}\n</table></div>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
