"""Totals of many actors on their way to the driver: along the tree, or all taken by the driver itself.

The product's own engine, pool, stores and calls, on one machine; the actors are light: they train nothing and
hold a packed total of an 11-million-weight model at 95 %, 4 % of it common to all and 1 % their own, so that
unions grow as they do where masks nearly agree. Figures are medians of rounds after the first, in seconds of
the whole round, in which nothing else happens.

A model of it from its parts (handing over, combining, the driver's merging), each measured by itself, with as
many at it at once, predicts what the tree takes; it is printed beside what was measured before it is used for
a thousand actors on 125 nodes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

import cluster
from algorithms import Grid, Total
from algorithms.core.packing import PackedTotal, merge, unpack
from cluster.actors import totals
from cluster.actors.actor_pool import Beginning, HostActor
from cluster.actors.placement import ActorKind, Bundle
from cluster.actors.ray_engine import RayEngine
from cluster.actors.ray_session import connection
from cluster.exchange import Assignment, Broadcast, ClientReport, HostSetup
from cluster.measured import Measured
from tests.benchmarks.report import Figure

#: Weights of ResNet-18 for CIFAR-10.
WEIGHTS = 11_173_962
COMMON, OWN = 0.04, 0.01
ROUNDS = 4
TIMES, TURNS = 7, 3  # of one part
#: Bytes a second between nodes, in the model of a thousand actors.
NETWORK = 1.25e9


def sparse_total(client: int) -> PackedTotal:
    """The packed total of one made-up sparse update."""
    common = np.random.default_rng(0).random(WEIGHTS, np.float32) < COMMON
    rng = np.random.default_rng(client + 1)
    positions = np.flatnonzero(common | (rng.random(WEIGHTS, np.float32) < OWN)).astype(np.int32)
    high, low = np.zeros(0), np.zeros(0)
    rest = Total(
        Grid(1.0, 10_000), high, low, np.zeros(0, np.int32), np.zeros(20, np.int64), None, 1, [client]
    )
    columns: dict[str, np.ndarray] = {
        "high": np.full(len(positions), 2.0**-10),
        "low": np.full(len(positions), 2.0**-60),
        "votes": np.ones(len(positions), np.int32),
    }
    return PackedTotal(rest, positions, columns, dict.fromkeys(columns, WEIGHTS))


class LightHost:
    """Hands over a total that it made beforehand, as its client's."""

    def __init__(self, setup: HostSetup, gpus: float) -> None:
        self._ready: dict[int, PackedTotal] = {}
        self._client = -1

    def play(self, broadcast: Broadcast, assignments: Sequence[Assignment]) -> list[ClientReport]:
        """Play one client."""
        (assignment,) = assignments
        self._client = assignment.client
        if self._client not in self._ready:
            self._ready[self._client] = sparse_total(self._client)
        nothing, phases = Measured.nothing(1, 1), (1.0, 0.0, 0.0, 0.0)
        return [ClientReport(self._client, nothing, 1e9, phases, 1, 1, 1.0, None, 1.0, folded=True)]

    def collect(self, round_number: int) -> PackedTotal:
        """The total."""
        return self._ready[self._client]


class Rounds:
    """Rounds of so many light actors, a client each."""

    def __init__(self, actors: int) -> None:
        bundles = [Bundle(ActorKind("", 1.0), 1)] * actors
        self._engine = RayEngine(
            _setup(), np.ones(actors, np.int64), bundles, make_host=LightHost, placement_timeout=600.0
        )
        self._clients = list(map(_assignment, range(actors)))
        self._number = 0

    def seconds(self) -> float:
        """A round."""
        self._number += 1
        started = time.perf_counter()
        outcome = self._engine.run(_broadcast(self._number), self._clients, [], lambda: None)
        spent = time.perf_counter() - started
        assert outcome.total.clients == [assignment.client for assignment in self._clients]
        return spent

    def close(self) -> None:
        """Free the actors."""
        self._engine.close()


def _setup() -> Any:
    config = cluster.resolve({"tracking": {"enabled": False}, "client_timeout_s": 600.0})
    return SimpleNamespace(config=config, folder=SimpleNamespace(exists=lambda: True))


def _broadcast(number: int) -> Any:
    return SimpleNamespace(instructions=SimpleNamespace(round=number), nbytes=1)


def _assignment(client: int) -> Assignment:
    nothing: Any = SimpleNamespace()
    return Assignment(client, 0.0, nothing, 0)


class Parts:
    """What the model is made of, in seconds: each kind of work by itself, on every core at once.

    Attributes:
        call: A call and its answer, of many to one actor.
        hand_over: An actor's call that stores its total, per call.
        combine: By how many do so on one machine at once, calls that combine ``totals.FAN`` of them each and
            store what they add up to.
        whole: By how many updates are in it, the driver's making a dense total of a packed one.
        merge: Its adding another such one to that.
    """

    def __init__(self) -> None:
        clients, at_once = range(totals.FAN), (1, 2, 4, 8)
        actor: Any = ray.remote(HostActor)
        count = len(clients) + TURNS * sum(at_once)
        every = [actor.options(num_cpus=0).remote(LightHost, 0.0) for _ in range(count)]
        hosts, others = every[: len(clients)], iter(every[len(clients) :])
        ray.get([host.ready.remote(_setup(), Beginning("parts")) for host in every])
        self.call = _median(lambda: ray.get([hosts[0].alive.remote() for _ in range(200)])) / 200

        def hand_over() -> list[totals.Stored]:
            told = _broadcast(1)
            calls = [
                host.play.remote(told, [_assignment(client)], True, True)
                for host, client in zip(hosts, clients, strict=True)
            ]
            return [stored for _, stored in ray.get(calls)]

        def combine(calls: int) -> float:
            # Each call its own totals, of an actor that has combined none: what is in a cache, or mapped
            # already, is read faster.
            groups = [(next(others), hand_over()) for _ in range(calls)]
            started = time.perf_counter()
            ray.get([host.combine.remote(group) for host, group in groups])
            return time.perf_counter() - started

        stored = hand_over()  # modules are imported, totals made
        self.hand_over = _median(hand_over) / len(hosts)
        self.combine = {calls: statistics.median(combine(calls) for _ in range(TURNS)) for calls in at_once}
        union = ray.get(hosts[0].combine.remote(stored))
        self.whole, self.merge = {}, {}
        for members, reference in ((1, stored[0].reference), (totals.FAN, union.reference)):
            total = ray.get(reference)
            self.whole[members] = _median(partial(unpack, total))
            self.merge[members] = _median(partial(merge, unpack(total), total))
        for host in every:
            ray.kill(host)

    def tree(self, actors: int) -> float:
        """A round of light actors on one node: one kind of work after the other."""
        spent, left, members = actors * self.hand_over, actors, 1
        while left > totals.DIRECT:
            calls = math.ceil(left / totals.FAN)
            spent += self.combine[calls]
            left, members = calls, totals.FAN
        return spent + self.whole[members] + (left - 1) * self.merge[members]

    def nodes(self, nodes: int, actors: int) -> float:
        """The same with so many actors a node, a core each, and a network between nodes."""
        spent, left, members = (
            nodes * actors * self.call + self.hand_over * actors + self.combine[1],
            nodes,
            actors,
        )
        while left > totals.DIRECT:
            calls = math.ceil(left / totals.FAN)
            taken = math.ceil(left / calls)
            # Unions grow, and with them what is sent, merged and packed.
            spent += taken * _sent_s(members) + calls * self.call
            spent += self.combine[1] * _union(members) / _union(1)
            left, members = calls, members * taken
        growth = _union(members) / _union(totals.FAN)
        merged = growth * self.merge[totals.FAN]
        return spent + growth * self.whole[totals.FAN] + left * (merged + _sent_s(members))


def _sent_s(members: int) -> float:
    """Seconds of the network for the total of so many."""
    return 24 * _union(members) * WEIGHTS / NETWORK


def _union(members: int) -> float:
    """Share of the weights in the union of so many made-up supports."""
    return COMMON + (1 - COMMON) * (1 - (1 - OWN) ** members)


def _median(work: Any) -> float:
    seconds = []
    for _ in range(TIMES):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def figures(name: str, quick: bool) -> list[Figure]:
    """A round by number of actors, along the tree and flat, and the model beside it."""
    found = []
    counts = (8, 16) if quick else (8, 16, 32, 64)
    with connection("local", num_cpus=counts[-1], include_dashboard=False, object_store_memory=4 * 2**30):
        parts = Parts()
        for part, seconds in vars(parts).items():
            of_each = seconds.items() if isinstance(seconds, dict) else [("", seconds)]
            found += [Figure(name, part, f"{count} ms".strip(), 1e3 * each) for count, each in of_each]
        found.append(Figure(name, "one packed total", "MB", 24 * _union(1) * WEIGHTS / 1e6))
        for actors in counts:
            case = f"{actors} actors"
            for way in ("tree", "flat"):
                direct, totals.DIRECT = totals.DIRECT, totals.DIRECT if way == "tree" else 10_000
                try:
                    rounds = Rounds(actors)
                    rounds.seconds()  # totals are made, modules imported
                    spent = statistics.median(rounds.seconds() for _ in range(ROUNDS))
                    rounds.close()
                finally:
                    totals.DIRECT = direct
                found.append(Figure(name, case, f"{way} s", spent))
                print(f"  {case} {way}: {spent:.3f} s", flush=True)
                if way == "tree":
                    model = parts.tree(actors)
                    found += [
                        Figure(name, case, "model s", model),
                        Figure(name, case, "measured/model", spent / model, 1.25),
                    ]
        found.append(Figure(name, "1,000 actors on 125 nodes", "model s", parts.nodes(125, 8), 10.0))
    return found
