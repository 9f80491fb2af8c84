"""Totals of many actors on their way to the driver: along the tree, or all taken by the driver itself.

The product's own engine, pool, stores and calls, on one machine; the actors are light: they train nothing and
hold a packed total of an 11-million-weight model at 95 %, 4 % of it common to all and 1 % their own, so that
unions grow as they do where masks nearly agree. Figures are medians of rounds after the first, in seconds of
the whole round, in which nothing else happens.

A model of it from parts that are measured alone (a call, storing and combining a total) predicts what the
tree takes; it is printed beside what was measured before it is used for a thousand actors on 125 nodes.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

import cluster
from algorithms import Grid, Total
from algorithms.core.packing import PackedTotal, merge, pack, unpack
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
        config = cluster.resolve({"tracking": {"enabled": False}, "client_timeout_s": 600.0})
        setup: Any = SimpleNamespace(config=config, folder=SimpleNamespace(exists=lambda: True))
        bundles = [Bundle(ActorKind("", 1.0), 1)] * actors
        self._engine = RayEngine(
            setup, np.ones(actors, np.int64), bundles, make_host=LightHost, placement_timeout=600.0
        )
        self._clients: list[Any] = [Assignment(client, 0.0, SimpleNamespace(), 0) for client in range(actors)]
        self._number = 0

    def seconds(self) -> float:
        """A round."""
        self._number += 1
        broadcast: Any = SimpleNamespace(instructions=SimpleNamespace(round=self._number), nbytes=1)
        started = time.perf_counter()
        outcome = self._engine.run(broadcast, self._clients, [], lambda: None)
        spent = time.perf_counter() - started
        assert outcome.total.clients == [assignment.client for assignment in self._clients]
        return spent

    def close(self) -> None:
        """Free the actors."""
        self._engine.close()


class Parts:
    """What the model is made of, each measured alone in this process, in seconds."""

    def __init__(self, clients: int = 8) -> None:
        made = [sparse_total(client) for client in range(clients)]
        self.put = _median(lambda: ray.put(made[0]))
        references = [ray.put(total) for total in made]
        self.unpack = _median(lambda: unpack(ray.get(references[0])))
        sums = unpack(made[0])
        self.merge = _median(lambda: merge(sums, ray.get(references[1])))
        self.pack = _median(lambda: ray.put(pack(sums)))

    def combine(self, totals_: int) -> float:
        """A call that combines so many."""
        return self.unpack + self.merge * (totals_ - 1) + self.pack

    def tree(self, actors: int, cores: int, call: float) -> float:
        """A round of light actors on one node: levels one after the other, each spread over the cores."""
        spent, left = actors * (call + self.put / cores), actors
        while left > totals.DIRECT:
            calls = math.ceil(left / totals.FAN)
            spent += math.ceil(calls / cores) * self.combine(math.ceil(left / calls)) + calls * call
            left = calls
        return spent + self.unpack + (left - 1) * self.merge

    def nodes(self, nodes: int, actors: int, call: float) -> float:
        """The same with so many actors a node, a core each, and a network between nodes."""
        spent, left, members = nodes * actors * call + self.put + self.combine(actors), nodes, actors
        while left > totals.DIRECT:
            calls = math.ceil(left / totals.FAN)
            taken = math.ceil(left / calls)
            # Unions grow, and with them what is sent, merged and packed.
            growth = _union(members) / _union(1)
            sent = (taken - 1) * 24 * _union(members) * WEIGHTS / NETWORK
            spent += sent + self.unpack + growth * self.merge * (taken - 1) + growth * self.pack
            spent, left, members = spent + calls * call, calls, members * taken
        growth = _union(members) / _union(1)
        return spent + left * (growth * self.merge + 24 * _union(members) * WEIGHTS / NETWORK)


def _union(members: int) -> float:
    """Share of the weights in the union of so many made-up supports."""
    return COMMON + (1 - COMMON) * (1 - (1 - OWN) ** members)


def _median(work: Any, times: int = 7) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def figures(name: str, quick: bool) -> list[Figure]:
    """A round by number of actors, along the tree and flat, and the model beside it."""
    found = []
    cores = os.cpu_count() or 1
    counts = (8, 16) if quick else (8, 16, 32, 64)
    with connection("local", num_cpus=counts[-1], include_dashboard=False, object_store_memory=4 * 2**30):
        parts = Parts()
        for part in ("put", "unpack", "merge", "pack"):
            found.append(Figure(name, "one packed total", f"{part} ms", 1e3 * getattr(parts, part)))
        found.append(Figure(name, "one packed total", "MB", 24 * _union(1) * WEIGHTS / 1e6))
        call = 0.0
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
                    call = call or _call()
                    model = parts.tree(actors, cores, call)
                    found += [
                        Figure(name, case, "model s", model),
                        Figure(name, case, "measured/model", spent / model, 1.25),
                    ]
        found.append(Figure(name, "a call", "ms", 1e3 * call))
        thousand = parts.nodes(125, 8, call)
        found.append(Figure(name, "1,000 actors on 125 nodes", "model s", thousand, 10.0))
    return found


def _call() -> float:
    """Seconds of a call and its answer, of many at once to one actor."""

    @ray.remote
    class Nothing:
        def nothing(self) -> None: ...

    actor: Any = Nothing.remote()
    ray.get(actor.nothing.remote())
    return _median(lambda: ray.get([actor.nothing.remote() for _ in range(200)])) / 200
