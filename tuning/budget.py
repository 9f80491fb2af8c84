"""What a trial may cost: as much local training as the experiment's rounds, whatever its method adds to them.

The unit is the client-round: one client's training for the experiment's local epochs. A method that trains
more than that, in a stage before round 1 or a warm-up, has as many rounds fewer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from algorithms import Instructions, ServerState
from cluster.configuration.config import Config
from cluster.configuration.trees import ConfigError


def instructions_of(config: Config) -> Callable[[int], Instructions]:
    """What clients are told in a round by its number, as far as it can be known before: epochs and cohort.

    The method is asked with a state that holds no weights, and a mask from its second round on.
    """
    method = config.method

    def of(number: int) -> Instructions:
        mask = torch.empty(0, dtype=torch.bool) if number > method.first_round else None
        state = ServerState(round=number - 1, weights=torch.empty(0), mask=mask)
        return method.instruct(state, config.rounds, config.population)

    return of


def epochs_of(config: Config) -> Callable[[int], int]:
    """Local epochs of a client in a round by its number."""
    told = instructions_of(config)
    return lambda number: told(number).epochs or config.local.epochs


def rounds_within(config: Config) -> int:
    """Rounds that train no more than the experiment's rounds of its cohort and local epochs do.

    Raises:
        ConfigError: What the method adds leaves it no round.
    """
    told, epochs = instructions_of(config), epochs_of(config)
    whole = left = config.rounds * config.cohort * config.local.epochs
    for number in range(config.method.first_round, config.rounds + 1):
        left -= (told(number).cohort or config.cohort) * epochs(number)
        if left < 0 and number <= 1:
            raise ConfigError(
                f"{config.algorithm.name}: what it trains up to round 1 is {whole - left:,} local epochs of "
                f"clients, more than the {whole:,} of a trial; raise rounds, or shorten its stage or warm-up"
            )
        if left < 0:
            return number - 1
    return config.rounds
