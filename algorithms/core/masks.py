"""Masks: top-K selections over all weights or layer by layer, random masks, growth, agreement of masks.

A mask is a bool vector over the prunable span; magnitudes are float32. Selections are exact: ties are broken
by the lower index, so that exactly K positions remain. Non-finite weights are for the aggregation to refuse;
here they only must not raise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from algorithms.core.parameters import Entry


def target_count(size: int, sparsity: float) -> int:
    """K = round((1 - s) |P|), the number of weights kept at sparsity ``sparsity``."""
    return round((1.0 - sparsity) * size)


def ceiling_count(size: int, sparsity: float) -> int:
    """ceil((1 - s) n) in exact decimals, at least 1: in floats 0.05 * 180 is 9.000000000000002.

    What is beyond a whole number by less than 1e-7 is the rounding of ``sparsity`` itself, as of a third.
    """
    return max(1, math.ceil((1 - Fraction(repr(sparsity))) * size - Fraction(1, 10**7)))


def kth_largest(magnitudes: Tensor, k: int) -> float:
    """The ``k``-th largest entry (k from 1) of a float32 tensor without negative entries."""
    flat = magnitudes.reshape(-1)
    if flat.device.type != "cpu":
        # torch.kthvalue of one long row would use one block of the GPU.
        return float(flat.sort(descending=True).values[k - 1])
    # numpy's vectorised quickselect is five times faster than torch.kthvalue, but many equal entries, as the
    # zeros of a sparse model are, make it ten times slower: select among the others then.
    values = flat.float().numpy() if flat.dtype == torch.bfloat16 else flat.numpy()
    nonzero = values != 0
    count = int(np.count_nonzero(nonzero))
    if count < k:
        return (
            0.0 if not (values < 0).any() else float(np.partition(values, values.size - k)[values.size - k])
        )
    if count < 0.75 * values.size:
        values = values[nonzero]
    return float(np.partition(values, values.size - k)[values.size - k])


def nonzero_mask(weights: Tensor) -> Tensor:
    """Mask of the entries that are not 0, bool of the same shape."""
    # On the CPU numpy compares about nine times faster than torch.
    return torch.from_numpy(weights.numpy() != 0) if weights.device.type == "cpu" else weights != 0


def count_beyond(first: Tensor, second: Tensor) -> int:
    """Number of positions that the first mask holds and the second does not."""
    if first.device.type == "cpu":
        return int(np.count_nonzero(first.numpy() > second.numpy()))
    return int(torch.count_nonzero(first & ~second))


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of exactly the ``k`` largest entries of ``scores``; ties go to the lower index.

    Args:
        scores: float32[n], none negative.
        k: Number of positions to keep, 0 to n.

    Returns:
        bool[n] with exactly ``k`` true positions.
    """
    size = scores.numel()
    if k <= 0:
        return torch.zeros(size, dtype=torch.bool, device=scores.device)
    if k >= size:
        return torch.ones(size, dtype=torch.bool, device=scores.device)
    scores = torch.nan_to_num(scores, nan=float("inf")) if not torch.isfinite(scores.sum()) else scores
    threshold = kth_largest(scores, k)
    if scores.device.type == "cpu":
        mask = torch.from_numpy(scores.numpy() >= np.float32(threshold))
    else:
        mask = scores >= threshold
    held = np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else torch.count_nonzero(mask)
    surplus = int(held) - k
    if surplus:
        ties = torch.nonzero(scores == threshold).reshape(-1)
        mask[ties[len(ties) - surplus :]] = False
    return mask


def cut_to_top_k(weights: Tensor, k: int) -> Tensor:
    """Zero all but the ``k`` largest |w| of a flat tensor, in place; cut positions become +0.0.

    Returns:
        The mask that was kept, bool[n].
    """
    if weights.device.type != "cpu":
        mask = top_k_mask(weights.abs(), k)
        weights.masked_fill_(~mask, 0.0)
        return mask
    # numpy's large temporaries lie in huge pages; faulting in torch's costs more than the arithmetic.
    values = weights.numpy()
    mask = top_k_mask(torch.from_numpy(np.abs(values)), k)
    np.putmask(values, ~mask.numpy(), 0.0)
    return mask


def cut_globally(weights: Tensor, k: int, layers: Sequence[Entry], *, guard: bool) -> Tensor:
    """Cut all layers to their ``k`` largest |w| by one threshold, in place; cut positions become +0.0.

    Args:
        weights: float32[prunable].
        k: Positions to keep.
        layers: The prunable layers.
        guard: Leave no layer empty: one that the cut would empty keeps its own top instead, its share of
            ``k`` and at least one weight, and the other layers share what is left of ``k``.

    Returns:
        The mask that was kept, bool[prunable]: ``k`` positions, or more where ``k`` is below one a layer.
    """
    if not guard:
        return cut_to_top_k(weights, k)
    magnitudes, guarded = weights.abs(), np.zeros(len(layers), np.int64)
    others = torch.ones(len(weights), dtype=torch.bool, device=weights.device)
    while True:
        mask = layer_wise_top_k(magnitudes, guarded, layers)
        positions = torch.nonzero(others).reshape(-1)
        mask[positions] = top_k_mask(magnitudes[positions], max(0, k - int(guarded.sum())))
        empty = np.flatnonzero(layer_counts(mask, layers) == 0)
        if not len(empty):
            weights.masked_fill_(~mask, 0.0)
            return mask
        for index in empty.tolist():
            # A weight is left for every other layer, as far as there are any.
            left = k - int(guarded.sum()) - (int(np.count_nonzero(guarded == 0)) - 1)
            guarded[index] = max(1, min(round(k * layers[index].size / len(weights)), left))
            others[layers[index].span] = False


def drop_below(values: Tensor, threshold: float | Tensor, out: Tensor | None = None) -> Tensor:
    """``values`` with 0 for every |v| < ``threshold``, in one fused pass; NaN stays.

    Args:
        values: float32 of any shape; bfloat16 too where ``out`` is None.
        threshold: A positive, finite number of the values' type; or a tensor that holds it or 0, whose value
            the host does not read.
        out: Where to write; ``values`` itself to cut in place.
    """
    if isinstance(threshold, Tensor) or values.dtype == torch.bfloat16:
        return values.masked_fill(values.abs() < threshold, 0.0)
    # hardshrink keeps |v| > lambda; with the float32 just below the threshold that is |v| >= threshold.
    limit = float(np.nextafter(np.float32(threshold), np.float32(0)))
    return torch.hardshrink(values, limit) if out is None else torch.hardshrink(values, limit, out=out)


# --------------------------------------------------------------------------------------- layer by layer


def apportion(total: int, shares: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """Divide ``total`` positions among layers in proportion to ``shares``, none beyond its capacity.

    A layer whose part would exceed its capacity takes just that and the rest is divided among the others
    (as ERK does with layers above density 1). Whole numbers by largest remainder, ties to the earlier layer.

    Args:
        total: Number of positions, at most the sum of the capacities.
        shares: What each layer's part is proportional to, non-negative, float64[layers] or int64[layers].
        capacities: Largest part of each layer, int64[layers].

    Returns:
        int64[layers], summing to exactly ``total``.

    Raises:
        ValueError: The layers cannot hold ``total`` positions.
    """
    capacities = np.asarray(capacities, np.int64)
    shares = np.where(np.isfinite(shares), shares, 0.0)
    if not 0 <= total <= capacities.sum():
        raise ValueError(f"cannot place {total} positions in layers that hold {capacities.sum()}")
    parts, full = np.zeros(len(capacities)), capacities == 0
    while not full.all():
        weights = np.where(full, 0.0, shares)
        if weights.sum() == 0.0:  # no open layer has a claim: in proportion to the room that is left
            weights = np.where(full, 0, capacities)
        parts = np.where(full, capacities, (total - capacities[full].sum()) * (weights / weights.sum()))
        overflowing = ~full & (parts > capacities)
        if not overflowing.any():
            break
        full = full | overflowing
    # What is left to noise beyond the sixth digit must not decide where a weight goes.
    parts = np.round(parts, 6)
    counts = np.minimum(np.floor(parts).astype(np.int64), capacities)
    for layer in np.argsort(counts - parts, kind="stable")[: total - counts.sum()]:
        counts[layer] += 1
    return counts


def density_shares(distribution: str, layers: Sequence[Entry], keep: int = 0) -> np.ndarray:
    """Shares for :func:`apportion` of a random sparse model with given layer densities, float64[layers].

    Args:
        distribution: ``uniform``: the same density everywhere. ``er``: density proportional to
            (in + out)/(in * out) (Mocanu et al., arXiv 1707.04780). ``erk``: to the sum of the weight's
            dimensions over their product (Evci et al., arXiv 1911.11134). ``igq``: 1 / (f n + 1) in a layer
            of n weights, ideal gas quotas (Chen et al., arXiv 2202.09844).
        layers: The prunable layers.
        keep: Positions of all layers together, from which ``igq`` finds f.
    """
    if distribution == "igq":
        return _ideal_gas_quotas(layer_sizes(layers).astype(np.float64), keep)
    if distribution == "uniform":
        return np.array([float(layer.size) for layer in layers])
    if distribution == "er":
        return np.array([layer.size * sum(layer.shape[:2]) / np.prod(layer.shape[:2]) for layer in layers])
    # A layer's part is density times size, and its size is the product of its dimensions.
    return np.array([float(sum(layer.shape)) for layer in layers])


def _ideal_gas_quotas(sizes: np.ndarray, keep: int) -> np.ndarray:
    """n / (f n + 1) of each layer, with the f >= 0 for which they sum to ``keep``; by halving."""
    low, high = 0.0, len(sizes) / max(keep, 1)  # n / (f n + 1) is below 1 / f
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (sizes / (middle * sizes + 1)).sum() > keep else (low, middle)
    return sizes / (high * sizes + 1)


def layer_sizes(layers: Sequence[Entry]) -> np.ndarray:
    """Number of weights of each layer, int64[layers]."""
    return np.array([layer.size for layer in layers], np.int64)


def layer_counts(mask: Tensor, layers: Sequence[Entry]) -> np.ndarray:
    """Number of positions a mask holds in each layer, int64[layers]."""
    if mask.device.type == "cpu":
        held = mask.numpy()
        return np.array([np.count_nonzero(held[layer.span]) for layer in layers], np.int64)
    return torch.stack([torch.count_nonzero(mask[layer.span]) for layer in layers]).cpu().numpy()


def layer_wise_top_k(
    scores: Tensor, counts: np.ndarray, layers: Sequence[Entry], among: Tensor | None = None
) -> Tensor:
    """Mask of the ``counts[l]`` largest scores of each layer l; ties go to the lower index.

    Args:
        scores: Non-negative, float32[prunable].
        counts: Positions of each layer, int64[layers].
        layers: The prunable layers.
        among: Only positions of this mask are taken, whatever the scores, all of them where they are too few.
    """
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    for layer, count in zip(layers, counts, strict=True):
        if among is None:
            mask[layer.span] = top_k_mask(scores[layer.span], int(count))
        else:
            positions = torch.nonzero(among[layer.span]).reshape(-1) + layer.start
            mask[positions] = top_k_mask(scores[positions], int(count))
    return mask


def random_mask(counts: np.ndarray, layers: Sequence[Entry], rng: np.random.Generator) -> Tensor:
    """Mask of ``counts[l]`` random positions of each layer l: the tops of |P| uniform numbers."""
    return layer_wise_top_k(uniform_scores(layers[-1].stop, rng), counts, layers)


def uniform_scores(size: int, rng: np.random.Generator) -> Tensor:
    """``size`` uniform numbers in [0, 1), float32: scores whose top is a random choice."""
    return torch.from_numpy(rng.random(size, dtype=np.float32))


def exchangeable(rate: float, counts: np.ndarray, layers: Sequence[Entry]) -> np.ndarray:
    """Positions each layer exchanges at ``rate``: round(rate * count), at most its zeros, int64[layers].

    A dense layer has nothing to try instead and exchanges nothing; the limit binds above density 1/(1+rate).
    """
    wanted = np.rint(np.round(rate * counts, 6)).astype(np.int64)  # noise must not decide at a half
    return np.minimum(wanted, layer_sizes(layers) - counts)


def prune_and_grow(
    magnitudes: Tensor,
    mask: Tensor,
    drops: np.ndarray,
    growths: np.ndarray,
    scores: Tensor,
    layers: Sequence[Entry],
) -> tuple[Tensor, Tensor]:
    """Drop the smallest weights of a mask layer by layer, then grow where the scores are largest.

    Growth picks among all positions outside what the drop has left, just dropped ones included.

    Args:
        magnitudes: |w|, float32[prunable].
        mask: The live mask, bool[prunable].
        drops: Positions each layer loses, int64[layers].
        growths: Positions each layer gains, int64[layers].
        scores: Non-negative, float32[prunable].
        layers: The prunable layers.

    Returns:
        What is kept and what is grown, two disjoint bool[prunable].
    """
    kept = layer_wise_top_k(magnitudes, layer_counts(mask, layers) - drops, layers, mask)
    return kept, layer_wise_top_k(scores, growths, layers, ~kept)


def top_of_union(
    magnitudes: Tensor, union: Tensor, before: Tensor | None, counts: np.ndarray, layers: Sequence[Entry]
) -> Tensor:
    """Mask of the ``counts[l]`` largest weights of each layer l among those that clients hold.

    Args:
        magnitudes: |w|, float32[prunable].
        union: What at least one client holds, bool[prunable].
        before: The mask so far, from which a layer is filled up whose union is too small: bool[prunable]
            or None.
        counts: Positions of each layer, int64[layers].
        layers: The prunable layers.
    """
    mask = layer_wise_top_k(magnitudes, counts, layers, union)
    for rest in (before, ~union):
        missing = counts - layer_counts(mask, layers)
        if rest is not None and missing.any():
            mask |= layer_wise_top_k(magnitudes, missing, layers, rest & ~mask)
    return mask


def nested_mask(magnitudes: Tensor, mask: Tensor, k: int, layers: Sequence[Entry]) -> Tensor:
    """The ``k`` positions of a mask that a smaller budget keeps: of each layer its top, the same share.

    Positions are ranked by their quantile among their layer's |w| (ties by lower index): masks of two budgets
    are nested exactly, and a layer's part of the budget is its part of the mask to within rounding.
    """
    quantiles = torch.zeros_like(magnitudes)  # those of the mask are above 0
    for layer in layers:
        positions = torch.nonzero(mask[layer.span]).reshape(-1) + layer.start
        order = torch.argsort(magnitudes[positions], descending=True, stable=True)
        ranks = torch.arange(len(positions), device=mask.device, dtype=torch.float64)
        quantiles[positions[order]] = (1.0 - (ranks + 0.5) / max(1, len(positions))).float()
    return top_k_mask(quantiles, k)


# ---------------------------------------------------------------------------------- what masks have in common


def consensus(votes: np.ndarray, masks: int) -> float | None:
    """Agreement of ``masks`` masks: sum_j C(v_j, 2) / (C(m, 2) mean |mask|), in [0, 1].

    Args:
        votes: v_j, in how many masks position j is kept, int[n].
        masks: m, the number of masks.

    Returns:
        The share of kept positions that two masks have in common on average; None for fewer than two masks
        or where nothing is kept.
    """
    kept = int(votes.sum(dtype=np.int64))
    if masks < 2 or kept == 0:
        return None
    counts = np.bincount(votes, minlength=masks + 1).astype(np.int64)
    voters = np.arange(len(counts), dtype=np.int64)
    pairs = int((counts * (voters * (voters - 1) // 2)).sum())
    return pairs / (masks * (masks - 1) / 2 * (kept / masks))


def intersection_over_union(first: np.ndarray, second: np.ndarray) -> float | None:
    """IoU of two bool masks; None where both are empty."""
    union = int(np.count_nonzero(first | second))
    return int(np.count_nonzero(first & second)) / union if union else None
