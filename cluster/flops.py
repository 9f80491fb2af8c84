"""Training FLOPs of the prunable layers: dense-equivalent, and ideal sparse.

A multiply-add counts two. A training step costs a layer one forward, one input gradient (not where its inputs
depend on nothing that is trained, as the first layer's on images) and one weight gradient, each of the
forward's size. Products without weights, such as those of attention, are not counted. Ideally sparse, forward
and input gradient scale with the density of the weights, and the weight gradient with that of the saved
activations times the share of its entries that the method uses: a mask's density, as RigL, FedDST and FLASH
count; SparsyFed's nonzeros, as the gradient at a zero is 0; 1 where zeros may regrow. A frozen layer has no
weight gradient, and costs the same dense and sparse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from algorithms.core.parameters import ParameterLayout, dry_forward, prunable_layers


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOPs a sample of each prunable layer, float64[layers], in the layout's order.

    Attributes:
        forward: FLOPs of one sample's forward pass.
        needs_input_gradient: Share of them in calls whose inputs depend on what is trained, float64[layers].
        frozen: FLOPs of one sample's training pass in all layers that are not trained: forward, and input
            gradient where their inputs depend on what is trained.
        frozen_forward: Those of the forward pass.
    """

    forward: np.ndarray
    needs_input_gradient: np.ndarray
    frozen: float = 0.0
    frozen_forward: float = 0.0

    @classmethod
    def of(cls, model: nn.Module, layout: ParameterLayout, example: Tensor) -> LayerFlops:
        """Count by one dry forward of ``example``, a batch of any size."""
        counted: dict[str, float] = {}
        backward: dict[str, float] = {}
        # By the weight's name, so that layers with tied weights add up; a weight that is no parameter
        # (computed by torch's parametrizations) has no name and is not prunable.
        names = {id(parameter): name for name, parameter in model.named_parameters()}

        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            name = names.get(id(layer.weight), "")
            flops = call_flops(layer, inputs[0], output) / len(example)
            counted[name] = counted.get(name, 0.0) + flops
            if inputs[0].requires_grad:
                backward[name] = backward.get(name, 0.0) + flops

        dry_forward(model, example, prunable_layers(model).values(), count, gradients=True)
        entries = [entry.name for entry in layout.prunable]
        frozen = sorted(counted.keys() - {*entries, ""})
        return cls(
            np.array([counted.get(name, 0.0) for name in entries]),
            np.array(
                [backward.get(name, 0.0) / counted[name] if name in counted else 0.0 for name in entries]
            ),
            sum(counted[name] + backward.get(name, 0.0) for name in frozen),
            sum(counted[name] for name in frozen),
        )

    def of_part(self, shares: np.ndarray) -> LayerFlops:
        """Those of a model of which a client holds so much of each layer, float64[layers]."""
        return replace(self, forward=self.forward * shares)

    def dense(self, samples: int) -> float:
        """Dense-equivalent FLOPs of training on ``samples`` samples."""
        return (
            float(samples * (self.forward * (2.0 + self.needs_input_gradient)).sum()) + samples * self.frozen
        )

    def attack(self, samples: int, weight_density: np.ndarray) -> np.ndarray:
        """FLOPs of a forward pass and the gradient of the inputs, float64[layers]; see ``sparse``."""
        return samples * 2.0 * self.forward * weight_density

    def attack_frozen(self, samples: int) -> float:
        """The same in all layers that are not trained."""
        return samples * 2.0 * self.frozen_forward

    def sparse(
        self,
        samples: int,
        weight_density: np.ndarray,
        activation_density: np.ndarray,
        gradient_density: np.ndarray,
    ) -> np.ndarray:
        """Ideal sparse FLOPs of each trained layer, float64[layers]; densities are float64[layers] too."""
        backward_and_forward = (1.0 + self.needs_input_gradient) * weight_density
        return samples * self.forward * (backward_and_forward + activation_density * gradient_density)


def held_shares(held: np.ndarray, layout: ParameterLayout) -> np.ndarray:
    """Share of each prunable layer in a part of the model, bool[trained]; float64[layers]."""
    return np.array([np.count_nonzero(held[entry.span]) / entry.size for entry in layout.prunable])


def call_flops(layer: Any, inputs: Tensor, output: Tensor) -> float:
    """FLOPs of one call of a convolution or linear layer.

    Each output element is a dot product as long as one output channel's weights; a transposed convolution is
    the reverse, its weights are those of one input channel each.
    """
    elements = inputs.numel() if getattr(layer, "transposed", False) else output.numel()
    return 2.0 * elements * layer.weight.numel() / len(layer.weight)


def held_units(held: np.ndarray, layout: ParameterLayout) -> dict[str, float]:
    """Share of each prunable layer's output units that have a weight in a part of the model, by name."""
    rows = {entry.name: held[entry.span].reshape(entry.shape[0], -1) for entry in layout.prunable}
    return {name: float(weights.any(axis=1).mean()) for name, weights in rows.items()}


def count_activations(model: nn.Module, example: Tensor, units: Mapping[str, float] = {}) -> int:
    """Values that all leaf modules of ``model`` put out for one sample of ``example``.

    Args:
        model: A plain module.
        example: A batch.
        units: Share of the output units that are there, by the name of a layer's weight; what follows a layer
            puts out as large a share of its own.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    counted, share = 0.0, 1.0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal counted, share
        share = units.get(names.get(id(getattr(module, "weight", None)), ""), share)
        counted += share * output[0].numel() if isinstance(output, Tensor) else 0

    dry_forward(model, example, (m for m in model.modules() if not list(m.children())), count)
    return round(counted)
