"""The section ``privacy``, and what does not fit together where what clients did is to be hidden.

Functions take a whole ``Config``, whose choices can be built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from algorithms import registry
from cluster.configuration.sections import Section
from cluster.configuration.secure import SecureSection, secure_problems


class DPSection(Section):
    """Client-level differential privacy of the models: of what one client adds, at most ``clip`` counts."""

    clip: float | None = Field(
        None, gt=0.0, description="C: an update farther from the global model is cut to it; null: no privacy"
    )
    noise_multiplier: float | None = Field(
        None,
        gt=0.0,
        description="z: noise of deviation z C on the sum of a round's updates; default what epsilon allows",
    )
    epsilon: float | None = Field(
        None, gt=0.0, description="budget: the run ends before the round that would exceed it"
    )
    delta: float = Field(1e-5, gt=0.0, lt=1.0, description="the guarantee's delta, below 1 / clients")
    adaptive: bool = Field(
        False, description="whether C, from clip on, follows the updates' median norm (Andrew et al., 2021)"
    )
    accountant: Literal["rdp", "pld"] = Field(
        "rdp", description="how epsilon is composed: Renyi divergences, or privacy loss distributions"
    )

    @property
    def asked(self) -> bool:
        """Whether models are private."""
        return self.clip is not None


class PrivacySection(Section):
    """What hides what single clients did."""

    dp: DPSection = DPSection()
    secure: SecureSection = SecureSection()


def privacy_problems(config: Any) -> Iterator[str]:
    """A sentence for each."""
    yield from secure_problems(config)
    dp = config.privacy.dp
    if dp.asked:
        yield from _amounts(config)
        yield from _mechanism(config)
    else:
        found = dp.model_dump(exclude_defaults=True)
        yield from (f"privacy.dp.{key}: {found[key]}, but privacy.dp.clip is unset" for key in found)


def _amounts(config: Any) -> Iterator[str]:
    """Noise that nobody set."""
    dp = config.privacy.dp
    if dp.noise_multiplier is None and dp.epsilon is None:
        yield "privacy.dp: without noise; set privacy.dp.noise_multiplier, or privacy.dp.epsilon"
    if dp.delta * config.population >= 1.0:
        yield (
            f"privacy.dp.delta: {dp.delta:g} allows to publish one of {config.population:,} clients whole; "
            f"allowed is less than {1 / config.population:g}"
        )


def _mechanism(config: Any) -> Iterator[str]:
    """What the accountant's mechanism is not, or what else of the clients the server would learn."""
    needs = "privacy.dp needs"
    if config.sampler.name != "poisson":
        yield (
            f"sampler.name: {config.sampler.name}, and {needs} a coin for each client: sampler.name=poisson "
            "(of cohorts of a fixed size the same noise hides far less)"
        )
    if config.schedule.name != "synchronous":
        yield f"schedule.name: {config.schedule.name}, and {needs} whole rounds: schedule.name=synchronous"
    if (asked := config.schedule.options.get("over_selection", 1.0)) > 1.0:
        yield f"schedule.over_selection: {asked:g}, and {needs} everybody who is asked; leave it out"
    if config.max_update_norm is not None:
        yield (
            f"max_update_norm: {config.max_update_norm:g}, and who is refused tells of its data; leave it "
            "out, privacy.dp.clip bounds what an update can do"
        )
    if config.wire.bits is not None:
        yield f"wire.grid: {config.wire.bits}, and {needs} values to clip, not their words: wire.grid=exact"
    if config.aggregation.name != "mean":
        yield f"aggregation.name: {config.aggregation.name}, and {needs} the sum of all updates: mean"
    if config.aggregation.weighting == "samples":
        yield f"aggregation.weighting: samples, and {needs} clients that weigh the same; leave it out"
    if config.byzantine.share and config.byzantine.kind == "little_is_enough":
        yield "byzantine.kind: little_is_enough looks at what others send, which privacy.dp hides"
    if any(tier.sparsity is not None for tier in config.devices.kinds.values()):
        yield f"devices.tiers: {needs} one support for all clients; leave the tiers' sparsity out"
    if not config.method.mean_alone:
        able = ", ".join(name for name, method in registry().items() if method().mean_alone)
        yield (
            f"algorithm.name: {config.algorithm.name} advances by more than the mean of a round's updates "
            f"as it is set, and privacy.dp releases that alone; it works with {able}"
        )
