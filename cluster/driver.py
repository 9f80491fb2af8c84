"""The driver: draws cohorts, broadcasts, collects totals, advances the server, measures, logs, checkpoints.

One plain class; ``cluster.run`` runs it in this process (``execution: inline``) or inside the driver actor.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from safetensors.torch import save

from algorithms import Grid, ParameterLayout, ServerState
from cluster import seeding, wire
from cluster.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest,
    list_rounds,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from cluster.client import EvaluationChunk, Task, wire_shape
from cluster.config import code_digest
from cluster.devices import Devices
from cluster.engine import Engine, Outcome
from cluster.federation import Federation
from cluster.local_training import Broadcast
from cluster.metrics import Downlink, evaluation_metrics, round_metrics
from cluster.run_folder import RunFolder, comparable

#: Rounds in a row in which every update was refused, after which a run ends.
REFUSED_ROUNDS_LIMIT = 3

#: Rows of one evaluation chunk.
_CHUNK_ROWS = 256

Line = dict[str, Any]


class DivergedError(RuntimeError):
    """Every update was refused in several rounds in a row; the model is as it was before them."""


class ReplayError(RuntimeError):
    """A round computed again differs from its stored line."""


class Driver:
    """Runs one experiment from its folder, from the start or from its last checkpoint.

    Args:
        folder: The run's folder.
        federation: Data, partition and initial model.
        engine: Where rounds are computed.
        on_line: Called with each new round's line once it is stored.
        should_stop: Asked before each round; True ends the run with a checkpoint, once there is a round.
    """

    def __init__(
        self,
        folder: RunFolder,
        federation: Federation,
        engine: Engine,
        *,
        on_line: Callable[[Line], None] = lambda line: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder, self.federation, self.engine = folder, federation, engine
        self._on_line, self._should_stop = on_line, should_stop
        config = self.config = federation.config
        self.method, self.server = config.build_algorithm(), config.build_server()
        self.layout: ParameterLayout = federation.layout
        self._shape = wire_shape(self.layout)
        self._devices = Devices(config)
        self._digest = f"{config.digest()}-{code_digest()}"
        folder.heal()
        self._stored = {line["round"]: line for line in folder.rounds()}
        self._chunks = federation.evaluation_chunks(_CHUNK_ROWS)
        self._totals: dict[str, float] = {}
        self._held: dict[int, int] = {}  # client -> version of the mask it got last
        self._refused_rounds = 0
        self._waiting: Line | None = None  # the last round's line, until its evaluation is in
        self._after: Callable[[], None] | None = None  # what is left to do about the last round
        self._refusals = ""
        self._final: Line = {}
        self._ending = False  # what is measured now is the run's last round
        self.state = self._restore() or self._initial_state()

    # ------------------------------------------------------------------------------------- the run

    def run(self) -> Line:
        """Compute rounds until the planned end, ``stop_after`` or a stop request.

        Returns:
            The last round's line.

        Raises:
            DivergedError: Every update of three rounds in a row was refused.
        """
        last = self.config.stop_after or self.config.rounds
        while self.state.round < last:
            if self._should_stop() and self.state.round >= self.method.first_round:
                break
            self._round()
            if self._refused_rounds >= REFUSED_ROUNDS_LIMIT:
                self._finish_line()
                self.save_model()
                raise DivergedError(
                    f"every update was refused in {REFUSED_ROUNDS_LIMIT} rounds in a row, last in round "
                    f"{self.state.round}: {self._refusals}. The global model is unharmed. A smaller local.lr "
                    f"(now {self.config.learning_rate(self.state.round):g}) is the usual cure."
                )
        self._finish_line()
        self.save_model()
        return self._stored[self.state.round] | self._final

    def _round(self) -> None:
        started = time.perf_counter()
        state = self.state
        instructions = self.method.instruct(state, self.config.rounds, self.config.partition.clients)
        cohort = self._draw_cohort(instructions.round, instructions.cohort or self.config.cohort)
        broadcast, downlink = self._broadcast(state, instructions, cohort)
        default = self.method.sparsity
        tasks = [Task(int(client), self._devices.sparsity(int(client), default)) for client in cohort]
        prepared = time.perf_counter()
        outcome = self.engine.run(broadcast, tasks, self._due_chunks(), self._book_keeping)
        self._write_waiting_line(outcome)
        worked = time.perf_counter()
        refused = {r.client: r.refused for r in outcome.reports if r.refused is not None}
        if len(refused) == len(outcome.reports):
            self._refused_rounds += 1
            if instructions.round < 1:
                raise DivergedError(
                    f"every update of the stage before round 1 was refused: {refused}. "
                    "A smaller local.lr is the usual cure."
                )
            self.state = replace(state, round=state.round + 1)
        else:
            self._refused_rounds = 0
            assert outcome.total is not None
            self.state = self.method.advance(state, outcome.total, self.server, self.layout)
        stepped = time.perf_counter()
        self._refusals = "; ".join(f"client {client}: {reason}" for client, reason in refused.items())
        times = {
            "time/round_s": stepped - started,
            "time/prepare_s": prepared - started,
            "time/step_s": stepped - worked,
        }
        # Measured while the next round runs, whose broadcast already changes who holds which mask.
        held = self._held
        self._after = lambda: self._measure(state, outcome, downlink, refused, times, held)

    def _book_keeping(self) -> None:
        """Measure and checkpoint the last round while the next one is already being computed."""
        if self._after is not None:
            self._after()
            self._after = None

    def _measure(
        self,
        before: ServerState,
        outcome: Outcome,
        downlink: Downlink,
        refused: dict[int, str],
        times: dict[str, float],
        held: dict[int, int],
    ) -> None:
        state = self.state
        line: Line = {"round": state.round, "timestamp": time.time()}
        line |= round_metrics(
            self.layout,
            before.weights.numpy(),
            state.weights.numpy(),
            outcome.total,
            outcome.reports,
            downlink,
        )
        line["clients/refused_list"] = [[client, reason] for client, reason in sorted(refused.items())]
        for key in ("comm/uplink_bytes", "comm/downlink_bytes", "flops/dense", "flops/sparse"):
            self._totals[key] = self._totals.get(key, 0) + line[key]
            line[f"{key}_total"] = self._totals[key]
        line["train/lr"] = self.config.learning_rate(max(1, state.round))
        phases = np.array([report.phases for report in outcome.reports]).sum(axis=0)
        line |= times
        line["time/lost_actors"] = outcome.lost_actors
        line |= {f"time/{phase}_s": seconds for phase, seconds in outcome.seconds.items()}
        names = ("train", "encode", "decode", "fold")
        line |= {f"time/clients_{name}_s": float(s) for name, s in zip(names, phases, strict=True)}
        self._waiting = line
        if not self._evaluation_due(state.round):
            self._store(line)
            self._waiting = None
        if state.round % self.config.checkpoint_every == 0:
            self.checkpoint(held)

    # ---------------------------------------------------------------------------------- its steps

    def _draw_cohort(self, round_number: int, size: int) -> np.ndarray:
        rng = seeding.generator(self.config.seed, "cohort", round_number)
        clients = self.config.partition.clients
        return np.sort(rng.choice(clients, size=min(size, clients), replace=False))

    def _broadcast(
        self, state: ServerState, instructions: Any, cohort: np.ndarray
    ) -> tuple[Broadcast, Downlink]:
        """Encode w_t to what the cohort is sent; what clients train from is what they would decode."""
        exact, shape = state.weights.numpy(), self._shape
        mask = None if state.mask is None else state.mask.numpy()
        support = exact[: shape.prunable] != 0 if mask is None else mask
        value_format = self.config.wire.downlink
        holders = (
            sum(self._held.get(int(client)) == state.mask_version for client in cohort)
            if mask is not None
            else 0
        )
        total, message = 0, b""
        if holders < len(cohort):
            message = wire.encode(exact, support, shape, value_format=value_format)
            total += len(message) * (len(cohort) - holders)
        if holders:
            total += len(wire.encode(exact, support, shape, held=mask, value_format=value_format)) * holders
        received = exact
        if value_format != "float32":
            message = message or wire.encode(exact, support, shape, value_format=value_format)
            received = wire.decode(message, shape).values
        if mask is not None:
            self._held = self._held | {int(client): state.mask_version for client in cohort}
        samples = int(self.federation.sizes[cohort].sum())
        broadcast = Broadcast(
            weights=received,
            exact=exact,
            mask=mask,
            instructions=instructions,
            lr=self.config.learning_rate(max(1, instructions.round)),
            limit=Grid.for_round(exact, samples).limit,
            samples=samples,
        )
        clients = len(cohort)
        dense = wire.dense_bytes(shape) * clients
        return broadcast, Downlink(total, wire.nonzero_bytes(exact, shape) * clients, dense)

    def _evaluation_due(self, round_number: int) -> bool:
        last = self.config.stop_after or self.config.rounds
        return round_number % self.config.evaluate_every == 0 or round_number == last or self._ending

    def _due_chunks(self) -> list[EvaluationChunk]:
        """Chunks on which this round's broadcast, the last round's result, is evaluated."""
        last = self.state.round
        return self._chunks if last >= self.method.first_round and self._evaluation_due(last) else []

    def _write_waiting_line(self, outcome: Outcome) -> None:
        if self._waiting is not None:
            self._waiting |= evaluation_metrics(outcome.evaluated)
            self._store(self._waiting)
            self._waiting = None

    def _finish_line(self) -> None:
        """Measure and evaluate the last round, with no next round to overlap it with."""
        self._ending = True
        self._book_keeping()
        state = self.state
        evaluated = self._stored.get(state.round, {}).get("test/accuracy") is not None
        if self._waiting is not None or not evaluated:
            instructions = self.method.instruct(state, self.config.rounds, self.config.partition.clients)
            broadcast, _ = self._broadcast(state, instructions, np.array([], np.int64))
            outcome = self.engine.run(broadcast, [], self._chunks, lambda: None)
            self._write_waiting_line(outcome)
            # A run that was stopped elsewhere may have stored this round's line without an evaluation.
            self._final = evaluation_metrics(outcome.evaluated)
        if self.state.round not in list_rounds(self.folder.checkpoints):
            self.checkpoint(self._held)

    def _store(self, line: Line) -> None:
        """Write a round's line, or check it against the one stored before the run was interrupted."""
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

    def checkpoint(self, held: dict[int, int]) -> None:
        """Write a checkpoint of everything the next round needs.

        Args:
            held: Version of the mask that each client holds after the round of ``self.state``.
        """
        self.folder.sync_rounds()  # a checkpoint never outlives the lines before it
        scores = {r: self._stored[r].get(self.federation.selection_metric) for r in self._stored}
        kept = [r for r in list_rounds(self.folder.checkpoints) if scores.get(r) is not None]
        best = max(kept, key=lambda r: (scores[r], -r), default=None)
        driver = {
            "totals": self._totals,
            "held": sorted(held.items()),
            "refused_rounds": self._refused_rounds,
            "waiting": self._waiting,
        }
        save_checkpoint(
            self.folder.checkpoints, Checkpoint(self.state, driver, self._digest), best_round=best
        )

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

    def _restore(self) -> ServerState | None:
        path = latest(self.folder.checkpoints)
        if path is None:
            return None
        stored = load_checkpoint(path)
        if stored.digest.split("-")[0] != self._digest.split("-")[0]:
            raise CheckpointError(f"{path} belongs to another configuration (hash {stored.digest})")
        self._totals = dict(stored.driver["totals"])
        self._held = {int(client): int(version) for client, version in stored.driver["held"]}
        self._refused_rounds = int(stored.driver["refused_rounds"])
        self._waiting = stored.driver["waiting"]
        return stored.state
