"""Model inputs of what is stored."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor


def to_input(stored: np.ndarray, device: torch.device) -> Tensor:
    """Model input of what is stored, by its type.

    Floats become float32, uint8 are pixels and become (x / 255 - 0.5) / 0.5, integers of any other type are
    codes, such as tokens, and become int64.
    """
    return normalised(from_read_only(np.ascontiguousarray(stored)).to(device))


def normalised(stored: Tensor) -> Tensor:
    """See :func:`to_input`."""
    if stored.dtype == torch.uint8:
        return stored.float().div_(255.0).sub_(0.5).div_(0.5)
    return stored.float() if stored.is_floating_point() else stored.long()


def from_read_only(array: np.ndarray) -> Tensor:
    """A tensor over an array from the object store or a memory map; it is only ever read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
