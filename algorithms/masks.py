"""Masks: top-K selections, thresholds and what two masks have in common.

A mask is a bool vector over the prunable span; magnitudes are float32. Selections are exact: ties are broken
by the lower index, so that exactly K positions remain. Non-finite weights are for the aggregation to refuse;
here they only must not raise.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def target_count(size: int, sparsity: float) -> int:
    """K = round((1 - s) |P|), the number of weights kept at sparsity ``sparsity``."""
    return round((1.0 - sparsity) * size)


def kth_largest(magnitudes: Tensor, k: int) -> float:
    """The ``k``-th largest entry (k from 1) of a flat float32 tensor."""
    flat = magnitudes.reshape(-1)
    if flat.device.type == "cpu":
        # numpy's vectorised quickselect is about five times faster than torch.kthvalue (bench_masks.py).
        values = flat.numpy()
        return float(np.partition(values, values.size - k)[values.size - k])
    return float(torch.kthvalue(flat, flat.numel() - k + 1).values)


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of exactly the ``k`` largest entries of ``scores``; ties go to the lower index.

    Args:
        scores: float32[n], non-negative for magnitudes.
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
    mask = scores >= threshold
    surplus = int(torch.count_nonzero(mask)) - k
    if surplus:
        ties = torch.nonzero(scores == threshold).reshape(-1)
        mask[ties[len(ties) - surplus :]] = False
    return mask


def cut_to_top_k(weights: Tensor, k: int) -> Tensor:
    """Zero all but the ``k`` largest |w| of a flat tensor, in place; cut positions become +0.0.

    Returns:
        The mask that was kept, bool[n].
    """
    mask = top_k_mask(weights.abs(), k)
    weights.masked_fill_(~mask, 0.0)
    return mask


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
