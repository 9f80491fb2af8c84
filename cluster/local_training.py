"""Local training: one resident model plays any client, by plain SGD on one flat vector.

The model is built once; a visit copies the global vector in, runs the method's client half around the steps
and leaves the update in a flat buffer. No DataLoader, no optimizer object, no rebuild.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algorithms import Algorithm, Client, Instructions, ParameterLayout, Visit
from algorithms.layers import pruned_layers
from algorithms.masks import nonzero_mask
from cluster import seeding
from cluster.flops import LayerFlops
from cluster.workload.datasets import Split

#: Images of one evaluation step. Fixed, so that a logged accuracy never depends on the machine.
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class LocalSettings:
    """What local training takes from the configuration."""

    seed: int
    epochs: int
    batch_size: int
    weight_decay: float
    proximal: float


@dataclass(frozen=True)
class Broadcast:
    """What every actor gets for one round: one object in the store, arrays read without copying.

    Attributes:
        weights: w_t as the clients decode it, float32[size].
        exact: w_t as the server holds it, for evaluation; the same array unless the downlink is lossy.
        mask: The mask both sides hold, bool[prunable], or None.
        instructions: The method's instructions.
        lr: Learning rate of the round.
        limit: Largest magnitude an update may hold (see ``Grid``).
        samples: Samples of the whole cohort.
        period: Number of shifts of the data so far, which tells who holds what.
    """

    weights: np.ndarray
    exact: np.ndarray
    mask: np.ndarray | None
    instructions: Instructions
    lr: float
    limit: float
    samples: int
    period: int = 0


@dataclass
class Trained:
    """What a visit leaves: the update, a view that the next visit overwrites, and what was measured.

    Attributes:
        values: The update, float32[size] on the CPU, +0.0 outside the support.
        support: bool[prunable], or None for all of it.
        samples: n_i.
        steps: Local steps.
        loss: Mean training loss over the steps.
        regrown_before_cut: |{w_t = 0 and w_i != 0}| before the final cut.
        regrown: The same after it.
        deactivated: |{w_t != 0 and w_i = 0}| after it.
        flops_dense: Dense-equivalent training FLOPs.
        flops_sparse: Ideal sparse training FLOPs of each prunable layer, float64[layers].
    """

    values: np.ndarray
    support: np.ndarray | None
    samples: int
    steps: int
    loss: float
    regrown_before_cut: int
    regrown: int
    deactivated: int
    flops_dense: float
    flops_sparse: np.ndarray


class Trainer:
    """Trains any client of the federation on one resident model.

    Args:
        model: A plain module; its layers are swapped as the method asks.
        method: The method.
        settings: Local hyperparameters.
        train: The training split, images uint8 or float32 [N, C, H, W].
        device: Where the model lives.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Algorithm,
        settings: LocalSettings,
        train: Split,
        device: torch.device,
    ) -> None:
        self.method, self.settings, self.train, self.device = method, settings, train, device
        example = to_input(train.images[:2], device)
        self.module = model.to(device)
        self.layout = ParameterLayout.of(self.module, example)
        self.flops = LayerFlops.of(self.module, self.layout, example)
        method.prepare(self.module)
        self._pruning = pruned_layers(self.module)
        layout = self.layout
        self._model = torch.empty(layout.size, device=device)
        self._weights = (
            torch.empty(layout.trained_size, device=device)
            if method.reparameterised
            else self._model[: layout.trained_size]
        )
        self._gradient = torch.empty(layout.trained_size, device=device)
        self._gradient_views = list(layout.split(self._gradient, layout.trained).values())
        self._global = torch.empty(layout.size, device=device)
        layout.bind(self.module, self._model)
        self._parameters = layout.parameters(self.module)
        # Integer buffers (BatchNorm's counter) are restored at each start and never averaged.
        self._counters = {
            name: buffer.clone()
            for name, buffer in self.module.named_buffers()
            if not buffer.is_floating_point()
        }

    def visit(self, client: int, rows: np.ndarray, sparsity: float, broadcast: Broadcast) -> Trained:
        """Play one client: load w_t, train locally, turn the result into the update.

        Args:
            client: Index of the client, for its random streams.
            rows: The client's rows of the training split, int64[n_i].
            sparsity: The client's target sparsity.
            broadcast: The round's global model and instructions.
        """
        instructions, settings = broadcast.instructions, self.settings
        stream = (settings.seed, instructions.round, client)
        torch.manual_seed(seeding.integer(stream[0], "torch", *stream[1:]))
        order = seeding.generator(stream[0], "batches", *stream[1:])
        self._load(broadcast.weights)
        mask = None if broadcast.mask is None else _from_read_only(broadcast.mask).to(self.device)
        images = to_input(self.train.images[rows], self.device)
        labels = torch.from_numpy(self.train.labels[rows]).to(self.device)
        samples, batch = len(rows), settings.batch_size
        epochs = instructions.epochs or settings.epochs
        layout = self.layout
        visit = Visit(
            layout=layout,
            instructions=instructions,
            sparsity=sparsity,
            global_weights=self._global,
            mask=mask,
            weights=self._weights,
            model=self._model,
            gradient=self._gradient,
            module=self.module,
            rng=seeding.generator(stream[0], "method", *stream[1:]),
            epochs=epochs,
            steps_per_epoch=-(-samples // batch),
        )
        client_half = self.method.client(self.method, visit)
        received = nonzero_mask(self._global[: layout.prunable_size])
        density_received = self._layer_density(received)

        extra_samples = 0

        def one_more_batch() -> None:
            nonlocal extra_samples
            extra_samples += min(batch, samples)
            chosen = torch.from_numpy(order.permutation(samples)[:batch]).to(self.device)
            self._backward(client_half, images[chosen], labels[chosen])

        visit.batch_gradient = one_more_batch
        self.module.train()
        client_half.begin()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for _ in range(epochs):
            shuffled = torch.from_numpy(order.permutation(samples)).to(self.device)
            for start in range(0, samples, batch):
                chosen = shuffled[start : start + batch]
                loss_sum += self._backward(client_half, images[chosen], labels[chosen])
                self._sgd_step(broadcast.lr)
                visit.step += 1
                client_half.after_step()
        before_cut = nonzero_mask(visit.prunable)
        support = client_half.finish()
        result = visit.prunable
        if self.method.uploads_differences:
            result = result + self._global[: layout.prunable_size]
        after_cut = nonzero_mask(result)
        values = self._model
        if self.method.reparameterised:
            # The upload is w, not theta; the float buffers are already in place.
            values[: layout.trained_size] = self._weights
        density_training = client_half.training_density(self._layer_density(before_cut))
        activations = np.array(
            [
                self._pruning[entry.name].kept if entry.name in self._pruning else 1.0
                for entry in layout.prunable
            ]
        )
        first = min(batch, samples)
        return Trained(
            values=values.cpu().numpy(),
            support=None if support is None else support.cpu().numpy(),
            samples=samples,
            steps=visit.step,
            loss=float(loss_sum) / visit.step,
            regrown_before_cut=int(torch.count_nonzero(before_cut & ~received)),
            regrown=int(torch.count_nonzero(after_cut & ~received)),
            deactivated=int(torch.count_nonzero(received & ~after_cut)),
            flops_dense=self.flops.dense(samples * epochs + extra_samples),
            flops_sparse=self.flops.sparse(first, density_received, activations)
            + self.flops.sparse(samples * epochs - first + extra_samples, density_training, activations),
        )

    def evaluate(
        self, effective: np.ndarray, split: Split, start: int, stop: int
    ) -> tuple[np.ndarray, float]:
        """Correct predictions and summed cross-entropy of the plain module on ``split[start:stop]``.

        Args:
            effective: theta and the float buffers, float32[size].
            split: What to evaluate on.
            start: First row.
            stop: Row after the last.

        Returns:
            Correct predictions in every class, int64[classes], and the sum.
        """
        self._model.copy_(_from_read_only(effective))
        self.module.eval()
        correct, loss = np.zeros(0, np.int64), 0.0
        with torch.no_grad():
            for first in range(start, stop, EVALUATION_BATCH):
                rows = slice(first, min(first + EVALUATION_BATCH, stop))
                labels = torch.from_numpy(np.asarray(split.labels[rows])).to(self.device)
                logits = self.module(to_input(split.images[rows], self.device))
                found = labels[logits.argmax(1) == labels].cpu().numpy()
                counts = np.bincount(found, minlength=logits.shape[1])
                correct = counts + correct if len(correct) else counts
                loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        return correct, loss

    def _load(self, weights: np.ndarray) -> None:
        received = _from_read_only(weights)
        self._global.copy_(received)
        self._model.copy_(self._global)
        if self.method.reparameterised:
            self._weights.copy_(self._global[: self.layout.trained_size])
        buffers = dict(self.module.named_buffers())
        for name, value in self._counters.items():
            buffers[name].copy_(value)

    def _backward(self, client_half: Client, images: Tensor, labels: Tensor) -> Tensor:
        client_half.before_forward()
        loss = F.cross_entropy(self.module(images), labels)
        gradients = torch.autograd.grad(loss, self._parameters)
        torch._foreach_copy_(self._gradient_views, gradients)
        client_half.after_backward()
        return loss.detach()

    def _sgd_step(self, lr: float) -> None:
        settings, gradient = self.settings, self._gradient
        if settings.weight_decay:
            gradient.add_(self._weights, alpha=settings.weight_decay)
        if settings.proximal:
            # Gradient of mu/2 |w - w_t|^2 (FedProx, arXiv 1812.06127).
            gradient.add_(self._weights, alpha=settings.proximal)
            gradient.sub_(self._global[: self.layout.trained_size], alpha=settings.proximal)
        self._weights.add_(gradient, alpha=-lr)

    def _layer_density(self, nonzero: Tensor) -> np.ndarray:
        kept = nonzero.cpu().numpy()
        return np.array([np.count_nonzero(kept[entry.span]) / entry.size for entry in self.layout.prunable])


def to_input(images: np.ndarray, device: torch.device) -> Tensor:
    """Model input of stored images: uint8 pixels as (x / 255 - 0.5) / 0.5, floats as they are."""
    stored = _from_read_only(np.ascontiguousarray(images)).to(device)
    if stored.dtype == torch.uint8:
        return stored.float().div_(255.0).sub_(0.5).div_(0.5)
    return stored.float()


def _from_read_only(array: np.ndarray) -> Tensor:
    """A tensor over an array from the object store or a memory map; it is only ever read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
