"""Methods against heterogeneity inside a mask: what stays outside, and what they are without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from algorithms import registry
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")
NAMES = sorted(name for name in registry() if name.startswith("masked_"))
MODEL = {"name": "small_cnn", "channels": [16, 16], "hidden": 16, "norm": "group", "groups": 2}


def run(cache, folder, name, rounds=2, **options):
    config = tiny_federation(cache, rounds=rounds, model=MODEL, algorithm={"name": name, **options})
    return run_inline(config, folder)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_moves_or_travels_outside_the_mask(cache, tmp_path, name):
    found = run(cache, tmp_path / "masked", name, sparsity=0.8)
    layout, mask = found.driver.layout, found.state.mask
    assert int(mask.sum()) == round(0.2 * layout.prunable_size)
    for state in found.states:
        assert torch.equal(state.mask, mask)
        assert not state.weights[: layout.prunable_size][~mask].any()
    for values, support in found.uploads.values():
        flat = torch.cat([support[entry.name].reshape(-1) for entry in layout.prunable])
        assert torch.equal(flat, mask)
        sent = torch.cat([values[entry.name].reshape(-1) for entry in layout.prunable])
        assert not sent[~mask].any()
    for state in found.driver._schedule.kept.states.values():
        for array in state.arrays.values():
            assert not array[: len(mask)][~mask.numpy()].any()
    plain = run(cache, tmp_path / "fixed_mask", "fixed_mask", sparsity=0.8)
    assert torch.equal(plain.state.mask, mask)
    assert not torch.equal(plain.state.weights[: layout.model_size], found.state.weights[: layout.model_size])


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_everything_is_the_method_itself(cache, tmp_path, name):
    whole = run(cache, tmp_path / "whole", name, sparsity=0.0)
    plain = run(cache, tmp_path / "plain", name.removeprefix("masked_"))
    assert_identical(whole, plain)


def test_values_alone_travel(cache, tmp_path):
    masked = run(cache, tmp_path / "masked", "masked_fedsam", sparsity=0.8).lines[-1]
    fixed = run(cache, tmp_path / "fixed", "fixed_mask", sparsity=0.8).lines[-1]
    for way in ("uplink", "downlink"):
        assert masked[f"comm/{way}_bytes"] == fixed[f"comm/{way}_bytes"]
    assert masked["flops/dense"] == 2 * fixed["flops/dense"]
    assert masked["flops/sparse"] == pytest.approx(2 * fixed["flops/sparse"], rel=1e-6)
    assert np.isfinite(masked["test/accuracy"])
