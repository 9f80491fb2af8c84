"""``sparsyfed tune``: a study from its file to its report, and the report of a study that is there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from rich.console import Console

from cluster.actors.ray_session import connected
from cluster.command_line.figures import shown
from cluster.configuration.trees import flatten
from cluster.federation import Federation
from cluster.records import tracking
from cluster.records.introduction import benchmark_name
from cluster.records.outputs import with_tracking
from cluster.rounds.conduct import TRACKING_DEADLINE_S, stop_on_signal
from tuning.coordinator import Coordinator
from tuning.folder import StudyFolder
from tuning.progress import StudyDisplay, announce, conclude
from tuning.protocol import MethodResult, collect, intervals, on_test
from tuning.report import final_table, write_report
from tuning.search import Search
from tuning.storage import heal_journal, open_database, open_journal
from tuning.study import Plan, load_plan

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

#: Seconds that a study waits for its own run in MLflow; a new SQLite store is migrated first.
_FIRST_ANSWER_S = 300.0


def tune(console: Console, source: str, overrides: Sequence[str], output: str | None, title: str) -> int:
    """Run a study, or go on with it; returns the exit status.

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
    complete, results = run_study(plan, folder, console)
    command = " ".join(["sparsyfed tune", source, *overrides, *(["--output", output] if output else [])])
    conclude(console, final_table(plan, results), folder.path, command, complete)
    return 0 if complete else 130


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
    _quiet()
    results = collect(plan, folder, _searches(plan, _storage(plan, folder), folder.mark()))
    write_report(plan, folder, results)
    whole = all(len(result.finals) == len(plan.final_seeds) for result in results.values())
    command = f"sparsyfed tune {shown(folder.path / 'study.yaml')} --output {shown(folder.path)}"
    conclude(console, final_table(plan, results), folder.path, command, whole)
    return 0


def run_study(
    plan: Plan, folder: StudyFolder, console: Console | None = None
) -> tuple[bool, dict[str, MethodResult]]:
    """Run a study, or go on with it: search, final runs, report.

    Args:
        plan: The study, from ``load_plan``.
        folder: Where it is kept.
        console: Where to show its progress; nowhere by default.

    Returns:
        Whether it is complete (False where it was stopped), and what it found out by method.
    """
    _quiet()
    console = console or Console(quiet=True)
    plan = _tracked(plan, folder.path.parent)
    federation = Federation.of(plan.base)
    # A database that does not answer is an error before a folder is made.
    database = _storage(plan, folder) if plan.section.storage else None
    with folder.locked():
        mark = folder.take(plan)
        heal_journal(folder.path)
        searches = _searches(plan, database or _storage(plan, folder), mark)
        whole_machine = plan.base.model_copy(update={"actors": _cores(plan)})
        methods = [own.config for own in plan.contenders.values()]
        with (
            connected(whole_machine, federation.stored_floats, also=methods),
            stop_on_signal() as stopped,
        ):
            parent = _Parent(plan, folder)
            try:
                with StudyDisplay(console, plan, collect(plan, folder, searches)) as display:
                    coordinator = Coordinator(plan, folder, searches, display, parent.tags, stopped.is_set)
                    complete = coordinator.run()
                results = collect(plan, folder, searches)
                files = write_report(plan, folder, results)
                parent.finish("FINISHED" if complete else "KILLED", files, _final_values(plan, results))
            except BaseException:
                parent.finish("FAILED", [], {})
                raise
    return complete, results


class _Parent:
    """The study's own run in MLflow, above those of its trials; nothing where tracking is off."""

    def __init__(self, plan: Plan, folder: StudyFolder) -> None:
        self.tags = {"study": plan.name}
        self._tracker: tracking.Tracker | None = None
        section = plan.base.tracking
        if not section.enabled or section.uri is None:
            return
        experiment = section.experiment or benchmark_name(plan.base)
        target = tracking.TrackingTarget(section.uri, experiment, f"study-{plan.name}")
        params = {key: value for key, value in flatten(plan.dump()).items() if not key.startswith("tracking")}
        tags = {**section.tags, **self.tags, "kind": "study"}
        self._tracker = tracking.Tracker(folder.path, target, params=params, tags=tags)
        self._tracker.start()
        run_id = self._tracker.wait_until_known(_FIRST_ANSWER_S)
        if run_id is not None:  # else the trials are found by the tag `study` alone
            self.tags["mlflow.parentRunId"] = run_id

    def finish(self, status: tracking.Status, files: Sequence[Path], values: Mapping[str, float]) -> None:
        """End the run, tables and pictures attached."""
        if self._tracker is not None:
            self._tracker.finish(status, files, values, 2 * TRACKING_DEADLINE_S)


def _final_values(plan: Plan, results: Mapping[str, MethodResult]) -> dict[str, float]:
    means = intervals(on_test(plan, results))
    values = {f"tuned/{label}/test_{plan.selects.key}": interval.mean for label, interval in means.items()}
    values |= {f"tuned/{label}/client_rounds": float(r.client_rounds) for label, r in results.items()}
    return values


def _tracked(plan: Plan, root: Path) -> Plan:
    """The plan with the store of the runs around it, unless it names another; every run of it uses that."""
    given = plan.base.tracking
    if given.enabled and given.uri is not None:
        tracking.check(given.uri)
    return plan.on(tracking={"uri": with_tracking(plan.base, root).tracking.uri})


def _searches(plan: Plan, storage: BaseStorage, mark: str) -> dict[str, Search]:
    return {label: Search(plan, own, storage, mark) for label, own in plan.contenders.items()}


def _storage(plan: Plan, folder: StudyFolder) -> BaseStorage:
    url = plan.section.storage
    return open_journal(folder.path) if url is None else open_database(url)


def _cores(plan: Plan) -> int:
    """Actors that a private cluster of this machine holds."""
    return max(1, int((os.cpu_count() or 1) // plan.base.cpus_per_actor))


def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
