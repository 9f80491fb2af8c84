"""A process that plays clients keeps what it frees."""

import platform
import resource

import pytest
import torch

from cluster.clients.client import ClientHost
from cluster.federation import Federation
from tests.tiny_experiment import tiny_federation

#: Together beyond what glibc keeps of its own accord, each one less than what any glibc can be told to keep.
PIECES, BYTES = 3, 24 * 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc")
def test_memory_that_a_step_frees_costs_the_next_one_no_page_faults(tmp_path):
    ClientHost(Federation.of(tiny_federation(tmp_path)).setup())
    for _warm in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            _ = [torch.zeros(BYTES, dtype=torch.uint8) for _ in range(PIECES)]
            del _
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < BYTES // resource.getpagesize() // 10
