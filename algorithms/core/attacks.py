"""Attacks: inputs near the true ones at which the loss is larger, for adversarial training and evaluation.

Lengths are in pixel units, of which 1 is the whole range of a pixel; :class:`Pixels` says what that is in a
model's inputs. FGSM: Goodfellow et al., ICLR 2015, arXiv 1412.6572, with a random start and a step of 1.25
epsilon as in Wong et al., ICLR 2020, arXiv 2001.03994. PGD: Madry et al., ICLR 2018, arXiv 1706.06083.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from algorithms.core.hyperparameters import hyperparameter


@dataclass(frozen=True)
class Pixels:
    """What a pixel unit is in a model's inputs.

    Attributes:
        unit: Length of one pixel unit.
        low: Smallest input that there is.
        high: Largest one.
    """

    unit: float = 1.0
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Attack:
    """``none``: inputs stay as they are. Subclass it for an attack of one's own."""

    name: ClassVar[str] = "none"

    @property
    def active(self) -> bool:
        """Whether it changes anything; if not, nothing is computed and nothing drawn."""
        return False

    @property
    def reach(self) -> tuple[float, float]:
        """How far its steps lead at most, and the radius that it declares, in pixel units."""
        return math.inf, 0.0

    def find(
        self,
        inputs: Tensor,
        slope: Callable[[Tensor], Tensor],
        pixels: Pixels,
        generator: torch.Generator,
    ) -> Tensor:
        """The attacked inputs, like ``inputs``.

        Args:
            inputs: A batch of model inputs, [n, ...].
            slope: Gradient of the batch's mean loss at inputs, like them; a forward pass and an input
                gradient.
            pixels: What pixel units are in these inputs.
            generator: The attack's own randomness, on the CPU, so that all devices draw the same.
        """
        return inputs


@dataclass(frozen=True, kw_only=True)
class Fgsm(Attack):
    """``fgsm``: one step along the sign of the gradient, from a random start."""

    name: ClassVar[str] = "fgsm"

    epsilon: float = hyperparameter(
        8 / 255,
        "radius of the ball around each input, in pixel units: 1 is the whole range of a pixel",
        low=0.0,
        log=True,
        search=(2 / 255, 0.3),
    )
    step: float | None = hyperparameter(
        None, "length of a step, in pixel units; default 1.25 epsilon, of pgd a quarter of epsilon", low=0.0
    )
    random_start: bool = hyperparameter(True, "start anywhere in the ball, not at the input itself")
    norm: str = hyperparameter("linf", "what the ball is a ball of", choices=("linf", "l2"))

    @property
    def passes(self) -> int:
        """Steps."""
        return 1

    @property
    def length(self) -> float:
        """Of a step, in pixel units."""
        return 1.25 * self.epsilon if self.step is None else self.step

    @property
    def active(self) -> bool:
        """See :class:`Attack`."""
        return self.epsilon > 0.0 and self.passes > 0

    @property
    def reach(self) -> tuple[float, float]:
        """See :class:`Attack`."""
        return self.passes * self.length, self.epsilon

    def find(
        self,
        inputs: Tensor,
        slope: Callable[[Tensor], Tensor],
        pixels: Pixels,
        generator: torch.Generator,
    ) -> Tensor:
        """See :class:`Attack`: steps of one length, each projected on the ball and on what inputs may be."""
        radius, step = self.epsilon * pixels.unit, self.length * pixels.unit
        found = inputs
        if self.random_start:
            found = (inputs + self._anywhere(inputs, radius, generator)).clamp(pixels.low, pixels.high)
        for _ in range(self.passes):
            moved = found + step * self._direction(slope(found))
            found = (inputs + self._inside(moved - inputs, radius)).clamp(pixels.low, pixels.high)
        return found

    def _anywhere(self, inputs: Tensor, radius: float, generator: torch.Generator) -> Tensor:
        """Uniform in the ball."""
        if self.norm == "linf":
            return torch.rand(inputs.shape, generator=generator).mul_(2).sub_(1).mul_(radius).to(inputs)
        toward = torch.randn(inputs.shape, generator=generator)
        share = torch.rand(len(inputs), generator=generator) ** (len(inputs) / inputs.numel())
        return (toward * (radius * share / _norms(toward)).view(_column(inputs))).to(inputs)

    def _direction(self, slope: Tensor) -> Tensor:
        """Of the steepest ascent, of length 1."""
        if self.norm == "linf":
            return slope.sign()
        return slope / _norms(slope).clamp(min=1e-30).view(_column(slope))

    def _inside(self, moved: Tensor, radius: float) -> Tensor:
        if self.norm == "linf":
            return moved.clamp(-radius, radius)
        return moved * (radius / _norms(moved).clamp(min=radius)).view(_column(moved))


@dataclass(frozen=True, kw_only=True)
class Pgd(Fgsm):
    """``pgd``: projected gradient ascent, several steps of FGSM that stay in the ball."""

    name: ClassVar[str] = "pgd"

    steps: int = hyperparameter(
        10, "steps; each costs two thirds of a training pass", low=0, high=1000, search=(3, 10)
    )

    @property
    def passes(self) -> int:
        """See :class:`Fgsm`."""
        return self.steps

    @property
    def length(self) -> float:
        """See :class:`Fgsm`."""
        return self.epsilon / 4 if self.step is None else self.step


@dataclass(frozen=True, kw_only=True)
class EvaluationPgd(Pgd):
    """``pgd``: projected gradient ascent, as robustness is measured by it."""

    steps: int = hyperparameter(20, "steps", low=0, high=1000)


def _norms(values: Tensor) -> Tensor:
    """Length of each sample, float[n]."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1)


def _column(values: Tensor) -> tuple[int, ...]:
    """Shape of a number a sample, beside ``values``."""
    return (len(values), *[1] * (values.ndim - 1))
