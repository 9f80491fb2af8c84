"""A naive federated reference: FedAvg, and hooks for every other method.

The reference shares no code with the product's methods, trainer, masks or aggregation. Weights are dicts of
tensors by name; there is no flat vector, no wire, no grid, no custom autograd; local training is a
``torch.optim.SGD`` over leaf tensors and the module is called with ``torch.func.functional_call``. Shared is
only what *defines* the experiment: configuration, data arrays, partition, the plain model and ``seeding``.

A method's reference is a subclass of :class:`NaiveFederation` that overrides a few hooks::

    class NaiveTopK(NaiveFederation):
        def upload(self, weights, received, visit):
            mask = self.largest(weights, keep=...)
            return self.masked(weights, mask), mask

    from tests.tiny_experiment import assert_same, run_inline, tiny_federation

    config = tiny_federation(tmp_path, algorithm={"name": "topk", "sparsity": 0.8})
    assert_same(run_inline(config, tmp_path / "run"), NaiveTopK(config).run())
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cluster import seeding
from cluster.configuration.config import Config
from cluster.federation import Federation
from tests.tiny_experiment import Mask, Weights


@dataclass
class NaiveVisit:
    """One client's local training, as the hooks see it.

    Attributes:
        round: Round, from 1 (or 0 for a stage before it).
        client: Index of the client.
        received: The global weights the client started from.
        images, labels: The client's samples.
        order: The stream of batch permutations (contract of ``Trainer.visit``).
        rng: The client's stream for the method's own randomness.
        epochs: Local epochs.
        steps_per_epoch: Local steps an epoch.
        step: Steps done.
        thresholds: Activation thresholds by layer name, where the first batch's are reused.
        notes: Anything a method wants to remember during the visit.
    """

    round: int
    client: int
    received: Weights
    images: Tensor
    labels: Tensor
    order: np.random.Generator
    rng: np.random.Generator
    epochs: int
    steps_per_epoch: int
    step: int = 0
    thresholds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class NaiveFederation:
    """FedAvg, with hooks for every other method; see the module's docstring.

    Attributes:
        options: Hyperparameters of the method (``config.algorithm``, with the method's defaults).
        trained: Names of the trained parameters, in the module's order.
        prunable: Names of the weights of convolutions and linear layers, in the module's order.
        uploads: (round, client) -> (upload, mask by name or None), recorded by :meth:`run`.
        history: Global weights after each round, the initial ones first.
        mask: The mask both sides hold; methods that have one set it.
    """

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.options = config.method
        federation = Federation.of(config)
        self.module = copy.deepcopy(federation.model).train()
        self.partition = federation.partition
        # The documented input scaling: [0, 255] to [0, 1] to [-1, 1].
        self.images = (torch.tensor(np.array(federation.dataset.train.inputs)).float() / 255.0 - 0.5) / 0.5
        self.labels = torch.tensor(np.array(federation.dataset.train.targets))
        self.layers = {
            f"{name}.weight": layer
            for name, layer in self.module.named_modules()
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))
        }
        self.trained = [name for name, p in self.module.named_parameters() if p.requires_grad]
        self.prunable = [name for name in self.trained if name in self.layers]
        self.mask: Mask | None = None
        self.moments: list[Weights] = []
        self.uploads: dict[tuple[int, int], tuple[Weights, Mask | None]] = {}
        self.history: list[Weights] = []
        self.visit: NaiveVisit | None = None
        for name in self.prunable:
            layer = self.layers[name]
            layer.forward = partial(self._layer_forward, name, layer)

    # ---- what a method overrides

    def initial(self, weights: Weights) -> Weights:
        """Global weights before round 1, from the common initialisation."""
        return weights

    def local_epochs(self, round_number: int) -> int:
        """Local epochs of a round."""
        return self.config.local.epochs

    def begin(self, weights: Weights, visit: NaiveVisit) -> None:
        """Once, after the global weights were copied; may write ``weights``."""

    def before_forward(self, weights: Weights, visit: NaiveVisit) -> None:
        """Before each forward pass; may write ``weights`` in place."""

    def effective(self, weights: Weights, visit: NaiveVisit) -> Weights:
        """What the module computes with, differentiable in ``weights``."""
        return weights

    def activation_density(self, name: str, weight: Tensor, visit: NaiveVisit) -> float | None:
        """Share of a layer's input that its weight gradient sees; None or 1 for all of it."""
        return None

    def reuses_threshold(self, name: str) -> bool:
        """Whether the layer's activation threshold is the first batch's."""
        return False

    def change_gradients(self, weights: Weights, gradients: Weights, visit: NaiveVisit) -> None:
        """After the backward pass, before weight decay and the proximal term; may write ``gradients``."""

    def after_step(self, weights: Weights, visit: NaiveVisit) -> None:
        """After each SGD step (``visit.step`` counts it); may write ``weights``."""

    def upload(self, weights: Weights, received: Weights, visit: NaiveVisit) -> tuple[Weights, Mask | None]:
        """What is sent: values by name (0 outside the mask), and the support by name or None for all."""
        return weights, None

    def server(
        self,
        weights: Weights,
        uploads: dict[int, Weights],
        masks: dict[int, Mask | None],
        sizes: dict[int, int],
        round_number: int,
    ) -> Weights:
        """The next global weights."""
        return self.server_step(weights, self.mean(uploads, sizes))

    # ---- the loop

    def run(self, rounds: int | None = None) -> NaiveFederation:
        """Train; returns itself, with ``history`` and ``uploads`` filled."""
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        start = {name: t.detach().clone() for name, t in tensors.items() if t.is_floating_point()}
        weights = self.initial(start)
        self.history = [_copy(weights)]
        for round_number in range(1, (rounds or self.config.rounds) + 1):
            weights = self.one_round(weights, round_number)
            self.history.append(_copy(weights))
        return self

    def one_round(self, weights: Weights, round_number: int) -> Weights:
        """Cohort, local training of each client, server."""
        uploads: dict[int, Weights] = {}
        masks: dict[int, Mask | None] = {}
        sizes: dict[int, int] = {}
        for client in self.cohort(round_number):
            uploads[client], masks[client] = self.train_client(weights, client, round_number)
            sizes[client] = len(self.partition.client(client))
            mask = masks[client]
            self.uploads[round_number, client] = (
                _copy(uploads[client]),
                None if mask is None else _copy(mask),
            )
        return self.server(weights, uploads, masks, sizes, round_number)

    def cohort(self, round_number: int) -> list[int]:
        """The clients of a round, in ascending order."""
        rng = seeding.generator(self.config.seed, "cohort", round_number)
        chosen = rng.choice(self.config.partition.clients, size=self.config.cohort, replace=False)
        return sorted(int(client) for client in chosen)

    def train_client(
        self, global_weights: Weights, client: int, round_number: int
    ) -> tuple[Weights, Mask | None]:
        """Plain SGD over shuffled batches; every difference between methods is a hook."""
        settings, seed = self.config.local, self.config.seed
        rows = np.array(self.partition.client(client))
        torch.manual_seed(seeding.integer(seed, "torch", round_number, client))
        samples = len(rows)
        visit = self.visit = NaiveVisit(
            round=round_number,
            client=client,
            received=_copy(global_weights),
            images=self.images[rows],
            labels=self.labels[rows],
            order=seeding.generator(seed, "batches", round_number, client),
            rng=seeding.generator(seed, "method", round_number, client),
            epochs=self.local_epochs(round_number),
            steps_per_epoch=math.ceil(samples / settings.batch_size),
        )
        weights = _copy(global_weights)
        self.begin(weights, visit)
        leaves = [weights[name].requires_grad_() for name in self.trained]
        sgd = torch.optim.SGD(
            leaves, lr=self.learning_rate(max(1, round_number)), weight_decay=settings.weight_decay
        )
        for _ in range(visit.epochs):
            order = visit.order.permutation(samples)
            for first in range(0, samples, settings.batch_size):
                batch = order[first : first + settings.batch_size]
                gradients = self.gradients(weights, visit.images[batch], visit.labels[batch], visit)
                for name, leaf in zip(self.trained, leaves, strict=True):
                    leaf.grad = gradients[name]
                    if settings.proximal:
                        leaf.grad += settings.proximal * (leaf.detach() - visit.received[name])
                sgd.step()
                visit.step += 1
                with torch.no_grad():
                    self.after_step(weights, visit)
        trained = _copy(weights)
        return self.upload(trained, visit.received, visit)

    def gradients(self, weights: Weights, images: Tensor, labels: Tensor, visit: NaiveVisit) -> Weights:
        """Gradients of the cross-entropy by name, after ``before_forward`` and ``change_gradients``."""
        with torch.no_grad():
            self.before_forward(weights, visit)
        leaves = {name: weights[name] for name in self.trained}
        # Float buffers are passed in as they are, so BatchNorm moves them; its counter is a throw-away copy.
        counters = {n: b.clone() for n, b in self.module.named_buffers() if not b.is_floating_point()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        tensors = {**weights, **self.effective(weights, visit), **counters}
        loss = F.cross_entropy(functional_call(self.module, tensors, (images,)), labels)
        found = torch.autograd.grad(loss, list(leaves.values()))
        gradients = dict(zip(leaves, (gradient.clone() for gradient in found), strict=True))
        with torch.no_grad():
            self.change_gradients(weights, gradients, visit)
        return gradients

    def one_more_gradient(self, weights: Weights, visit: NaiveVisit) -> Weights:
        """Gradients on one more batch, without a step: the next permutation's first batch (FedDST)."""
        batch = visit.order.permutation(len(visit.labels))[: self.config.local.batch_size]
        return self.gradients(weights, visit.images[batch], visit.labels[batch], visit)

    def learning_rate(self, round_number: int) -> float:
        """lr_final after ``lr_horizon`` rounds of one constant factor each, and falling on after them."""
        local = self.config.local
        if local.lr_final is None:
            return local.lr
        horizon = local.lr_horizon or self.config.rounds
        factor = math.exp((math.log(local.lr_final) - math.log(local.lr)) / horizon)
        rate = local.lr
        for _ in range(round_number):
            rate *= factor
        return rate

    # ---- the server's arithmetic

    def mean(self, uploads: dict[int, Weights], sizes: dict[int, int]) -> Weights:
        """sum n_i w_i / sum n_i, summed one after the other in float64; an absent weight is 0."""
        clients = list(uploads)
        total = sum(sizes[client] for client in clients)
        return {
            name: (sum(sizes[c] * uploads[c][name].double() for c in clients) / total).float()
            for name in uploads[clients[0]]
        }

    def masked_mean(
        self, uploads: dict[int, Weights], masks: dict[int, Mask | None], sizes: dict[int, int]
    ) -> Weights:
        """sum n_i m_i w_i / sum n_i m_i on prunable weights (0 where nobody holds one), else the mean."""
        result = self.mean(uploads, sizes)
        for name in self.prunable:
            top = torch.zeros_like(result[name], dtype=torch.float64)
            bottom = torch.zeros_like(top)
            for client, values in uploads.items():
                mask = masks[client]
                held = torch.ones_like(top) if mask is None else mask[name].double()
                top += sizes[client] * held * values[name].double()
                bottom += sizes[client] * held
            result[name] = torch.where(bottom > 0, top / bottom.clamp(min=1.0), 0.0).float()
        return result

    def server_step(self, weights: Weights, mean: Weights) -> Weights:
        """The configured server optimizer on the trained parameters; float buffers take the mean."""
        optimizer = self.config.build_server()
        name_of = self.config.server.name
        result = dict(mean)
        first = self.moments[0] if self.moments else {}
        second = self.moments[1] if len(self.moments) > 1 else {}
        new_first: Weights = {}
        new_second: Weights = {}
        for name in self.trained:
            delta = mean[name].double() - weights[name].double()
            if name_of == "fedavg":
                new_first[name] = delta + optimizer.momentum * first.get(name, torch.zeros_like(delta))
                result[name] = (weights[name].double() + optimizer.lr * new_first[name]).float()
                continue
            before = second.get(name, torch.full_like(delta, optimizer.tau**2))
            kept = optimizer.momentum * first.get(name, torch.zeros_like(delta))
            new_first[name] = kept + (1 - optimizer.momentum) * delta
            if name_of == "fedadagrad":
                new_second[name] = before + delta**2
            elif name_of == "fedadam":
                new_second[name] = optimizer.beta2 * before + (1 - optimizer.beta2) * delta**2
            else:
                new_second[name] = before - (1 - optimizer.beta2) * delta**2 * torch.sign(before - delta**2)
            step = optimizer.lr * new_first[name] / (new_second[name] ** 0.5 + optimizer.tau)
            result[name] = (weights[name].double() + step).float()
        self.moments = [new_first, new_second]
        return result

    # ---- masks, one weight at a time

    def largest(self, scores: Weights, keep: int, names: list[str] | None = None) -> Mask:
        """The ``keep`` largest |score| over ``names`` together (default: all prunable); ties: first wins.

        A stable sort of (magnitude, position) pairs: slow, and nothing can go wrong.
        """
        names = self.prunable if names is None else names
        magnitudes = [(abs(v), n, i) for n in names for i, v in enumerate(scores[n].flatten().tolist())]
        ranked = sorted(range(len(magnitudes)), key=lambda j: -magnitudes[j][0])
        mask = {name: torch.zeros(scores[name].numel(), dtype=torch.bool) for name in names}
        for j in ranked[:keep]:
            _, name, index = magnitudes[j]
            mask[name][index] = True
        return {name: mask[name].view(scores[name].shape) for name in names}

    def kept_count(self, sparsity: float, names: list[str] | None = None) -> int:
        """round((1 - s) |P|) over ``names``."""
        names = self.prunable if names is None else names
        return round((1 - sparsity) * sum(dict(self.module.named_parameters())[n].numel() for n in names))

    def masked(self, weights: Weights, mask: Mask) -> Weights:
        """The weights with 0 outside the mask; tensors that the mask does not name stay."""
        return {
            name: torch.where(mask[name], value, torch.zeros(())) if name in mask else value
            for name, value in weights.items()
        }

    # ---- activation pruning, by autograd alone

    def _layer_forward(self, name: str, layer: nn.Module, inputs: Tensor) -> Tensor:
        weight = layer.weight
        assert self.visit is not None
        density = self.activation_density(name, weight.detach(), self.visit)
        if density is None or density >= 1.0 or not self.module.training:
            return _apply(layer, inputs, weight, layer.bias)
        if not self.reuses_threshold(name) or name not in self.visit.thresholds:
            count = max(1, math.ceil(density * inputs.numel()))
            ranked = sorted((abs(value) for value in inputs.detach().flatten().tolist()), reverse=True)
            self.visit.thresholds[name] = ranked[count - 1]
        threshold = self.visit.thresholds[name]
        pruned = torch.where(inputs.abs() >= threshold, inputs, torch.zeros(())).detach()
        # The value is the exact forward; the input's gradient goes through the first term, the weight's
        # through the second, whose value is zero.
        through_weight = _apply(layer, pruned, weight, None)
        return _apply(layer, inputs, weight.detach(), layer.bias) + (through_weight - through_weight.detach())


def _apply(layer: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(inputs, weight, bias)
    convolve: Callable[..., Tensor] = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    return convolve(inputs, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
