"""The driver: has the schedule collect totals, advances the server, measures, logs, checkpoints.

One plain class; ``cluster.run`` runs it in this process (``execution: inline``) or inside the driver actor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import save

from algorithms import Algorithm, ParameterLayout, ServerState
from cluster import seeding
from cluster.configuration.choices import ChoiceError
from cluster.exchange import EvaluationChunk
from cluster.federation import Federation
from cluster.records.checkpoint import Checkpoint, list_rounds, save_checkpoint, write_atomically
from cluster.records.kept_files import drop_unused, load_kept, save_kept
from cluster.records.logged_models import effective_model
from cluster.records.model_file import model_bytes, model_metadata
from cluster.records.resuming import RULES, load_resumable, standing, stands_on, take_up
from cluster.records.run_folder import RunFolder
from cluster.references import load_reference
from cluster.rounds.aggregating import Aggregating
from cluster.rounds.client_evaluation import ClientEvaluation
from cluster.rounds.engine import Engine, Outcome
from cluster.rounds.ledger import Ledger, Line
from cluster.rounds.metrics import Supports, added_up, evaluation_metrics, round_metrics, time_metrics
from cluster.rounds.private import Private
from cluster.rounds.robust_evaluation import RobustEvaluation
from cluster.rounds.schedule import Round, Schedule, Snapshot
from cluster.rounds.setbacks import Setbacks
from cluster.rounds.stopping import StopRule
from cluster.transport.downlink import Holders

#: Rows of one evaluation chunk.
_CHUNK_ROWS = 256


class Driver:
    """Runs one experiment from its folder, from the start or from its last checkpoint.

    Args:
        folder: The run's folder.
        federation: Data, partition and initial model.
        engine: Where rounds are computed.
        on_line: Called with each new round's line once it is stored.
        should_stop: Asked before each round; True ends the run with a checkpoint, once there is a round.
        on_checkpoint: Called with every checkpoint, once it is written.

    Attributes:
        state: The server's state after the rounds so far.
        stopped_by: What ``stop`` ended the run for, in words; None where it did not.
    """

    def __init__(
        self,
        folder: RunFolder,
        federation: Federation,
        engine: Engine,
        *,
        on_line: Callable[[Line], None] = lambda line: None,
        should_stop: Callable[[], bool] = lambda: False,
        on_checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.federation, self.engine = folder, federation, engine
        self._should_stop, self._on_checkpoint = should_stop, on_checkpoint
        config = self.config = federation.config
        self.method, self.server = config.method, config.build_server()
        self.layout: ParameterLayout = federation.layout
        self._last = config.stop_after or config.rounds
        self._schedule = make_schedule(federation, engine, self.method)
        self._chunks = federation.evaluation_chunks(_CHUNK_ROWS)
        self._clients, self._robust = ClientEvaluation(federation), RobustEvaluation(federation, _CHUNK_ROWS)
        self._setbacks, self._supports = Setbacks(), Supports()
        self._aggregating, self._private = Aggregating(federation), Private.of(federation)
        self._stands_on = stands_on(federation)
        self._after: Callable[[], None] | None = None  # what is left to do about the last round
        self._final: Line = {}
        self._stop = StopRule.of(config, federation.selection_metric)
        self.stopped_by: str | None = None
        self._ending = False  # what is measured now is the run's last round
        found = standing(folder, config)
        take_up(folder, found)
        self._ledger = Ledger(folder, config, found.lines, on_line, federation.objective.selects)
        self.state = self._initial_state() if found.checkpoint is None else self._restore(found.checkpoint)
        self._before = self.state  # that of the round before, whose line may still wait

    # ------------------------------------------------------------------------------------- the run

    def run(self) -> Line:
        """Compute rounds until the planned end, ``stop_after``, what ``stop`` waits for or a stop request.

        Returns:
            The last round's line.

        Raises:
            DivergedError: Every update of three rounds in a row was refused.
            ClientError: Every client of three rounds in a row failed and was skipped.
        """
        while self.state.round < self._last and not self._setbacks.too_many:
            if self._stop is not None:
                self._settle()
                self.stopped_by = self._stop.reason(self._ledger.lines)
            if self._private is not None and not self.stopped_by:
                self.stopped_by = self._private.exhausted(self._schedule.instruct(self.state))
            if self.stopped_by or (self._should_stop() and self.state.round >= self.method.first_round):
                break
            self._round()
        self._finish()
        line = self._ledger.line(self.state.round)
        self._save_model(line | self._final)
        self._setbacks.check(line, self.config.learning_rate(self.state.round))
        return line | self._final

    def state_after(self, round_number: int) -> ServerState:
        """The server's state after a round whose line is being stored."""
        return self.state if self.state.round == round_number else self._before

    def _round(self) -> None:
        """Collect a round's updates and step; what there is to tell of it is told while the next one runs."""
        started, before = time.perf_counter(), self.state
        result = self._schedule.round(before, self._due_chunks(), self._book_keeping)
        if not result.outcome.evaluating:
            self._complete_line(result.outcome, before.round)
        worked = time.perf_counter()
        self._before, self.state = before, self._advance(before, result)
        stepped = time.perf_counter()
        times = {
            "time/round_s": stepped - started,
            "time/prepare_s": result.prepared - started,
            "time/step_s": stepped - worked,
        }
        # Taken now: the next round's broadcast already changes who holds which mask.
        snapshot = self._schedule.snapshot()

        def after() -> None:
            self._complete_line(result.outcome, before.round)
            self._measure(before, result, times, snapshot)

        self._after = after

    def _advance(self, before: ServerState, result: Round) -> ServerState:
        """The server's state after a round; without an update all but its number stays."""
        outcome = result.outcome
        total = None if outcome.total is None else self._aggregating.settle(before, outcome.total)
        if self._private is not None:
            total = self._private.release(before, total, self._schedule.instruct(before))
            self._schedule.clip = self._private.clip
            result.metrics.update(self._private.line)
        if outcome.total is None or total is None:
            self._setbacks.count(before.round + 1, outcome.reports)
            return replace(before, round=before.round + 1)
        self._setbacks.clear()
        share = outcome.total.samples / self._schedule.population_weight(before.round + 1)
        return self.method.advance(before, total, self.server, self.layout, share)

    def _book_keeping(self) -> None:
        """Write, measure and checkpoint the last round while the next one is already being computed."""
        if self._after is not None:
            self._after()
            self._after = None

    def _measure(
        self, before: ServerState, result: Round, times: dict[str, float], snapshot: Snapshot
    ) -> None:
        """Enter the last round's line, and checkpoint where that is due."""
        state, outcome, started = self.state, result.outcome, time.perf_counter()
        line: Line = {"round": state.round, "timestamp": time.time()}
        old, new = (self.method.nonzeros(one.weights, self.layout).numpy() for one in (before, state))
        line |= round_metrics(self.layout, old, new, outcome, result.downlink)
        line |= self._supports.overlap(state.round, new)
        measures = self.method.layer_measures(state, self.layout)
        line |= {f"{name}/layers": values for name, values in measures.items()}
        if self.config.sparsity_schedule.name != "constant":
            target = self.config.ramp.at(self.method.sparsity, max(1, state.round), self.config.rounds)
            line["sparsity/target"] = target
        line["train/lr"] = self.config.learning_rate(max(1, state.round))
        if snapshot.kept:
            line["clients/kept_bytes"] = sum(state.nbytes for state in snapshot.kept.values())
        if self.federation.trained.base_bytes:
            installed = len(snapshot.installed.clients)
            line["comm/base_bytes_total"] = installed * self.federation.trained.base_bytes
        line |= result.metrics | times | time_metrics(outcome, self.engine.actors)
        self._ledger.enter(line, evaluated=not self._evaluation_due(state.round))
        measured = time.perf_counter()
        if state.round % self.config.checkpoint_every == 0:
            self.checkpoint(snapshot)
        self._ledger.spent(log=measured - started, checkpoint=time.perf_counter() - measured)

    def _settle(self) -> None:
        """Measure and evaluate the last round at once, as what it says decides whether there is another."""
        self._book_keeping()
        if self._ledger.waiting is not None:
            chunks = self._chunks_of(self.state.round, last=False)
            outcome = self._schedule.evaluate(self.state, chunks, lambda: None)
            self._complete_line(outcome, self.state.round)

    def _finish(self) -> None:
        """Measure and evaluate the last round, with no next round to overlap it with."""
        self._ending = True
        self._book_keeping()
        state = self.state
        evaluated = self._ledger.value(state.round, self.federation.selection_metric) is not None
        # Clients are judged in the last round too, whatever was measured to find that it is the last one.
        judged = all(each.due(state.round) for each in (self._clients, self._robust))
        if self._ledger.waiting is not None or not evaluated or (self.stopped_by and not judged):
            chunks = self._chunks_of(state.round, last=True)
            outcome = self._schedule.evaluate(state, chunks, lambda: None)
            # A run that was stopped elsewhere may have stored this round's line without an evaluation.
            self._final = self._evaluation(outcome, state.round, last=True)
            self._ledger.complete(self._final)
        if state.round not in list_rounds(self.folder.checkpoints):
            self.checkpoint(self._schedule.snapshot())

    # ---------------------------------------------------------------------------------- evaluation

    def _evaluation_due(self, round_number: int) -> bool:
        others = self._clients.due(round_number) or self._robust.due(round_number)
        due = round_number % self.config.evaluate_every == 0 or others
        return due or round_number == self._last or self._ending

    def _chunks_of(self, round_number: int, *, last: bool) -> list[EvaluationChunk]:
        others = (each.chunks(round_number, last=last) for each in (self._clients, self._robust))
        return [*self._chunks, *chain.from_iterable(others)]

    def _due_chunks(self) -> list[EvaluationChunk]:
        """Chunks on which this round's broadcast, the last round's result, is evaluated."""
        last = self.state.round
        settled = self._after is None and self._ledger.waiting is None
        if last < self.method.first_round or settled or not self._evaluation_due(last):
            return []
        return self._chunks_of(last, last=False)

    def _evaluation(self, outcome: Outcome, round_number: int, *, last: bool) -> Line:
        """What was measured of a round's result; of each client and under attack where that was due."""
        parts = added_up(outcome.evaluated())
        measured = self._clients.metrics(self.folder, round_number, parts, last=last)
        measured |= self._robust.metrics(added_up(outcome.evaluated(), attacked=True))
        return evaluation_metrics(self.federation.objective, parts) | measured

    def _complete_line(self, outcome: Outcome, round_number: int) -> None:
        """Store the line that waits for the evaluation that came with the round after it."""
        if self._ledger.waiting is not None:
            self._ledger.complete(self._evaluation(outcome, round_number, last=False))

    # --------------------------------------------------------------------------- state on the disk

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Write a checkpoint of everything the next round needs.

        Args:
            snapshot: What the schedule remembers after the round of ``self.state``.
        """
        place = self.folder.checkpoints
        kept = save_kept(place, self.state.round, snapshot.kept)
        driver: dict[str, Any] = {
            **self._ledger.dump(),
            "held": snapshot.held.dump(),
            "installed": snapshot.installed.dump(),
            "simulated_s": snapshot.simulated_s,
            "flight": snapshot.flight,
            "refused_rounds": self._setbacks.refused,
            "failed_rounds": self._setbacks.failed,
            "rules": RULES,
        }
        if self._private is not None:
            driver["privacy"] = self._private.dump()
        save_checkpoint(
            place,
            Checkpoint(
                self.state,
                driver,
                f"{self.config.digest()}-{self._stands_on['code']}",
                snapshot.bases,
                self._supports.by_round,
                self._stands_on,
                kept,
            ),
            best_round=self._ledger.best(list_rounds(place), self.federation.selection_metric),
        )
        drop_unused(place)
        self._on_checkpoint()

    def _initial_state(self) -> ServerState:
        rng = seeding.generator(self.config.seed, "server")
        return self.method.initial_state(self.federation.initial_weights, self.layout, rng)

    def _restore(self, path: Path) -> ServerState:
        """Continue from a checkpoint; see :func:`cluster.records.resuming.load_resumable`."""
        stored = load_resumable(path, self.config)
        driver = stored.driver
        self._ledger.load(driver)
        self._supports.by_round = dict(stored.masks)
        held = Holders.load(driver["held"])
        installed = Holders.load(driver.get("installed", Holders().dump()))  # 0.1 had no adapters
        kept = load_kept(path.parent, dict(stored.kept))
        snapshot = Snapshot(
            driver["simulated_s"], held, driver["flight"], dict(stored.bases), kept, installed
        )
        self._schedule.restore(snapshot, stored.state)
        if self._private is not None:
            self._private.load(driver["privacy"])
            self._schedule.clip = self._private.clip
        self._setbacks.refused = int(driver["refused_rounds"])
        # What made the clients fail may be cured: where rounds are left, they are asked anew.
        if stored.state.round >= self._last:
            self._setbacks.failed = int(driver.get("failed_rounds", 0))
        return stored.state

    def _save_model(self, line: Line) -> None:
        """Write the effective weights, with which the plain module reproduces the logged metrics.

        Of an adapter both: the plain module with what was trained merged into it, and that alone.
        """
        model = effective_model(self.federation, self.state.weights)
        if (adapter := self.config.build_adapter()) is not None:
            trained, told = adapter.tensors(model)
            write_atomically(self.folder.adapter_file, save(trained, {"adapter_config": json.dumps(told)}))
            adapter.merge(model)
        tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
        said = model_metadata(self.config, line)
        write_atomically(self.folder.model_file, model_bytes(tensors, said))


def make_schedule(federation: Federation, engine: Engine, method: Algorithm) -> Schedule:
    """The configured schedule.

    Raises:
        ChoiceError: One of the user's own names no schedule.
    """
    runs = federation.config.build_schedule().runs
    kind = load_reference("schedule.name", runs, ChoiceError) if isinstance(runs, str) else runs
    if not issubclass(kind, Schedule):
        raise ChoiceError(f"schedule.name: it runs {kind.__name__}, which is no subclass of Schedule")
    return kind(federation, engine, method)
