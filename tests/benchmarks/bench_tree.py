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
TIMES = 7  # of one part
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

    @property
    def hosts(self) -> Sequence[Any]:
        """The actors."""
        return self._engine._pool._hosts

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
    """What the model is made of, in seconds, each kind of work by itself.

    They are measured among the processes of as many actors, which take time from each other by waiting alone.

    Args:
        hosts: The actors.

    Attributes:
        call: A call and its answer, of many to one actor.
        hand_over: An actor's call that stores its total, per call.
        combine: Calls that combine ``totals.FAN`` of them each and store what they add up to, as many at once
            as it takes for all.
        whole: The driver's making a dense total of what it gets.
        merge: Its adding another such one to that.
    """

    def __init__(self, hosts: Sequence[Any]) -> None:
        self.call = _median(lambda: ray.get([hosts[0].alive.remote() for _ in range(200)])) / 200

        def hand_over() -> list[totals.Stored]:
            told = _broadcast(1)
            calls = [host.play.remote(told, [_assignment(n)], True, True) for n, host in enumerate(hosts)]
            return [stored for _, stored in ray.get(calls)]

        self.hand_over = _median(hand_over) / len(hosts)
        turns = []
        for _ in range(TIMES):
            stored = hand_over()  # new ones: what is in a cache or mapped already is read faster
            groups = [stored[first : first + totals.FAN] for first in range(0, len(hosts), totals.FAN)]
            started = time.perf_counter()
            ray.get([host.combine.remote(group) for host, group in zip(hosts, groups, strict=False)])
            turns.append(time.perf_counter() - started)
        self.combine = statistics.median(turns)
        one = stored[0] if len(hosts) <= totals.DIRECT else ray.get(hosts[0].combine.remote(groups[0]))
        total = ray.get(one.reference)
        self.whole = _median(partial(unpack, total))
        self.merge = _median(partial(merge, unpack(total), total))

    def tree(self, actors: int) -> float:
        """A round of so many light actors on one node: one kind of work after the other."""
        spent, left = actors * self.hand_over, actors
        if left > totals.DIRECT:
            spent, left = spent + self.combine, math.ceil(left / totals.FAN)
        return spent + self.whole + (left - 1) * self.merge

    def nodes(self, nodes: int) -> float:
        """The same of so many such nodes, which combine at once, and a network between them."""
        spent = nodes * totals.FAN * self.call + totals.FAN * self.hand_over + self.combine
        left, members = nodes, totals.FAN
        while left > totals.DIRECT:
            calls = math.ceil(left / totals.FAN)
            taken = math.ceil(left / calls)
            # Unions grow, and with them what is sent, merged and packed.
            spent += taken * _sent_s(members) + calls * self.call
            spent += self.combine * _union(members) / _union(1)
            left, members = calls, members * taken
        growth = _union(members) / _union(1)
        return spent + growth * self.whole + left * (growth * self.merge + _sent_s(members))


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
        for actors in counts:
            case = f"{actors} actors"
            for way in ("tree", "flat"):
                direct, totals.DIRECT = totals.DIRECT, totals.DIRECT if way == "tree" else 10_000
                try:
                    rounds = Rounds(actors)
                    rounds.seconds()  # totals are made, modules imported
                    spent = statistics.median(rounds.seconds() for _ in range(ROUNDS))
                finally:
                    totals.DIRECT = direct
                found.append(Figure(name, case, f"{way} s", spent))
                print(f"  {case} {way}: {spent:.3f} s", flush=True)
                if way == "tree":
                    parts = Parts(rounds.hosts)
                    model = parts.tree(actors)
                    found += [
                        Figure(name, case, "model s", model),
                        Figure(name, case, "measured/model", spent / model, 1.25),
                        *(Figure(name, case, f"{part} ms", 1e3 * own) for part, own in vars(parts).items()),
                    ]
                    if actors == totals.FAN:
                        found.append(
                            Figure(name, "1,000 actors on 125 nodes", "model s", parts.nodes(125), 10.0)
                        )
                rounds.close()
        found.append(Figure(name, "one packed total", "MB", 24 * _union(1) * WEIGHTS / 1e6))
    return found
