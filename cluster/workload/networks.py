"""The built-in architectures: plain torch networks for images.

Layers are found by their names (`fnmatch` patterns such as `*shortcut*`), activations are never changed in
place because methods save them, and nothing depends on the batch but BatchNorm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from algorithms.core.hyperparameters import hyperparameter
from cluster.workload.architecture import Architecture
from cluster.workload.models import ModelError

_NORMS = ("group", "batch", "none")


def _norm(kind: str, channels: int, groups: int) -> nn.Module:
    """The normalisation of a convolution's output."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "none":
        return nn.Identity()
    if channels % groups:
        raise ModelError(f"model.groups = {groups} does not divide a layer's {channels} channels")
    return nn.GroupNorm(groups, channels)


@dataclass(frozen=True, kw_only=True)
class SmallCNN(Architecture):
    """Two blocks of convolution, normalisation, ReLU and 2x2 max-pooling, then two linear layers.

    What the blocks leave is averaged to at most 2x2, so that the model has about 208,000 parameters (on
    one-channel 8x8 digits as on 28x28 clothes) and not 1.7 million. Neither the norm nor the kind of
    pooling matters much for speed: on one core the convolutions take four fifths of a step. Images have at
    least 4x4 pixels.
    """

    initialised_here = True

    channels: tuple[int, ...] = hyperparameter((64, 128), "output channels of the two convolutions", low=1)
    hidden: int = hyperparameter(256, "width of the hidden linear layer", low=1)
    norm: str = hyperparameter("group", "normalisation behind a convolution", choices=_NORMS)
    groups: int = hyperparameter(8, "groups of GroupNorm; must divide the channels", low=1)
    projection: int = hyperparameter(
        0, "width of MOON's projection, two linear layers before the last one; 0: none", low=0
    )

    def __post_init__(self) -> None:
        if len(self.channels) != 2:
            raise ValueError(f"channels: two numbers are needed, found {list(self.channels)}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """See :class:`Architecture`."""
        depth, height, width = input_shape
        if min(height, width) < 4:
            raise ModelError(
                f"model.name = 'small_cnn' needs at least 4x4 pixels, images have {height}x{width}"
            )
        first, second = self.channels
        kept = (min(2, height // 4), min(2, width // 4))
        layers: list[nn.Module] = []
        for before, after in ((depth, first), (first, second)):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=self.norm == "none"),
                _norm(self.norm, after, self.groups),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        if kept != (height // 4, width // 4):
            layers.append(nn.AdaptiveAvgPool2d(kept))
        layers += [nn.Flatten(), nn.Linear(second * kept[0] * kept[1], self.hidden), nn.ReLU()]
        width = self.hidden
        if self.projection:
            layers += [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.projection)]
            width = self.projection
        return nn.Sequential(*layers, nn.Linear(width, classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, arXiv 1512.03385).

    The shortcut is the identity, or a 1x1 convolution with a normalisation where the shape changes; then its
    convolution is called `shortcut.0`, for name patterns such as `*shortcut*`.
    """

    def __init__(self, before: int, after: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = norm(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), norm(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, before, H, W] to [B, after, H/stride, W/stride]."""
        residual = functional.relu(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        return functional.relu(residual + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """See :class:`ResNet18`."""

    def __init__(
        self, depth: int, classes: int, stem: str, width: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(depth, width, 7, stride=2, padding=3, bias=False)
            self.pool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(depth, width, 3, padding=1, bias=False)
            self.pool = nn.Identity()
        self.norm1 = norm(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for stage in (1, 2, 3, 4):
            stride = 1 if stage == 1 else 2
            blocks = [
                BasicBlock(widths[stage - 1], widths[stage], stride, norm),
                BasicBlock(widths[stage], widths[stage], 1, norm),
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to logits [B, classes]."""
        x = self.pool(functional.relu(self.norm1(self.conv1(x))))
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean(dim=(2, 3)))


@dataclass(frozen=True, kw_only=True)
class ResNet18(Architecture):
    """ResNet-18: 11.17 million parameters for ten classes of CIFAR."""

    initialised_here = True

    norm: str = hyperparameter("batch", "normalisation; batch is the papers'", choices=_NORMS)
    groups: int = hyperparameter(2, "groups of GroupNorm; must divide the channels", low=1)
    stem: str = hyperparameter(
        "cifar",
        "cifar: a 3x3 convolution and no pooling; imagenet: 7x7 with stride 2 and a 3x3 max-pool with stride "
        "2, as in the original and in the Speech Commands experiments",
        choices=("cifar", "imagenet"),
    )
    width: int = hyperparameter(
        64, "channels of the first stage; the later ones have 2, 4 and 8 times as many", low=1
    )

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """See :class:`Architecture`."""
        return ResidualNetwork(
            input_shape[0],
            classes,
            self.stem,
            self.width,
            lambda channels: _norm(self.norm, channels, self.groups),
        )


class Perturbation(nn.Module):
    """One perturbation added to all inputs, a parameter that begins at 0, for saddle problems."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.perturbation = nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ...] to the same."""
        return x + self.perturbation


@dataclass(frozen=True, kw_only=True)
class MLP(Architecture):
    """Linear layers with ReLU between them, on flattened inputs."""

    initialised_here = True

    hidden: tuple[int, ...] = hyperparameter(
        (200,), "widths of the hidden layers; [] for a linear classifier", low=1
    )
    bias: bool = hyperparameter(True, "whether layers have an offset")
    perturbation: bool = hyperparameter(False, "whether one is trained for all inputs, as sgda and masha do")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """See :class:`Architecture`."""
        sizes = [math.prod(input_shape), *self.hidden]
        layers: list[nn.Module] = [Perturbation(input_shape)] if self.perturbation else []
        layers.append(nn.Flatten())
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after, bias=self.bias), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], classes, bias=self.bias))


@dataclass(frozen=True, kw_only=True)
class Linear(Architecture):
    """One linear layer on flattened inputs: linear or logistic regression, which have one optimum."""

    bias: bool = hyperparameter(True, "whether outputs have an offset")
    init: str = hyperparameter("normal", "weights drawn as in all, or zero", choices=("normal", "zero"))
    perturbation: bool = hyperparameter(False, "whether one is trained for all inputs, as sgda and masha do")

    @property
    def initialised_here(self) -> bool:
        """See :class:`Architecture`."""
        return self.init == "normal"

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """See :class:`Architecture`."""
        layer = nn.Linear(math.prod(input_shape), classes, bias=self.bias)
        if self.init == "zero":
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        first = [Perturbation(input_shape)] if self.perturbation else []
        return nn.Sequential(*first, nn.Flatten(), layer)
