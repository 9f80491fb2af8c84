"""The contract of a method: a frozen dataclass with its hyperparameters, a server half and a client half.

A method is one file. Its dataclass fields are its hyperparameters; their metadata is the single source of the
configuration schema, the command line's help, the Optuna space and the logged parameters. Methods hold no
state: the server's is a :class:`ServerState`, a client's lives in a :class:`Client` for one visit. Every hook
has a dense default, so that FedAvg is nearly empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from algorithms.core.aggregation import Grid, Total
from algorithms.core.client import Client, Instructions
from algorithms.core.masks import cut_to_top_k, nonzero_mask
from algorithms.core.parameters import Carried, ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer

# --------------------------------------------------------------------------------------------- the server


@dataclass(frozen=True)
class ServerState:
    """Everything the server knows after ``round`` rounds; an immutable value.

    Attributes:
        round: Rounds completed.
        weights: The global model as a flat vector, float32[size].
        mask: The mask that server and clients hold, bool[prunable]; None for methods without one.
        mask_version: Counts the changes of ``mask``.
        moments: The server optimizer's moments, each float32[trained].
        arrays: The method's own arrays by name.
    """

    round: int
    weights: Tensor
    mask: Tensor | None = None
    mask_version: int = 0
    moments: tuple[Tensor, ...] = ()
    arrays: Mapping[str, Tensor] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------- the method


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A federated method. Subclass it in a file of its own: declare fields, override what differs."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    #: Where the defaults differ from what the method's authors run, a sentence each.
    departures: ClassVar[tuple[str, ...]] = ()
    client: ClassVar[type[Client]] = Client
    #: Whether clients may differ in their target sparsity (device tiers).
    unequal_sparsity: ClassVar[bool] = False
    #: Whether clients cut to the sparsity that they are told each visit, so that a schedule may move it.
    follows_sparsity: ClassVar[bool] = False
    #: Whether the updates of a server step may start from different versions of the model (the buffered
    #: schedule): ``advance`` asks the total for its (masked) mean alone, and no mask or phase changes.
    asynchronous: ClassVar[bool] = False
    #: What an update weighs unless ``aggregation.weighting`` says otherwise: its samples, or all the same.
    weighting: ClassVar[Literal["samples", "equal"]] = "samples"
    #: Whether the server holds the sum of what clients keep. Then a late visit, which the server leaves out,
    #: changes neither; else its client has trained and keeps what came of it.
    kept_is_summed: ClassVar[bool] = False
    #: Whether clients train, send and are averaged over the part that :meth:`submodel` gave them alone; else
    #: it is only what they are sent of the model.
    confined: ClassVar[bool] = False
    #: Whether clients can work out their part by themselves, from the round, their place and their budget, so
    #: that its positions need not be sent.
    submodel_known: ClassVar[bool] = False
    #: Whether all clients of a round send the same positions, whatever their data, as models and not as
    #: differences, and ``advance`` asks the total for its (masked) mean alone: robust rules need both.
    shares_support: ClassVar[bool] = False
    #: Whether totals also keep every accepted update by client (``total.updates``): a cohort of models.
    keeps_updates: ClassVar[bool] = False
    #: Whether totals also keep n_i of the positions that clients name (``visit.marks``): ``total.marked``.
    keeps_marks: ClassVar[bool] = False

    #: Share of the prunable weights that is zero; methods with a target declare it as their first field.
    sparsity = 0.0

    #: Whether ``advance`` asks totals which positions clients sent, beside the (masked) mean, in rounds in
    #: which they differ: secure aggregation then adds up n_i m_i too.
    reads_supports: ClassVar[bool] = False

    # ---- properties that the cluster asks for

    @property
    def reparameterised(self) -> bool:
        """Whether modules compute with something else than the weights that are trained and sent."""
        return False

    @property
    def trains_zeros(self) -> bool:
        """Whether a tensor that is 0 at first is trained like any other, as half of a low-rank adapter is."""
        return True

    @property
    def kept_weights(self) -> float:
        """Share of the prunable weights that one threshold over all layers leaves of a model that is sent.

        1 where models are not cut so: the warning about adapters goes by it.
        """
        return 1.0

    @property
    def masked(self) -> bool:
        """Whether totals keep sum n m for a masked mean."""
        return False

    @property
    def uploads_differences(self) -> bool:
        """Whether clients send w_i - w_t instead of w_i, over the trained span; float buffers as they are."""
        return False

    @property
    def first_round(self) -> int:
        """1, or 0 when the method asks for a stage of its own before round 1."""
        return 1

    @property
    def recordable(self) -> bool:
        """Whether a local step is one pass, which a GPU may record once and replay (``cuda_graphs``)."""
        own = type(self).client
        return own.gradient is Client.gradient and own.train is Client.train

    @property
    def least_passes(self) -> float:
        """Training passes that a visit makes over every sample of its planned batches at least.

        A device's time is at least theirs. Where ``gradient`` or ``train`` is overridden it is 0, unless the
        method says more; a visit with fewer passes than this is an error.
        """
        return 1.0 if self.recordable else 0.0

    @property
    def mean_alone(self) -> bool:
        """Whether ``advance`` needs nothing of the total but its (masked) mean, as under ``privacy.dp``.

        There votes and counts are those of the support that all share: they tell nothing of any client.
        """
        return (self.asynchronous or self.shares_support) and not self.confined and not self.kept_is_summed

    @property
    def beyond_sums(self) -> str:
        """What the method does that sums over clients are not enough for, in words; empty for nothing."""
        return ""

    # ---- server half

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """The state before the first round, from the common initialisation ``weights``, float32[size]."""
        return ServerState(round=self.first_round - 1, weights=weights)

    def instruct(self, state: ServerState, rounds: int, clients: int) -> Instructions:
        """What the next round's clients are told; ``clients`` is the population's size."""
        return Instructions(round=state.round + 1, rounds=rounds)

    def sends_mask(self, told: Instructions) -> bool:
        """Whether all clients send the mask that both sides hold, whatever their data; all if there is none.

        Under secure aggregation its values alone travel then.

        Args:
            told: What the round's clients are told.
        """
        return self.shares_support

    def zero(self, grid: Grid, layout: ParameterLayout, updates: bool = False) -> Total:
        """The total of no update, which keeps what the method asks totals for, and ``updates`` if asked."""
        return Total.zero(
            grid,
            layout,
            masked=self.masked,
            updates=updates or self.keeps_updates,
            parts=self.confined,
            marks=self.keeps_marks,
        )

    def aggregate(self, state: ServerState, total: Total, layout: ParameterLayout) -> Tensor:
        """The (masked) weighted mean of what the clients sent, float32[up_size], in memory of its own.

        Where clients hold parts of the model it is over each coordinate's holders, and one that nobody of the
        round held stays as it is.
        """
        if not self.confined:
            return torch.from_numpy(total.masked_mean() if self.masked else total.mean())
        mean = torch.from_numpy(total.masked_mean())
        trained = mean[: layout.trained_size]
        unheld = torch.from_numpy(total.mask_samples == 0)
        kept = torch.zeros_like(trained) if self.uploads_differences else state.weights[: len(trained)]
        torch.where(unheld, kept, trained, out=trained)
        return mean

    def next_carried(
        self, state: ServerState, means: Mapping[str, Tensor], share: float, layout: ParameterLayout
    ) -> Mapping[str, Tensor]:
        """What is carried after the round, by name; what is not named stays as it was.

        Args:
            state: The state before the round; ``layout.split(state.weights, layout.carried)`` are its own.
            means: The weighted means of what clients sent.
            share: The share of the population's weight that took part.
            layout: The model's layout.
        """
        return means

    def next_mask(
        self, state: ServerState, weights: Tensor, total: Total, layout: ParameterLayout
    ) -> Tensor | None:
        """The mask that both sides hold from now on; ``weights`` are after the server step."""
        return state.mask

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """The state after a round: aggregate (differences: add w_t), server step on what is trained, mask.

        Args:
            state: The state before it.
            total: The sum of the accepted updates.
            server: The server optimizer.
            layout: The model's layout.
            share: The share of the population's weight that took part.
        """
        mean = self.aggregate(state, total, layout)
        trained = layout.trained_size
        if self.uploads_differences:
            # Of the trained parameters only: float buffers are sent as they are and take the plain mean.
            mean[:trained] += state.weights[:trained]
        weights = torch.cat([mean[: layout.model_size], state.weights[layout.model_size :]])
        if layout.carried:
            means = layout.split(mean, layout.both + layout.up)
            own = layout.split(weights, layout.carried)
            for name, value in self.next_carried(state, means, share, layout).items():
                own[name].copy_(value)
        weights[:trained], moments = server.step(state.weights[:trained], mean[:trained], state.moments)
        mask = self.next_mask(state, weights, total, layout)
        version = state.mask_version
        if mask is not None:
            prunable, outside = layout.prunable_size, ~mask
            weights[:prunable].masked_fill_(outside, 0.0)
            # Moments outside the mask are 0, so that they do not move a weight that comes back.
            moments = tuple(
                torch.cat([m[:prunable].masked_fill(outside, 0.0), m[prunable:]]) for m in moments
            )
            version += state.mask is None or not torch.equal(mask, state.mask)
        return replace(
            state,
            round=state.round + 1,
            weights=weights,
            mask=mask,
            mask_version=int(version),
            moments=moments,
        )

    def layer_measures(self, state: ServerState, layout: ParameterLayout) -> Mapping[str, list[float]]:
        """Numbers of the method's own by name, one of each prunable layer; logged as ``<name>/layers``.

        Args:
            state: The state after the round.
            layout: The model's layout.
        """
        return {}

    # ---- both halves

    def carries(self, layout: ParameterLayout) -> Mapping[str, Carried]:
        """Floats that travel beside the model, by name, at first 0; see :meth:`next_carried`."""
        return {}

    def keeps(self, layout: ParameterLayout) -> Mapping[str, int]:
        """Floats that a client keeps between its visits, by name and number: ``visit.kept``."""
        return {}

    def known(self, weights: Tensor, layout: ParameterLayout) -> Tensor | None:
        """Values that the receiver of an update can work out from w_t, float32[trained]; None for none.

        A message whose trained values equal them where it has any is its support alone: none travel.

        Args:
            weights: w_t as the client received it, float32[size].
            layout: The model's layout.
        """
        return None

    def nonzeros(self, weights: Tensor, layout: ParameterLayout) -> Tensor:
        """The prunable weights that the plain module has, bool[prunable]: what mask metrics compare.

        Override it where ``weights``, float32[trained] at least, are not 0 where the module's are.
        """
        return nonzero_mask(weights[: layout.prunable_size])

    def problems(self, config: Any) -> Iterator[str]:
        """Settings that the method refuses: a sentence each, which names key and value.

        Args:
            config: The whole configuration, ``cluster.Config``.
        """
        yield from ()

    def loss(self, outputs: Tensor, targets: Tensor, objective: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The training loss of a batch, a scalar: by default the objective's.

        It stands on the method, as a pass may be recorded once for all clients: it launches the same work
        whatever the values are and reads nothing back.

        Args:
            outputs: What the model returned.
            targets: The batch's targets; soft ones where ``visit.gradient_of`` was given such.
            objective: The objective's own loss of outputs and targets.
        """
        return objective(outputs, targets)

    def prepare(self, model: nn.Module) -> None:
        """Swap layers of the plain model in place; called once an actor."""

    def lay_out(self, layout: ParameterLayout, model: nn.Module, example: Tensor) -> ParameterLayout:
        """The plain model's layout with what the method needs to know beside it: at both sides the same.

        Args:
            layout: The plain model's.
            model: The plain model.
            example: A batch of inputs.

        Raises:
            ValueError: The method cannot train such a model; names the layer.
        """
        return layout.carrying(self.carries(layout))

    def submodel(
        self, weights: Tensor, told: Instructions, place: int | None, budget: float, layout: ParameterLayout
    ) -> Tensor | None:
        """The part of the model that a client is sent, bool[trained]; None for all of it. A pure function.

        Args:
            weights: The model, float32[size].
            told: What the client is told.
            place: How many clients were asked before it, in this round and in those before; None where the
                model of that budget is to be evaluated.
            budget: Share of the model that it can have, 1 - its target sparsity.
            layout: The model's layout.
        """
        return None

    def cut(self, weights: Tensor, mask: Tensor | None, keep: int, layout: ParameterLayout) -> None:
        """Cut ``weights``, float32[prunable], in place to a device tier's budget of ``keep`` weights."""
        cut_to_top_k(weights, keep)

    def effective_weights(self, weights: Tensor, layout: ParameterLayout) -> Tensor:
        """theta: what the plain module computes with, float32[size], from the state's ``weights``."""
        return weights

    def personal_weights(
        self, weights: Tensor, received: Tensor, kept: Mapping[str, Tensor], layout: ParameterLayout
    ) -> Tensor:
        """What a client itself computes with after its local training, float32[size].

        Args:
            weights: What it would send, as ``w`` (a difference on top of w_t), float32[size].
            received: w_t as it was received, float32[size].
            kept: What it would keep.
            layout: The model's layout.
        """
        return self.effective_weights(weights, layout)


# --------------------------------------------------------------------------------------------- the registry


def registry() -> dict[str, type[Algorithm]]:
    """Every method by name: the subclasses of :class:`Algorithm` that carry a ``name``."""
    found: dict[str, type[Algorithm]] = {}
    pending = list(Algorithm.__subclasses__())
    while pending:
        method = pending.pop()
        pending.extend(method.__subclasses__())
        if method.__dict__.get("name"):
            found[method.name] = method
    return dict(sorted(found.items()))
