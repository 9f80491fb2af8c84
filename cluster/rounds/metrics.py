"""What is measured every round, under the names that MLflow shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms import ParameterLayout
from algorithms.core.masks import consensus, intersection_over_union
from cluster.exchange import Evaluated
from cluster.measured import cohort_metrics
from cluster.records.run_folder import finite
from cluster.rounds.engine import Outcome
from cluster.workload.objectives import Objective, Sums, added

#: Rounds between the global models whose supports are compared.
OVERLAP_ROUNDS = 10


@dataclass(frozen=True)
class Downlink:
    """Bytes the cohort was sent, and what receiving them took.

    Attributes:
        total: Encoded bytes of all messages.
        nonzeros: 4 bytes a nonzero, the paper's accounting, for all clients.
        dense: 4 bytes a float, for all clients.
        joules: Of all of them.
    """

    total: int
    nonzeros: int
    dense: int
    joules: float = 0.0


def round_metrics(
    layout: ParameterLayout, old: np.ndarray, new: np.ndarray, outcome: Outcome, downlink: Downlink
) -> dict[str, Any]:
    """Masks, bytes, FLOPs and joules of one round.

    Args:
        layout: The model's layout.
        old: Which prunable weights the model had before it, bool[prunable].
        new: Which it has after it.
        outcome: What the round's work came to.
        downlink: What the cohort was sent.
    """
    prunable, total, reports = layout.prunable_size, outcome.total, outcome.reports
    nonzeros = int(np.count_nonzero(new))
    regrown, deactivated = int(np.count_nonzero(new & ~old)), int(np.count_nonzero(old & ~new))
    accepted = [report for report in reports if report.accepted]
    uplink = sum(report.uplink_bytes for report in reports) + outcome.beside_bytes

    def mean(values: Sequence[float]) -> float | None:
        return float(np.mean(values)) if len(values) else None

    everyone = [report.measured for report in reports]
    return {
        **cohort_metrics(everyone, [report.measured for report in accepted], layout),
        "sparsity/global": 1.0 - nonzeros / prunable,
        "sparsity/upload": finite(mean([1.0 - report.upload_density for report in accepted])),
        "sparsity/layers": [
            1.0 - int(np.count_nonzero(new[entry.span])) / entry.size for entry in layout.prunable
        ],
        "masks/regrowth": regrown,
        "masks/regrowth_share": regrown / prunable,
        "masks/deactivation": deactivated,
        "masks/deactivation_share": deactivated / prunable,
        "masks/consensus": consensus(total.votes, len(accepted))
        if total is not None and len(total.votes)
        else None,
        "masks/overlap": intersection_over_union(old, new),
        "comm/uplink_bytes": uplink,
        "comm/downlink_bytes": downlink.total,
        "comm/uplink_bytes_per_client": uplink / max(1, len(reports)),
        "comm/downlink_bytes_per_client": downlink.total / max(1, len(reports)),
        "comm/uplink_nonzero_bytes": sum(report.uplink_nonzero_bytes for report in reports),
        "comm/downlink_nonzero_bytes": downlink.nonzeros,
        "comm/dense_bytes": downlink.dense,
        # Rounded once: it does not matter who added up whose.
        "energy/joules": math.fsum([downlink.joules, *(report.joules for report in reports)]),
        "clients/trained": len(reports),
        "clients/refused": sum(report.refused is not None for report in reports),
        "clients/refused_list": sorted([r.client, r.refused] for r in reports if r.refused is not None),
    }


def time_metrics(outcome: Outcome, actors: int) -> dict[str, Any]:
    """Where the seconds of a round went, those of all clients added up.

    Args:
        outcome: What the round's work came to.
        actors: Number of actors.
    """
    phases = np.array([report.phases for report in outcome.reports]).reshape(-1, 4).sum(axis=0)
    names = ("train", "encode", "decode", "fold")
    return {
        "time/lost_actors": outcome.lost_actors,
        "time/actors": actors,
        "time/clients_evaluate_s": sum(chunk.seconds for chunk, _ in outcome.evaluated()),
        **{f"time/{phase}_s": seconds for phase, seconds in outcome.seconds.items()},
        **{f"time/clients_{name}_s": float(s) for name, s in zip(names, phases, strict=True)},
    }


class Supports:
    """Compares the global model's support with that of ten rounds before.

    Attributes:
        by_round: Support after the last tenth round, packed bits, uint8[ceil(prunable / 8)].
    """

    def __init__(self) -> None:
        self.by_round: dict[int, Tensor] = {}

    def overlap(self, number: int, support: np.ndarray) -> dict[str, float | None]:
        """IoU of the two supports, every ten rounds from 20 on.

        Args:
            number: The round.
            support: Which prunable weights the model has after it, bool[prunable].
        """
        if number < 1 or number % OVERLAP_ROUNDS:
            return {}
        before = self.by_round.get(number - OVERLAP_ROUNDS)
        self.by_round = {number: torch.from_numpy(np.packbits(support))}
        if before is None:
            return {}
        earlier = np.unpackbits(before.numpy(), count=len(support)).astype(bool)
        return {f"masks/overlap_{OVERLAP_ROUNDS}": intersection_over_union(earlier, support)}


#: What was evaluated: split, budget of which tier, whose rows or model, after which local training.
Part = tuple[str, str | None, int | None, int | None]


def added_up(evaluated: Evaluated, *, attacked: bool = False) -> dict[Part, Sums]:
    """The sums over all chunks of each part, under attack or not, added in the order of their rows."""
    parts: dict[Part, Sums] = {}
    own = [result for result in evaluated if result[0].attacked == attacked]
    for chunk, sums in sorted(own, key=lambda result: result[0].start):
        part = (chunk.split, chunk.tier, chunk.client, chunk.after)
        parts[part] = added(parts[part], sums) if part in parts else sums
    return parts


def evaluation_metrics(objective: Objective, parts: Mapping[Part, Sums]) -> dict[str, Any]:
    """The objective's metrics on each split, and the one that selects at each tier's budget."""
    metrics: dict[str, Any] = {}
    for (split, tier, client, _), sums in sorted(parts.items(), key=lambda item: str(item[0])):
        if client is not None:
            continue
        measured = objective.metrics(sums)
        if tier is not None:
            metrics[f"tiers/{tier}/{objective.selects.key}"] = finite(measured[objective.selects.key])
            continue
        for measure in objective.measures:
            metrics[f"{split}/{measure.key}"] = finite(measured[measure.key])
    return metrics
