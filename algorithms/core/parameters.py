"""The flat layout: one float32 vector holds the whole model.

First all *prunable* weights (of every convolution and linear layer), then the other trained parameters,
then the float buffers, then what a method carries beside the model, by the way it travels::

    [ prunable weights | biases, norms, ... | running means, ... | both ways | up | down ]
      0          prunable_size        trained_size         model_size            up_size  size

Loading a global model is one copy, a mask is a bool vector over the first span, global top-K is one
selection and aggregation one multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from algorithms.core.products import StrayProducts

PRUNABLE_LAYERS = (_ConvNd, nn.Linear)


@dataclass(frozen=True)
class Entry:
    """One tensor of the model and its place ``[start, stop)`` in the flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of floats."""
        return self.stop - self.start

    @property
    def span(self) -> slice:
        """The entry's place in the flat vector."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Carried:
    """Floats that travel beside the model.

    Attributes:
        size: How many.
        direction: The way they travel: down with the model, up with the update, or both.
    """

    size: int
    direction: Literal["both", "up", "down"] = "both"


@dataclass(frozen=True)
class ParameterLayout:
    """Names, shapes and offsets of the spans of the flat vector."""

    prunable: tuple[Entry, ...]
    other: tuple[Entry, ...]
    buffers: tuple[Entry, ...]
    both: tuple[Entry, ...] = ()
    up: tuple[Entry, ...] = ()
    down: tuple[Entry, ...] = ()

    @property
    def prunable_size(self) -> int:
        """|P|: number of prunable weights."""
        return self.prunable[-1].stop if self.prunable else 0

    @property
    def trained_size(self) -> int:
        """Number of trained parameters, prunable ones included."""
        return self.other[-1].stop if self.other else self.prunable_size

    @property
    def model_size(self) -> int:
        """Length of what belongs to the model."""
        return self.buffers[-1].stop if self.buffers else self.trained_size

    @property
    def up_size(self) -> int:
        """Length of what clients send; it is the first part of the flat vector."""
        return (self.up or self.both)[-1].stop if self.up or self.both else self.model_size

    @property
    def down_size(self) -> int:
        """Length of what clients are sent."""
        return self.size - sum(entry.size for entry in self.up)

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return self.down[-1].stop if self.down else self.up_size

    @property
    def carried(self) -> tuple[Entry, ...]:
        """What travels beside the model."""
        return self.both + self.up + self.down

    @property
    def trained(self) -> tuple[Entry, ...]:
        """Every trained tensor, in flat order."""
        return self.prunable + self.other

    @property
    def head(self) -> tuple[Entry, ...]:
        """The prunable layer that was defined last, which makes the outputs: its weight and its bias."""
        weight = self.prunable[-1]
        bias = weight.name.removesuffix("weight") + "bias"
        return (weight, *(entry for entry in self.other if entry.name == bias))

    @classmethod
    def of(cls, model: nn.Module, example: Tensor | None = None) -> ParameterLayout:
        """Lay out ``model``; with ``example`` a dry forward checks that every prunable layer is used.

        Args:
            model: Any module; tied weights are laid out once.
            example: An input batch, e.g. ``torch.zeros(2, 3, 32, 32)``.

        Raises:
            ValueError: A parameter or float buffer is not float32, no layer is prunable and trained, or the
                dry forward misses a prunable layer or meets one in a form that cannot be pruned.
        """
        layers = prunable_layers(model)
        weights = {id(layer.weight) for layer in layers.values()}
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not any(id(parameter) in weights for _, parameter in parameters):
            frozen = " that is trained" if layers else ""
            raise ValueError(f"the model has no convolution or linear layer{frozen}: nothing could be pruned")
        floats = [(name, b) for name, b in model.named_buffers() if b.is_floating_point()]
        for name, tensor in parameters + floats:
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype}; the flat layout holds float32 only")
        if example is not None:
            _check_layers(model, layers, example)
        prunable = _place([(n, p) for n, p in parameters if id(p) in weights], 0)
        other = _place(
            [(n, p) for n, p in parameters if id(p) not in weights], prunable[-1].stop if prunable else 0
        )
        start = (other or prunable)[-1].stop
        return cls(prunable, other, _place(floats, start))

    def carrying(self, carries: Mapping[str, Carried]) -> ParameterLayout:
        """The layout with floats of a method's own behind the model's."""
        start, spans = self.model_size, {}
        for direction in ("both", "up", "down"):
            entries = []
            for name, carried in carries.items():
                if carried.direction == direction:
                    entries.append(Entry(name, (carried.size,), start, start + carried.size))
                    start += carried.size
            spans[direction] = tuple(entries)
        return replace(self, **spans)

    def flatten(self, model: nn.Module) -> Tensor:
        """Copy the model's tensors into a new flat vector, float32[size]; what is carried begins at 0."""
        flat = torch.zeros(self.size)
        for entry, tensor in self._tensors(model):
            flat[entry.span] = tensor.detach().reshape(-1).cpu()
        return flat

    def sent_down(self, flat: np.ndarray) -> np.ndarray:
        """What clients are sent of ``flat``, float32[size]: less what goes up alone, float32[down_size]."""
        if not self.up:
            return flat
        return np.concatenate([flat[: self.up[0].start], flat[self.up_size :]])

    def received_down(self, sent: np.ndarray) -> np.ndarray:
        """The flat vector of what was sent, float32[size], 0 in what only travels up."""
        if not self.up:
            return sent
        start = self.up[0].start
        return np.insert(sent, np.full(self.up_size - start, start), np.float32(0.0))

    def bind(self, model: nn.Module, flat: Tensor) -> None:
        """Make the model's parameters and float buffers views into ``flat``, float32[size].

        What is written to ``flat`` afterwards is what the model computes with.
        """
        with torch.no_grad():
            for entry, tensor in self._tensors(model):
                tensor.data = flat[entry.span].view(entry.shape)

    def split(self, flat: Tensor, entries: Iterable[Entry] | None = None) -> dict[str, Tensor]:
        """Views of ``flat`` by name and shape, for instance to fill a plain module's ``state_dict``."""
        entries = self.trained + self.buffers if entries is None else entries
        return {entry.name: flat[entry.span].view(entry.shape) for entry in entries}

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The model's trained parameters in flat order."""
        named = dict(model.named_parameters())
        return [named[entry.name] for entry in self.trained]

    def _tensors(self, model: nn.Module) -> list[tuple[Entry, Tensor]]:
        named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return [(entry, named[entry.name]) for entry in self.trained + self.buffers]


def _place(tensors: list[tuple[str, Tensor]], start: int) -> tuple[Entry, ...]:
    entries = []
    for name, tensor in tensors:
        entries.append(Entry(name, tuple(tensor.shape), start, start + tensor.numel()))
        start += tensor.numel()
    return tuple(entries)


def prunable_layers(model: nn.Module) -> dict[str, Any]:
    """The convolutions and linear layers of ``model`` by name, in order of definition.

    A layer whose weight is a table of embeddings too is none of them: embeddings are trained dense. Nor is
    the output projection of ``nn.MultiheadAttention``: torch uses its weight without calling the layer, so
    that no method could hook into it.
    """
    uncalled = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, PRUNABLE_LAYERS) and id(layer) not in uncalled and id(layer.weight) not in tables
    }


def dry_forward(
    model: nn.Module,
    example: Tensor,
    layers: Iterable[nn.Module],
    hook: Callable[[Any, Any, Any], Any],
    *,
    gradients: bool = False,
) -> None:
    """One forward of ``example`` in evaluation mode, and with a hook on some layers.

    ``gradients`` says whether it makes a graph.
    """
    handles = [layer.register_forward_hook(hook) for layer in layers]
    was_training, fast_path = model.training, torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast path of nn.TransformerEncoderLayer, in evaluation alone, calls none of its layers.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.set_grad_enabled(gradients):
            model.eval()(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        model.train(was_training)
        for handle in handles:
            handle.remove()


def _check_layers(model: nn.Module, layers: Mapping[str, nn.Module], example: Tensor) -> None:
    used: set[nn.Module] = set()
    with StrayProducts(model, layers.values()) as stray:
        dry_forward(model, example, layers.values(), lambda module, _inputs, _output: used.add(module))
    missed = [name for name, layer in layers.items() if layer not in used]
    if missed:
        raise ValueError(
            f"a forward pass never calls {', '.join(missed)}: a layer that is not used cannot be trained, "
            "and one whose weight is used without calling the layer cannot be pruned"
        )
    if stray.found:
        raise ValueError(
            f"{', '.join(stray.found)}: a trained matrix that is multiplied with outside of any convolution "
            "or linear layer, which no method would prune; make it an nn.Linear (in place of "
            "nn.MultiheadAttention: one for queries, keys and values each, and one behind them), or freeze it"
        )
