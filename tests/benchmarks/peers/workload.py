"""The workload that all simulators share: torch and numpy only, as each has its own environment."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn

CLIENTS, COHORT, SAMPLES, BATCH, TEST, LR = 100, 10, 64, 16, 512, 0.01


def arrays() -> dict[str, np.ndarray]:
    """Random images and labels: what is measured does not depend on what they show."""
    generator = np.random.default_rng(0)
    total = CLIENTS * SAMPLES
    return {
        "train_images": generator.integers(0, 256, (total, 8, 8), np.uint8),
        "train_labels": np.arange(total) % 10,
        "test_images": generator.integers(0, 256, (TEST, 8, 8), np.uint8),
        "test_labels": np.arange(TEST) % 10,
    }


def tensors(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Model inputs and labels of ``train`` or ``test``."""
    data = arrays()
    images = torch.from_numpy(data[f"{split}_images"])[:, None].float().div_(255).sub_(0.5).div_(0.5)
    return images, torch.from_numpy(data[f"{split}_labels"])


def small_cnn() -> nn.Sequential:
    """The product's small CNN on 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1, bias=False),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1, bias=False),
        nn.GroupNorm(8, 128),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def report(seconds: list[float]) -> None:
    """The rounds' seconds as the last line of the output."""
    print("seconds", *seconds, flush=True)
    sys.stdout.flush()
