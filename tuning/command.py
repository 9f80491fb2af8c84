"""``sparsyfed tune``: a study from its file to its report, and the report of a study that is there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.command_line.figures import shown
from cluster.command_line.many_runs import Batch
from tuning import dashboard
from tuning.folder import StudyFolder
from tuning.progress import announce, conclude
from tuning.protocol import collect
from tuning.report import final_table, write_report
from tuning.running import StudyResult, quiet, run_study, searches_of, storage_of
from tuning.storage import JOURNAL
from tuning.study import load_plan

if TYPE_CHECKING:
    from rich.console import Console


def tune(console: Console, source: str, overrides: Sequence[str], output: str | None, title: str) -> int:
    """Run a study, or go on with it; returns the exit status: 1 where runs failed that should not have.

    Args:
        console: Where to show it.
        source: Study file or preset.
        overrides: ``key=value`` on it.
        output: The study's folder; default ``runs/<name>``.
        title: First line shown.

    Raises:
        ConfigError, RunFolderError, DataError, ...: Before anything starts; the message says what to do.
    """
    plan = load_plan(source, overrides)
    folder = StudyFolder(Path(output or Path("runs") / plan.name).absolute())
    announce(console, plan, folder.path, title)
    result = run_study(plan, folder, console)
    command = " ".join(["sparsyfed tune", source, *overrides, *(["--output", output] if output else [])])
    _conclude(console, result, command if result.stopped or result.failed_finals else None)
    return 130 if result.stopped else 1 if result.failures else 0


def report(console: Console, study: str, *, trust: bool = False) -> int:
    """Write the report of a study anew.

    Args:
        console: Where to show it.
        study: Its folder, or its name in ``runs``.
        trust: Import the code that it names, though somebody else made it.
    """
    path = Path(study) if Path(study).exists() else Path("runs") / study
    folder = StudyFolder(path.absolute())
    plan = folder.plan(trust=trust)
    quiet()
    results = collect(plan, folder, searches_of(plan, storage_of(plan, folder), folder.mark()))
    write_report(plan, folder, results)
    whole = all(len(result.finals) == len(plan.final_seeds) for result in results.values())
    command = f"sparsyfed tune {shown(folder.path / 'study.yaml')} --output {shown(folder.path)}"
    _conclude(console, StudyResult(folder.path, plan, results), None if whole else command)
    return 0


def batches(source: str, overrides: Sequence[str]) -> tuple[str, list[Batch]]:
    """What a study is, in words, and its runs: the trials of every method, and its final runs."""
    plan = load_plan(source, overrides)
    parts = []
    for label, own in plan.contenders.items():
        trials = plan.section.trials if own.space else 1
        parts.append(Batch(label, own.trial_config(own.default), trials + len(plan.final_seeds)))
    pruned = f", at most: {plan.section.pruner.name} ends some early" if plan.pruned else ""
    return f"a study of {len(parts)} methods{pruned}", parts


def _conclude(console: Console, result: StudyResult, command: str | None) -> None:
    """The table, what to do next, and what failed."""
    opens = dashboard.command(result.folder, JOURNAL, result.plan.section.storage)
    conclude(console, final_table(result.plan, result.methods), result.folder, opens, command)
    for name, reason in result.failures.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    if result.failed_finals:
        print("the same command runs what failed of the final runs again, and nothing else", file=sys.stderr)
