"""Local training: one resident model plays any client, by plain SGD on one flat vector.

The model is built once; a visit copies the global vector in, runs the method's client half around the steps
and leaves the update in a flat buffer. No DataLoader, no optimizer object, no rebuild.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from algorithms import Algorithm, Attack, Client, ParameterLayout, Pixels, Visit
from algorithms.core.client import Loss
from algorithms.core.layers import pruned_layers
from algorithms.core.masks import count_beyond
from cluster import seeding
from cluster.clients.adversary import Adversary
from cluster.clients.augmentation import Augmentation
from cluster.clients.billing import Bill
from cluster.clients.local_steps import LocalSettings, LocalSteps, layer_density
from cluster.clients.meter import Meter
from cluster.clients.passes import EagerPasses, GraphPasses, Passes, arithmetic
from cluster.clients.pooling import quicken_pools
from cluster.clients.transfers import ClientData, Staging
from cluster.exchange import Broadcast
from cluster.flops import LayerFlops, held_shares
from cluster.measured import Measured
from cluster.transport.downlink import Part
from cluster.workload.datasets import Split
from cluster.workload.inputs import pixels_of, to_input
from cluster.workload.objectives import Classification, Objective, Sums, added

#: Samples of one evaluation step by kind of device; not by its size, so that machines of a kind log the same.
#: On a CPU the activations of more do not stay in its cache: 256 at once take ResNet-18 a third longer.
EVALUATION_BATCH = {"cpu": 64, "cuda": 256}


@dataclass
class Trained:
    """What a visit leaves: the update, a view that the next visit overwrites, and what was measured.

    Attributes:
        values: The update, float32[size] on the CPU, +0.0 outside the support.
        support: bool[prunable], or None for all of it.
        measured: What was measured.
        kept: What the client keeps for its next visit, float32 arrays by name.
        kept_if_late: What it keeps instead where its update is late, if that differs.
        marks: Positions that it names beside the update, bool[prunable], or None.
    """

    values: np.ndarray
    support: np.ndarray | None
    measured: Measured
    kept: dict[str, np.ndarray]
    kept_if_late: dict[str, np.ndarray]
    marks: np.ndarray | None = None


class Trainer:
    """Trains any client of the federation on one resident model.

    Args:
        model: A plain module; its layers are swapped as the method asks.
        method: The method.
        settings: Local hyperparameters.
        train: The training split.
        device: Where the model lives.
        objective: What is learned; by default the classes of the samples.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Algorithm,
        settings: LocalSettings,
        train: Split,
        device: torch.device,
        objective: Objective | None = None,
    ) -> None:
        self.method, self.settings, self.device = method, settings, device
        self.objective = objective or Classification()
        self._data, self._staging = ClientData(train, device), Staging()
        example = to_input(train.inputs[:2], device)
        self.module = model.to(device)
        plain = ParameterLayout.of(self.module, example)
        self.layout = method.lay_out(plain, self.module, example)
        self.flops = LayerFlops.of(self.module, self.layout, example)
        method.prepare(self.module)
        if device.type == "cpu":
            quicken_pools(self.module)
        self._pruning = pruned_layers(self.module)
        self._meter = Meter(self.module, self.layout)
        self._adversary = Adversary(self.module, self.objective, pixels_of(train.inputs) or Pixels())
        layout = self.layout
        self._model = layout.flatten(self.module).to(device)
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
        self._passes = self._choose_passes(settings, device.type)
        self._augmentation = Augmentation.of(settings.crop, settings.flip, train.inputs.dtype)
        self._loaded: weakref.ref[Broadcast | Part] | None = None
        # Integer buffers (BatchNorm's counter) are restored at each start and never averaged.
        self._counters = {
            name: buffer.clone()
            for name, buffer in self.module.named_buffers()
            if not buffer.is_floating_point()
        }

    def _choose_passes(self, settings: LocalSettings, kind: str) -> Passes:
        if settings.cuda_graphs and kind == "cuda" and self.method.recordable:
            return GraphPasses(self._compute, self._pruning.values())
        return EagerPasses(self._compute)

    def visit(
        self,
        client: int,
        rows: np.ndarray,
        sparsity: float,
        broadcast: Broadcast,
        kept: Mapping[str, np.ndarray] | None = None,
        part: Part | None = None,
        seconds: np.ndarray | None = None,
        *,
        flipped: int = 0,
    ) -> Trained:
        """Play one client: load w_t, train locally, turn the result into the update.

        Args:
            client: Index of the client, for its random streams.
            rows: The client's rows of the training split, int64[n_i].
            sparsity: The client's target sparsity.
            broadcast: The round's global model and instructions.
            kept: What the client keeps from its last visit.
            part: The part of the model that it was sent; None for all of it.
            seconds: What weights cost its device, see :class:`Visit`; None where no device is meant.
            flipped: Number of the classes of an attacker that learns them counted from the other end.
        """
        self._load(broadcast, part)
        visit, steps, bill = self._set_up(client, rows, sparsity, broadcast, kept)
        if flipped:
            visit.targets = flipped - 1 - visit.targets
        unknown = torch.zeros(len(self.layout.prunable) + 1)
        visit.seconds = unknown if seconds is None else torch.from_numpy(seconds)
        client_half = self.method.client(self.method, visit)
        try:
            return self._play(client_half, steps, bill)
        finally:
            self._meter.stop()

    def _play(self, client_half: Client, steps: LocalSteps, bill: Bill) -> Trained:
        visit = client_half.visit
        client_half.begin()
        # Clients of a smaller budget begin with a cut of what they received.
        cut = client_half.cuts_received
        received = self._density_received
        if cut:
            received = layer_density(self.method.nonzeros(visit.weights, self.layout), self.layout)
        loss = client_half.train(steps.batches(visit))
        return self._update(client_half, bill, received, float(loss))

    def _set_up(
        self,
        client: int,
        rows: np.ndarray,
        sparsity: float,
        broadcast: Broadcast,
        kept: Mapping[str, np.ndarray] | None,
    ) -> tuple[Visit, LocalSteps, Bill]:
        """A visit that has not begun, with its data and random streams."""
        instructions, settings = broadcast.instructions, self.settings
        stream = (settings.seed, instructions.round, client)
        self._seed(seeding.integer(stream[0], "torch", *stream[1:]))
        if not self.module.training:
            self.module.train()
        bill = Bill(self.flops, self._shares)
        order = seeding.generator(stream[0], "batches", *stream[1:])
        change = attack = None
        if self._augmentation is not None:
            key = seeding.integer(stream[0], "augmentation", *stream[1:])
            change = partial(self._augmentation.apply, key=key)
        if settings.attack.active:
            draws = torch.Generator().manual_seed(seeding.integer(stream[0], "attack", *stream[1:]))
            attack = partial(
                self._adversary.attacked, settings.attack, generator=draws, precision=settings.precision
            )
        steps = LocalSteps(
            settings, self._passes, self._compute, self.module, self._meter, order, bill, change, attack
        )
        inputs, targets = self._data.of(rows)
        an_epoch = -(-len(rows) // settings.batch_size)
        planned = instructions.local_steps(len(rows), settings.batch_size, settings.epochs)
        visit = Visit(
            layout=self.layout,
            instructions=instructions,
            sparsity=sparsity,
            global_weights=self._global,
            mask=self._mask,
            weights=self._weights,
            model=self._model,
            gradient=self._gradient,
            prunings=self._pruning,
            inputs=inputs,
            targets=targets,
            rng=seeding.generator(stream[0], "method", *stream[1:]),
            lr=broadcast.lr,
            batch_size=settings.batch_size,
            epochs=-(-planned // an_epoch),
            steps_per_epoch=an_epoch,
            steps=planned,
            workbench=steps,
            chosen=torch.empty(0, dtype=torch.int64, device=self.device),
            moments=settings.optimizer.start(self._weights),
            objective=self.objective.loss,
            kept={name: torch.tensor(array, device=self.device) for name, array in (kept or {}).items()},
            part=self._held,
        )
        return visit, steps, bill

    def _update(self, client_half: Client, bill: Bill, received: np.ndarray, loss: float) -> Trained:
        """Cut what was trained to the update, compare the mask with the one received and draw up the bill.

        Args:
            client_half: The client half, trained.
            bill: The passes so far.
            received: Share of nonzeros of each layer that the first pass met, float64[layers].
            loss: Mean training loss.
        """
        visit, layout, method = client_half.visit, self.layout, self.method
        self._check_least_passes(visit, bill)
        before_cut = method.nonzeros(visit.weights, layout)
        density_trained = layer_density(before_cut, layout)
        support = client_half.finish()
        result = visit.weights
        if method.uploads_differences:
            result = result + self._global[: layout.trained_size]
        after_cut = method.nonzeros(result, layout)
        values = self._model
        if method.reparameterised:
            # The upload is w, not theta; the float buffers are already in place.
            values[: layout.trained_size] = self._weights
        activations = np.array(
            [
                self._pruning[entry.name].kept if entry.name in self._pruning else 1.0
                for entry in layout.prunable
            ]
        )
        return Trained(
            values=self._staging.fetch(values),
            support=None if support is None else self._staging.fetch(support),
            measured=Measured(
                samples=len(visit.targets),
                steps=visit.step,
                loss=loss,
                regrown_before_cut=count_beyond(before_cut, self._received),
                regrown=count_beyond(after_cut, self._received),
                deactivated=count_beyond(self._received, after_cut),
                flops_dense=bill.dense(),
                flops_sparse=bill.sparse(client_half, received, density_trained, activations),
                own={name: (float(total), weight) for name, (total, weight) in visit.measures.items()},
                flops_frozen=bill.frozen(),
            ),
            kept=self._kept(visit.kept),
            kept_if_late=self._kept(visit.kept_if_late),
            marks=None if visit.marks is None else visit.marks.cpu().numpy(),
        )

    def _check_least_passes(self, visit: Visit, bill: Bill) -> None:
        """Who arrives when is told from this promise: arrivals before it would be out of order."""
        planned = visit.instructions.local_samples(len(visit.targets), visit.batch_size, self.settings.epochs)
        if bill.dense() < self.method.least_passes * bill.planned(planned) * (1.0 - 1e-9):
            raise ValueError(
                f"{type(self.method).__name__}.least_passes promises {self.method.least_passes:g} over "
                f"{planned} samples; this visit made {bill.dense() / bill.planned(planned):.3g}"
            )

    def _kept(self, kept: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """What a client keeps, as it was declared."""
        declared = self.method.keeps(self.layout)
        for name, tensor in kept.items():
            if declared.get(name) != tensor.numel() or tensor.dtype != torch.float32:
                allowed = (
                    ", ".join(f"{own} of {size:,} floats" for own, size in declared.items()) or "nothing"
                )
                raise ValueError(
                    f"visit.kept[{name!r}] holds {tensor.numel():,} values of {tensor.dtype}; "
                    f"{type(self.method).__name__}.keeps declares {allowed}"
                )
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in kept.items()}

    def evaluate(self, effective: np.ndarray, split: Split, start: int, stop: int) -> Sums:
        """What the objective adds up of the plain module on ``split[start:stop]``, which is not empty.

        Args:
            effective: theta and the float buffers, float32[size].
            split: What to evaluate on.
            start: First row.
            stop: Row after the last.
        """
        with torch.no_grad():
            return self._sums(effective, split, start, stop, lambda inputs, targets: self.module(inputs))

    def evaluate_attacked(
        self, effective: np.ndarray, split: Split, attack: Attack, restarts: int, seed: int
    ) -> Sums:
        """The same of all of ``split`` under attack, of each sample the worst of ``restarts`` attacks.

        Args:
            effective: theta and the float buffers, float32[size].
            split: What to evaluate on.
            attack: How inputs are attacked.
            restarts: Number of attacks.
            seed: Of their randomness, whoever evaluates.
        """
        draws = torch.Generator().manual_seed(seed)

        def outputs(inputs: Tensor, targets: Tensor) -> Tensor:
            return self._adversary.worst_outputs(attack, inputs, targets, restarts, draws)

        return self._sums(effective, split, 0, len(split.targets), outputs)

    def _sums(
        self,
        effective: np.ndarray,
        split: Split,
        start: int,
        stop: int,
        outputs: Callable[[Tensor, Tensor], Tensor],
    ) -> Sums:
        self._staging.send(effective, self._model)
        # In evaluation some modules keep what they made of their weights (timm's TinyViT), until they train.
        self.module.train().eval()
        batch = EVALUATION_BATCH[self.device.type]
        sums: Sums | None = None
        for first in range(start, stop, batch):
            rows = slice(first, min(first + batch, stop))
            targets = torch.from_numpy(np.asarray(split.targets[rows])).to(self.device)
            more = self.objective.sums(outputs(to_input(split.inputs[rows], self.device), targets), targets)
            sums = more if sums is None else added(sums, more)
        assert sums is not None
        return sums

    def _load(self, broadcast: Broadcast, part: Part | None) -> None:
        """Put the model and its counters back to the start of a visit; what is received again stays."""
        source = broadcast if part is None else part
        if self._loaded is None or self._loaded() is not source:
            self._staging.send(source.weights, self._global)
            self._mask: Tensor | None = None
            if broadcast.mask is not None:
                self._mask = torch.empty(len(broadcast.mask), dtype=torch.bool, device=self.device)
                self._staging.send(broadcast.mask, self._mask)
            self._received = self.method.nonzeros(self._global, self.layout)
            self._density_received = layer_density(self._received, self.layout)
            self._held: Tensor | None = None
            self._shares: np.ndarray | None = None
            if part is not None and part.held is not None:
                self._held = torch.from_numpy(part.held.copy()).to(self.device)
                self._shares = held_shares(part.held, self.layout)
            # Not kept alive: its arrays are views into the object store.
            self._loaded = weakref.ref(source)
        self._model.copy_(self._global)
        if self.method.reparameterised:
            self._weights.copy_(self._global[: self.layout.trained_size])
        if self._counters:
            buffers = dict(self.module.named_buffers())
            for name, value in self._counters.items():
                buffers[name].copy_(value)

    def _seed(self, seed: int) -> None:
        """Seed the generators that this device uses.

        torch.manual_seed would also note a whole stack trace for each kind of device that is not there, which
        costs more than everything else that a visit does between its steps.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _compute(self, inputs: Tensor, targets: Tensor, own: Loss | None = None) -> Tensor:
        with arithmetic(self.settings.precision, self.device):
            loss = (own or self.method.loss)(self.module(inputs), targets, self.objective.loss)
        gradients = torch.autograd.grad(loss, self._parameters)
        torch._foreach_copy_(self._gradient_views, gradients)
        return loss.detach()
