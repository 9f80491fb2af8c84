"""``docs/measures.md``, written from the table of measures.

python -m tests.measures_page          # writes the page; tests/test_docs.py compares it
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from cluster.configuration.choices import built_in
from cluster.measures import MEASURES, RESULTS, Measure, of_objective, results_of

PAGE = Path(__file__).parents[1] / "docs" / "measures.md"

_HEAD = """# What is measured

Every key of a line of `rounds.jsonl`, under the same name in MLflow, and of `result.json`. This page is
written from the one table that summaries, progress, comparisons, studies and MLflow read
(`cluster/measures.py`): `python -m tests.measures_page`. A share is stored as a fraction of 1 and shown in
percent. *Better* is empty where more is neither better nor worse. Measures by rules of different versions are
not compared.

What is learned, the objective, declares its metrics; the first one selects the best round, checkpoint and
configuration. An objective of your own (`objective.name=my_module:MyObjective`; `Classification` in
`cluster/workload/objectives.py` is the example) has the same rows with its metrics.
"""


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for name, objective in built_in("objective").items():
        parts += [f"## Of `objective.name={name}`\n", _table(of_objective(objective.measures))]
    parts += ["## Of every round\n", _table(MEASURES)]
    parts.append("## `result.json`\n\n`accuracy` stands for the key of what selects.\n")
    parts.append(_table([*results_of(built_in("objective")["classification"].measures[0]), *RESULTS]))
    return "\n".join(parts)


def _table(measures: Iterable[Measure]) -> str:
    lines = ["| key | meaning | unit | better | where |", "|---|---|---|---|---|"]
    for measure in measures:
        version = f" Version {measure.version} of its rule." if measure.version > 1 else ""
        cells = (
            f"`{measure.key}`",
            measure.meaning + version,
            measure.unit,
            measure.better or "",
            measure.when,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description="Write docs/measures.md.").parse_args()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
