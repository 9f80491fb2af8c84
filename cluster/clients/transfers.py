"""Between host and device: the training split resident on a GPU, and copies through pinned memory.

On the CPU the same calls are plain gathers and views.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from cluster.workload.datasets import Split
from cluster.workload.inputs import from_read_only, normalised, to_input

#: Share of a GPU's free memory that a resident split may take; a larger one is sent client by client.
RESIDENT_SHARE = 0.25


class ClientData:
    """A client's model inputs, from the stored split: on a GPU they lie there as they are stored.

    Args:
        split: Often a memory map.
        device: Where models train.
    """

    def __init__(self, split: Split, device: torch.device) -> None:
        self._split, self._device = split, device
        self._inputs: Tensor | None = None
        if device.type != "cpu" and split.inputs.nbytes <= RESIDENT_SHARE * _free_memory(device):
            self._inputs = from_read_only(np.ascontiguousarray(split.inputs)).to(device)
            self._targets = from_read_only(np.ascontiguousarray(split.targets)).to(device)

    def of(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Model inputs [n_i, ...] and targets [n_i, ...] of the rows int64[n_i]."""
        if self._inputs is None:
            targets = torch.from_numpy(self._split.targets[rows]).to(self._device)
            return to_input(self._split.inputs[rows], self._device), targets
        chosen = torch.from_numpy(rows).to(self._device)
        return normalised(self._inputs.index_select(0, chosen)), self._targets.index_select(0, chosen)


class Staging:
    """Copies of flat vectors through buffers of pinned memory, which a GPU reads and writes by itself."""

    def __init__(self) -> None:
        self._pinned: dict[tuple[str, torch.dtype, int], Tensor] = {}
        self._fetches: Counter[tuple[torch.dtype, int]] = Counter()
        self._sent: torch.cuda.Event | None = None

    def send(self, array: np.ndarray, out: Tensor) -> None:
        """Copy an array to ``out``, a tensor of its shape; on a GPU the host does not wait for the copy."""
        if out.device.type != "cuda":
            out.copy_(from_read_only(array))
            return
        pinned = self._buffer("send", out)
        if self._sent is not None:
            self._sent.synchronize()  # the last copy out of these buffers
        pinned.copy_(from_read_only(array))
        out.copy_(pinned, non_blocking=True)
        self._sent = torch.cuda.Event()
        self._sent.record()

    def fetch(self, tensor: Tensor) -> np.ndarray:
        """A flat tensor as an array that lasts until the next fetch but one of its type and size.

        On the CPU it is a view, which lasts as long as the tensor's values do.
        """
        if tensor.device.type != "cuda":
            return tensor.cpu().numpy()
        kind = (tensor.dtype, tensor.numel())
        self._fetches[kind] += 1
        pinned = self._buffer(f"fetch {self._fetches[kind] % 2}", tensor)
        pinned.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        return pinned.numpy()

    def _buffer(self, way: str, like: Tensor) -> Tensor:
        key = (way, like.dtype, like.numel())
        if key not in self._pinned:
            self._pinned[key] = torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)
        return self._pinned[key]


def _free_memory(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
