"""The section ``privacy.secure``, and what does not go together with a server that sees sums alone.

Functions take a whole ``Config``, whose choices can be built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from cluster.configuration.sections import Section


class SecureSection(Section):
    """Secure aggregation: clients mask what they send, and only their sum can be read."""

    masks: Literal["real", "billed"] | None = Field(
        None,
        description="real: updates travel masked, and only their sum is unmasked; billed: the same words, "
        "bytes and seconds without masks; null: updates are not hidden",
    )
    threshold: float = Field(
        2 / 3,
        ge=0.5,
        le=1.0,
        description="share of the clients that exchanged keys whose shares unmask a sum; more than half",
    )

    @property
    def asked(self) -> bool:
        """Whether the server sees sums alone."""
        return self.masks is not None

    def threshold_of(self, clients: int) -> int:
        """How many of so many clients it takes; never one alone."""
        return max(2, clients // 2 + 1, math.ceil(self.threshold * clients - 1e-9))


def secure_problems(config: Any) -> Iterator[str]:
    """A sentence for each."""
    secure, method, name = config.privacy.secure, config.method, config.algorithm.name
    if not secure.asked:
        if secure.threshold != SecureSection().threshold:
            yield f"privacy.secure.threshold: {secure.threshold:g}, but privacy.secure.masks is unset"
        return
    sees = "with privacy.secure the server sees no single update"
    if config.schedule.name != "synchronous":
        yield (
            f"schedule.name: {config.schedule.name}, and privacy.secure needs a cohort that exchanges keys: "
            "schedule.name=synchronous"
        )
    over, asked = config.schedule.options.get("over_selection", 1.0), config.cohort
    planned = math.ceil(asked * over - 1e-9)
    if secure.threshold_of(planned) > asked:
        yield (
            f"privacy.secure.threshold: it takes {secure.threshold_of(planned)} of {planned} clients to "
            f"unmask a sum, and cohort: {asked} is all that counts; raise cohort, or lower threshold or "
            "over_selection"
        )
    if config.max_update_norm is not None:
        yield f"max_update_norm: {config.max_update_norm:g}, and {sees}; leave it out"
    if config.aggregation.name != "mean":
        yield f"aggregation.name: {config.aggregation.name}, and {sees}; set it to mean"
    if config.byzantine.share and config.byzantine.kind == "little_is_enough":
        yield f"byzantine.kind: little_is_enough looks at what others send, and {sees}"
    if config.wire.uplink != "float32":
        yield f"wire.uplink: {config.wire.uplink}, and values travel as words of wire.grid; leave it out"
    if config.privacy.dp.asked:
        yield (
            f"privacy.secure.masks: {secure.masks} beside privacy.dp, which clips updates where they are "
            "folded, and there they are masked; leave one of them out"
        )
    why = method.beyond_sums
    if method.keeps_updates:
        why = "looks at every update of a round"
    elif method.keeps_marks:
        why = "asks who named a position"
    elif method.confined:
        why = "gives every client a part of its own"
    if why:
        yield f"algorithm.name: {name} {why}, and {sees}"
