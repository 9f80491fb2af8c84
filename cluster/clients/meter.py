"""Bills the passes that a method runs through the model by itself, layer by layer as they happen.

A layer's forward pass, its input gradient and its weight gradient cost the same each, and each is billed when
it is computed: a forward pass without gradients a third of a training pass, an attack's forward pass and
input gradient two thirds. A frozen layer has no weight gradient. A part of the model costs its layers alone.
Gradients of gradients are not counted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from algorithms import ParameterLayout
from algorithms.core.parameters import prunable_layers
from cluster.clients.billing import Bill
from cluster.flops import call_flops


class Meter:
    """Hooks on the prunable layers of one model, from :meth:`start` to :meth:`stop`."""

    def __init__(self, module: nn.Module, layout: ParameterLayout) -> None:
        places = {entry.name: place for place, entry in enumerate(layout.prunable)}
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._layers = [
            (layer, places.get(names[id(layer.weight)]))  # None: it is frozen
            for layer in prunable_layers(module).values()
            if id(layer.weight) in names
        ]
        self._handles: list[RemovableHandle] = []
        # By weight: number of the backward pass, FLOPs of the calls that it came through, ideal sparse ones.
        self._reached: dict[int, tuple[int, float, float]] = {}
        self.paused = False  # during passes that are billed as a whole

    def start(self, bill: Bill) -> None:
        """Bill from now on; calling it again changes nothing."""
        if self._handles:
            return
        self._bill = bill
        for layer, place in self._layers:
            self._handles.append(layer.register_forward_hook(partial(self._called, place)))
            if place is not None:
                gradient = partial(self._weight_gradient, place, id(layer.weight))
                self._handles.append(layer.weight.register_hook(gradient))

    def stop(self) -> None:
        """The visit is over."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._reached, self.paused = [], {}, False

    def _called(self, place: int | None, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given, weight = inputs[0], layer.weight
        if self.paused and isinstance(weight, nn.Parameter):
            return  # but for other weights, which torch.func.functional_call puts there
        flops = call_flops(layer, given, output)
        density = 1.0 if place is None else int(torch.count_nonzero(weight)) / weight.numel()
        sparse = flops * density
        self._bill.own(place, flops, sparse)
        if not output.requires_grad:
            return
        backward = [-1]  # the backward pass that came through this call last

        def output_gradient(gradient: Tensor) -> None:
            backward[0] = number = _backward_number()
            kept = layer.pruning.kept if layer.training and hasattr(layer, "pruning") else 1.0
            last, before, sparse_before = self._reached.get(id(weight), (number, 0.0, 0.0))
            if last != number:
                before = sparse_before = 0.0
            self._reached[id(weight)] = (number, before + flops, sparse_before + flops * kept)

        def input_gradient(gradient: Tensor) -> None:
            if backward[0] == _backward_number():
                self._bill.own(place, flops, sparse)

        output.register_hook(output_gradient)
        if given.requires_grad:
            given.register_hook(input_gradient)
        if weight.requires_grad and not isinstance(weight, nn.Parameter):
            # Other weights in the layer's place.
            weight.register_hook(partial(self._weight_gradient, place, id(weight)))

    def _weight_gradient(self, place: int | None, weight: int, gradient: Tensor) -> None:
        # Computed once a backward pass, for all calls that it came through.
        number, flops, sparse = self._reached.pop(weight, (-1, 0.0, 0.0))
        if number == _backward_number():
            self._bill.own(place, flops, sparse)


def _backward_number() -> int:
    """Number of the backward pass that is going on, as torch's own checkpoints tell them apart."""
    return int(torch._C._current_graph_task_id())
