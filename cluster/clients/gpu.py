"""The GPU of a host: whether there is one, and whether a client fits into the share of it.

Ray hands out GPU shares as numbers and isolates no memory; here a host is held to its share, and a share that
is too small is refused by name after the first client, not by a crash in some later round.
"""

from __future__ import annotations

import socket
from typing import Protocol

import torch

from cluster.references import UserError

#: What CUDA itself takes of a GPU for each process, beside what torch counts; between 0.3 and 0.6 GiB.
CONTEXT_BYTES = 600 * 2**20

GPU_MEMORY_CURE = "raise gpus_per_actor (or devices.tiers.*.gpus), or lower local.batch_size"

_GIB = 2**30


class GpuError(UserError):
    """A GPU that was asked for is missing or too small; the message says what to set."""


def device_for(gpus: float) -> torch.device:
    """Where a host trains that was given ``gpus`` GPUs; Ray has made them the only visible ones.

    Raises:
        GpuError: It was given one and torch sees none.
    """
    if gpus <= 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise GpuError(
            f"gpus_per_actor: {gpus:g} GPU was given to an actor on {socket.gethostname()}, where torch "
            f"{torch.__version__} sees none; install its CUDA build and a driver, or set gpus_per_actor=0"
        )
    return torch.device("cuda")


def allowed_bytes(share: float, total: int) -> int:
    """What torch may reserve on a share of a GPU with ``total`` bytes, beside CUDA's own part."""
    return max(0, int(min(share, 1.0) * total) - CONTEXT_BYTES)


def why_it_does_not_fit(client: int, reserved: int, share: float, total: int) -> str | None:
    """What is wrong where a client reserved ``reserved`` bytes on ``share`` of a GPU; None where it fits."""
    if reserved <= allowed_bytes(share, total):
        return None
    needed = (reserved + CONTEXT_BYTES) / total
    enough = f"at least {needed:.2f}" if needed <= 1 else "a GPU with more memory"
    return (
        f"client {client} needs {(reserved + CONTEXT_BYTES) / _GIB:.1f} GiB of GPU memory "
        f"(of that {CONTEXT_BYTES / _GIB:.1f} for CUDA itself), and {share:g} of a GPU with "
        f"{total / _GIB:.1f} GiB is {share * total / _GIB:.1f} GiB; it takes {enough}: {GPU_MEMORY_CURE}"
    )


class MemoryCounter(Protocol):
    """What is asked of CUDA."""

    def total(self) -> int:
        """Bytes of the GPU."""

    def reserved(self) -> int:
        """Most bytes that torch has held at once in this process."""

    def cap(self, fraction: float) -> None:
        """Refuse allocations beyond this fraction of the GPU, in this process."""


class Cuda:
    """The counter of the current CUDA device."""

    def total(self) -> int:
        """See :class:`MemoryCounter`."""
        return torch.cuda.get_device_properties(0).total_memory

    def reserved(self) -> int:
        """See :class:`MemoryCounter`."""
        return torch.cuda.max_memory_reserved()

    def cap(self, fraction: float) -> None:
        """See :class:`MemoryCounter`."""
        torch.cuda.set_per_process_memory_fraction(fraction)


class GpuMemory:
    """Holds a host to its share of a GPU: measured on the first client, enforced from then on.

    Args:
        share: GPUs the host was given.
        counter: What is asked of CUDA.
    """

    def __init__(self, share: float, counter: MemoryCounter | None = None) -> None:
        self._share, self._counter = share, counter or Cuda()
        self._measured = False

    def check(self, client: int) -> None:
        """Call after each client's training; only the first one's memory is measured.

        Raises:
            GpuError: The share is too small; names what a client needs.
        """
        if self._measured:
            return
        total = self._counter.total()
        reason = why_it_does_not_fit(client, self._counter.reserved(), self._share, total)
        if reason is not None:
            raise GpuError(reason)
        if self._share < 1:
            self._counter.cap(allowed_bytes(self._share, total) / total)
        self._measured = True
