"""The way of totals to the driver, without Ray: every update arrives once, whatever is combined or lost."""

from types import SimpleNamespace

import numpy as np
import pytest
import ray

from algorithms import Entry, Grid, ParameterLayout, Total
from algorithms.core.packing import merge, unpack
from cluster.actors import totals
from cluster.actors.totals import DIRECT, Stored, Totals

LAYOUT = ParameterLayout((Entry("a", (3,), 0, 3),), (), ())


class Store:
    """Stands for Ray: what was put, by reference."""

    exceptions = ray.exceptions

    def __init__(self):
        self.held = {}

    def put(self, total, node):
        self.held[len(self.held)] = total
        return Stored(len(self.held) - 1, tuple(total.clients), node)

    def get(self, reference, timeout=None):
        if self.held[reference] is None:
            raise ray.exceptions.ObjectLostError("0" * 56, None, "")
        return self.held[reference]


def total_of(clients):
    total = Total.zero(Grid(1024.0, 10_000), LAYOUT)
    for client in clients:
        total.fold(client, np.full(3, client, np.float32), None, 1, LAYOUT)
    return total


def reports(clients):
    return [SimpleNamespace(client=client, folded=True, seconds=0.1) for client in clients]


class Story:
    """So many actors a node, each with two clients, that hand over and combine in some order."""

    def __init__(self, nodes, actors, seed):
        self.rng, self.store = np.random.default_rng(seed), Store()
        self.nodes = [f"node {n}" for n in range(nodes) for _ in range(actors)]
        self.totals = Totals(self.store, self.nodes)
        self.clients = set(range(2 * len(self.nodes)))
        self.to_play = {actor: [2 * actor, 2 * actor + 1] for actor in range(len(self.nodes))}
        self.combining = {}  # actor -> parcels
        self.again, self.combined, self.taken = [], 0, 0

    def playing(self):
        return {self.nodes[actor] for actor in self.to_play}

    def hand_over(self):
        actor = int(self.rng.choice(list(self.to_play)))
        clients = self.to_play.pop(actor)
        self.totals.folded(actor, reports(clients))
        self.again += self.totals.take_in(actor, self.store.put(total_of(clients), self.nodes[actor]))

    def ask(self):
        """Give every idle actor what it should combine."""
        for actor in self.rng.permutation(len(self.nodes)).tolist():
            if actor not in self.to_play and actor not in self.combining:
                parcels = self.totals.to_combine(actor, self.playing())
                if parcels:
                    assert 2 <= len(parcels) <= totals.FAN
                    self.combining[actor] = parcels

    def finish_one(self):
        actor = int(self.rng.choice(list(self.combining)))
        parcels, self.combined = self.combining.pop(actor), self.combined + 1
        try:
            found = unpack(self.store.get(parcels[0].stored.reference))
            for parcel in parcels[1:]:
                merge(found, self.store.get(parcel.stored.reference))
            stored = self.store.put(found, self.nodes[actor])
        except ray.exceptions.ObjectLostError:
            stored = None
        self.again += self.totals.combined(actor, parcels, stored)

    def lose(self, actor):
        """An actor dies, and with it what it has put into the store."""
        for reference, held in self.store.held.items():
            owned = held is not None and any(
                p.actor == actor and p.stored.reference == reference for p in self.all_parcels()
            )
            if owned:
                self.store.held[reference] = None
        if actor in self.combining:
            self.again += self.totals.combined(actor, self.combining.pop(actor), None)
        self.again += self.totals.lose(actor)

    def all_parcels(self):
        ready = [parcel for some in self.totals._ready.values() for parcel in some]
        return ready + [parcel for parcels in self.combining.values() for parcel in parcels]

    def play_again(self):
        clients, self.again = self.again, []
        assert len(set(clients)) == len(clients)
        if clients:
            idle = [a for a in range(len(self.nodes)) if a not in self.to_play and a not in self.combining]
            self.to_play[idle[0]] = clients

    def run(self, strike=lambda story: None):
        while True:
            self.ask()
            strike(self)
            self.play_again()
            if self.combining and (not self.to_play or self.rng.random() < 0.5):
                self.finish_one()
            elif self.to_play:
                self.hand_over()
            elif self.totals.few:
                self.taken = len(self.all_parcels())
                self.again += self.totals.take_stored(1.0)
                if not self.again:
                    break
        assert not self.totals.left
        assert self.totals.total.clients == sorted(self.clients)
        whole = total_of(sorted(self.clients))
        assert self.totals.total.high.tobytes() == whole.high.tobytes()
        return self


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("nodes", "actors"), [(1, 5), (1, 16), (3, 4), (20, 8), (40, 1)])
def test_the_driver_takes_a_few_totals_of_any_number_of_actors(nodes, actors, seed):
    story = Story(nodes, actors, seed).run()
    assert 1 <= story.taken <= DIRECT
    assert story.combined <= len(story.nodes)


@pytest.mark.parametrize("seed", range(20))
def test_however_few_the_driver_takes_and_calls_combine(monkeypatch, seed):
    monkeypatch.setattr(totals, "DIRECT", 1)
    monkeypatch.setattr(totals, "FAN", 2)
    story = Story(2, 4, seed).run()
    assert story.taken == 1
    assert story.combined == 7


def test_a_nodes_totals_are_combined_on_it_first():
    story = Story(4, 8, seed=0)
    for _ in range(32):
        story.hand_over()
    story.ask()
    for actor, parcels in story.combining.items():
        assert {parcel.stored.node for parcel in parcels} == {story.nodes[actor]}
        assert len(parcels) == 8
    assert len(story.combining) == 4


def test_while_some_play_on_a_node_its_totals_wait_for_eight():
    story = Story(1, 16, seed=0)
    for _ in range(7):
        story.hand_over()
    story.ask()
    assert not story.combining
    story.hand_over()
    story.ask()
    assert [len(parcels) for parcels in story.combining.values()] == [8]


@pytest.mark.parametrize("seed", range(30))
def test_actors_that_die_at_any_time_lose_nothing(seed):
    deaths = np.random.default_rng(seed)

    def strike(story):
        if deaths.random() < 0.1:
            actor = int(deaths.integers(len(story.nodes)))
            if actor not in story.to_play:
                story.lose(actor)

    Story(5, 4, seed).run(strike)


@pytest.mark.parametrize("seed", range(10))
def test_a_whole_node_that_dies_in_mid_tree_loses_nothing(seed):
    done = []

    def strike(story):
        if story.combined == 3 and not done:
            done.append(True)
            for actor in [a for a, node in enumerate(story.nodes) if node == "node 1"]:
                if actor not in story.to_play:
                    story.lose(actor)

    Story(6, 5, seed).run(strike)
    assert done


def test_few_actors_hand_their_totals_to_the_driver():
    assert not Totals(Store(), ["one"] * DIRECT).stores
    assert Totals(Store(), ["one"] * (DIRECT + 1)).stores


def test_a_total_of_others_than_were_played_is_not_taken():
    held = Totals(Store(), ["one", "one"])
    held.folded(0, reports([3, 4]))
    assert held.take_in(0, total_of([3])) == {3, 4}
    assert held.total is None
    held.folded(0, reports([3]))
    assert held.take_in(0, None) == {3}
    held.folded(0, reports([3]))
    assert held.take_in(0, total_of([3])) == set()
    assert held.total.clients == [3]


def test_a_total_that_nobody_hands_over_is_played_again():
    """Its actor is frozen: it lives, and answers nobody."""
    store = Store()
    held = Totals(store, ["one"] * 9)
    held.folded(0, reports([3, 4]))
    held.take_in(0, store.put(total_of([3, 4]), "one"))

    def never(reference, timeout):
        raise ray.exceptions.GetTimeoutError

    store.get = never
    assert held.take_stored(1.0) == {3, 4}
    assert held.total is None
    assert not held.left
