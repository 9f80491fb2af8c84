"""What ``privacy.dp`` will have told of one client after the planned rounds, and whether it can be kept."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from algorithms import Instructions, ParameterLayout, ServerState
from algorithms.core.clipping import noise_beside_count
from cluster.accounting import AccountingError, Event, composed, epsilon, least_noise
from cluster.configuration.config import Config


def planned_events(config: Config, noise: float) -> list[Event]:
    """The releases of a whole run with so much noise, of a stage before round 1 too."""
    method = config.method
    events: list[Event] = []
    for number in range(method.first_round, config.rounds + 1):
        before = ServerState(round=number - 1, weights=torch.empty(0))
        told = method.instruct(before, config.rounds, config.population)
        events = composed(events, Event(noise, rate_of(config, told)))
    return events


def rate_of(config: Config, told: Instructions) -> float:
    """q: the chance of each client to be asked in a round."""
    return min(1.0, (told.cohort or config.cohort) / config.population)


def noise_of(config: Config) -> float:
    """z: the one that is set, or the least that the budget allows over the planned rounds.

    Raises:
        AccountingError: No noise keeps to the budget, or the library is not installed.
    """
    dp = config.privacy.dp
    if dp.noise_multiplier is not None:
        return dp.noise_multiplier
    assert dp.epsilon is not None
    return least_noise(lambda noise: planned_events(config, noise), dp.epsilon, dp.delta, dp.accountant)


def spent(config: Config, events: list[Event]) -> float:
    """Epsilon of some releases of a run."""
    return epsilon(events, config.privacy.dp.delta, config.privacy.dp.accountant)


def check_guarantee(config: Config, layout: ParameterLayout) -> None:
    """Refuse what would travel unprotected, or a budget that not even one round keeps to.

    Raises:
        AccountingError: Naming the key.
    """
    if not config.privacy.dp.asked:
        return
    for problem in _problems(config, layout):
        raise AccountingError(problem)


def _problems(config: Config, layout: ParameterLayout) -> Iterator[str]:
    dp = config.privacy.dp
    if layout.buffers:
        yield (
            f"privacy.dp: {layout.buffers[0].name} of model.name={config.model.name} averages clients' data "
            "and would travel without clip and noise; choose a model without, such as model.norm=group"
        )
    if layout.both or layout.up:
        beside = (*layout.both, *layout.up)[0].name
        yield (
            f"privacy.dp: {beside}, which {config.algorithm.name} sends beside the model, would travel "
            "without clip and noise; choose another algorithm.name or its options"
        )
    noise = noise_of(config)
    if dp.adaptive and math.isnan(noise_beside_count(noise, config.cohort)):
        yield (
            f"privacy.dp.adaptive: with a noise multiplier of {noise:g} and cohort: {config.cohort} the "
            f"count of updates below the clip takes all of it; allowed are cohorts above {10 * noise:g}"
        )
    first = Event(noise, planned_events(config, noise)[0].rate)
    one = spent(config, [first])  # also to find out now whether the library is here
    if dp.epsilon is not None and one > dp.epsilon:
        yield (
            f"privacy.dp.epsilon: {dp.epsilon:g}, and with privacy.dp.noise_multiplier {noise:g} one round "
            f"costs {one:.3g}; raise one of them"
        )
