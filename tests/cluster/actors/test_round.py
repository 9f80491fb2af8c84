"""Rounds without Ray: who gets what when, and one chunk that kills whichever made-up actor evaluates it."""

import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from cluster.actors import ray_round
from cluster.actors.actor_pool import NotBegunError
from cluster.actors.placement import CostModel
from cluster.actors.ray_calls import Crew
from cluster.actors.ray_round import Rounds
from cluster.actors.totals import Stored
from cluster.exchange import Assignment, ClientError, EvaluationChunk
from cluster.measured import Measured
from tests.cluster.actors.test_totals import total_of

CENTRAL = [EvaluationChunk("test", start, start + 5) for start in (0, 5)]
TRAINED = [EvaluationChunk("test", 0, 10, client=client) for client in range(18)]


@dataclass(frozen=True, eq=False)
class Call:
    method: str
    chunks: list[EvaluationChunk]


class Pool:
    """Two actors that answer at once; a call is its own reference."""

    kinds = ("", "")
    nodes = ("one", "one")

    def __init__(self, deadly):
        self.deadly, self.down, self.lost_under = deadly, {}, []

    def __len__(self):
        return len(self.kinds)

    def call(self, actor, method, *arguments):
        return Call(method, arguments[1] if method == "evaluate" else [])

    def answer(self, call):
        if call.method == "evaluate" and self.deadly in call.chunks:
            self.lost_under.append(call.chunks)
            raise ray.exceptions.ActorDiedError
        return [(chunk, {"loss": 0.0}) for chunk in call.chunks]

    def lost(self, actor):
        return self.down.setdefault(actor, 0.0) == 0.0

    def back(self, actor, place):
        del self.down[actor]

    def seconds_without(self, kind=None):
        return 0.0


@pytest.fixture
def evaluated(monkeypatch):
    """Evaluates the chunks after round 4, one of which is deadly."""
    monkeypatch.setattr(ray_round, "PROBE_EVERY_S", 0.0)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "wait", lambda calls, **_: (calls[:1], calls[1:]))

    def evaluate(deadly, *, skip):
        pool = Pool(deadly)
        monkeypatch.setattr(ray, "get", pool.answer)
        crew = Crew(pool, np.ones(18, np.int64), CostModel(), lambda client: "", 10.0, skip, 0)
        broadcast = round_(5)
        rounds = Rounds(crew)
        rounds.start(broadcast, [], CENTRAL + TRAINED)
        return pool, {chunk for chunk, _ in rounds.finish().evaluated()}

    return evaluate


def test_a_clients_evaluation_that_keeps_losing_its_actor_ends_the_run(evaluated):
    with pytest.raises(
        ClientError,
        match="client 5 failed in round 4, stage evaluation: the actor that played it was lost 3 times",
    ):
        evaluated(TRAINED[5], skip=False)


def test_where_failing_clients_are_skipped_it_alone_is_left_out(evaluated):
    pool, done = evaluated(TRAINED[5], skip=True)
    assert done == set(CENTRAL + TRAINED) - {TRAINED[5]}
    assert len(pool.lost_under[0]) > 1
    assert pool.lost_under[1:] == [[TRAINED[5]], [TRAINED[5]]]  # alone, from the second time on


def test_what_all_need_is_never_left_out(evaluated):
    with pytest.raises(ClientError, match="rows 5 to 10 of test failed in round 4, stage evaluation"):
        evaluated(CENTRAL[1], skip=True)


class Deadly(Pool):
    """Actors that every client kills; they are back at once."""

    def __init__(self):
        super().__init__(deadly=None)

    def answer(self, call):
        if call.method == "play":
            raise ray.exceptions.ActorDiedError
        return None if call.method == "collect" else super().answer(call)


@pytest.mark.usefixtures("evaluated")
def test_a_round_in_which_every_client_is_given_up(monkeypatch):
    pool = Deadly()
    monkeypatch.setattr(ray, "get", pool.answer)
    rounds = Rounds(Crew(pool, np.ones(18, np.int64), CostModel(), lambda client: "", 10.0, True, 0))
    rounds.start(round_(5), tasks(3), [])
    outcome = rounds.finish()
    assert outcome.total is None
    assert [(report.client, report.skipped) for report in outcome.reports] == [(n, True) for n in range(3)]


class Played:
    """A client's report, as far as a round looks at it."""

    def __init__(self, client, seconds=1.0):
        self.client, self.seconds, self.samples, self.folded = client, seconds, 1, False
        self.measured = Measured.nothing(1, 1)


class Summed:
    """A total that knows whom it is of."""

    def __init__(self, assignments):
        self.clients = [assignment.client for assignment in assignments]

    def copy(self):
        return self


class Scripted(Pool):
    """Two actors that answer when they are told to."""

    def __init__(self):
        super().__init__(deadly=None)
        self.asked, self.may_answer, self.handing_over, self.folds = [], [], [], False

    def call(self, actor, method, *arguments):
        work = arguments[1] if method in ("play", "evaluate") else []
        call = Call(method, work)
        if method == "play" and arguments[2]:
            self.handing_over.append(call)
        self.asked.append((actor, method, [getattr(one, "client", one) for one in work]))
        self.may_answer.append(call)
        return call

    def answer(self, call):
        if call.method == "play":
            reports = [Played(task.client) for task in call.chunks]
            for report in reports:
                report.folded = self.folds
            return reports, Summed(call.chunks) if call in self.handing_over else None
        return super().answer(call) if call.method == "evaluate" else None


@pytest.fixture
def scripted(monkeypatch):
    """Two actors, and rounds of clients that cost a second each, as is known."""
    pool, clock = Scripted(), SimpleNamespace(now=0.0)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "get", pool.answer)
    monkeypatch.setattr(ray, "wait", lambda calls, **_: ([c for c in calls if c in pool.may_answer][:1], []))
    watch = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=time.perf_counter)
    monkeypatch.setattr(ray_round, "time", watch)
    costs = CostModel()
    for actor in (0, 1):
        costs.learn(actor, [Played(client) for client in range(8)])
    costs.learn_chunks([EvaluationChunk("test", 0, 5, seconds=1.0)])
    crew = Crew(pool, np.ones(18, np.int64), costs, lambda client: "", 1000.0, False, 0)
    return pool, Rounds(crew), clock


def answer(rounds, actor):
    """An actor answers its oldest call."""
    (reference,) = [r for r, who in rounds._queues.oldest().items() if who == actor]
    rounds._take_in(actor, reference)


def tasks(count):
    return [Assignment(client, 0.0, None, 0) for client in range(count)]


def round_(number):
    return SimpleNamespace(instructions=SimpleNamespace(round=number), nbytes=1)


def test_who_will_be_done_first_gets_the_next_client(scripted):
    pool, rounds, clock = scripted
    rounds.start(round_(1), tasks(6), [])
    # A third of the share each, and again: 6 clients for two actors.
    assert pool.asked == [(0, "play", [0]), (1, "play", [1]), (0, "play", [2]), (1, "play", [3])]
    clock.now = 0.9
    answer(rounds, 1)
    rounds._hand_out()
    assert pool.asked[4:] == [(1, "play", [4])]  # actor 0, with 1.1 s to go, has no room yet


def test_a_client_waits_for_the_actor_that_will_be_done_first(scripted):
    pool, rounds, clock = scripted
    rounds.start(round_(1), tasks(5), [])
    assert pool.asked[-1] == (1, "play", [3])
    clock.now = 0.2
    first, *_ = rounds._queues.drop(0)  # actor 0 has begun anew and holds nothing else
    rounds._queues.put(pool.may_answer[0], replace(first, seconds=10.0), 0.2)
    rounds._hand_out()
    assert len(pool.asked) == 4  # for actor 1, which is done in 2 s and has no room, not for actor 0 in 10 s
    clock.now = 1.0
    answer(rounds, 1)
    rounds._hand_out()
    assert pool.asked[4] == (1, "play", [4])


def test_the_evaluation_goes_on_while_the_next_round_is_played(scripted):
    pool, rounds, _ = scripted
    chunks = [EvaluationChunk("test", start, start + 5) for start in range(0, 20, 5)]
    rounds.start(round_(1), [], chunks)
    outcome = rounds.finish()  # nobody to play: at once
    assert [method for _, method, _ in pool.asked] == ["evaluate"] * 4
    rounds.start(round_(2), tasks(1), CENTRAL)
    assert len(pool.asked) == 4  # no room yet
    evaluated = outcome.evaluated()
    assert {chunk.start for chunk, _ in evaluated} == {0, 5, 10, 15}
    assert outcome.evaluated() is evaluated
    asked = [method for _, method, _ in pool.asked[4:]]
    assert asked[0] == "play"
    assert "evaluate" in asked


def test_the_last_call_of_each_actor_brings_its_total(scripted):
    pool, rounds, _ = scripted
    pool.folds = True
    rounds.start(round_(1), tasks(2), [])
    assert pool.asked == [
        (0, "play", [0]),
        (1, "play", [1]),
        (0, "collect", []),
    ]  # client 1 was waiting still
    pool.may_answer = [call for call in pool.may_answer if call.method == "play"]
    answer(rounds, 1)
    assert rounds._totals.total.clients == [1]
    assert not rounds._totals.played[1]


def test_before_costs_are_known_clients_are_dealt_in_turn(scripted):
    pool, rounds, _ = scripted
    rounds._crew.costs.__init__()
    rounds.start(round_(1), tasks(6), [])
    assert pool.asked == [(0, "play", [0]), (1, "play", [1]), (0, "play", [2]), (1, "play", [3])]


def test_only_the_client_that_ran_when_its_actor_was_lost_is_played_alone(scripted):
    _, rounds, _ = scripted
    rounds.start(round_(1), tasks(4), [])
    rounds._lose(0, "died")
    assert rounds._losses == {0: 1}  # not client 2, which had not begun
    assert set(rounds._losses) == {0}


def test_calls_of_a_round_that_an_error_ended_are_forgotten(scripted):
    _, rounds, _ = scripted
    rounds.start(round_(1), tasks(6), [])
    rounds.start(round_(1), tasks(6), [])
    assert rounds._queues.count.tolist() == [2, 2]
    assert rounds._queues.methods.total() == 4


@pytest.mark.usefixtures("evaluated")
def test_an_actor_that_came_back_unnoticed_has_lost_what_it_had(monkeypatch):
    class Forgetful(Scripted):
        """Actor 0 has died and come back since it was told of the run."""

        def __init__(self):
            super().__init__()
            self.told, self.of = False, {}

        def call(self, actor, method, *arguments):
            call = super().call(actor, method, *arguments)
            self.of[call] = actor
            return call

        def answer(self, call):
            if call.method == "ready":
                self.told = True
                return None
            if self.of[call] == 0 and not self.told:
                raise ray.exceptions.RayTaskError("play", "", NotBegunError())
            return super().answer(call)

    pool = Forgetful()
    monkeypatch.setattr(ray, "get", pool.answer)
    rounds = Rounds(Crew(pool, np.ones(18, np.int64), CostModel(), lambda client: "", 10.0, False, 0))
    rounds.start(round_(5), tasks(4), [])
    outcome = rounds.finish()
    assert [report.client for report in outcome.reports] == [0, 1, 2, 3]
    assert outcome.lost_actors == 1


class Many(Pool):
    """Twenty actors that answer one after the other; each call takes its clients' seconds of their clock."""

    kinds = ("",) * 20
    nodes = ("one",) * 20

    def __init__(self):
        super().__init__(deadly=None)
        self.folded = {actor: [] for actor in range(20)}
        self.stored, self.most, self.combined, self.of = set(), 0, 0, {}

    def call(self, actor, method, *arguments):
        call = Call(method, arguments)
        self.of[call] = actor
        return call

    def handed(self, actor, store):
        clients, self.folded[actor] = sorted(self.folded[actor]), []
        if not clients:
            return None
        return self.put(clients) if store else total_of(clients)

    def put(self, clients):
        self.stored.add(tuple(clients))
        self.most = max(self.most, len(self.stored))
        return Stored(tuple(clients), tuple(clients), "one")

    def answer(self, call, timeout=None):
        if isinstance(call, tuple):
            self.stored.discard(call)
            return total_of(call)
        actor, arguments = self.of[call], call.chunks
        if call.method == "play":
            reports = [Played(task.client, seconds=30.0) for task in arguments[1]]
            for report in reports:
                report.folded = True
                self.folded[actor].append(report.client)
            return reports, self.handed(actor, arguments[3]) if arguments[2] else None
        if call.method == "collect":
            return self.handed(actor, arguments[1])
        self.combined += 1
        for part in arguments[0]:
            self.stored.discard(part.reference)
        return self.put(sorted(client for part in arguments[0] for client in part.clients))


def test_a_long_round_of_many_actors_leaves_little_in_the_store(evaluated, monkeypatch):
    pool = Many()
    monkeypatch.setattr(ray, "get", pool.answer)
    drawn = np.random.default_rng(0)
    monkeypatch.setattr(ray, "wait", lambda calls, **_: ([calls[drawn.integers(len(calls))]], []))
    costs = CostModel()
    for actor in range(20):
        costs.learn(actor, [Played(client, seconds=30.0) for client in range(600)])
    rounds = Rounds(Crew(pool, np.ones(600, np.int64), costs, lambda client: "", 1000.0, False, 0))
    rounds.start(round_(1), tasks(600), [])
    outcome = rounds.finish()
    assert outcome.total.clients == list(range(600))
    assert pool.most <= 2 * 20  # as much as a private cluster has room for
    assert pool.combined
