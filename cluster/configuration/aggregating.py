"""How updates are added up and who does harm: the sections, and what does not fit together in them.

Functions take a whole ``Config``, whose choices can be built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from algorithms import registry
from cluster.configuration.choices import KINDS
from cluster.configuration.sections import Choice, Section


class AggregationChoice(Choice):
    """How the server adds updates up; other keys are the rule's own."""

    name: str = KINDS["aggregation"].default
    weighting: Literal["samples", "equal"] | None = Field(
        None, description="what an update weighs: its samples, or all the same; default what the method asks"
    )


class ByzantineSection(Section):
    """Clients that are out to do harm, to try rules of aggregation on."""

    share: float = Field(0.0, ge=0.0, lt=0.5, description="share of the clients, the same ones all along")
    kind: Literal["sign_flip", "scale", "noise", "label_flip", "little_is_enough"] = Field(
        "sign_flip", description="what they send, or (label_flip) train on"
    )
    factor: float | None = Field(
        None,
        gt=0.0,
        description="how many times their update (sign_flip, scale), its root mean square (noise) or the "
        "others' deviation (little_is_enough); default 10, of the last 1.5",
    )


def aggregation_problems(config: Any) -> Iterator[str]:
    """A sentence for each."""
    harm = config.byzantine
    if not config.left_alone("sampler") and getattr(config.build_sampler(), "varies", False):
        yield from coin_problems(config)
    if config.rule.keeps_updates:
        name = config.aggregation.name
        yield from support_problems(config, "aggregation.name", name)
        yield from config.rule.problems(config.cohort)
        if config.aggregation.weighting == "samples":
            yield (
                f"aggregation.weighting: samples, and with {name} clients weigh the same: none may buy "
                "weight by the samples that it says it has; leave it out"
            )
    if not harm.share:
        found = harm.model_dump(exclude_defaults=True)
        yield from (f"byzantine.{key}: {found[key]}, but byzantine.share is 0" for key in found)
    elif harm.kind == "little_is_enough":
        yield from support_problems(config, "byzantine.kind", harm.kind)
    elif harm.kind == "label_flip":
        if not config.build_objective().by_class:
            yield (
                "byzantine.kind: label_flip needs the classes of the samples, and objective.name="
                f"{config.objective.name} has none"
            )
        if harm.factor is not None:
            yield f"byzantine.factor: {harm.factor:g}, but label_flip has none; leave it out"


def grid_problems(config: Any) -> Iterator[str]:
    """Updates that cannot be written on a grid of words."""
    bits, form = config.wire.bits, config.wire.uplink
    if bits is None:
        return
    if form != "float32":
        yield f"wire.grid: {bits}, and values travel as its words; leave wire.uplink={form} out"
    if config.schedule.name != "synchronous":
        yield (
            f"wire.grid: {bits}, and clients of {config.schedule.name} rounds write on no common grid; "
            "set schedule.name=synchronous, or wire.grid=exact"
        )


def coin_problems(config: Any) -> Iterator[str]:
    """Rounds whose cohort cannot be of any size."""
    name = config.sampler.name
    if config.schedule.name == "buffered":
        yield f"sampler.name: {name} draws whole rounds, and buffered has none; schedule.name=synchronous"
    elif (asked := config.schedule.options.get("over_selection", 1.0)) > 1.0:
        yield f"schedule.over_selection: {asked:g}, and {name} takes everybody it asks; leave it out"


def support_problems(config: Any, key: str, name: str) -> Iterator[str]:
    """Rounds whose updates cannot be compared coordinate by coordinate.

    Args:
        config: The configuration.
        key: The key that asks for it.
        name: Its value.
    """
    if not config.method.shares_support:
        able = ", ".join(known for known, method in registry().items() if method.shares_support)
        yield (
            f"{key}: {name} compares updates coordinate by coordinate, and clients of "
            f"{config.algorithm.name} send supports or differences of their own: with Top-K per client a "
            f"coordinate sent by fewer than half has median 0; it works with {able}"
        )
    if any(tier.sparsity is not None for tier in config.devices.kinds.values()):
        yield f"{key}: {name} needs one support for all clients; leave the tiers' sparsity out"
    if config.schedule.name != "synchronous":
        yield f"{key}: {name} looks at every update of a round: schedule.name=synchronous"
