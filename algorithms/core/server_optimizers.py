"""Server optimizers: what the server does with the clients' mean (Reddi et al. 2021, arXiv 2003.00295).

They act on Delta = mean(w_i) - w_t over the trained parameters and compose with every method. Float buffers
take the plain mean; methods that hold a mask re-apply it after the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from algorithms.core.hyperparameters import hyperparameter

Moments = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """``fedavg``: SGD on Delta with optional momentum; lr 1 without momentum returns the mean itself."""

    name: ClassVar[str] = "fedavg"

    lr: float = hyperparameter(1.0, "server learning rate", low=0.0, high=100.0, log=True)
    momentum: float = hyperparameter(0.0, "server momentum", low=0.0, high=0.9999)

    def step(self, weights: Tensor, mean: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """One server step.

        Args:
            weights: w_t, float32[trained].
            mean: The clients' mean, float32[trained].
            moments: Moments after the last step; empty before the first.

        Returns:
            w_(t+1) and the moments to keep.
        """
        if self.momentum == 0.0:
            return (mean, ()) if self.lr == 1.0 else (weights + self.lr * (mean - weights), ())
        velocity = mean - weights
        if moments:
            velocity = velocity + self.momentum * moments[0]
        return weights + self.lr * velocity, (velocity,)


@dataclass(frozen=True, kw_only=True)
class _Adaptive(ServerOptimizer):
    name: ClassVar[str] = ""

    lr: float = hyperparameter(0.01, "server learning rate, eta", low=0.0, high=100.0, log=True)
    momentum: float = hyperparameter(0.9, "decay of the first moment, beta_1", low=0.0, high=0.9999)
    beta2: float = hyperparameter(0.99, "decay of the second moment", low=0.0, high=0.99999)
    tau: float = hyperparameter(1e-3, "degree of adaptivity", low=1e-12, high=1.0, log=True)

    def step(self, weights: Tensor, mean: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """One step of algorithm 2 of the paper; ``momentum`` is its beta_1, v starts at tau**2."""
        delta = mean - weights
        first, second = moments or (torch.zeros_like(delta), torch.full_like(delta, self.tau**2))
        first = self.momentum * first + (1.0 - self.momentum) * delta
        second = self._second_moment(second, delta * delta)
        return weights + self.lr * first / (second.sqrt() + self.tau), (first, second)

    def _second_moment(self, second: Tensor, square: Tensor) -> Tensor:
        raise TypeError("an adaptive server optimizer defines its second moment")


class FedAdagrad(_Adaptive):
    """``fedadagrad``: v + Delta^2."""

    name = "fedadagrad"

    def _second_moment(self, second: Tensor, square: Tensor) -> Tensor:
        return second + square


class FedAdam(_Adaptive):
    """``fedadam``: beta_2 v + (1 - beta_2) Delta^2."""

    name = "fedadam"

    def _second_moment(self, second: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * second + (1.0 - self.beta2) * square


class FedYogi(_Adaptive):
    """``fedyogi``: v - (1 - beta_2) Delta^2 sign(v - Delta^2)."""

    name = "fedyogi"

    def _second_moment(self, second: Tensor, square: Tensor) -> Tensor:
        return second - (1.0 - self.beta2) * square * torch.sign(second - square)


@dataclass(frozen=True, kw_only=True)
class FedAdamW(ServerOptimizer):
    """``fedadamw``: torch's AdamW along Delta (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    name: ClassVar[str] = "fedadamw"

    lr: float = hyperparameter(1e-3, "server learning rate", low=0.0, high=100.0, log=True)
    momentum: float = hyperparameter(0.9, "decay of the first moment, beta_1", low=0.0, high=0.9999)
    beta2: float = hyperparameter(0.999, "decay of the second moment", low=0.0, high=0.99999)
    eps: float = hyperparameter(1e-8, "added to the second moment's root", low=1e-12, high=1.0, log=True)
    weight_decay: float = hyperparameter(0.01, "share of lr by which weights shrink", low=0.0, high=1.0)

    def step(self, weights: Tensor, mean: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """The moments are corrected for their start at 0, and how many steps they are old is the third.

        It is counted by weight: those of one that comes back into a mask begin anew.
        """
        delta = mean - weights
        first, second, number = moments or (torch.zeros_like(delta),) * 3
        first = self.momentum * first + (1.0 - self.momentum) * delta
        second = self.beta2 * second + (1.0 - self.beta2) * delta * delta
        number = number + 1.0
        rise, fall = ((1.0 - beta ** number.double()).float() for beta in (self.momentum, self.beta2))
        root = (second / fall).sqrt() + self.eps
        shrunk = weights * (1.0 - self.lr * self.weight_decay)
        return shrunk + self.lr * first / rise / root, (first, second, number)


SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = {
    optimizer.name: optimizer for optimizer in (ServerOptimizer, FedAdagrad, FedAdam, FedYogi, FedAdamW)
}
