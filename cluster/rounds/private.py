"""Private models: a round's noise, what all rounds so far tell of one client, and the end of the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from algorithms import Instructions, ServerState, Total
from algorithms.core.clipping import COUNT_NOISE, next_clip, noise_beside_count, released
from cluster import seeding
from cluster.accounting import Event, composed
from cluster.federation import Federation
from cluster.guarantee import noise_of, rate_of, spent
from cluster.records.run_folder import finite


class Private:
    """Makes of each round's total what its guarantee allows to be known.

    Args:
        federation: The experiment.

    Attributes:
        clip: What the next round's updates are cut to.
    """

    def __init__(self, federation: Federation) -> None:
        config = self._config = federation.config
        self._dp, self._layout, self._method = config.privacy.dp, federation.layout, config.method
        assert self._dp.clip is not None
        self.clip: float = self._dp.clip
        self._noise, self._events = noise_of(config), list[Event]()

    @classmethod
    def of(cls, federation: Federation) -> Private | None:
        """What ``privacy.dp`` of an experiment asks for; None where it asks for nothing."""
        return cls(federation) if federation.config.privacy.dp.asked else None

    def exhausted(self, told: Instructions) -> str | None:
        """Why there cannot be another round, in words; None where there can."""
        budget = self._dp.epsilon
        if budget is None:
            return None
        after = spent(self._config, composed(self._events, self._event(told)))
        if after <= budget:
            return None
        return f"privacy/epsilon would be {after:.4g} > {budget:g} after round {told.round}"

    def release(self, state: ServerState, total: Total | None, told: Instructions) -> Total | None:
        """What the method is given of a round, composed with what was released before.

        The noise depends on seed and round alone. Of a round without an update nothing is released: the model
        stays, which counts like any other release.

        Args:
            state: The state before the round.
            total: The sum of the clipped updates.
            told: What the clients were told.
        """
        self._events = composed(self._events, self._event(told))
        self.line: dict[str, Any] = {
            "privacy/epsilon": finite(spent(self._config, self._events)),
            "privacy/clip": self.clip,
            "privacy/clipped": None if total is None else 1.0 - total.unclipped / len(total.clients),
        }
        if total is None:
            return None
        config, cohort = self._config, told.cohort or self._config.cohort
        counts = self._dp.adaptive and told.round > 0
        noise = noise_beside_count(self._noise, cohort) if counts else self._noise
        rng = seeding.generator(config.seed, "privacy", told.round)
        drawn = rng.standard_normal(self._layout.trained_size) * (noise * self.clip)
        adds = told.sends_model and not self._method.uploads_differences
        base = state.weights.numpy() if adds else None
        held = None if state.mask is None else state.mask.numpy()
        if counts:
            of_count = rng.standard_normal() * COUNT_NOISE * cohort
            self.clip = next_clip(self.clip, total.unclipped, len(total.clients), cohort, of_count)
        return released(total, drawn, cohort, held, base, self._layout)

    def dump(self) -> dict[str, Any]:
        """What a checkpoint keeps: the releases, not what they come to."""
        return {"noise": self._noise, "clip": self.clip, "events": [astuple(each) for each in self._events]}

    def load(self, stored: Mapping[str, Any]) -> None:
        """Continue from what :meth:`dump` gave."""
        self._noise, self.clip = stored["noise"], stored["clip"]
        self._events = [Event(*each) for each in stored["events"]]

    def _event(self, told: Instructions) -> Event:
        return Event(self._noise, rate_of(self._config, told))
