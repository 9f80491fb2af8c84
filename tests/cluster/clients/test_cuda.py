"""The checks that ``sparsyfed bench gpu`` makes, on a GPU where there is one, else rehearsed on the CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.clients import transfers
from cluster.clients.local_training import Trainer
from tests.cluster.clients import cuda_checks
from tests.cluster.clients.cuda_checks import CHECKS, NeedsCuda

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", CHECKS)
def test_on_this_machines_device(name, tmp_path):
    try:
        assert CHECKS[name](DEVICE, tmp_path)
    except NeedsCuda as reason:
        pytest.skip(str(reason))


def test_graphs_that_compute_something_else_are_found(tmp_path, monkeypatch):
    record = cuda_checks.trainer_of

    def off_by_an_ulp(*arguments, recorded=None, **options):
        trainer = record(*arguments, recorded=recorded, **options)
        if recorded is not None:
            compute = trainer._passes._compute
            trainer._passes._compute = lambda images, labels: compute(images * (1 + 2**-22), labels)
        return trainer

    monkeypatch.setattr(cuda_checks, "trainer_of", off_by_an_ulp)
    with pytest.raises(
        AssertionError, match=r"replayed visits differ by .*, launched ones repeat bit for bit"
    ):
        CHECKS["graphs equal launched passes: fedavg"](torch.device("cpu"), tmp_path)


def test_a_device_that_computes_something_else_is_found(tmp_path, monkeypatch):
    visit, devices = Trainer.visit, []

    def second_device_learns_faster(self, client, rows, sparsity, broadcast, *kept, **more):
        if self not in devices:
            devices.append(self)
        lr = broadcast.lr * (1.0 if self is devices[0] else 1.2)
        return visit(self, client, rows, sparsity, replace(broadcast, lr=lr), *kept, **more)

    monkeypatch.setattr(Trainer, "visit", second_device_learns_faster)
    with pytest.raises(AssertionError, match=r"differ by .* of the way moved, .* allowed is 0"):
        CHECKS["the GPU agrees with the CPU: fedavg"](torch.device("cpu"), tmp_path)


def test_a_resumed_run_that_forgot_something_is_found(tmp_path, monkeypatch):
    restore = cuda_checks.Driver._restore

    def forgetful(self, *place):
        state = restore(self, *place)
        if state is not None:
            state.weights[0] += 1
        return state

    monkeypatch.setattr(cuda_checks.Driver, "_restore", forgetful)
    with pytest.raises(AssertionError, match="and the same run again by nothing"):
        CHECKS["a run resumes"](torch.device("cpu"), tmp_path)


def test_devices_that_sum_in_another_order_are_within_the_bound(tmp_path, monkeypatch):
    # Rounding of another kind than a GPU's, and larger: every input is off by up to a part in a million.
    to_input, trainers = transfers.ClientData.of, []

    def rounded(self, rows):
        images, labels = to_input(self, rows)
        if self not in trainers:
            trainers.append(self)
        noise = torch.from_numpy(np.random.default_rng(0).uniform(-1e-6, 1e-6, images.shape)).float()
        return images * (1 + noise * (self is not trainers[0])), labels

    monkeypatch.setattr(transfers.ClientData, "of", rounded)
    for name in CHECKS:
        if name.startswith("the GPU agrees"):
            assert "differ by" in CHECKS[name](torch.device("cpu"), tmp_path / name.rpartition(" ")[2])
