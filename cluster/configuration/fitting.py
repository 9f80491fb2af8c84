"""Whether the sections of a configuration fit together: a sentence for each that does not.

Each function takes a whole ``Config``, whose choices can be built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from algorithms import registry
from cluster.configuration.choices import ChoiceError, build_choice


def sparsity_problems(config: Any) -> Iterator[str]:
    """A schedule of the sparsity for a method that follows none."""
    if config.sparsity_schedule.name != "constant" and not config.method.follows_sparsity:
        able = ", ".join(name for name, known in registry().items() if known.follows_sparsity)
        yield (
            f"sparsity_schedule.name: {config.algorithm.name} does not cut to a sparsity of each round; "
            f"schedules work with {able}"
        )


def device_problems(config: Any) -> Iterator[str]:
    """Tiers whose shares or sparsities do not fit together, or not the method."""
    kinds = config.devices.kinds
    if abs(sum(tier.share for tier in kinds.values()) - 1.0) > 1e-6:
        shares = ", ".join(f"{name} {tier.share:g}" for name, tier in kinds.items())
        yield f"devices.tiers: shares must sum to 1, found {shares}"
    method = config.method
    if all(tier.sparsity is None for tier in kinds.values()):
        return
    if not method.unequal_sparsity:
        able = ", ".join(name for name, known in registry().items() if known.unequal_sparsity)
        yield (
            f"devices.tiers: {config.algorithm.name} has one sparsity for all clients; "
            f"tiers with a sparsity work with {able}"
        )
        return
    densest = min(method.sparsity if tier.sparsity is None else tier.sparsity for tier in kinds.values())
    if method.sparsity != densest:
        yield (
            f"algorithm.sparsity: {method.sparsity:g} is not the densest tier's budget; with these "
            f"devices.tiers set algorithm.sparsity={densest:g}"
        )


def shift_problems(config: Any) -> Iterator[str]:
    """A shift without a round, beyond the last one, or of a partition that cannot be."""
    shift = config.shift
    if shift.round is None:
        yield from (
            f"shift.{key}: needs shift.round, the first round on the new data"
            for key in ("every", "partition", "classes")
            if getattr(shift, key)
        )
        return
    if shift.round > config.rounds:
        yield f"shift.round: {shift.round} is beyond rounds: {config.rounds}"
    if not config.left_alone("partition"):
        try:
            config.shifted_partition  # noqa: B018
        except ValidationError as error:
            for problem in error.errors():
                key, found = ".".join(map(str, problem["loc"])), problem["input"]
                yield f"shift.partition.{key}: {problem['msg']}, found {found!r}"
        except ChoiceError as error:
            yield str(error)
    if "clients" in shift.partition:
        yield "shift.partition.clients: a shift keeps the clients; change partition.clients instead"


def class_problems(config: Any) -> Iterator[str]:
    """What needs the classes of the samples, where the objective has none."""
    if config.build_objective().by_class:
        return
    have = f"needs the classes of the samples, and objective.name={config.objective.name} has none"
    partitioners = {"partition": (config.partition.name, config.build_partitioner())}
    if config.shift.partition:
        shifted = config.shifted_partition
        after = build_choice("partition", shifted.name, shifted.options)
        partitioners["shift.partition"] = (shifted.name, after)
    for key, (name, partitioner) in partitioners.items():
        if partitioner.by_class:
            yield f"{key}.name: {name} {have}; allowed are iid, natural, and sampled with alpha=null"
    if config.shift.classes is not None:
        yield f"shift.classes: {have}; leave it out"
    if config.evaluate_clients.every:
        yield f"evaluate_clients.every: {have}, by which clients are judged; leave it out"
