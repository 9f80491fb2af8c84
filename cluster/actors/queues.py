"""What every actor has been asked and has not answered; a thousand actors cost no more than a few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np

from cluster.actors.ray_calls import Call

#: Calls an actor holds at once: one runs, one waits, so that it never idles between two.
CALLS_IN_FLIGHT = 2


class Queues:
    """The calls in flight by actor; an actor answers in the order in which it was asked.

    Args:
        actors: How many there are.

    Attributes:
        count: Calls that each actor holds, int64[actors].
        since: When its oldest call began, as far as that can be told, float64[actors].
        deadline: When it counts as hung; infinite where it holds nothing, float64[actors].
        collecting: Calls of it that bring its total, int64[actors].
        playing: Calls of it that play clients, int64[actors].
        methods: Calls in flight by method.
    """

    def __init__(self, actors: int) -> None:
        self._calls: list[dict[Any, Call]] = [{} for _ in range(actors)]  # by reference, oldest first
        self.count = np.zeros(actors, np.int64)
        self.since, self.deadline = np.zeros(actors), np.full(actors, np.inf)
        self.collecting, self.playing = np.zeros(actors, np.int64), np.zeros(actors, np.int64)
        self.methods: Counter[str] = Counter()
        self._first, self._rest = np.zeros(actors), np.zeros(actors)  # seconds of the oldest, of the others

    def put(self, reference: Any, call: Call, now: float) -> None:
        """Take note of a call that was started."""
        if not self._calls[call.actor]:
            self.since[call.actor] = now
        self._calls[call.actor][reference] = call
        self._note(call, 1)

    def call(self, actor: int, reference: Any) -> Call:
        """The call of a reference."""
        return self._calls[actor][reference]

    def take(self, actor: int, reference: Any, now: float) -> None:
        """Take out a call that was answered; the next one begins."""
        self.since[actor] = now
        self._note(self._calls[actor].pop(reference), -1)

    def drop(self, actor: int, methods: Collection[str] | None = None) -> list[Call]:
        """Take out an actor's calls, oldest first; of some methods only."""
        dropped = [(r, c) for r, c in self._calls[actor].items() if methods is None or c.method in methods]
        for reference, call in dropped:
            del self._calls[actor][reference]
            self._note(call, -1)
        return [call for _, call in dropped]

    def oldest(self) -> dict[Any, int]:
        """The call that each actor is at, by reference, and the actor."""
        return {next(iter(calls)): actor for actor, calls in enumerate(self._calls) if calls}

    def ends(self, now: float) -> np.ndarray:
        """When each actor will be done with what it holds, by what such work has cost so far, float64."""
        ends = np.maximum(now, self.since + self._first) + self._rest
        return np.where(self.count > 0, ends, now)

    def _note(self, call: Call, change: int) -> None:
        actor, calls = call.actor, self._calls[call.actor]
        self.count[actor] = len(calls)
        self.methods[call.method] += change
        self.collecting[actor] += change * call.collects
        self.playing[actor] += change * (call.method == "play")
        seconds = [held.seconds for held in calls.values()]
        self._first[actor], self._rest[actor] = (seconds[0], sum(seconds[1:])) if seconds else (0.0, 0.0)
        limit = next(iter(calls.values())).limit_s if calls else np.inf
        self.deadline[actor] = self.since[actor] + limit
