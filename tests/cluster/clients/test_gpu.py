"""A host's share of a GPU: refused by name where it is missing or too small. CUDA is behind a counter."""

import pytest
import torch

from cluster.clients.gpu import (
    CONTEXT_BYTES,
    GpuError,
    GpuMemory,
    allowed_bytes,
    device_for,
    why_it_does_not_fit,
)

GIB = 2**30


class Counter:
    """A GPU of 16 GiB."""

    def __init__(self, reserved):
        self.held, self.fraction = reserved, None

    def total(self):
        return 16 * GIB

    def reserved(self):
        return self.held

    def cap(self, fraction):
        self.fraction = fraction


def test_a_quarter_of_16_gib_leaves_4_gib_less_cudas_own():
    assert allowed_bytes(0.25, 16 * GIB) == 4 * GIB - CONTEXT_BYTES
    assert allowed_bytes(2, 16 * GIB) == 16 * GIB - CONTEXT_BYTES  # memory of one GPU at a time
    assert allowed_bytes(0.01, 16 * GIB) == 0


def test_what_fits_is_capped_once_at_its_share():
    counter = Counter(4 * GIB - CONTEXT_BYTES)
    memory = GpuMemory(0.25, counter)
    memory.check(client=3)
    assert counter.fraction == (4 * GIB - CONTEXT_BYTES) / (16 * GIB)
    counter.held = 15 * GIB
    memory.check(client=4)  # from now on torch itself refuses


def test_what_does_not_fit_names_need_share_and_cure():
    with pytest.raises(
        GpuError,
        match=r"client 3 needs 5\.6 GiB of GPU memory \(of that 0\.6 for CUDA itself\), and 0\.25 of a GPU "
        r"with 16\.0 GiB is 4\.0 GiB; it takes at least 0\.35: raise gpus_per_actor",
    ):
        GpuMemory(0.25, Counter(5 * GIB)).check(client=3)
    assert "a GPU with more memory" in why_it_does_not_fit(3, 16 * GIB, 1, 16 * GIB)


def test_a_whole_gpu_is_not_capped():
    counter = Counter(5 * GIB)
    GpuMemory(1, counter).check(client=0)
    assert counter.fraction is None


def test_a_gpu_that_torch_does_not_see_is_an_error_and_none_asked_for_is_the_cpu(monkeypatch):
    assert device_for(0) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GpuError, match=r"gpus_per_actor: 0\.5 GPU was given to an actor on .* sees none"):
        device_for(0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_for(0.5) == torch.device("cuda")
