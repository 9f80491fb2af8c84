"""Samplers: which clients are asked to train.

A sampler is a function of a generator, the number of clients wanted and the :class:`Candidates`; one of your
own is what ``sampler.name=module:factory`` returns when it is called with the section's other keys::

    def factory(share=0.5):
        def draw(rng, count, candidates):
            return rng.choice(int(share * candidates.clients), size=count, replace=False)
        return draw
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from algorithms.core.masks import apportion
from cluster.configuration.choices import ChoiceError
from cluster.references import UserError, did_you_mean, load_reference


@dataclass(frozen=True)
class Candidates:
    """Whom a sampler chooses from.

    Attributes:
        sizes: Samples of every client, int64[clients].
        available: Which of some clients can be asked now, bool[n] of int64[n].
        round: Number of the round.
        simulated_s: Simulated seconds since the run began.
        tiers: Number of every client's device tier, int8[clients].
    """

    sizes: np.ndarray
    available: Callable[[np.ndarray], np.ndarray]
    round: int
    simulated_s: float
    tiers: np.ndarray

    @property
    def clients(self) -> int:
        """Size of the population."""
        return len(self.sizes)


#: (generator, clients wanted, candidates) -> distinct clients, int64[at most as many].
Sampler = Callable[[np.random.Generator, int, Candidates], np.ndarray]


class SamplerError(UserError):
    """A sampler returned what is no cohort; the message says what."""


def uniform(rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
    """Uniformly without replacement from all clients; who is not available then does not answer."""
    return rng.choice(candidates.clients, size=count, replace=False)


def by_availability(rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
    """Uniformly without replacement from the clients that are available; fewer where there are fewer.

    Of a population of any size only as many are looked at as it takes: a sample grows until it holds enough.
    """
    looked_at = count
    while True:
        looked_at = min(4 * looked_at, candidates.clients)
        sample = rng.choice(candidates.clients, size=looked_at, replace=False)
        found = sample[candidates.available(sample)]
        if len(found) >= count or looked_at == candidates.clients:
            return found[:count]


def by_size(rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
    """One after the other without replacement, with chances in proportion to the clients' samples.

    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006: the smallest of Exp(n_i).
    """
    keys = rng.standard_exponential(candidates.clients) / candidates.sizes
    return np.argpartition(keys, count - 1)[:count]


def stratified(rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
    """So many of each device tier as is its share of the population, uniformly without replacement within it.

    Whole numbers by largest remainder: 10 of tiers of 34, 33 and 33 clients are 4, 3 and 3.
    """
    members = np.bincount(candidates.tiers)
    drawn = apportion(count, members, members)
    return np.concatenate(
        [
            rng.choice(np.flatnonzero(candidates.tiers == tier), size=number, replace=False)
            for tier, number in enumerate(drawn)
            if number
        ]
    )


SAMPLERS: dict[str, Sampler] = {
    "uniform": uniform,
    "availability": by_availability,
    "size": by_size,
    "stratified": stratified,
}


def build_sampler(name: str, options: Mapping[str, Any]) -> Sampler:
    """The sampler that ``sampler.name`` stands for.

    Raises:
        ChoiceError: There is no such sampler, or it takes no such options.
    """
    if ":" in name:
        factory = load_reference("sampler.name", name, ChoiceError)
        try:
            inspect.signature(factory).bind(**options)
        except (TypeError, ValueError) as error:  # it is not callable, has no signature, takes other options
            raise ChoiceError(f"sampler.name = {name!r}: {error}") from None
        made: Sampler = factory(**options)
        if not callable(made):
            raise ChoiceError(
                f"sampler.name = {name!r}: expected a factory that returns a sampler, a function of "
                f"(rng, count, candidates); it returned {made!r}"
            )
        return made
    if name not in SAMPLERS:
        raise ChoiceError(
            f"sampler.name: {name!r} is unknown; allowed are {', '.join(SAMPLERS)}, "
            f"or module:factory of your own{did_you_mean(name, SAMPLERS)}"
        )
    if options:
        raise ChoiceError(f"sampler.{next(iter(options))}: {name} has no such field; its fields: none")
    return SAMPLERS[name]


def draw(sampler: Sampler, rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
    """Ask a sampler for at most ``count`` clients; they are returned in ascending order.

    Raises:
        SamplerError: It returned a client twice, one outside the population, or too many.
    """
    drawn = np.asarray(sampler(rng, min(count, candidates.clients), candidates))
    cohort = np.unique(drawn)
    inside = not len(cohort) or (cohort[0] >= 0 and cohort[-1] < candidates.clients)
    if drawn.ndim != 1 or len(cohort) != len(drawn) or len(drawn) > count or not inside:
        raise SamplerError(
            f"sampler.name: expected at most {count} different clients of 0 to {candidates.clients - 1} "
            f"in round {candidates.round}, found {drawn.tolist()}"
        )
    return cohort.astype(np.int64)
