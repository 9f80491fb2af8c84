"""Model inputs of what is stored."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from algorithms import Pixels


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


def pixels_of(stored: np.ndarray) -> Pixels | None:
    """What pixel units are in the model inputs of what is stored; see :func:`to_input`.

    Floats have the units that they are stored in and may become any number; codes have no neighbours: None.
    """
    if stored.dtype == np.uint8:
        return Pixels(unit=2.0, low=-1.0, high=1.0)
    return Pixels() if stored.dtype.kind == "f" else None


def from_read_only(array: np.ndarray) -> Tensor:
    """A tensor over an array from the object store or a memory map; it is only ever read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
