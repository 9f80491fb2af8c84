"""A method of your own in one file: run it with ``algorithm.name=tests.example_method:RandomK``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms import Algorithm, Client, hyperparameter


class RandomKClient(Client):
    """Trains dense and sends K weights drawn at random."""

    def finish(self) -> Tensor:
        """Zero what is not drawn, in place, and return the support that travels."""
        visit = self.visit
        drawn = visit.rng.choice(len(visit.prunable), size=visit.keep, replace=False)
        support = torch.zeros(len(visit.prunable), dtype=torch.bool)
        support[torch.from_numpy(drawn)] = True
        scale = 1.0 / (1.0 - visit.sparsity) if self.method.unbiased else 1.0
        visit.prunable.mul_(scale).masked_fill_(~support, 0.0)
        return support


@dataclass(frozen=True, kw_only=True)
class RandomK(Algorithm):
    """The simplest sparse baseline: a random K of the weights, anew for every client and round."""

    client = RandomKClient

    sparsity: float = hyperparameter(0.9, "share of prunable weights that is not sent", low=0.0, high=0.99)
    unbiased: bool = hyperparameter(False, "divide what is sent by the density, so that the mean is unbiased")
