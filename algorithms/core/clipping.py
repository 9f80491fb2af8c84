"""Sums of clipped updates, and the noise that hides any one of them: the mechanism of private averaging.

DP-FedAvg: McMahan et al., "Learning differentially private recurrent language models", ICLR 2018, arXiv
1710.06963, with a fixed denominator (section 3, the first estimator) and clients of equal weight. The clip
that follows the updates' median norm: Andrew et al., NeurIPS 2021, arXiv 1905.03871.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from algorithms.core.aggregation import Grid, Total
from algorithms.core.parameters import ParameterLayout
from algorithms.core.robust import distance, settled

#: Andrew et al., section 2: the step of the clip's logarithm, the share of updates to be below the clip, and
#: the noise on their count as a share of the cohort.
CLIP_STEP, CLIP_QUANTILE, COUNT_NOISE = 0.2, 0.5, 1 / 20


def fold_clipped(
    total: Total,
    client: int,
    values: np.ndarray,
    support: np.ndarray | None,
    base: np.ndarray | None,
    clip: float,
    layout: ParameterLayout,
) -> None:
    """Fold Delta min(1, clip / |Delta|), Delta = values - base, into a total of differences.

    All weigh the same. What is scaled are float64 values, so that no rounding leads beyond the clip.

    Args:
        total: Where it goes.
        client: Who sent it.
        values: What was sent, float32[trained], 0 outside the support.
        support: Which prunable positions travelled, bool[prunable]; None for all.
        base: What the client received, float32[trained] or more; None where Delta itself was sent.
        clip: C.
        layout: The model's layout.

    Raises:
        OverflowError: A value is not finite; nothing was added.
    """
    trained = layout.trained_size
    norm = distance(values, np.zeros(trained, np.float32) if base is None else base, trained)
    share = 1.0 if norm <= clip else clip / norm  # NaN is not below
    with np.errstate(invalid="ignore"):  # of infinite values nothing is left
        scaled = share * values.astype(np.float64)
    total.fold(client, scaled, support, 1, layout)
    if base is not None:
        total.shift(-share * base[:trained].astype(np.float64), 1)
    total.unclipped += norm <= clip


def released(
    total: Total,
    noise: np.ndarray,
    cohort: int,
    held: np.ndarray | None,
    base: np.ndarray | None,
    layout: ParameterLayout,
) -> Total:
    """A total whose mean is base + (sum of clipped Delta + noise) / cohort, and that tells nothing else.

    Votes and counts are those of a support that does not depend on data. The denominator is the number of
    clients that are asked on average: who is absent counts as 0.

    Args:
        total: What :func:`fold_clipped` made.
        noise: Of the sum, float64[trained].
        cohort: Clients that are asked on average.
        held: The mask that all share, bool[prunable]; outside it nothing is released. None for no mask.
        base: What Deltas are added to, float32[trained] or more; None where the mean is of Deltas.
        layout: The model's layout.
    """
    support = np.ones(layout.prunable_size, bool) if held is None else held
    mean = (total.high + total.low)[: layout.trained_size] + noise
    mean[: len(support)][~support] = 0.0
    mean /= cohort
    if base is not None:
        mean += base[: len(mean)]
    counts = [np.count_nonzero(support[entry.span]) for entry in layout.prunable]
    public = replace(
        total,
        grid=Grid.for_round(mean, 1),
        votes=support.astype(total.votes.dtype),
        layer_counts=np.array(counts, total.layer_counts.dtype),
        mask_samples=None if total.mask_samples is None else support.astype(total.mask_samples.dtype),
        clients=[],
        unclipped=0,
    )
    return settled(public, [mean])


def next_clip(clip: float, below: int, updates: int, cohort: int, noise: float) -> float:
    """C exp(-0.2 (b - 1/2)), b the noised share of updates within C, of a cohort's fixed size.

    Args:
        clip: C.
        below: Updates within it.
        updates: Updates that came.
        cohort: Clients that are asked on average.
        noise: Of the count, in clients.
    """
    # Of each client b_i - 1/2 is added, which moves the sum by no more than 1/2 (section 2).
    share = (below - updates / 2 + noise) / cohort + 0.5
    return clip * math.exp(-CLIP_STEP * (share - CLIP_QUANTILE))


def noise_beside_count(noise: float, cohort: int) -> float:
    """z of the updates' sum such that it and the noised count together cost what ``noise`` does alone.

    (z^-2 - (2 sigma_b)^-2)^(-1/2), sigma_b = cohort / 20; NaN where nothing is left for the sum.
    """
    left = noise**-2 - (2 * COUNT_NOISE * cohort) ** -2
    return left**-0.5 if left > 0 else math.nan
