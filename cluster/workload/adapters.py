"""Adapters: a frozen base, and something small beside its layers that is trained instead.

What is frozen is outside the flat vector: it is neither trained nor sent, but installed once on every device.
One of your own is ``adapter.name=my_module:Mine``, a frozen dataclass that derives from :class:`Adapter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster.workload.inputs import from_read_only
from cluster.workload.models import ModelError


@dataclass(frozen=True)
class Adapted:
    """What an adapter made of a model.

    Attributes:
        layers: Names of the layers that got something of their own, in order of definition.
        head: Name of the layer that is trained in full; empty where the model has none, or it is frozen.
    """

    layers: tuple[str, ...]
    head: str


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """What is trained in place of a whole model; its fields are its options."""

    @property
    def begins_at_zero(self) -> bool:
        """Whether a whole tensor of what is trained is 0 at first."""
        return False

    @abstractmethod
    def attach(self, model: nn.Module, outputs: int, seed: int) -> Adapted:
        """Put beside layers of a plain model, in place, what is trained, and freeze everything else.

        Args:
            model: The plain module, on the CPU.
            outputs: Values that it puts out for each target, by which its head is known.
            seed: Seed of what is drawn; no global generator is read or changed.

        Raises:
            ModelError: The model has no layer for it, or none that is called so.
        """

    @abstractmethod
    def merge(self, model: nn.Module) -> None:
        """Make the plain module again, in place, with weights that compute the same."""

    @abstractmethod
    def tensors(self, model: nn.Module) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """What is trained, by the names of a file, and what it says of itself: plain JSON values."""


def head_of(model: nn.Module, outputs: int) -> str:
    """The last linear layer that puts out as many values as the model, with a weight of its own; else empty.

    A head that shares its weight, as one tied to the embeddings does, is part of the base.
    """
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == outputs and not shares_weight(model, layer)
    ]
    return names[-1] if names else ""


def shares_weight(model: nn.Module, layer: nn.Linear) -> bool:
    """Whether another module holds the layer's weight too, or the weight is computed from something else."""
    holders = [m for m in model.modules() if any(own is layer.weight for own in m._parameters.values())]
    return holders != [layer]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another one wherever it stands."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


# ------------------------------------------------------------------------------------------ the frozen base


def frozen(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are not trained, by name."""
    return [(name, own) for name, own in model.named_parameters() if not own.requires_grad]


def frozen_size(model: nn.Module) -> int:
    """How many floats they are."""
    return sum(parameter.numel() for _, parameter in frozen(model))


def base_of(model: nn.Module) -> np.ndarray:
    """All of them in one vector, float32[frozen].

    Raises:
        ModelError: One is of another type.
    """
    parts = []
    for name, parameter in frozen(model):
        if parameter.dtype != torch.float32:
            raise ModelError(f"adapter: the base's {name} is {parameter.dtype}; allowed is float32")
        parts.append(parameter.detach().reshape(-1).cpu())
    return torch.cat([torch.empty(0), *parts]).numpy()


def share_base(model: nn.Module, base: np.ndarray) -> None:
    """Make the parameters that are not trained views of ``base``, float32[frozen], which is only ever read.

    On one node the models of all actors then stand on the same memory.
    """
    vector, start = from_read_only(base), 0
    for _, parameter in frozen(model):
        parameter.data = vector[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
