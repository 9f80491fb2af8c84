"""Local optimizers: what a client does with a gradient, on the flat vector; their state is fresh each visit.

The twin of the server's, and like them they compose with every method: they act on w, whatever the modules
compute with. A weight whose gradient is 0 from the start of a visit on and which is 0 stays 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.server_optimizers import Moments


@dataclass(frozen=True, kw_only=True)
class LocalOptimizer:
    """A local optimizer; subclass it for one of your own."""

    name: ClassVar[str] = ""
    #: Whether weight decay shrinks the weights by itself instead of entering the gradient.
    decoupled_decay: ClassVar[bool] = False

    def start(self, weights: Tensor) -> Moments:
        """The moments before the first step of a visit, each like ``weights``, float32[trained]."""
        return ()

    def step(
        self, weights: Tensor, gradient: Tensor, moments: Moments, *, lr: float, decay: float, number: int
    ) -> None:
        """One step, in place.

        Args:
            weights: w, float32[trained].
            gradient: The whole gradient, float32[trained]; it may be overwritten.
            moments: As ``start`` made them and earlier steps left them.
            lr: Learning rate.
            decay: Weight decay, 0 where it is in the gradient already.
            number: Number of the step, from 1.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Sgd(LocalOptimizer):
    """``sgd``: plain, or with momentum, Nesterov's too."""

    name: ClassVar[str] = "sgd"

    momentum: float = hyperparameter(0.0, "momentum of the local steps", low=0.0, high=0.9999)
    nesterov: bool = hyperparameter(False, "look ahead along the momentum")

    def __post_init__(self) -> None:
        """Nesterov's form needs a momentum."""
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true needs momentum above 0")

    def start(self, weights: Tensor) -> Moments:
        """The velocity, where there is a momentum."""
        return (torch.zeros_like(weights),) if self.momentum else ()

    def step(
        self, weights: Tensor, gradient: Tensor, moments: Moments, *, lr: float, decay: float, number: int
    ) -> None:
        """See :class:`LocalOptimizer`."""
        if self.momentum:
            (velocity,) = moments
            velocity.mul_(self.momentum).add_(gradient)
            gradient = gradient.add_(velocity, alpha=self.momentum) if self.nesterov else velocity
        weights.add_(gradient, alpha=-lr)


@dataclass(frozen=True, kw_only=True)
class AdamW(LocalOptimizer):
    """``adamw``: Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    name: ClassVar[str] = "adamw"
    decoupled_decay: ClassVar[bool] = True

    momentum: float = hyperparameter(0.9, "decay of the first moment, beta_1", low=0.0, high=0.9999)
    beta2: float = hyperparameter(0.999, "decay of the second moment", low=0.0, high=0.99999)
    eps: float = hyperparameter(1e-8, "added to the second moment's root", low=1e-12, high=1.0, log=True)

    def start(self, weights: Tensor) -> Moments:
        """The first and the second moment."""
        return torch.zeros_like(weights), torch.zeros_like(weights)

    def step(
        self, weights: Tensor, gradient: Tensor, moments: Moments, *, lr: float, decay: float, number: int
    ) -> None:
        """See :class:`LocalOptimizer`; the moments are corrected for their start at 0."""
        first, second = moments
        if decay:
            weights.mul_(1.0 - lr * decay)
        first.lerp_(gradient, 1.0 - self.momentum)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1.0 - self.beta2)
        root = (second / (1.0 - self.beta2**number)).sqrt_().add_(self.eps)
        weights.addcdiv_(first, root, value=-lr / (1.0 - self.momentum**number))


LOCAL_OPTIMIZERS: dict[str, type[LocalOptimizer]] = {optimizer.name: optimizer for optimizer in (Sgd, AdamW)}
