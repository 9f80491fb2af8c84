"""Narrow models inside a wide one: some units of every hidden layer, and the weights that join them.

Zeros in the wide model are the narrow model exactly where what is left out of a layer reaches nothing that is
kept: biases, gains and shifts of its units are 0 as well, norms do not mix it with the rest, and flattening
keeps the values of a unit together. A model that is not so is refused by the name of its layer.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.parameters import ParameterLayout, dry_forward, prunable_layers


@dataclass(frozen=True)
class Units:
    """Whose units the first two dimensions of a tensor are; 0: of none, as the inputs and the classes.

    Attributes:
        rows: Width of the hidden layer that the first dimension belongs to.
        columns: Width of the one that the second dimension belongs to.
        repeats: Entries of the second dimension a unit: the pixels of a flattened channel.
    """

    rows: int = 0
    columns: int = 0
    repeats: int = 1


@dataclass(frozen=True)
class UnitLayout(ParameterLayout):
    """A layout that knows the hidden units. Layers of one width keep the same units, as residual sums ask.

    Attributes:
        units: Of every trained tensor.
        blocks: By width, into how many blocks of neighbouring units a layer is cut: its units, or where a
            GroupNorm follows its groups.
    """

    units: tuple[Units, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def over(cls, layout: ParameterLayout, model: nn.Module, example: Tensor) -> UnitLayout:
        """Find the units of a plain model by one forward of ``example``, and check that they can be left out.

        Raises:
            ValueError: Zeros in it are no narrower model; names the layer.
        """
        units, blocks = _units_of(model, example)
        known = {each.name: getattr(layout, each.name) for each in fields(layout)}
        missing = [entry.name for entry in layout.trained if entry.name not in units]
        if missing:
            raise ValueError(f"{missing[0]}: not known which of it belongs to which unit of a hidden layer")
        found = cls(
            **known, units=tuple(units[entry.name] for entry in layout.trained), blocks=tuple(blocks.items())
        )
        _check(model, example, found, units)
        return found

    def part(self, kept: Mapping[int, np.ndarray]) -> Tensor:
        """The weights that join some units, bool[trained]; ``kept`` blocks by width, bool[blocks]."""
        pieces = []
        own = {width: np.repeat(kept[width], width // blocks) for width, blocks in self.blocks}
        for entry, units in zip(self.trained, self.units, strict=True):
            piece = own[units.rows] if units.rows else np.ones(entry.shape[0], bool)
            if len(entry.shape) > 1:
                columns = np.repeat(own[units.columns], units.repeats) if units.columns else True
                piece = np.outer(piece, np.broadcast_to(columns, entry.shape[1])).reshape(-1)
                piece = np.repeat(piece, math.prod(entry.shape[2:]))
            pieces.append(piece)
        return torch.from_numpy(np.concatenate(pieces))

    def counts(self, ratio: float) -> dict[int, int]:
        """Blocks that a model of ``ratio`` times the width keeps, by width: rounded up, at least one."""
        return {width: max(1, math.ceil(ratio * blocks - 1e-7)) for width, blocks in self.blocks}

    def weights(self, ratio: float) -> int:
        """Prunable weights of such a model."""
        blocks = dict(self.blocks)
        own = {width: width // blocks[width] * count for width, count in self.counts(ratio).items()}
        total = 0
        for entry, units in zip(self.prunable, self.units, strict=False):
            rows, columns = own.get(units.rows, entry.shape[0]), entry.shape[1]
            columns = own[units.columns] * units.repeats if units.columns else columns
            total += rows * columns * math.prod(entry.shape[2:])
        return total


@lru_cache(maxsize=256)
def widest(layout: UnitLayout, share: float) -> float:
    """The largest ratio of widths whose model has at most ``share`` of the prunable weights."""
    ratios = sorted({i / blocks for _, blocks in layout.blocks for i in range(1, blocks + 1)})
    limit = share * layout.prunable_size * (1.0 + 1e-9)
    return ratios[max(0, bisect_right(ratios, limit, key=layout.weights) - 1)] if ratios else 1.0


@dataclass(frozen=True, kw_only=True)
class UnitMethod(Algorithm):
    """A method whose clients hold some units of every hidden layer."""

    confined = True
    submodel_known = True
    unequal_sparsity = True
    asynchronous = True

    sparsity: float = hyperparameter(
        0.0,
        "share of the model that a client does not hold, unless its tier has its own",
        low=0.0,
        high=0.9999,
    )

    def lay_out(self, layout: ParameterLayout, model: nn.Module, example: Tensor) -> ParameterLayout:
        """See :class:`Algorithm`: the model's hidden units."""
        return UnitLayout.over(super().lay_out(layout, model, example), model, example)


@dataclass(frozen=True, kw_only=True)
class Slices(UnitMethod):
    """A method whose clients hold neighbouring units of every hidden layer."""

    share_of: str = hyperparameter(
        "weights",
        "what 1 - sparsity is a share of: the model's `weights`, of which clients hold the widest slice that "
        "fits, or its `width`, the units of every hidden layer",
        choices=("weights", "width"),
    )

    def ratio(self, budget: float, layout: UnitLayout) -> float:
        """How many times as wide as the whole a budget's model is."""
        return budget if self.share_of == "width" else widest(layout, budget)

    def submodel(
        self, weights: Tensor, told: Instructions, place: int | None, budget: float, layout: ParameterLayout
    ) -> Tensor | None:
        """See :class:`Algorithm`."""
        assert isinstance(layout, UnitLayout)
        return self.slice(self.ratio(budget, layout), self.first(told), layout)

    def slice(self, ratio: float, first: int, layout: UnitLayout) -> Tensor:
        """The part of ``ratio`` times the width that begins with a block, bool[trained]."""
        blocks, kept = dict(layout.blocks), {}
        for width, count in layout.counts(ratio).items():
            kept[width] = np.zeros(blocks[width], bool)
            kept[width][(first + np.arange(count)) % blocks[width]] = True
        return layout.part(kept)

    def first(self, told: Instructions) -> int:
        """The first block of a slice; behind the last one it goes on with the first."""
        return 0


# ------------------------------------------------------------------------------------ the units of a model


def _units_of(model: nn.Module, example: Tensor) -> tuple[dict[str, Units], dict[int, int]]:
    """The units of every tensor by name, and the blocks of every width."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = prunable_layers(model)
    called: dict[str, bool] = {}  # by name, in the order of calls: whether its inputs are those of the model
    by_layer = {layer: name for name, layer in layers.items()}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        called.setdefault(by_layer[layer], not inputs[0].requires_grad)

    dry_forward(model, example, layers.values(), note, gradients=True)
    units: dict[str, Units] = {}
    blocks: dict[int, int] = {}
    before, last = 0, list(called)[-1]
    for name, is_first in called.items():
        layer = layers[name]
        if getattr(layer, "groups", 1) != 1 or isinstance(layer, _ConvTransposeNd):
            raise ValueError(f"{name}: units cannot be left out of a grouped or a transposed convolution")
        width, given = layer.weight.shape[:2]
        is_first = is_first or not before
        columns, repeats = (0, 1) if is_first else (given, 1)
        if not is_first and given != before and given not in blocks:
            columns, repeats = before, given // before
            if given % before:
                raise ValueError(f"{name}: its {given} inputs are not those of the {before} units before it")
        rows = 0 if name == last else width
        units[names[id(layer.weight)]] = Units(rows, columns, repeats)
        if layer.bias is not None:
            units[names[id(layer.bias)]] = Units(rows)
        if rows:
            blocks.setdefault(rows, rows)
            before = rows
    for name, module in model.named_modules():
        if isinstance(module, _NormBase | nn.GroupNorm):
            width = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
            if getattr(module, "track_running_stats", False):
                raise ValueError(
                    f"{name}: its running statistics are averaged over clients that do not hold all of its "
                    "units; use GroupNorm (model.norm=group)"
                )
            if width not in blocks:
                raise ValueError(f"{name}: it normalises {width} values, which no hidden layer puts out")
            groups = getattr(module, "num_groups", width)
            blocks[width] = math.gcd(blocks[width], groups)
            units |= {f"{name}.{own}": Units(width) for own, _ in module.named_parameters(recurse=False)}
    return units, blocks


def _check(model: nn.Module, example: Tensor, layout: UnitLayout, units: Mapping[str, Units]) -> None:
    """Leave every second block out and put noise in its place: no layer may notice."""
    model = copy.deepcopy(model)
    kept = {width: np.arange(blocks) % 2 == 0 for width, blocks in layout.blocks}
    generator = torch.Generator().manual_seed(0)
    flat = layout.flatten(model)
    flat[: layout.trained_size] = torch.randn(layout.trained_size, generator=generator) * layout.part(kept)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = prunable_layers(model)
    by_layer: dict[nn.Module, str] = {layer: name for name, layer in layers.items()}
    weights = {name: names[id(layer.weight)] for name, layer in layers.items()}
    layout.bind(model, flat.to(example.device))

    def inputs_met(scale: float) -> dict[str, Tensor]:
        met: dict[str, Tensor] = {}

        def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            name = by_layer.get(layer)
            if name is None:
                met["its output"] = output
                return None
            own, dimension = units[weights[name]], -1 if isinstance(layer, nn.Linear) else 1
            if own.columns:
                columns = np.repeat(_spread(kept, own.columns), own.repeats)
                met.setdefault(name, inputs[0].index_select(dimension, _positions(columns, output)))
            if not own.rows:
                return None
            absent = torch.zeros(own.rows, device=output.device)
            absent[_positions(~_spread(kept, own.rows), output)] = scale
            shape = [1] * output.dim()
            shape[dimension] = own.rows
            return output + absent.view(shape)

        dry_forward(model, example, [*layers.values(), model], hook)
        return met

    quiet, noisy = inputs_met(0.0), inputs_met(3.0)
    for name, value in quiet.items():
        if not torch.allclose(value, noisy[name], rtol=1e-4, atol=1e-4):
            raise ValueError(
                f"{name}: it depends on units that a narrower model leaves out; between two layers their "
                "values must not mix with those of others (LayerNorm, attention, groups of GroupNorm), and a "
                "flattened unit's must lie side by side"
            )


def _spread(kept: Mapping[int, np.ndarray], width: int) -> np.ndarray:
    """Which of a layer's units are kept, bool[width]."""
    return np.repeat(kept[width], width // len(kept[width]))


def _positions(flags: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(flags)).to(like.device)
