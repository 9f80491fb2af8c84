"""The client actors of one run on a Ray cluster: reserved, started, found dead, killed, back again."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from algorithms.core.packing import combine, pack
from cluster.actors.placement import Bundle
from cluster.actors.totals import Stored
from cluster.clients.client import ClientHost
from cluster.exchange import Assignment, Broadcast, ClientReport, EvaluationChunk, HostSetup
from cluster.federation import prepare_arguments
from cluster.machine import Watch
from cluster.references import UserError
from cluster.workload.objectives import Sums
from cluster.workload.preparing import prepare

#: Seconds between two questions whether a dead actor is back.
PROBE_EVERY_S = 0.5

#: Seconds in which an actor that has nothing to do answers.
ANSWER_S = 30.0

MakeHost = Callable[[HostSetup, float], ClientHost]


class PlacementError(UserError):
    """The cluster has no room for the actors that were asked for."""

    passes = True


@dataclass(frozen=True)
class Place:
    """Where an actor runs.

    Attributes:
        pid: Its process.
        node: Ray's id of its node.
        gpus: Ids of the GPUs it was given on that node.
    """

    pid: int
    node: str
    gpus: tuple[str, ...]


class NotBegunError(Exception):
    """The actor died and came back before anybody noticed: it has been told of no run."""


@dataclass(frozen=True)
class Beginning:
    """What an actor is told of a run, again after each of its deaths.

    Attributes:
        run: Tells the run from the one before, whose actors it may have taken over.
        driver: The driver actor, which is told what the actors' machines are doing; None: nobody is.
        watched_as: Name of the run there.
    """

    run: str
    driver: Any = None
    watched_as: str | None = None


class HostActor:
    """An actor around a host, which is built when it is told what to play.

    What goes wrong then is that call's error and is tried again by the next; an actor whose constructor
    raises would be dead for good.
    """

    def __init__(self, make: MakeHost, gpus: float) -> None:
        self._make, self._gpus = make, gpus
        self._run: str | None = None
        self._watch: Watch | None = None
        self._built: ClientHost | None = None

    @property
    def _host(self) -> ClientHost:
        if self._built is None:
            raise NotBegunError
        return self._built

    def alive(self) -> None:
        """Answers."""

    def ready(self, setup: HostSetup, beginning: Beginning) -> Place:
        """Build the host of a run, unless it stands; returns where it is."""
        import ray

        if self._run != beginning.run:
            self._built = None  # one model at a time
            self._look_around(beginning)
            if not setup.folder.exists():  # a node that joined after the run had begun
                prepare(**prepare_arguments(setup.config))
            self._built = self._make(setup, self._gpus)
            self._run = beginning.run
        return Place(os.getpid(), ray.get_runtime_context().get_node_id(), tuple(map(str, ray.get_gpu_ids())))

    def _look_around(self, beginning: Beginning) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        driver, name = beginning.driver, beginning.watched_as
        if driver is not None and name is not None:
            host = socket.gethostname()
            self._watch = Watch(name, lambda numbers: driver.sampled.remote(host, numbers))
            self._watch.start()

    def play(
        self, broadcast: Broadcast, assignments: Sequence[Assignment], hand_over: bool, store: bool
    ) -> tuple[list[ClientReport], Any]:
        """See :meth:`ClientHost.play`; to ``hand_over`` spares :meth:`collect` its way there and back."""
        reports = self._host.play(broadcast, assignments)
        return reports, self.collect(broadcast.instructions.round, store) if hand_over else None

    def evaluate(
        self, broadcast: Broadcast, chunks: Sequence[EvaluationChunk]
    ) -> list[tuple[EvaluationChunk, Sums]]:
        """See :meth:`ClientHost.evaluate`."""
        return self._host.evaluate(broadcast, chunks)

    def collect(self, round_number: int, store: bool) -> Any:
        """See :meth:`ClientHost.collect`; packed, and to ``store`` it is to tell of it alone."""
        total = self._host.collect(round_number)
        if total is None:
            return None
        return _stored(pack(total)) if store else pack(total)

    def combine(self, parts: Sequence[Stored]) -> Stored | None:
        """Combine stored totals; None where one of them is lost."""
        import ray

        try:
            # One after the other, as they are asked for: a total may be several times as large as the model.
            total = combine(ray.get(part.reference) for part in parts)
        except ray.exceptions.ObjectLostError:
            return None
        return _stored(total)


def _stored(total: Any) -> Stored:
    import ray

    return Stored(ray.put(total), tuple(total.clients), ray.get_runtime_context().get_node_id())


class ActorPool:
    """Actors by number, in kinds.

    Ray restarts a dead one for ever, elsewhere if its node is lost and another has room; what it was doing is
    dispatched again by the round, never by Ray.

    Args:
        bundles: What to reserve.
        make_host: Builds the host of an actor from the setup and the actor's GPUs.
        placement_timeout: Seconds until actors that cannot be placed are an error.

    Raises:
        PlacementError: The actors were not placed in time; names asked and free resources.

    Attributes:
        bundles: What is reserved.
        kinds: Name of each actor's kind.
        nodes: Id of each actor's node, as far as is known.
        down: Dead actors, and when their death was noticed.
    """

    def __init__(self, bundles: Sequence[Bundle], make_host: MakeHost, placement_timeout: float) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._ray = ray
        self.bundles, self.make_host = tuple(bundles), make_host
        self.kinds = [bundle.kind.name for bundle in bundles for _ in range(bundle.actors)]
        self.nodes = [""] * len(self.kinds)
        self.down: dict[int, float] = {}
        self._beginning: tuple[Any, Any] = (None, None)
        self._group = self._reserve(bundles, placement_timeout)
        actor, token = ray.remote(HostActor), secrets.token_hex(3)
        self._hosts: list[Any] = []
        for place, bundle in enumerate(bundles):
            kind = bundle.kind
            for _ in range(bundle.actors):
                options = actor.options(
                    name=f"{kind.name or 'clients'}-{len(self._hosts)}-{token}",
                    num_cpus=kind.cpus,
                    num_gpus=kind.gpus,
                    max_restarts=-1,
                    max_task_retries=0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, place),
                )
                self._hosts.append(options.remote(make_host, kind.gpus))

    def begin(self, setup: HostSetup, watched_as: str | None = None) -> None:
        """Have every actor build its host of a run.

        Args:
            setup: What there is to play.
            watched_as: Name of the run, whose driver actor this is called in is told what the actors'
                machines are doing; None to tell nobody.
        """
        context = self._ray.get_runtime_context()
        driver = context.current_actor if watched_as is not None else None
        beginning = Beginning(secrets.token_hex(8), driver, watched_as)
        self._beginning = (self._ray.put(setup), self._ray.put(beginning))
        try:
            # Starting is slow on a busy machine, and no reason to give up.
            self.nodes[:] = [place.node for place in self.places()]
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether every actor answers; ends them all where one does not."""
        try:
            self._ray.get([host.alive.remote() for host in self._hosts], timeout=ANSWER_S)
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError):
            self.close()
            return False
        return True

    def __len__(self) -> int:
        return len(self._hosts)

    def call(self, actor: int, method: str, *arguments: Any) -> Any:
        """Start a call; returns its reference. An actor is asked to be ready as it was when the run began."""
        arguments = self._beginning if method == "ready" else arguments
        return getattr(self._hosts[actor], method).remote(*arguments)

    def places(self) -> list[Place]:
        """Where every actor is."""
        return list(self._ray.get([self.call(actor, "ready") for actor in range(len(self))]))

    def kill(self, actor: int) -> None:
        """End an actor that hangs; Ray kills its process, frozen or not, and starts another."""
        self._ray.kill(self._hosts[actor], no_restart=False)

    def lost(self, actor: int) -> bool:
        """Take note of a death; False where it was known."""
        if actor in self.down:
            return False
        self.down[actor] = time.monotonic()
        return True

    def back(self, actor: int, place: Place) -> None:
        """Take note that a dead actor is back, perhaps on another node."""
        del self.down[actor]
        self.nodes[actor] = place.node

    def seconds_without(self, kind: str | None = None) -> float:
        """For how long every actor (of a kind) has been dead; 0 while one is alive."""
        if not self.down:
            return 0.0
        actors = [a for a, name in enumerate(self.kinds) if kind is None or name == kind]
        if not all(actor in self.down for actor in actors):
            return 0.0
        return time.monotonic() - max(self.down[actor] for actor in actors)

    def close(self) -> None:
        """Kill the actors and free what they had reserved."""
        for host in self._hosts:
            self._ray.kill(host)
        self._ray.util.remove_placement_group(self._group)

    def _reserve(self, bundles: Sequence[Bundle], timeout: float) -> Any:
        ray = self._ray
        group = ray.util.placement_group(
            [bundle.resources for bundle in bundles],
            strategy="PACK",
            # Ray keeps it after a killed driver, as long as the job; under this name it is found and freed.
            name=ray.get_runtime_context().get_actor_name() or "",
            bundle_label_selector=[dict(bundle.kind.label) for bundle in bundles],
        )
        if not group.wait(timeout):
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            whole = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
            ray.util.remove_placement_group(group)
            raise PlacementError(
                f"{_asked(bundles)} found no room within {timeout:g} s; free now: {free}, the whole cluster: "
                f"{whole}{_labels_of(ray.nodes(), bundles)}. Lower actors, cpus_per_actor or gpus_per_actor."
            )
        return group


def _asked(bundles: Sequence[Bundle]) -> str:
    """What was asked for, kind by kind, such as ``2 actors with 3 CPU and 0 GPU each``."""
    parts = []
    for kind in {bundle.kind.name: bundle.kind for bundle in bundles}.values():
        actors = sum(bundle.actors for bundle in bundles if bundle.kind == kind)
        tier = f" of tier {kind.name}" if kind.name else ""
        labels = ", ".join(f"{key}={value}" for key, value in kind.label.items())
        where = f" on nodes labelled {labels}" if labels else ""
        parts.append(f"{actors} actors{tier} with {kind.cpus:g} CPU and {kind.gpus:g} GPU each{where}")
    return " and ".join(parts)


def _labels_of(nodes: Sequence[dict[str, Any]], bundles: Sequence[Bundle]) -> str:
    """The values of the labels asked for that the nodes carry."""
    keys = sorted({key for bundle in bundles for key in bundle.kind.label})
    found = {
        key: sorted({node["Labels"][key] for node in nodes if node["Alive"] and key in node["Labels"]})
        for key in keys
    }
    return "".join(f", label {key}: {', '.join(values) or 'on no node'}" for key, values in found.items())
