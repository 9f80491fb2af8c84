"""Both halves of a round without Flower: an engine that asks nodes, and what a node makes of its question.

A node learns what crosses the wire and nothing else: the round's instructions, the model's bytes, and which
clients it plays. It answers with the bytes of their updates and what was measured. The server decodes and
folds these as it does everywhere, so that the sums are exact whoever played whom.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from algorithms import Grid, Instructions, ServerState
from cluster.clients.client import ClientHost
from cluster.configuration.config import Config, validate
from cluster.configuration.identity import code_digest
from cluster.configuration.trees import read_stored
from cluster.exchange import Assignment, Broadcast, ClientReport, EvaluationChunk
from cluster.federation import Federation
from cluster.measured import Measured
from cluster.records.run_folder import RunFolder
from cluster.references import UserError
from cluster.rounds.engine import Outcome
from cluster.simulation.devices import Devices
from cluster.simulation.shift import period_of
from cluster.transport import wire
from cluster.transport.downlink import Sender
from cluster.workload.inputs import from_read_only

#: What a ConfigRecord of Flower holds: numbers, text, bytes, and lists of one of these.
Content = Mapping[str, Any]


class NodeError(UserError):
    """A node cannot play, or did not answer."""

    status = 1


def experiment() -> Config:
    """The experiment that this app runs, from the file beside this one."""
    return validate(read_stored(Path(__file__).with_name("experiment.yaml")))


def folder_of_the_run(path: Path) -> RunFolder:
    """The folder of this experiment's run: a new one, or one to go on in.

    Raises:
        NodeError: It holds a run of another experiment.
        RunFolderError: It holds something else.
    """
    config = experiment()
    if not (path / "config.yaml").is_file():
        return RunFolder.create(path, config)
    folder = RunFolder.open(path)
    found = folder.config(inert=True)  # what code it names is not this app's to run
    if found.references or found.digest() != config.digest():
        raise NodeError(
            f"{path} holds a run of another experiment ({found.digest()}, this app's is {config.digest()}); "
            "choose another output"
        )
    return folder


class Node:
    """Plays clients, from what crosses the wire alone.

    Args:
        config: The experiment; the data of its clients are prepared on this machine.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._devices, self._code = config, Devices(config), code_digest()
        self._experiment = config.digest()
        federation = Federation.of(config)
        self._layout = federation.layout
        self._shape = wire.Shape.of(self._layout, "down")
        self._host = ClientHost(federation.setup())

    def play(self, question: Content) -> dict[str, Any]:
        """Train every client that is asked for on the model that was received.

        Raises:
            NodeError: The server runs other code, or another experiment.
            ClientError: A client's code raised, and ``on_client_error`` is ``stop``.
        """
        config = self._config
        if question["code"] != self._code:
            raise NodeError(
                f"this node has sparsyfed's code {self._code}, the server {question['code']}; "
                "install the same"
            )
        if question["experiment"] != self._experiment:
            raise NodeError(
                f"this node has the experiment {self._experiment}, the server {question['experiment']}; "
                "run the same app"
            )
        told = Instructions(**json.loads(question["instructions"]))
        weights = self._layout.received_down(wire.decode(question["model"], self._shape).values)
        broadcast = Broadcast(
            weights=weights,
            exact=weights,
            mask=None,
            instructions=told,
            lr=config.learning_rate(max(1, told.round)),
            limit=Grid.for_round(weights, 1).limit,  # of a total that stays empty here
            samples=1,
            period=period_of(config.shift, told.round),
        )
        clients = np.array(question["clients"], np.int64)
        assignments = [
            Assignment(
                client,
                self._devices.sparsity(client, config.method.sparsity, told.round),
                replace(device, uplink=uplink),
                len(question["model"]),
                deadline=question["deadline"],
                fold_before=0.0,  # nothing is folded here: updates travel
            )
            for client, device, uplink in zip(
                clients.tolist(), self._devices.of(clients, told.round), question["uplinks"], strict=True
            )
        ]
        reports = self._host.play(broadcast, assignments)
        return {
            "reports": json.dumps(
                [asdict(replace(r, message=None)) for r in reports], default=np.ndarray.tolist
            ),
            "updates": [report.message or b"" for report in reports],
        }


def reports_of(answer: Content) -> list[ClientReport]:
    """What a node reports, with the updates that it sent."""
    reports = []
    for told, update in zip(json.loads(answer["reports"]), answer["updates"], strict=True):
        own = {name: tuple(pair) for name, pair in told["measured"]["own"].items()}
        flops = np.array(told["measured"]["flops_sparse"], np.float64)
        told["measured"] = Measured(**{**told["measured"], "own": own, "flops_sparse": flops})
        told["phases"] = tuple(told["phases"])
        reports.append(ClientReport(**{**told, "message": update or None}))
    return reports


class NodesEngine:
    """Has clients played by nodes; the model is evaluated in this process.

    Args:
        federation: The experiment.
        ask: Sends each node its question, at most one, and returns their answers in the same order.
        nodes: How many nodes there are.
    """

    def __init__(
        self, federation: Federation, ask: Callable[[Sequence[Content]], Sequence[Content]], nodes: int
    ) -> None:
        self.actors, self._ask, self._code = nodes, ask, code_digest()
        self._experiment = federation.config.digest()
        self._sender = Sender(federation.layout, federation.config.wire.downlink)
        self._host = ClientHost(federation.setup())

    def run(
        self,
        broadcast: Broadcast,
        assignments: Sequence[Assignment],
        chunks: Sequence[EvaluationChunk],
        meanwhile: Callable[[], None],
    ) -> Outcome:
        """See :class:`cluster.rounds.engine.Engine`."""
        meanwhile()
        started = time.perf_counter()
        evaluated = self._host.evaluate(broadcast, chunks) if chunks else []
        seconds = {"evaluate": time.perf_counter() - started}
        reports: list[ClientReport] = []
        if assignments:
            answers = self._ask(self._questions(broadcast, assignments))
            reports = [report for answer in answers for report in reports_of(answer)]
        reports.sort(key=lambda report: report.client)
        return Outcome(None, reports, lambda: evaluated, seconds=seconds)

    def _questions(self, broadcast: Broadcast, assignments: Sequence[Assignment]) -> list[Content]:
        """One for each node that is to play: clients are dealt out in turn."""
        told = broadcast.instructions
        if broadcast.mask is not None or broadcast.parts or any(a.kept for a in assignments):
            raise NodeError("a mask, a part of the model or what clients keep cannot be sent to a node")
        parcel = self._sender.parcel(ServerState(told.round - 1, from_read_only(broadcast.exact)))
        shares = (assignments[first :: self.actors] for first in range(self.actors))
        return [
            {
                "code": self._code,
                "experiment": self._experiment,
                "instructions": json.dumps(asdict(told)),
                "model": parcel.message,
                "clients": [assignment.client for assignment in share],
                # Of cells that others share as well, whom this node is not told of.
                "uplinks": [assignment.device.uplink for assignment in share],
                "deadline": share[0].deadline,
            }
            for share in shares
            if share
        ]

    def close(self) -> None:
        """Nothing to release."""
