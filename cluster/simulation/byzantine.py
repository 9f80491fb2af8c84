"""Byzantine clients: some that send what harms the model, the same ones all along.

``little_is_enough``: Baruch, Baruch, Goldberg, NeurIPS 2019, arXiv 1902.06156, by attackers that know what
all others send; the rest is as in Blanchard et al., NeurIPS 2017, and Yin et al., ICML 2018.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from algorithms import Total
from algorithms.core.robust import settled
from cluster import seeding
from cluster.configuration.config import Config

#: What ``byzantine.factor`` is where none is given.
_FACTORS = {"little_is_enough": 1.5}


class Byzantine:
    """Who does harm in an experiment, and what is sent instead of what was trained.

    Args:
        config: The configuration.
    """

    def __init__(self, config: Config) -> None:
        section = config.byzantine
        self.kind, self._seed, self._population = section.kind, config.seed, config.population
        self._number = round(section.share * config.population)
        self._factor = section.factor or _FACTORS.get(section.kind, 10.0)

    @cached_property
    def clients(self) -> frozenset[int]:
        """Numbers of the attackers: those of the smallest random number of their own."""
        if not self._number:
            return frozenset()
        drawn = seeding.uniform(self._seed, "byzantine", 0, np.arange(self._population))
        return frozenset(np.argsort(drawn, kind="stable")[: self._number].tolist())

    def flips_labels(self, client: int) -> bool:
        """Whether a client trains on the classes counted from the other end."""
        return self.kind == "label_flip" and client in self.clients

    def corrupt(
        self, client: int, number: int, values: np.ndarray, received: np.ndarray, support: np.ndarray | None
    ) -> None:
        """Put what a client sends in place of its update.

        Args:
            client: The client.
            number: The round.
            values: Its update over what is trained, float32[trained]; changed in place.
            received: What it would be without training, float32[trained].
            support: Which of the first positions travel, bool[n]; None for all.
        """
        if client not in self.clients or self.kind in ("label_flip", "little_is_enough"):
            return
        delta = values - received
        if self.kind == "noise":
            rng = seeding.generator(self._seed, "byzantine", number, client)
            size = float(np.sqrt(np.mean(np.square(delta, dtype=np.float64))))
            delta += rng.standard_normal(len(delta)) * (self._factor * size)
        else:
            delta *= self._factor if self.kind == "scale" else -self._factor
        values[:] = received + delta
        if support is not None:
            values[: len(support)][~support] = 0.0

    def collude(self, total: Total, trained: int) -> Total:
        """A round's total in which attackers that know the others send mean - factor x deviation of theirs.

        Args:
            total: The round's, which kept its updates.
            trained: How many of the first positions are trained.
        """
        updates = total.updates or {}
        honest = [values for client, (values, _) in updates.items() if client not in self.clients]
        if self.kind != "little_is_enough" or not honest or len(honest) == len(updates):
            return total
        known = np.stack(honest).astype(np.float64)
        sent = known.mean(axis=0)
        sent[:trained] -= self._factor * known[:, :trained].std(axis=0)
        changed = {
            client: (sent.astype(np.float32) if client in self.clients else values, weight)
            for client, (values, weight) in updates.items()
        }
        rows, weights = zip(*changed.values(), strict=True)
        total = settled(total, rows, weights)
        total.updates = changed
        return total
