"""The coordinator: asks every method's study, runs trials side by side on the cluster, tells how they ended.

One process, one lock on the study's folder. Trials are runs like any other, each with a driver of its own and
its share of the actors; a thread follows each of them. Everything is kept as it happens, so that after a kill
the coordinator is simply started again.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from optuna.trial import Trial

from cluster.actors.actor_pool import PlacementError
from cluster.actors.ray_session import ClusterError, room
from cluster.configuration.config import Config, validate
from cluster.configuration.trees import ConfigError, merge
from cluster.exchange import ClientError
from cluster.execution import complete, run_or_resume, tell_of_another_try
from cluster.records.run_folder import BusyError, RunFolder
from cluster.records.shared_storage import below
from cluster.references import may_pass, reason_of
from cluster.rounds.setbacks import DivergedError
from tuning.folder import StudyFolder
from tuning.protocol import MethodResult, collect
from tuning.search import Cost, Search, present
from tuning.study import Plan

Line = dict[str, Any]
Outcome = Literal["finished", "pruned", "failed"]

#: How often a run is begun where the cluster takes its driver or its actors, and where something else fails.
_ATTEMPTS, _OTHER_ATTEMPTS = 4, 2
#: Trials in a row that may fail for no fault of theirs; with the next one the study ends, to be gone on with.
LOST_IN_A_ROW = 3

#: Seconds that a run waits for the driver of a killed coordinator to let go of its folder.
_HANDOVER_S = 60.0

#: What is no run's own: without a cluster none of them goes on.
_OF_THE_CLUSTER = (ClusterError, PlacementError)


@dataclass(eq=False)
class Job:
    """One run of the study: a trial, or a final run of a best configuration.

    Attributes:
        label: The method.
        number: The trial whose configuration is run.
        config: Its experiment.
        path: Its run folder.
        trial: The Optuna trial of the search; None for a final run.
        stop: Set to end the run after its round.
    """

    label: str
    number: int
    config: Config
    path: Path
    trial: Trial | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def shown(self) -> str:
        """Its name in progress and in MLflow."""
        return f"{self.label}-{'trial' if self.trial else 'final'}-" + (
            f"{self.number:03d}" if self.trial else f"s{self.config.seed}"
        )


class Display(Protocol):
    """What is shown while the study goes on; called under the coordinator's lock."""

    def started(self, job: Job) -> None:
        """A run begins, or goes on."""

    def line(self, job: Job, line: Line) -> None:
        """A round of a run is done."""

    def ended(self, job: Job, outcome: Outcome, value: float | None, reason: str | None) -> None:
        """A run is done; ``value`` is what selects, on validation data for a trial and test data else."""


def shares(plan: Plan, free: int) -> tuple[int, int]:
    """How many trials run at once on ``free`` actor places, and the actors of each.

    A method is best tuned one trial after the other, each with many actors; beyond a method a trial, and a
    client an actor, what is free takes more trials of a method at once.
    """
    asked, actors = plan.section.trials_at_once, plan.base.actors
    if plan.base.execution == "inline":
        return 1, 1
    if asked is None and actors is not None:
        asked = max(1, free // actors)
    elif asked is None:
        asked = max(1, min(free, len(plan.contenders)), free // plan.base.cohort)
    return asked, actors or max(1, min(plan.base.cohort, free // asked))


class Coordinator:
    """Runs a study in its folder until it is complete or stopped.

    Args:
        plan: The study.
        folder: Its folder, locked and taken by the caller.
        searches: The methods' searches by label.
        display: What shows it.
        tags: Tags of every run in MLflow.
        stopped: Whether the user asked to stop.

    Attributes:
        failed_finals: Why a final run failed, by its name; the next coordinator runs it again.
    """

    def __init__(
        self,
        plan: Plan,
        folder: StudyFolder,
        searches: dict[str, Search],
        display: Display,
        tags: dict[str, str],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._plan, self._folder, self._searches = plan, folder, searches
        self._display, self._tags, self._stopped = display, tags, stopped
        self.failed_finals: dict[str, str] = {}
        self._lost_in_a_row = 0
        self._lock = threading.RLock()
        self._running: set[Job] = set()
        self._done: queue.SimpleQueue[tuple[Job, BaseException | None]] = queue.SimpleQueue()
        self._slots, self._actors = 1, 1

    def run(self) -> bool:
        """Search, then run every best configuration on fresh seeds, on the connected cluster.

        Returns:
            Whether it came to its end; False where it was stopped.
        """
        free = room(self._plan.base) if self._plan.base.execution == "ray" else 1
        self._slots, self._actors = shares(self._plan, free)
        left = [
            self._trial(label, trial)
            for label, search in self._searches.items()
            for trial in search.interrupted()
        ]
        interrupted = [job for job in left if job is not None]
        self._work(lambda: interrupted.pop(0) if interrupted else self._next_trial())
        if not self._stopped():
            finals = self._final_runs(collect(self._plan, self._folder, self._searches))
            self._work(lambda: finals.pop(0) if finals else None)
        return not self._stopped()

    # ------------------------------------------------------------------------------------- what is run

    def _next_trial(self) -> Job | None:
        """The next trial of the method with the fewest running, then the fewest begun.

        While there are as many methods as places, each has one trial at a time, and what is suggested to it
        depends on its own trials alone.
        """
        running = Counter(job.label for job in self._running)
        order = {label: (running[label], len(s.trials())) for label, s in self._searches.items()}
        for label in sorted(order, key=lambda label: order[label]):
            while self._searches[label].wants_another():
                job = self._trial(label, self._searches[label].ask())
                if job is not None:
                    return job
        return None

    def _trial(self, label: str, trial: Trial) -> Job | None:
        """A trial to run; None where its values make no valid experiment, which is told as failed."""
        contender = self._plan.contenders[label]
        path = self._folder.trial(label, trial.number)
        try:
            config = contender.trial_config(trial.params)
        except ConfigError as error:
            self._searches[label].tell_failed(trial, str(error), Cost.of(path))
            return None
        job = Job(label, trial.number, config, path, trial)
        job.config = self._placed(job, "trial")
        return job

    def _final_runs(self, results: dict[str, MethodResult]) -> list[Job]:
        jobs = []
        for seed in self._plan.final_seeds:
            for label, result in results.items():
                if result.best is None or seed in result.finals:
                    continue
                config = self._plan.contenders[label].final_config(result.best.values, seed)
                path = self._folder.final(label, result.best.number, seed)
                job = Job(label, result.best.number, config, path)
                job.config = self._placed(job, "final")
                jobs.append(job)
        return jobs

    def _placed(self, job: Job, kind: str) -> Config:
        """The job's experiment with its share of the cluster, its place in MLflow and on shared storage."""
        tags = {**self._tags, "kind": kind, "trial": str(job.number)}
        tracked = {"run_name": job.shown, "tags": tags}
        # A trial's driver ends with its coordinator: the next one goes on with the trial from its folder.
        changes = {"actors": self._actors, "detached": False, "tracking": tracked}
        # Every method has a trial-000.
        changes["checkpoint_uri"] = below(job.config.checkpoint_uri, self._folder.path.name, job.label)
        return validate(merge(job.config.dump(), changes))

    # ------------------------------------------------------------------------------------ running it

    def _work(self, following: Callable[[], Job | None]) -> None:
        """Keep every place busy until nothing follows; what no run can do without ends all of them."""
        failure: BaseException | None = None
        while True:
            with self._lock:
                while len(self._running) < self._slots and failure is None and not self._stopped():
                    job = following()
                    if job is None:
                        break
                    self._running.add(job)
                    self._display.started(job)
                    threading.Thread(target=self._follow, args=(job,), daemon=True, name=job.shown).start()
            if not self._running:
                break
            job, error = self._done.get()
            self._running.discard(job)
            if error is not None and failure is None:
                failure = error
                for other in self._running:
                    other.stop.set()
        if failure is not None:
            raise failure

    def _follow(self, job: Job) -> None:
        problem: BaseException | None = None
        try:
            try:
                summary = self._compute(job)
            except Exception as error:
                if not _of_one_run(error):
                    raise
                with self._lock:
                    self._lost_in_a_row += may_pass(error)
                    if self._lost_in_a_row > LOST_IN_A_ROW:
                        raise  # this one stays running; whatever is wrong would take all that are left
                    self._fail(job, error)
            else:
                with self._lock:
                    self._lost_in_a_row = 0
                    self._conclude(job, summary)
        except BaseException as error:
            problem = error
        self._done.put((job, problem))

    def _compute(self, job: Job) -> dict[str, Any]:
        """The run's summary; tried again where machine or cluster were at fault, not the experiment."""
        done = complete(job.config, job.path)
        if done is not None:
            return done.summary
        if job.path.exists() and not (job.path / "config.yaml").exists():
            shutil.rmtree(job.path)  # killed before anything was computed
        give_up = time.monotonic() + _HANDOVER_S
        attempt = 1
        while True:
            for line in RunFolder(job.path).rounds():
                self._judge(job, line)  # of what was stored before an interruption
            try:
                return run_or_resume(
                    job.config,
                    job.path,
                    progress=lambda line: self._on_line(job, line),
                    should_stop=lambda: job.stop.is_set() or self._stopped(),
                ).summary
            except BusyError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(1.0)
            except Exception as error:
                limit = _ATTEMPTS if isinstance(error, _OF_THE_CLUSTER) else _OTHER_ATTEMPTS
                if attempt == limit or self._stopped() or not may_pass(error):
                    raise
                attempt += 1
                tell_of_another_try(job.shown, error)

    def _on_line(self, job: Job, line: Line) -> None:
        self._judge(job, line)
        with self._lock:
            self._display.line(job, line)

    def _judge(self, job: Job, line: Line) -> None:
        """Hand what selects to a trial's study, and end the trial where the pruner says so."""
        value = line.get(f"val/{self._plan.selects.key}")
        if job.trial is None or value is None or job.stop.is_set():
            return
        with self._lock:
            if self._searches[job.label].report(job.trial, line["round"], value):
                job.stop.set()

    def _conclude(self, job: Job, summary: dict[str, Any]) -> None:
        """Tell the study what a run came to, unless it was stopped for another reason than its own."""
        whole, key = summary["complete"], self._plan.selects.key
        if job.trial is None:
            if whole:
                self._display.ended(job, "finished", summary[key], None)
            return
        search, cost, value = self._searches[job.label], Cost.of(job.path), summary[f"val_{key}"]
        shown = f"validation {self._plan.selects.title} {self._plan.selects.text(value)}"
        if whole:
            self._present(job, f"finished: {shown}")
            search.tell_finished(job.trial, value, cost)
            self._display.ended(job, "finished", value, None)
        elif (at := search.pruned_at(job.trial)) is not None:
            text = f"pruned for its value after round {at}; after its last round {shown}"
            self._present(job, text)
            search.tell_pruned(job.trial, cost)
            self._display.ended(job, "pruned", value, None)
        else:
            return  # it stays running, for the coordinator that goes on with the study
        _drop_checkpoints(job.path)

    def _present(self, job: Job, outcome: str) -> None:
        if job.trial is not None:
            present(job.trial, job.label, job.path, self._folder.artifacts, outcome)

    def _fail(self, job: Job, error: Exception) -> None:
        """Tell the study that a run cannot finish; a final run is left to the next coordinator."""
        lost, reason = may_pass(error), reason_of(error)
        if lost and self._stopped():
            return  # it was not tried again, and stays running
        if job.trial is None:
            self.failed_finals[job.shown] = reason
        else:
            self._present(job, f"failed: {reason}")
            self._searches[job.label].tell_failed(job.trial, reason, Cost.of(job.path), lost=lost)
            _drop_checkpoints(job.path)
        self._display.ended(job, "failed", None, reason)


def _of_one_run(error: Exception) -> bool:
    """Whether other runs may well do better, of the errors that a run ends with."""
    if isinstance(error, (DivergedError, ClientError)):
        return True
    return may_pass(error) and not isinstance(error, _OF_THE_CLUSTER)


def _drop_checkpoints(path: Path) -> None:
    """A trial that was told is never continued; its rounds, result and model stay."""
    for checkpoint in (path / "checkpoints").glob("*.safetensors"):
        checkpoint.unlink()
