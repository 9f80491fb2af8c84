"""Split-Mix: the wide model is a set of narrow ones, of which a client trains as many as it has room for.

Hong, Wang, Wang and Zhou, "Efficient Split-Mix federated learning for on-demand and in-situ customization",
ICLR 2022, arXiv 2203.09747.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.core.algorithm import ServerState
from algorithms.core.client import Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.parameters import Entry, ParameterLayout, prunable_layers
from algorithms.core.widths import UnitLayout, UnitMethod


class BaseLogits(nn.Linear):
    """The last layer, whose inputs are the bases' in turn; in training each has logits of its own.

    A base that the client does not hold, all of whose weights are 0, has none.
    """

    bases: int

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, in] to logits [n, classes], in training [n, classes, bases held]."""
        if not self.training:
            return super().forward(inputs)
        weights = self.weight.view(self.out_features, self.bases, -1)
        held = (weights != 0).any(dim=2).any(dim=0).nonzero().reshape(-1)
        given = inputs.view(len(inputs), self.bases, -1)
        logits = torch.einsum("nbi,cbi->ncb", given.index_select(1, held), weights.index_select(1, held))
        return logits if self.bias is None else logits + self.bias[:, None]


@dataclass(frozen=True, kw_only=True)
class SplitMix(UnitMethod):
    """Narrow base models of disjoint units; clients train some of them, and any number can be mixed."""

    name = "splitmix"
    paper = "Hong et al., ICLR 2022, arXiv 2203.09747"
    departures = (
        "The bases share the bias of the last layer; the authors' have one each.",
        "No rescaling of layers in training: without norms it would differ from evaluation.",
        "No adversarial training and no second BatchNorm; a model with running statistics is refused.",
    )

    bases: int = hyperparameter(8, "narrow models that the wide one consists of", low=1, high=64)
    mask_absent_classes: bool = hyperparameter(
        False, "logits of classes that a batch does not have count as 0", source="the authors' code"
    )

    @property
    def recordable(self) -> bool:
        """Clients hold different numbers of bases."""
        return self.bases == 1

    # ---- server half

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """The common initialisation without the weights that would join two bases."""
        state = super().initial_state(weights, layout, rng)
        inside = self.part(range(self.bases), layout)
        joined = torch.cat([inside, torch.ones(layout.size - len(inside), dtype=torch.bool)])
        return replace(state, weights=weights.masked_fill(~joined, 0.0))

    # ---- both halves

    def lay_out(self, layout: ParameterLayout, model: nn.Module, example: Tensor) -> ParameterLayout:
        """See :class:`Algorithm`; refuses widths and groups that do not divide among the bases."""
        found = super().lay_out(layout, model, example)
        assert isinstance(found, UnitLayout)
        for width, blocks in found.blocks:
            if blocks % self.bases:
                names = (
                    e.name for e, own in zip(found.trained, found.units, strict=True) if own.rows == width
                )
                what = f"{width} units" if blocks == width else f"{width} units in {blocks} groups"
                raise ValueError(
                    f"{next(names)}: its {what} do not divide among algorithm.bases={self.bases}; allowed is "
                    "what divides all of them"
                )
        if self.bases > 1 and _last(found).name != _last_linear(model):
            raise ValueError(f"{_last(found).name}: the last layer has to be a linear one, defined last")
        return found

    def submodel(
        self, weights: Tensor, told: Instructions, place: int | None, budget: float, layout: ParameterLayout
    ) -> Tensor | None:
        """As many bases as fit; evaluated are the first ones.

        A client's first is the next of a shuffled order, in which all come equally often; others are random.
        """
        count = min(self.bases, max(1, round(budget * self.bases)))
        if place is None:
            return self.part(range(count), layout)
        turn, position = divmod(place, self.bases)
        first = np.random.default_rng([1, turn]).permutation(self.bases)[position]
        others = np.delete(np.arange(self.bases), first)
        more = np.random.default_rng([2, place]).choice(others, size=count - 1, replace=False)
        return self.part([int(first), *more.tolist()], layout)

    def part(self, bases: Iterable[int], layout: ParameterLayout) -> Tensor:
        """The weights of some bases, bool[trained]."""
        assert isinstance(layout, UnitLayout)
        part = torch.zeros(layout.trained_size, dtype=torch.bool)
        for base in bases:
            own = {
                width: np.arange(blocks) // (blocks // self.bases) == base for width, blocks in layout.blocks
            }
            part |= layout.part(own)
        return part

    def effective_weights(self, weights: Tensor, layout: ParameterLayout) -> Tensor:
        """The last layer's weights by the number of bases that are there: logits are the mean of theirs."""
        effective, last = weights.clone(), _last(layout)
        own = effective[last.span].view(last.shape[0], self.bases, -1)
        own /= max(1, int((own != 0).any(dim=2).any(dim=0).sum()))
        return effective

    def prepare(self, model: nn.Module) -> None:
        """Have the last layer give logits by base."""
        if self.bases > 1:
            *_, layer = prunable_layers(model).values()
            layer.__class__ = type("BaseLogits", (BaseLogits, type(layer)), {})
            layer.bases = self.bases

    def loss(self, outputs: Tensor, targets: Tensor, objective: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The sum of the bases' losses, each of its own logits."""
        if self.mask_absent_classes:
            present = functional.one_hot(targets, outputs.shape[1]).any(dim=0)
            outputs = outputs * present.view(1, -1, *[1] * (outputs.dim() - 2))
        if outputs.dim() == 2:
            return objective(outputs, targets)
        held = outputs.shape[2]
        by_base = outputs.transpose(1, 2).reshape(-1, outputs.shape[1])
        return held * objective(by_base, targets.repeat_interleave(held, dim=0))


def _last(layout: ParameterLayout) -> Entry:
    """The layer whose outputs are the classes."""
    assert isinstance(layout, UnitLayout)
    return next(entry for entry, own in zip(layout.prunable, layout.units, strict=False) if not own.rows)


def _last_linear(model: nn.Module) -> str:
    """The name of the weight of the layer defined last, where that is linear."""
    *_, (name, layer) = prunable_layers(model).items()
    return f"{name}.weight" if isinstance(layer, nn.Linear) else ""
