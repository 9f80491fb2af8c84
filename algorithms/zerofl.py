"""ZeroFL: weights cut in place before each forward pass, activations for the weight gradient, uploads apart.

Qiu et al., "ZeroFL: Efficient On-Device Training for Federated Learning with Local Sparsity", ICLR 2022,
arXiv 2208.02507. Local training: Raihan and Aamodt, "Sparse Weight Activation Training", NeurIPS 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np
from torch import Tensor, nn

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.layers import (
    ActivationPruning,
    WeightPruning,
    draws_every_batch,
    prune_inputs,
)
from algorithms.core.masks import ceiling_count, cut_to_top_k, target_count, top_k_mask
from algorithms.core.parameters import Entry, ParameterLayout


class ZeroFLClient(Client):
    """Trains with cut weights and activations under dense gradients; what is sent is cut once more."""

    method: ZeroFL

    def begin(self) -> None:
        """Fix this client's densities and forget the last client's thresholds."""
        visit, method = self.visit, self.method
        sparsity = method.training_sparsity(visit.sparsity)
        # In floats 1 - .9994 is .0006000000000000449: the ceiling of its share would be one too many.
        density = round(1.0 - sparsity, 12)
        for pruning in visit.prunings.values():
            pruning.reset()
            pruning.density = density
        self.cuts = {
            entry.name: WeightPruning(
                visit.weights[entry.span],
                ceiling_count(entry.size, sparsity),
                every_batch=method.draws_every_batch(entry),
            )
            for entry in method.sparse_layers(visit.layout)
            if sparsity > 0.0
        }
        self.densities: dict[str, float] = {}

    def before_forward(self) -> None:
        """Cut each sparse layer's weights; the dense gradient regrows them in the step that follows."""
        for cut in self.cuts.values():
            cut.cut()
        visit = self.visit
        if visit.step + 1 == visit.steps:
            # Reused thresholds let densities drift from 1 - s, nearly all of it in the first steps.
            self.densities = {name: cut.density() for name, cut in self.cuts.items()}

    def finish(self) -> Tensor | None:
        """Keep K = round((1 - s + mask_ratio) |P|) positions, chosen and filled as ``upload`` says."""
        visit, method = self.visit, self.method
        keep = target_count(visit.layout.prunable_size, method.lowered(visit.sparsity))
        if not method.uploads_differences:
            return cut_to_top_k(visit.prunable, keep)
        support = top_k_mask(visit.prunable.abs(), keep) if method.upload == "diff_on_top_k_weights" else None
        visit.weights.sub_(visit.global_weights[: visit.layout.trained_size])
        if support is None:
            return cut_to_top_k(visit.prunable, keep)
        visit.prunable.masked_fill_(~support, 0.0)
        return support

    def training_density(self, trained: np.ndarray) -> np.ndarray:
        """As measured at the last forward pass in the sparse layers: 1 - s, or where it drifted to."""
        names = [entry.name for entry in self.visit.layout.prunable]
        return np.array([self.densities.get(name, share) for name, share in zip(names, trained, strict=True)])


@dataclass(frozen=True, kw_only=True)
class ZeroFL(Algorithm):
    """Sparse weight-activation training on clients; uploads of density 1 - s + mask_ratio.

    The first layer, in order of definition, is neither cut nor pruned. With the two difference uploads a
    position that nobody sends keeps its w_t, so the global model stays as dense as the initialisation.
    """

    name = "zerofl"
    paper = "Qiu et al., ICLR 2022, arXiv 2208.02507; SWAT: Raihan and Aamodt, NeurIPS 2020"
    departures = (
        "mask_ratio is 0.2, one of ZeroFL's own; in SparsyFed's comparison it is 0, so that all methods' "
        "uploads are equally dense.",
        "A layer keeps ceil((1 - s) n) weights in exact decimals; the authors' 1 - s is a float, which "
        "keeps one more where (1 - s) n is a whole number (0.05 * 180 becomes 10).",
        "All layers reuse the first batch's thresholds; in SparsyFed's comparison linear layers take an "
        "exact top-k every batch, and the 1x1 shortcuts stay plain: threshold=first_batch_conv, "
        "plain_layers.",
    )
    client = ZeroFLClient
    asynchronous = True

    sparsity: float = hyperparameter(
        0.95, "share of each layer's weights and activations cut in local training", low=0.0, high=0.9999
    )
    mask_ratio: float = hyperparameter(
        0.2,
        "density that an upload has beyond 1 - sparsity",
        low=0.0,
        high=1.0,
        search=(0.0, 0.3),
        source="section 4; the authors use 0, .1 and .2",
    )
    upload: str = hyperparameter(
        "top_k_weights",
        "what is sent: `top_k_weights` w_i where |w_i| is largest; `diff_on_top_k_weights` w_i - w_t there; "
        "`top_k_weights_diff` w_i - w_t where |w_i - w_t| is largest",
        choices=("top_k_weights", "diff_on_top_k_weights", "top_k_weights_diff"),
        search=("top_k_weights", "diff_on_top_k_weights", "top_k_weights_diff"),
        source="section 4",
    )
    mask_ratio_applies_to: str = hyperparameter(
        "upload",
        "`upload`, or `both`: local training has sparsity - mask_ratio too (SparsyFed's comparison)",
        choices=("upload", "both"),
        source="code of arXiv 2504.05153",
    )
    threshold: str = hyperparameter(
        "first_batch",
        "thresholds of weights and activations: of a client's `first_batch` in the round, then reused; exact "
        "in `every_batch`; or `first_batch_conv`: so in linear layers only (SparsyFed's comparison)",
        choices=("first_batch", "every_batch", "first_batch_conv"),
        source="code of arXiv 2504.05153",
    )
    plain_layers: tuple[str, ...] = hyperparameter(
        (),
        "name patterns of further layers left dense; SparsyFed's comparison leaves the 1x1 shortcuts plain",
        source="code of arXiv 2504.05153",
    )

    @property
    def uploads_differences(self) -> bool:
        """Whether w_i - w_t is sent."""
        return self.upload != "top_k_weights"

    @property
    def kept_weights(self) -> float:
        """K over |P| of an upload of weights."""
        return 1.0 if self.uploads_differences else 1.0 - self.lowered(self.sparsity)

    def prepare(self, model: nn.Module) -> None:
        """Let every sparse layer prune its saved input; the density is each client's own."""
        entries = {entry.name: entry for entry in self.sparse_layers(ParameterLayout.of(model))}

        def choose(name: str, layer: nn.Module) -> ActivationPruning | None:
            entry = entries.get(f"{name}.weight")
            if entry is None:
                return None
            return ActivationPruning(density=1.0, every_batch=self.draws_every_batch(entry))

        prune_inputs(model, choose)

    def sparse_layers(self, layout: ParameterLayout) -> list[Entry]:
        """All prunable layers but the first and the plain ones."""
        return [
            entry
            for entry in layout.prunable[1:]
            if not any(fnmatch(entry.name.removesuffix(".weight"), pattern) for pattern in self.plain_layers)
        ]

    def draws_every_batch(self, entry: Entry) -> bool:
        """Whether the layer's cuts are exact in every batch; only linear layers have matrices as weights."""
        return draws_every_batch(self.threshold, linear=len(entry.shape) == 2)

    def lowered(self, sparsity: float) -> float:
        """``sparsity`` less the mask ratio, at least 0."""
        return max(0.0, sparsity - self.mask_ratio)

    def training_sparsity(self, sparsity: float) -> float:
        """s of local training for a client whose target is ``sparsity``."""
        return self.lowered(sparsity) if self.mask_ratio_applies_to == "both" else sparsity
