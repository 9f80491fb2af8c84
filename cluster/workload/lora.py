"""Low-rank adapters: y = W x + b + (alpha / r) B A x with W and b frozen (Hu et al. 2021, arXiv 2106.09685).

A [r, in] and B [out, r] are linear layers of their own, so that methods prune them and FLOPs are counted as
of any other. With B at 0 the first step moves B and the head alone: dL/dA is 0. The mean of products
is not the product of means: what clients send is averaged as A and B, exactly so with ``freeze_a`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.parameters import prunable_layers
from cluster.references import did_you_mean
from cluster.workload.adapters import Adapted, Adapter, head_of, replace_module, shares_weight
from cluster.workload.models import ModelError

_MOST_NAMES = 6


class LoraLinear(nn.Module):
    """A frozen linear layer with a product of two thin ones beside it.

    Attributes:
        base_layer: The layer as it was.
        lora_A: A, [r, in].
        lora_B: B, [out, r].
        scale: alpha / r.
    """

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        rank = len(a)
        self.base_layer, self.scale = base, scale
        # The names of PEFT. Nothing is drawn from the global generator.
        self.lora_A = nn.utils.skip_init(nn.Linear, base.in_features, rank, bias=False)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, base.out_features, bias=False)
        with torch.no_grad():
            self.lora_A.weight.copy_(a)
            self.lora_B.weight.copy_(b)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        mixed: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x)) * self.scale
        return mixed

    @property
    def weight(self) -> Tensor:
        """W + (alpha / r) B A, [out, in], for who uses a layer's weight without calling the layer."""
        return self.base_layer.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight)

    @property
    def bias(self) -> Tensor | None:
        """b, [out]."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.base_layer.out_features


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """Low-rank adapters beside linear layers; they and the head are trained, everything else is frozen.

    W becomes W + (alpha / r) B A. Methods find A and B as layers called ``NAME.lora_A`` and ``NAME.lora_B``.
    """

    rank: int = hyperparameter(8, "r, rows of A and columns of B", low=1, source="section 4.1")
    alpha: float = hyperparameter(16.0, "the product is scaled by alpha / r", above=0.0, source="section 4.1")
    layers: tuple[str, ...] = hyperparameter(
        ("*",),
        "name patterns of the linear layers that get one, of whole names or of their ends, such as query; "
        "the head never does",
    )
    freeze_a: bool = hyperparameter(
        False, "train B alone; A stays as it was drawn, and averages are exact", source="arXiv 2403.12313"
    )
    b_init: float = hyperparameter(
        0.0,
        "B begins uniform in +-b_init; 0 as published, and above it for methods that train no weight at 0, "
        "such as sparsyfed",
        low=0.0,
        high=1.0,
    )
    freeze_head: bool = hyperparameter(
        False,
        "the head stays as the base has it: for one that is trained already, where methods cut weights",
        source="PEFT, unless the head is among modules_to_save",
    )

    @property
    def begins_at_zero(self) -> bool:
        """B, as published."""
        return self.b_init == 0.0

    def attach(self, model: nn.Module, outputs: int, seed: int) -> Adapted:
        """See :class:`Adapter`: A is uniform in +-1/sqrt(in), which is Kaiming's with a = sqrt(5)."""
        head = head_of(model, outputs)
        chosen = self._choose(model, head)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if self.freeze_head:
            head = ""
        if head:
            for parameter in model.get_submodule(head).parameters():
                parameter.requires_grad_(True)
        generator = torch.Generator().manual_seed(seed)
        for name, layer in chosen.items():
            inputs, width = layer.in_features, layer.out_features
            if self.rank > min(inputs, width):
                raise ModelError(
                    f"adapter.rank: {self.rank} is more than layer {name!r} has, with {inputs} inputs and "
                    f"{width} outputs; allowed are 1 to {min(inputs, width)}, or leave it out of "
                    "adapter.layers"
                )
            a = torch.empty(self.rank, inputs).uniform_(-1.0, 1.0, generator=generator) / math.sqrt(inputs)
            # Drawn in any case, so that A is the same whatever b_init is.
            drawn = torch.empty(width, self.rank).uniform_(-1.0, 1.0, generator=generator)
            b = torch.zeros_like(drawn) if self.begins_at_zero else drawn * self.b_init
            adapted = LoraLinear(layer, a, b, self.alpha / self.rank)
            adapted.lora_A.requires_grad_(not self.freeze_a)
            replace_module(model, layer, adapted)
        return Adapted(tuple(chosen), head)

    def merge(self, model: nn.Module) -> None:
        """See :class:`Adapter`; the product is added in float64."""
        for layer in _adapted(model).values():
            a, b = layer.lora_A.weight.detach().double(), layer.lora_B.weight.detach().double()
            merged = layer.base_layer.weight.detach().double() + layer.scale * (b @ a)
            layer.base_layer.weight = nn.Parameter(merged.float())
            replace_module(model, layer, layer.base_layer)

    def tensors(self, model: nn.Module) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """See :class:`Adapter`: by the names of PEFT's ``adapter_model.safetensors``, a frozen A too."""
        layers = _adapted(model)
        named = {f"{name}.lora_{part}" for name in layers for part in "AB"}
        found = {
            f"base_model.model.{name}": own.detach().contiguous().clone()
            for name, own in model.named_parameters()
            if own.requires_grad or name.removesuffix(".weight") in named
        }
        whole = sorted(
            {name.rpartition(".")[0] for name, own in model.named_parameters() if own.requires_grad} - named
        )
        told = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(layers),
            "modules_to_save": whole,
        }
        return found, told

    def _choose(self, model: nn.Module, head: str) -> dict[str, nn.Linear]:
        """The layers that the patterns name, in order of definition."""
        known = prunable_layers(model)
        able = {
            name: layer
            for name, layer in known.items()
            if isinstance(layer, nn.Linear) and name != head and not shares_weight(model, layer)
        }
        kind = type(model).__name__
        if not able:
            beside = f" beside its head {head}" if head else ""
            raise ModelError(
                f"adapter.name = 'lora': {kind} has no linear layer{beside}; it is for linear layers"
            )
        for pattern in self.layers:
            if any(_fits(name, pattern) for name in able):
                continue
            others = [name for name in known if _fits(name, pattern)]
            place = f"adapter.layers: {pattern!r}"
            if head and _fits(head, pattern):
                raise ModelError(f"{place} names the head, which is trained in full; leave it out")
            if others:
                linear = isinstance(known[others[0]], nn.Linear)
                what = "has no weight of its own" if linear else "is a convolution"
                raise ModelError(f"{place}: {others[0]} {what}; adapters are for linear layers that have one")
            shown = ", ".join(list(able)[:_MOST_NAMES])
            more = f" and {len(able) - _MOST_NAMES} more" if len(able) > _MOST_NAMES else ""
            near = did_you_mean(pattern, {*able, *(name.rpartition(".")[2] for name in able)})
            raise ModelError(f"{place} names no linear layer of {kind}, which has {shown}{more}{near}")
        return {name: own for name, own in able.items() if any(_fits(name, each) for each in self.layers)}


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _adapted(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
