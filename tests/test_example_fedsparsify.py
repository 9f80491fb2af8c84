"""FedSparsify by hand, and where it is FedAvg."""

from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import nn

from sparsyfed import ParameterLayout, resolve, run
from tests.example_fedsparsify import FedSparsify


def test_a_schedule_worked_by_hand():
    layout = ParameterLayout.of(nn.Linear(4, 2, bias=False))
    method = FedSparsify(sparsity=0.75, until=2, exponent=1.0)
    weights = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0])
    before = method.initial_state(weights, layout, None)
    # t = 1 of T = 2: s = 3/4 * 1/2, so that 5 of the 8 weights stay.
    mask = method.next_mask(before, weights, None, layout)
    assert mask.int().tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    # t = 2: s = 3/4, 2 of 8. The first weight is the largest by now, and has been purged.
    after = replace(before, round=1, mask=mask)
    grown = torch.tensor([9.0, 0.0, 0.0, 0.3, -0.5, 0.1, 0.2, 0.4])
    assert method.next_mask(after, grown, None, layout).int().tolist() == [0, 0, 0, 0, 1, 0, 0, 1]


def test_without_sparsity_it_is_fedavg(tmp_path):
    same = ["rounds=2", "cohort=2", "partition.clients=6", "execution=inline", "tracking.enabled=false"]
    own = [
        "algorithm.name=tests.example_fedsparsify:FedSparsify",
        "algorithm.sparsity=0",
        "algorithm.until=2",
    ]
    run(resolve("quickstart", [*same, "algorithm.name=fedavg"]), tmp_path / "fedavg")
    run(resolve("quickstart", [*same, *own]), tmp_path / "own")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("fedavg", "own"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
