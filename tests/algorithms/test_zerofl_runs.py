"""ZeroFL, whole runs: the naive reference, and FedAvg where nothing is sparse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.naive import NaiveFederation, NaiveVisit
from tests.tiny_experiment import Mask, Weights, assert_identical, assert_same, run_inline, tiny_federation

# ------------------------------------------------------------------------------------ naive reference


class NaiveZeroFL(NaiveFederation):
    """ZeroFL with dicts of tensors, sorted lists and where()."""

    def training_density(self) -> float:
        both = self.options.mask_ratio_applies_to == "both"
        return min(1.0, 1 - self.options.sparsity + (self.options.mask_ratio if both else 0.0))

    def is_sparse(self, name: str) -> bool:
        if name == self.prunable[0]:
            return False
        # The patterns of these tests are plain layer names.
        return name.removesuffix(".weight") not in self.options.plain_layers

    def before_forward(self, weights: Weights, visit: NaiveVisit) -> None:
        limits = visit.notes.setdefault("limits", {})
        for name in filter(self.is_sparse, self.prunable):
            values = weights[name]
            if name in limits and self.reuses_threshold(name):
                values.copy_(torch.where(values.abs() < limits[name], torch.zeros(()), values))
                continue
            # SWAT's ceiling, of decimals: in floats .05 * 180 is a hair above 9.
            count = math.ceil(round(self.training_density(), 9) * values.numel() - 1e-6)
            kept = self.largest({name: values}, count, [name])[name]
            values.copy_(torch.where(kept, values, torch.zeros(())))
            limits[name] = min(abs(v) for v in values[kept].tolist())

    def activation_density(self, name: str, weight: Tensor, visit: NaiveVisit) -> float | None:
        # A hair less, or float noise makes ceil(.3 * 120) = 37.
        return self.training_density() - 1e-12 if self.is_sparse(name) else None

    def reuses_threshold(self, name: str) -> bool:
        if self.options.threshold == "first_batch_conv":
            return not isinstance(self.layers[name], nn.Linear)
        return bool(self.options.threshold == "first_batch")

    def upload(self, weights: Weights, received: Weights, visit: NaiveVisit) -> tuple[Weights, Mask | None]:
        keep = self.kept_count(self.options.sparsity - self.options.mask_ratio)
        changes = {name: weights[name] - received[name] for name in self.trained}
        scores = changes if self.options.upload == "top_k_weights_diff" else weights
        mask = self.largest(scores, keep)
        sent = weights if self.options.upload == "top_k_weights" else {**weights, **changes}
        return self.masked(sent, mask), mask

    def server(
        self,
        weights: Weights,
        uploads: dict[int, Weights],
        masks: dict[int, Mask | None],
        sizes: dict[int, int],
        round_number: int,
    ) -> Weights:
        mean = self.mean(uploads, sizes)
        if self.options.upload != "top_k_weights":
            mean |= {name: weights[name] + mean[name] for name in self.trained}
        return self.server_step(weights, mean)


BATCH_NORM = {"model": {"name": "tests.tiny_experiment:tiny_model"}}


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        ({"upload": "top_k_weights"}, {}),
        ({"upload": "diff_on_top_k_weights", "threshold": "first_batch_conv"}, {}),
        ({"upload": "top_k_weights_diff", "threshold": "every_batch"}, {}),
        ({"upload": "top_k_weights", "mask_ratio_applies_to": "both"}, BATCH_NORM),
        ({"upload": "diff_on_top_k_weights", "mask_ratio_applies_to": "both"}, BATCH_NORM),
        ({"upload": "top_k_weights_diff", "plain_layers": ["7"]}, BATCH_NORM),
        ({"upload": "top_k_weights_diff"}, {"server": {"name": "fedadam"}, "rounds": 1}),
    ],
)
def test_naive_reference(options: dict, overrides: dict, tmp_path) -> None:
    config = tiny_federation(
        tmp_path,
        algorithm={"name": "zerofl", "sparsity": 0.7, "mask_ratio": 0.1, **options},
        local={"epochs": 2, "weight_decay": 1e-3, "lr": 0.1},
        **overrides,
    )
    product = run_inline(config, tmp_path / "run")
    reference = NaiveZeroFL(config).run()
    assert_same(product, reference)
    sizes = {len(reference.partition.client(client)) for _, client in reference.uploads}
    assert len(sizes) > 1, "clients of unequal size"


# ---------------------------------------------------------------------------------------- limit cases


@pytest.mark.parametrize("model", [{}, BATCH_NORM])
def test_without_sparsity_it_is_fedavg(model: dict, tmp_path) -> None:
    local = {"epochs": 2, "weight_decay": 1e-3}
    dense = run_inline(tiny_federation(tmp_path, local=local, **model), tmp_path / "dense")
    options = {"name": "zerofl", "sparsity": 0.0}
    zerofl = run_inline(tiny_federation(tmp_path, local=local, algorithm=options, **model), tmp_path / "run")
    assert_identical(dense, zerofl)


@pytest.mark.parametrize("upload", ["diff_on_top_k_weights", "top_k_weights_diff"])
def test_differences_without_sparsity_are_fedavg_but_for_rounding(upload: str, tmp_path) -> None:
    """One round, so that both train from the same bits; buffers are identical, the rest within two ulp."""
    overrides = {"local": {"epochs": 2, "weight_decay": 1e-3}, "rounds": 1, **BATCH_NORM}
    dense = run_inline(tiny_federation(tmp_path, **overrides), tmp_path / "dense")
    options = {"name": "zerofl", "sparsity": 0.0, "upload": upload}
    zerofl = run_inline(tiny_federation(tmp_path, algorithm=options, **overrides), tmp_path / "run")
    layout = zerofl.driver.layout
    before, after, sums = dense.states[0].weights, dense.states[-1].weights, zerofl.states[-1].weights
    trained = layout.trained_size
    assert torch.equal(after[trained:], sums[trained:])
    uploads = [torch.cat([v.flatten() for v in u[0].values()]) for u in dense.uploads.values()]
    changes = [(update - before).abs() for update in uploads]
    largest = torch.stack([before.abs(), *(update.abs() for update in uploads), *changes]).amax(0)[:trained]
    error = (after.double() - sums.double())[:trained].abs()
    assert error.max() > 0, "they do differ: this test compares something"
    assert (error.numpy() <= 2.0 * np.spacing(largest.numpy())).all()
