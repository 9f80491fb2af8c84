"""A study from its plan to what it found out: ``run`` from Python, ``run_study`` for the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from rich.console import Console

from cluster.actors.ray_session import connected
from cluster.actors.remote import warm_drivers
from cluster.configuration.trees import flatten
from cluster.federation import Federation
from cluster.records import tracking
from cluster.records.introduction import benchmark_name
from cluster.records.outputs import with_tracking
from cluster.rounds.conduct import TRACKING_DEADLINE_S, stop_on_signal
from cluster.statistics import Interval
from tuning.coordinator import Coordinator
from tuning.folder import StudyFolder
from tuning.progress import StudyDisplay
from tuning.protocol import MethodResult, collect, intervals, on_test
from tuning.report import write_report
from tuning.search import Search
from tuning.storage import heal_journal, open_database, open_journal
from tuning.study import Plan, load_plan

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

#: Seconds that a study waits for its own run in MLflow; a new SQLite store is migrated first.
_FIRST_ANSWER_S = 300.0


@dataclass(frozen=True)
class StudyResult:
    """What a study found out.

    Attributes:
        folder: Its folder; ``report/report.md`` in it holds tables and pictures.
        plan: The study.
        methods: What is known of every method, its trials and final runs, by label.
        stopped: It was stopped before its end; the same study in the same folder goes on.
        failed_finals: Why final runs failed, by their names; the same study, run again, runs them again.
    """

    folder: Path
    plan: Plan
    methods: dict[str, MethodResult]
    stopped: bool = False
    failed_finals: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> dict[str, dict[str, Any]]:
        """The best values of what was tuned, by key, of every method that finished a trial, by label."""
        return {label: dict(own.best.values) for label, own in self.methods.items() if own.best is not None}

    @cached_property
    def scores(self) -> dict[str, Interval]:
        """What selects, on test data: mean and 95 % interval over the fresh seeds, by label."""
        return intervals(on_test(self.plan, self.methods))

    @property
    def ranking(self) -> list[str]:
        """Labels of the methods with final runs, the best mean first; the report says what is different."""
        merit = self.plan.selects.merit
        return sorted(self.scores, key=lambda label: -merit(self.scores[label].mean))

    @property
    def failures(self) -> dict[str, str]:
        """Why final runs failed, and trials that no value of theirs explains, by the runs' names."""
        trials = {
            f"{label}-trial-{trial.number:03d}": trial.reason or ""
            for label, own in self.methods.items()
            for trial in own.tried
            if trial.lost
        }
        return {**trials, **self.failed_finals}


def run(
    study: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), output: str | Path | None = None
) -> StudyResult:
    """Run a study, or go on with it; what ``sparsyfed tune`` does, without a word.

    Args:
        study: Name of a preset, path of a YAML file, or nested values with a section ``study``.
        overrides: ``key=value`` on it, such as ``study.trials=30``.
        output: The study's folder; by default ``runs/<its name>``. One that was interrupted there goes on.

    Returns:
        The best values, scores and ranking, and every trial. After Ctrl-C, what is known until then.

    Raises:
        ConfigError, RunFolderError, DataError, ...: Before anything starts; the message says what to do.
    """
    plan = load_plan(study, overrides)
    return run_study(plan, StudyFolder(Path(output or Path("runs") / plan.name).absolute()))


def run_study(plan: Plan, folder: StudyFolder, console: Console | None = None) -> StudyResult:
    """Run a study, or go on with it: search, final runs, report.

    Args:
        plan: The study, from ``load_plan``.
        folder: Where it is kept.
        console: Where to show its progress; nowhere by default.
    """
    quiet()
    console = console or Console(quiet=True)
    plan = _tracked(plan, folder.path.parent)
    federation = Federation.of(plan.base)
    # A database that does not answer is an error before a folder is made.
    database = storage_of(plan, folder) if plan.section.storage else None
    with folder.locked():
        mark = folder.take(plan)
        heal_journal(folder.path)
        searches = searches_of(plan, database or storage_of(plan, folder), mark)
        whole_machine = plan.base.model_copy(update={"actors": _cores(plan)})
        configs = [own.config for own in plan.contenders.values()]
        with (
            connected(whole_machine, federation.stored_floats, also=configs),
            warm_drivers(),
            stop_on_signal() as stopped,
        ):
            parent = _Parent(plan, folder)
            for search in searches.values():
                search.introduce(folder.path)
            try:
                with StudyDisplay(console, plan, collect(plan, folder, searches)) as display:
                    coordinator = Coordinator(plan, folder, searches, display, parent.tags, stopped.is_set)
                    ended = coordinator.run()
                methods = collect(plan, folder, searches)
                result = StudyResult(folder.path, plan, methods, not ended, coordinator.failed_finals)
                for label, interval in result.scores.items():
                    searches[label].judged(interval)
                files = write_report(plan, folder, methods)
                parent.finish("FINISHED" if ended else "KILLED", files, _final_values(result))
            except BaseException:
                parent.finish("FAILED", [], {})
                raise
    return result


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


def _final_values(result: StudyResult) -> dict[str, float]:
    key = result.plan.selects.key
    values = {f"tuned/{label}/test_{key}": score.mean for label, score in result.scores.items()}
    values |= {f"tuned/{label}/client_rounds": float(r.client_rounds) for label, r in result.methods.items()}
    return values


def _tracked(plan: Plan, root: Path) -> Plan:
    """The plan with the store of the runs around it, unless it names another; every run of it uses that."""
    given = plan.base.tracking
    if given.enabled and given.uri is not None:
        tracking.check(given.uri)
    return plan.on(tracking={"uri": with_tracking(plan.base, root).tracking.uri})


def searches_of(plan: Plan, storage: BaseStorage, mark: str) -> dict[str, Search]:
    """Every method's search by label."""
    return {label: Search(plan, own, storage, mark) for label, own in plan.contenders.items()}


def storage_of(plan: Plan, folder: StudyFolder) -> BaseStorage:
    """Where the study's trials are kept."""
    url = plan.section.storage
    return open_journal(folder.path) if url is None else open_database(url)


def _cores(plan: Plan) -> int:
    """Actors that a private cluster of this machine holds."""
    return max(1, int((os.cpu_count() or 1) // plan.base.cpus_per_actor))


def quiet() -> None:
    """Optuna says nothing of every trial."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
