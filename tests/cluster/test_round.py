"""A round that loses its actors, without Ray: one chunk kills whichever made-up actor evaluates it."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from cluster import ray_round
from cluster.client import ClientError, EvaluationChunk
from cluster.placement import CostModel
from cluster.ray_round import Crew, Round

CENTRAL = [EvaluationChunk("test", start, start + 5) for start in (0, 5)]
TRAINED = [EvaluationChunk("test", 0, 10, client=client) for client in range(18)]


@dataclass(frozen=True, eq=False)
class Call:
    method: str
    chunks: list[EvaluationChunk]


class Pool:
    """Two actors that answer at once; a call is its own reference."""

    kinds = ("", "")

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
        return [(chunk, np.zeros(2, np.int64), 0.0) for chunk in call.chunks]

    def lost(self, actor):
        return self.down.setdefault(actor, 0.0) == 0.0

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
        crew = Crew(pool, np.ones(18, np.int64), CostModel(), lambda client: "", 10.0, skip)
        broadcast = SimpleNamespace(instructions=SimpleNamespace(round=5))
        outcome = Round(crew, broadcast, [], CENTRAL + TRAINED).finish()
        return pool, {chunk for chunk, _, _ in outcome.evaluated}

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
