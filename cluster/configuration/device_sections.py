"""The sections of the configuration that are about devices, and about what changes in mid-run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.configuration.plain_yaml import as_text
from cluster.configuration.profiles import PROFILES
from cluster.configuration.sections import Choice, Gpus, Label, Section, from_anywhere
from cluster.configuration.trees import merge


class AvailabilityChoice(Choice):
    """When a tier's devices can be asked to train."""

    name: str = "always"

    @model_validator(mode="before")
    @classmethod
    def _with_a_path_from_anywhere(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and value.get("path") is not None:
            return {**value, "path": from_anywhere(as_text(value["path"]))}
        return value


class TierSection(Section):
    """One kind of device; the figures are the medians of its devices."""

    share: float = Field(ge=0.0, le=1.0, description="share of the clients")
    compute: float = Field(22.5e9, gt=0.0, description="FLOP/s that training reaches")
    memory: float = Field(3e9, gt=0.0, description="bytes that training may take")
    uplink: float = Field(11.22e6, gt=0.0, description="bit/s")
    downlink: float = Field(35.96e6, gt=0.0, description="bit/s")
    flop_energy: float = Field(2.49e-10, ge=0.0, description="joules a FLOP of training")
    uplink_energy: float = Field(4.43e-6, ge=0.0, description="joules a byte sent")
    downlink_energy: float = Field(7.02e-7, ge=0.0, description="joules a byte received")
    latency: float = Field(0.04, ge=0.0, description="seconds a visit, beside transfers and training")
    dropout: float = Field(0.0, ge=0.0, le=1.0, description="chance to download the model and never answer")
    spread: float = Field(0.0, ge=0.0, le=3.0, description="sigma of log compute and of log bandwidth")
    jitter: float = Field(0.0, ge=0.0, le=3.0, description="the same, drawn anew every round")
    availability: AvailabilityChoice = Field(default_factory=AvailabilityChoice)
    sparsity: float | None = Field(
        None, ge=0.0, le=0.9999, description="target sparsity; default algorithm.sparsity"
    )
    cpus: float | None = Field(None, gt=0.0, description="CPUs of an actor of the tier's own kind")
    gpus: Gpus | None = Field(None, description="GPUs of an actor of the tier's own kind")
    label: Label | None = Field(None, description="labels of the nodes of the tier's own actors")

    @property
    def own_kind(self) -> bool:
        """Whether the tier's clients run on actors of their own kind."""
        return not (self.cpus is None and self.gpus is None and self.label is None)


class DevicesSection(Section):
    """The devices that clients are; without tiers they are all alike (``uniform``)."""

    profile: Literal["uniform", "phones", "edge-boxes"] | None = Field(
        None, description="built-in tiers; keys of devices.tiers go on top"
    )
    flops: Literal["dense", "sparse"] = Field(
        "dense", description="FLOPs that take time: all, or those that a device spares by zeros not counted"
    )
    cells: int | None = Field(
        None, ge=1, description="cells that clients are spread over, whose uplink they share; null: none"
    )
    cell_uplink: float | None = Field(None, gt=0.0, description="bit/s of a cell's uplink")
    tiers: dict[str, TierSection] = Field(default_factory=dict, description="kinds of devices by name")

    @model_validator(mode="before")
    @classmethod
    def _on_top_of_profile(cls, value: Any) -> Any:
        known = PROFILES.get(str(value.get("profile"))) if isinstance(value, dict) else None
        own = (value.get("tiers") or {}) if known else None
        if not known or not isinstance(own, dict):
            return value
        tiers = dict(own)
        for name, tier in known.items():
            on_top = own.get(name, {})
            tiers[name] = merge(tier, on_top) if isinstance(on_top, dict) else on_top
        # The profile's tiers first, in its order.
        return {**value, "tiers": {name: tiers[name] for name in dict.fromkeys([*known, *own])}}

    @property
    def kinds(self) -> dict[str, TierSection]:
        """The tiers by name: those given, else the one of ``uniform``."""
        uniform = PROFILES["uniform"]
        return self.tiers or {name: TierSection.model_validate(tier) for name, tier in uniform.items()}


class ShiftSection(Section):
    """A change of who holds which data in mid-run."""

    round: int | None = Field(None, ge=2, description="first round on the new data; null: no shift")
    every: int | None = Field(None, ge=1, description="shift again every so many rounds; null: once")
    partition: dict[str, Any] = Field(
        default_factory=dict, description="keys of partition that change; by default the seed alone"
    )
    classes: int | None = Field(
        None, ge=1, description="train on so many classes only, the next ones after each shift (rotating)"
    )
