"""The driver: has the schedule collect totals, advances the server, measures, logs, checkpoints.

One plain class; ``cluster.run`` runs it in this process (``execution: inline``) or inside the driver actor.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from algorithms import Algorithm, ParameterLayout, ServerState
from algorithms.core.masks import intersection_over_union
from cluster import seeding
from cluster.configuration.config import code_digest
from cluster.exchange import ClientError, ClientReport, EvaluationChunk
from cluster.federation import Federation
from cluster.records.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_rounds,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from cluster.records.resuming import RULES, outdated, standing, stands_on, take_up
from cluster.records.run_folder import RunFolder, comparable
from cluster.references import UserError
from cluster.rounds.buffered import Buffered
from cluster.rounds.client_evaluation import ClientEvaluation
from cluster.rounds.engine import Engine, Outcome
from cluster.rounds.metrics import Downlink, evaluation_metrics, round_metrics
from cluster.rounds.schedule import Schedule, Snapshot
from cluster.rounds.synchronous import Synchronous
from cluster.simulation.shift import shift_metrics
from cluster.transport.downlink import Holders

#: Rounds in a row in which every update was refused, or every client failed, after which a run ends.
REFUSED_ROUNDS_LIMIT = 3

#: Rounds between the global models whose supports are compared.
OVERLAP_ROUNDS = 10

#: Rows of one evaluation chunk.
_CHUNK_ROWS = 256

#: What a checkpoint keeps of the driver and cannot be without.
_NEEDED = ("totals", "held", "simulated_s", "flight", "refused_rounds", "waiting")

Line = dict[str, Any]


class DivergedError(UserError):
    """Every update was refused in several rounds in a row; the model is as it was before them."""

    status = 1


class ReplayError(UserError):
    """A round computed again differs from its stored line."""

    status = 1


class Driver:
    """Runs one experiment from its folder, from the start or from its last checkpoint.

    Args:
        folder: The run's folder.
        federation: Data, partition and initial model.
        engine: Where rounds are computed.
        on_line: Called with each new round's line once it is stored.
        should_stop: Asked before each round; True ends the run with a checkpoint, once there is a round.
        on_checkpoint: Called with every checkpoint, once it is written.
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
        self._on_line, self._should_stop, self._on_checkpoint = on_line, should_stop, on_checkpoint
        config = self.config = federation.config
        self.method, self.server = config.build_algorithm(), config.build_server()
        self.layout: ParameterLayout = federation.layout
        self._last = config.stop_after or config.rounds
        self._schedule = make_schedule(federation, engine, self.method)
        self._stands_on = stands_on(federation)
        self._digest = f"{config.digest()}-{code_digest()}"
        found = standing(folder, config)
        take_up(folder, found)
        self._stored = {line["round"]: line for line in found.lines}
        self._chunks = federation.evaluation_chunks(_CHUNK_ROWS)
        self._clients = ClientEvaluation(federation)
        self._totals: dict[str, float] = {}
        self._refused_rounds = self._failed_rounds = 0
        self._waiting: Line | None = None  # the last round's line, until its evaluation is in
        self._after: Callable[[], None] | None = None  # what is left to do about the last round
        self._supports: dict[int, Tensor] = {}  # packed, of the last round that is a multiple of ten
        self._spent = {"log": 0.0, "checkpoint": 0.0}  # seconds of the last book-keeping
        self._final: Line = {}
        self._ending = False  # what is measured now is the run's last round
        self.state = self._restore(found.checkpoint) or self._initial_state()

    # ------------------------------------------------------------------------------------- the run

    def run(self) -> Line:
        """Compute rounds until the planned end, ``stop_after`` or a stop request.

        Returns:
            The last round's line.

        Raises:
            DivergedError: Every update of three rounds in a row was refused.
            ClientError: Every client of three rounds in a row failed and was skipped.
        """
        while (
            max(self._refused_rounds, self._failed_rounds) < REFUSED_ROUNDS_LIMIT
            and self.state.round < self._last
        ):
            if self._should_stop() and self.state.round >= self.method.first_round:
                break
            self._round()
        self._finish_line()
        self.save_model()
        line = self._stored[self.state.round]
        reasons = _reasons(line["clients/refused_list"])
        if self._failed_rounds >= REFUSED_ROUNDS_LIMIT:
            raise ClientError(
                f"every client failed in {REFUSED_ROUNDS_LIMIT} rounds in a row, last in round "
                f"{self.state.round}: {reasons}. The global model is as it was before them."
            )
        if self._refused_rounds >= REFUSED_ROUNDS_LIMIT:
            raise DivergedError(
                f"every update was refused in {REFUSED_ROUNDS_LIMIT} rounds in a row, last in round "
                f"{self.state.round}: {reasons}. The global model is unharmed. A smaller local.lr "
                f"(now {self.config.learning_rate(self.state.round):g}) is the usual cure."
            )
        return line | self._final

    def _round(self) -> None:
        started = time.perf_counter()
        state = self.state
        result = self._schedule.round(state, self._due_chunks(), self._book_keeping)
        outcome = result.outcome

        def write_waiting_line() -> None:
            self._write_waiting_line(lambda: self._evaluation(outcome, state.round, last=False))

        if not outcome.evaluating:
            write_waiting_line()
        worked = time.perf_counter()
        refused = {r.client: r.refused for r in outcome.reports if r.refused is not None}
        if outcome.total is None:
            self._without_update(outcome.reports)
        else:
            self._refused_rounds = self._failed_rounds = 0
            self.state = self.method.advance(state, outcome.total, self.server, self.layout)
        stepped = time.perf_counter()
        metrics = result.metrics | {
            "time/round_s": stepped - started,
            "time/prepare_s": result.prepared - started,
            "time/step_s": stepped - worked,
        }
        # Measured while the next round runs, whose broadcast already changes who holds which mask.
        snapshot = self._schedule.snapshot()

        def after() -> None:
            write_waiting_line()
            self._measure(state, outcome, result.downlink, refused, metrics, snapshot)

        self._after = after

    def _without_update(self, reports: Sequence[ClientReport]) -> None:
        """A round that leaves the model as it is: nobody's update was accepted, or arrived in time."""
        # A client that failed says nothing of the model, one that was late might have been accepted.
        answered = [report for report in reports if not report.skipped]
        failed = bool(reports) and not answered
        refused = bool(answered) and all(report.refused is not None for report in answered)
        if self.state.round + 1 < 1:
            reasons = _reasons((r.client, r.refused) for r in reports if r.refused is not None)
            if failed:
                raise ClientError(f"every client of the stage before round 1 failed: {reasons}")
            raise DivergedError(
                "no update of the stage before round 1 was accepted: "
                + (f"{reasons}. A smaller local.lr is the usual cure." if refused else "no client answered.")
            )
        self._failed_rounds = self._failed_rounds + 1 if failed else 0
        self._refused_rounds += refused
        self.state = replace(self.state, round=self.state.round + 1)

    def _book_keeping(self) -> None:
        """Write, measure and checkpoint the last round while the next one is already being computed."""
        if self._after is not None:
            self._after()
            self._after = None

    def _measure(
        self,
        before: ServerState,
        outcome: Outcome,
        downlink: Downlink,
        refused: dict[int, str],
        metrics: dict[str, Any],
        snapshot: Snapshot,
    ) -> None:
        state, started = self.state, time.perf_counter()
        line: Line = {"round": state.round, "timestamp": time.time()}
        line |= round_metrics(
            self.layout,
            before.weights.numpy(),
            state.weights.numpy(),
            outcome.total,
            outcome.reports,
            downlink,
        )
        line |= self._overlap(state)
        measures = self.method.layer_measures(state, self.layout)
        line |= {f"{name}/layers": values for name, values in measures.items()}
        line["clients/refused_list"] = [[client, reason] for client, reason in sorted(refused.items())]
        for key in ("comm/uplink_bytes", "comm/downlink_bytes", "flops/dense", "flops/sparse"):
            self._totals[key] = self._totals.get(key, 0) + line[key]
            line[f"{key}_total"] = self._totals[key]
        line["train/lr"] = self.config.learning_rate(max(1, state.round))
        phases = np.array([report.phases for report in outcome.reports]).reshape(-1, 4).sum(axis=0)
        line |= metrics
        line["time/lost_actors"] = outcome.lost_actors
        line["time/actors"] = self.engine.actors
        line["time/clients_evaluate_s"] = sum(chunk.seconds for chunk, _, _ in outcome.evaluated())
        line |= {f"time/{name}_s": seconds for name, seconds in self._spent.items()}
        line |= {f"time/{phase}_s": seconds for phase, seconds in outcome.seconds.items()}
        names = ("train", "encode", "decode", "fold")
        line |= {f"time/clients_{name}_s": float(s) for name, s in zip(names, phases, strict=True)}
        self._waiting = line
        if not self._evaluation_due(state.round):
            self._store(line)
            self._waiting = None
        measured = time.perf_counter()
        if state.round % self.config.checkpoint_every == 0:
            self.checkpoint(snapshot)
        self._spent = {"log": measured - started, "checkpoint": time.perf_counter() - measured}

    def _overlap(self, state: ServerState) -> dict[str, float | None]:
        """IoU of the global model's support with that of ten rounds before, every ten rounds from 20 on."""
        if state.round < 1 or state.round % OVERLAP_ROUNDS:
            return {}
        support = state.weights[: self.layout.prunable_size].numpy() != 0
        before = self._supports.get(state.round - OVERLAP_ROUNDS)
        self._supports = {state.round: torch.from_numpy(np.packbits(support))}
        if before is None:
            return {}
        earlier = np.unpackbits(before.numpy(), count=len(support)).astype(bool)
        return {f"masks/overlap_{OVERLAP_ROUNDS}": intersection_over_union(earlier, support)}

    # ---------------------------------------------------------------------------------- its steps

    def _evaluation_due(self, round_number: int) -> bool:
        due = round_number % self.config.evaluate_every == 0 or self._clients.due(round_number)
        return due or round_number == self._last or self._ending

    def _due_chunks(self) -> list[EvaluationChunk]:
        """Chunks on which this round's broadcast, the last round's result, is evaluated."""
        last = self.state.round
        if last < self.method.first_round or not self._evaluation_due(last):
            return []
        return self._chunks + self._clients.chunks(last, last=False)

    def _evaluation(self, outcome: Outcome, round_number: int, *, last: bool) -> Line:
        """What was measured of a round's result: by all, and by each client where that is due."""
        evaluated = outcome.evaluated()
        measured = self._clients.metrics(self.folder, round_number, evaluated, last=last)
        return evaluation_metrics(evaluated) | measured

    def _write_waiting_line(self, evaluation: Callable[[], Line]) -> None:
        if self._waiting is not None:
            self._waiting |= evaluation()
            self._store(self._waiting)
            self._waiting = None

    def _finish_line(self) -> None:
        """Measure and evaluate the last round, with no next round to overlap it with."""
        self._ending = True
        self._book_keeping()
        state = self.state
        evaluated = self._stored.get(state.round, {}).get(self.federation.selection_metric) is not None
        if self._waiting is not None or not evaluated:
            chunks = self._chunks + self._clients.chunks(state.round, last=True)
            outcome = self._schedule.evaluate(state, chunks, lambda: None)
            # A run that was stopped elsewhere may have stored this round's line without an evaluation.
            self._final = self._evaluation(outcome, state.round, last=True)
            self._write_waiting_line(lambda: self._final)
        if self.state.round not in list_rounds(self.folder.checkpoints):
            self.checkpoint(self._schedule.snapshot())

    def _store(self, line: Line) -> None:
        """Write a round's line, or check it against the one stored before the run was interrupted."""
        line |= shift_metrics(self.config, self._stored, line)
        stored = self._stored.get(line["round"])
        if stored is None:
            self.folder.append_round(line)
            self._stored[line["round"]] = line
            self._on_line(line)
        else:
            old, new = comparable(stored), comparable(line)
            differing = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
            if differing:
                raise ReplayError(
                    f"round {line['round']} computed again differs from {self.folder.rounds_file} in "
                    f"{', '.join(differing)}: the code, a library or the machine changed since"
                )

    # --------------------------------------------------------------------------- state on the disk

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Write a checkpoint of everything the next round needs.

        Args:
            snapshot: What the schedule remembers after the round of ``self.state``.
        """
        self.folder.sync_rounds()  # a checkpoint never outlives the lines before it
        scores = {r: self._stored[r].get(self.federation.selection_metric) for r in self._stored}
        kept = [r for r in list_rounds(self.folder.checkpoints) if scores.get(r) is not None]
        best = max(kept, key=lambda r: (scores[r], -r), default=None)
        driver = {
            "totals": self._totals,
            "held": snapshot.held.dump(),
            "simulated_s": snapshot.simulated_s,
            "flight": snapshot.flight,
            "refused_rounds": self._refused_rounds,
            "failed_rounds": self._failed_rounds,
            "waiting": self._waiting,
            "rules": RULES,
        }
        save_checkpoint(
            self.folder.checkpoints,
            Checkpoint(self.state, driver, self._digest, snapshot.bases, self._supports, self._stands_on),
            best_round=best,
        )
        self._on_checkpoint()

    def save_model(self) -> None:
        """Write the effective weights, so that the plain module loads them and reproduces the accuracy."""
        effective = self.method.effective_weights(self.state.weights, self.layout)
        # Through the module, so that tied, frozen and integer tensors are there too and the load is strict.
        model = copy.deepcopy(self.federation.model)
        self.layout.bind(model, effective)
        tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
        write_atomically(self.folder.model_file, save(tensors))

    def _initial_state(self) -> ServerState:
        rng = seeding.generator(self.config.seed, "server")
        return self.method.initial_state(self.federation.initial_weights, self.layout, rng)

    def _restore(self, path: Path | None) -> ServerState | None:
        if path is None:
            return None
        stored = load_checkpoint(path)
        missing = [key for key in _NEEDED if key not in stored.driver]
        if missing:
            raise CheckpointError(
                f"{path} was made by another version of sparsyfed and lacks {', '.join(missing)}: finish the "
                "run with that version, or start it anew"
            )
        for reason in outdated(self.config, int(stored.driver.get("rules", 1))):
            raise CheckpointError(
                f"{path} was made by an older version, {reason}: start the run anew, or finish it with "
                "sparsyfed 0.1"
            )
        self._supports = dict(stored.masks)
        self._totals = dict(stored.driver["totals"])
        held = Holders.load(stored.driver["held"])
        simulated_s, flight = stored.driver["simulated_s"], stored.driver["flight"]
        self._schedule.restore(Snapshot(simulated_s, held, flight, dict(stored.bases)), stored.state)
        self._refused_rounds = int(stored.driver["refused_rounds"])
        # What made the clients fail may be cured: where rounds are left, they are asked anew.
        if stored.state.round >= self._last:
            self._failed_rounds = int(stored.driver.get("failed_rounds", 0))
        self._waiting = stored.driver["waiting"]
        return stored.state


def _reasons(refused: Iterable[tuple[int, str]]) -> str:
    return "; ".join(f"client {client}: {reason}" for client, reason in refused)


def make_schedule(federation: Federation, engine: Engine, method: Algorithm) -> Schedule:
    """The configured schedule."""
    kinds = {"synchronous": Synchronous, "buffered": Buffered}
    return kinds[federation.config.schedule.name](federation, engine, method)
