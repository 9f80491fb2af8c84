"""SparsyFed: Powerpropagation, activations pruned with each layer's own sparsity, global top-K updates.

Guastella et al., "SparsyFed: Sparse Adaptive Federated Training", ICLR 2025, arXiv 2504.05153.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np
from torch import Tensor, nn

from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.layers import (
    ActivationPruning,
    Powerpropagation,
    draws_every_batch,
    inverse_power,
    power,
    prune_inputs,
    spectral_exponent,
)
from algorithms.core.parameters import Entry, ParameterLayout
from algorithms.topk import TopKClient, own_top


class SparsyFedClient(TopKClient):
    """Trains w under theta = sign(w) |w|^beta and cuts w to the global top K."""

    method: SparsyFed

    def begin(self) -> None:
        """Fix the exponents for this visit and forget the last client's thresholds."""
        visit = self.visit
        for pruning in visit.prunings.values():
            pruning.reset()
        self.powers: Powerpropagation | None = None
        self.exponents = self.method.exponents(visit.weights, visit.layout)
        if self.method.reparameterised:
            prunable = visit.layout.prunable_size
            self.powers = Powerpropagation(visit.prunable, visit.model[:prunable], self.exponents)

    def before_forward(self) -> None:
        """Write theta and the other parameters to where the modules read them."""
        if self.powers is not None:
            visit = self.visit
            self.powers.refresh()
            rest = slice(visit.layout.prunable_size, visit.layout.trained_size)
            visit.model[rest] = visit.weights[rest]

    def after_backward(self) -> None:
        """dL/dw = beta |w|^(beta - 1) dL/dtheta."""
        if self.powers is not None:
            self.powers.chain(self.visit.prunable_gradient)

    def gradient_density(self, nonzeros: np.ndarray) -> np.ndarray:
        """Share of nonzeros: the gradient at a zero is 0 where the exponent is above 1."""
        return np.where([beta > 1.0 for _, beta in self.exponents], nonzeros, 1.0)


@dataclass(frozen=True, kw_only=True)
class SparsyFed(Algorithm):
    """Sparsity-inducing re-parameterisation, activation pruning for the weight gradient, top-K updates."""

    name = "sparsyfed"
    paper = (
        "Guastella et al., ICLR 2025, arXiv 2504.05153; Powerpropagation: Schwarz et al., arXiv 2110.00296"
    )
    departures = (
        "Every layer is re-parameterised; in the authors' ResNet-18 the 1x1 shortcuts stay plain: "
        "plain_layers.",
        "All layers reuse the first batch's activation threshold; in the authors' code linear layers draw "
        "one every batch: threshold=first_batch_conv.",
        "Activations may become sparser than 99 %; the authors' tables were made with "
        "min_activation_density=0.01.",
    )
    client = SparsyFedClient
    unequal_sparsity = True
    follows_sparsity = True
    asynchronous = True

    sparsity: float = hyperparameter(0.95, "share of prunable weights that is cut", low=0.0, high=0.9999)
    beta: float = hyperparameter(
        1.25,
        "exponent of the re-parameterisation; 1 switches it off",
        low=1.0,
        high=4.0,
        search=(1.0, 2.0),
        source="section 3.1; the method's one hyperparameter",
    )
    exponent: str = hyperparameter(
        "constant",
        "`constant` uses beta; `spectral` sets it per layer from the weights: 1 + mean|W| / sigma(|W|)",
        choices=("constant", "spectral"),
        source="section 3.1, the hyperparameter-free variant",
    )
    spectral_mean: str = hyperparameter(
        "entries",
        "mean|W| of `spectral`: over all `entries` of a layer, or over its `nonzeros` (larger exponents)",
        choices=("entries", "nonzeros"),
        source="the authors' newest code; an earlier version of it",
    )
    activation_pruning: bool = hyperparameter(
        True, "prune saved activations with the layer's own weight sparsity", source="section 3.2"
    )
    threshold: str = hyperparameter(
        "first_batch",
        "activation thresholds: of a client's `first_batch` in the round, then reused; of `every_batch`; or "
        "`first_batch_conv`: convolutions reuse the first batch's, linear layers do not (authors' code)",
        choices=("first_batch", "every_batch", "first_batch_conv"),
        source="section 3.2; the authors' code",
    )
    min_activation_density: float = hyperparameter(
        1e-7,
        "lower bound of the activation density; .01 in the authors' code that made the published tables",
        low=0.0,
        high=1.0,
    )
    plain_layers: tuple[str, ...] = hyperparameter(
        (),
        "name patterns of layers left un-reparameterised and unpruned, so that their weights can regrow; "
        "the authors' ResNet-18 leaves its 1x1 shortcuts plain",
        source="the authors' code",
    )

    cut_received: bool = hyperparameter(
        False, "as for topk: send each client the model cut to its own sparsity", source="the authors' code"
    )
    guard_layers: bool = hyperparameter(
        False, "as for topk: leave no layer empty", source="the authors' code, where it is off"
    )

    copied_weights: bool = hyperparameter(
        False,
        "begin with w as the initial weights are, not with their inverse power: the first forward pass then "
        "meets their power; the authors' way with pre-trained models",
        source="the authors' code",
    )

    @property
    def reparameterised(self) -> bool:
        """Whether theta differs from w."""
        return self.exponent == "spectral" or self.beta != 1.0

    @property
    def kept_weights(self) -> float:
        """K over |P|."""
        return 1.0 - self.sparsity

    @property
    def trains_zeros(self) -> bool:
        """The gradient at a zero is 0; which layers are plain is up to who names them."""
        return not self.reparameterised or bool(self.plain_layers)

    # ---- server half

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """w = sign(u) |u|^(1/beta), so that the first forward pass sees the common initialisation u."""
        weights = weights.clone()
        for span, beta in self.exponents(weights, layout):
            if beta != 1.0 and not self.copied_weights:
                weights[span] = inverse_power(weights[span], beta)
        return ServerState(round=0, weights=weights)

    def layer_measures(self, state: ServerState, layout: ParameterLayout) -> dict[str, list[float]]:
        """The exponent of each layer, where they are drawn from the weights."""
        if self.exponent == "constant":
            return {}
        return {"exponent": [beta for _, beta in self.exponents(state.weights, layout)]}

    # ---- both halves

    def prepare(self, model: nn.Module) -> None:
        """Let every layer but the plain ones prune its saved input."""
        if not self.activation_pruning:
            return

        def choose(name: str, layer: nn.Module) -> ActivationPruning | None:
            if self._is_plain(name):
                return None
            every_batch = draws_every_batch(self.threshold, linear=isinstance(layer, nn.Linear))
            return ActivationPruning(
                density=None, every_batch=every_batch, minimum_density=self.min_activation_density
            )

        prune_inputs(model, choose)

    def submodel(
        self, weights: Tensor, told: Instructions, place: int | None, budget: float, layout: ParameterLayout
    ) -> Tensor | None:
        """As for topk."""
        return own_top(weights, budget, layout) if self.cut_received and told.round > 1 else None

    def exponents(self, weights: Tensor, layout: ParameterLayout) -> list[tuple[slice, float]]:
        """beta of each prunable layer's span."""
        return [(entry.span, self._exponent(entry, weights)) for entry in layout.prunable]

    def effective_weights(self, weights: Tensor, layout: ParameterLayout) -> Tensor:
        """theta = sign(w) |w|^beta on the prunable span."""
        effective = weights.clone()
        for span, beta in self.exponents(weights, layout):
            effective[span] = power(weights[span], beta)
        return effective

    def _exponent(self, entry: Entry, weights: Tensor) -> float:
        if self._is_plain(entry.name.removesuffix(".weight")):
            return 1.0
        if self.exponent == "spectral":
            return spectral_exponent(weights[entry.span].view(entry.shape), mean_over=self.spectral_mean)
        return self.beta

    def _is_plain(self, layer: str) -> bool:
        return any(fnmatch(layer, pattern) for pattern in self.plain_layers)
