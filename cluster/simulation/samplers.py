"""Samplers: which clients are asked to train, by ``sampler.name``.

One of your own, ``sampler.name=my_module:Fixed``::

    @dataclass(frozen=True, kw_only=True)
    class Fixed(Sampler):
        '''The same clients in every round.'''

        first: int = hyperparameter(0, "number of the first", low=0)

        def __call__(self, rng, count, candidates):
            return self.first + np.arange(count)

or ``sampler.name=my_module:factory``, a function that makes one of the section's other keys::

    def factory(share=0.5):
        def draw(rng, count, candidates):
            return rng.choice(int(share * candidates.clients), size=count, replace=False)
        return draw
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from algorithms.core.masks import apportion
from cluster.configuration.choices import ChoiceError
from cluster.references import UserError


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


class SamplerError(UserError):
    """A sampler returned what is no cohort; the message says what."""


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """A way to choose clients; a plain function of the same arguments is one too."""

    #: Whether more than ``count`` clients may come: every one is asked, and a round takes all who answer.
    varies: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
        """At most ``count`` distinct clients, int64.

        Args:
            rng: The only source of randomness.
            count: Clients wanted, at most the population.
            candidates: Whom to choose from.
        """

    @staticmethod
    def of(key: str, name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Draw:
        """The sampler that a user's function makes of the section's other keys.

        Raises:
            ChoiceError: It is not callable, takes other options, or returns no sampler.
        """
        try:
            inspect.signature(factory).bind(**options)
        except (TypeError, ValueError) as error:  # it is not callable, has no signature, takes other options
            raise ChoiceError(f"{key} = {name!r}: {error}") from None
        made: Draw = factory(**options)
        if not callable(made):
            raise ChoiceError(
                f"{key} = {name!r}: expected a factory that returns a sampler, a function of "
                f"(rng, count, candidates); it returned {made!r}"
            )
        return made


#: (generator, clients wanted, candidates) -> distinct clients, int64[at most as many].
Draw = Callable[[np.random.Generator, int, Candidates], np.ndarray]


class Uniform(Sampler):
    """Uniformly without replacement from all clients; who is not available then does not answer."""

    def __call__(self, rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
        """See :class:`Sampler`."""
        return rng.choice(candidates.clients, size=count, replace=False)


class Poisson(Sampler):
    """A coin for each client, by itself, with the chance cohort / clients; a cohort's size varies.

    Who is not available or drops out counts as asked. Nobody at all is a round without a server step.
    """

    varies = True

    def __call__(self, rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
        """See :class:`Sampler`."""
        return np.flatnonzero(rng.random(candidates.clients) < count / candidates.clients)


class ByAvailability(Sampler):
    """Uniformly without replacement from the clients that are available; fewer where there are fewer.

    Of a population of any size only as many are looked at as it takes: a sample grows until it holds enough.
    """

    def __call__(self, rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
        """See :class:`Sampler`."""
        looked_at = count
        while True:
            looked_at = min(4 * looked_at, candidates.clients)
            sample = rng.choice(candidates.clients, size=looked_at, replace=False)
            found = sample[candidates.available(sample)]
            if len(found) >= count or looked_at == candidates.clients:
                return found[:count]


class BySize(Sampler):
    """One after the other without replacement, with chances in proportion to the clients' samples.

    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006: the smallest of Exp(n_i).
    """

    def __call__(self, rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
        """See :class:`Sampler`."""
        keys = rng.standard_exponential(candidates.clients) / candidates.sizes
        return np.argpartition(keys, count - 1)[:count]


class Stratified(Sampler):
    """So many of each device tier as is its share of the population, uniformly without replacement within it.

    Whole numbers by largest remainder: 10 of tiers of 34, 33 and 33 clients are 4, 3 and 3.
    """

    def __call__(self, rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
        """See :class:`Sampler`."""
        members = np.bincount(candidates.tiers)
        drawn = apportion(count, members, members)
        return np.concatenate(
            [
                rng.choice(np.flatnonzero(candidates.tiers == tier), size=number, replace=False)
                for tier, number in enumerate(drawn)
                if number
            ]
        )


def draw(sampler: Draw, rng: np.random.Generator, count: int, candidates: Candidates) -> np.ndarray:
    """Ask a sampler for at most ``count`` clients; they are returned in ascending order.

    Raises:
        SamplerError: It returned a client twice, one outside the population, or too many.
    """
    drawn = np.asarray(sampler(rng, min(count, candidates.clients), candidates))
    cohort = np.unique(drawn)
    count = candidates.clients if getattr(sampler, "varies", False) else count
    inside = not len(cohort) or (cohort[0] >= 0 and cohort[-1] < candidates.clients)
    if drawn.ndim != 1 or len(cohort) != len(drawn) or len(drawn) > count or not inside:
        raise SamplerError(
            f"sampler.name: expected at most {count} different clients of 0 to {candidates.clients - 1} "
            f"in round {candidates.round}, found {drawn.tolist()}"
        )
    return cohort.astype(np.int64)
