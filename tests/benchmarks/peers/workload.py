"""The workloads that all simulators share: torch and numpy only, as each has its own environment."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 10


@dataclass(frozen=True)
class Workload:
    """FedAvg with plain SGD over made-up images, the test split evaluated after every round.

    Attributes:
        network: Builds the model, called with nothing; its weights are torch's own draw.
        shape: (channels, height, width) of an image.
        cohort: Clients of a round.
        samples: Training samples of a client.
        test: Test samples.
        epochs: Local epochs.
        batch: Samples of a local step.
        lr: Local learning rate.
        shards: How many equal pieces, each of one class, a client holds; 0: all classes, in turn.
        clients: How many there are.
    """

    network: Callable[..., nn.Sequential]
    shape: tuple[int, int, int]
    cohort: int
    samples: int
    test: int
    epochs: int
    batch: int
    lr: float
    shards: int = 0
    clients: int = 100

    def rows(self, client: int) -> slice:
        """The training samples of a client."""
        return slice(client * self.samples, (client + 1) * self.samples)

    def arrays(self) -> dict[str, np.ndarray]:
        """Images of one random pattern a class under three times as much noise; groups are the clients."""
        rng = np.random.default_rng(0)
        channels, height, width = self.shape
        patterns = rng.integers(0, 256, (CLASSES, height, width, channels), np.uint16)
        total = self.clients * self.samples
        labels = {"train": np.arange(total) % CLASSES, "test": np.arange(self.test) % CLASSES}
        if self.shards:
            pieces = rng.permutation(self.clients * self.shards)
            labels["train"] = np.repeat(pieces * CLASSES // len(pieces), self.samples // self.shards)
        found = {"train_groups": np.arange(total) // self.samples}
        for split, classes in labels.items():
            noise = rng.integers(0, 256, (len(classes), height, width, channels), np.uint16)
            found[f"{split}_images"] = ((patterns[classes] + 3 * noise) // 4).astype(np.uint8)
            found[f"{split}_labels"] = classes
        return found

    @functools.cache  # noqa: B019 - once a process
    def tensors(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Model inputs and labels of ``train`` or ``test``."""
        data = self.arrays()
        images = torch.from_numpy(data[f"{split}_images"]).permute(0, 3, 1, 2).contiguous()
        return images.float().div_(255).sub_(0.5).div_(0.5), torch.from_numpy(data[f"{split}_labels"])

    def batches(
        self, client: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch of a client, shuffled."""
        images, labels = self.tensors("train")
        first = self.rows(client).start
        for chosen in (first + torch.randperm(self.samples, generator=generator)).split(self.batch):
            yield images[chosen], labels[chosen]

    def test_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The test split."""
        images, labels = self.tensors("test")
        return zip(images.split(256), labels.split(256), strict=True)

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Accuracy and loss on the test split."""
        correct, loss = 0, 0.0
        with torch.no_grad():
            for images, labels in self.test_batches():
                outputs = model(images)
                correct += int((outputs.argmax(1) == labels).sum())
                loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        return correct / self.test, loss / self.test


def small_cnn(
    input_shape: tuple[int, ...] = (1, 8, 8), classes: int = CLASSES, seed_of_torch: int | None = None
) -> nn.Sequential:
    """The product's small CNN on images of this one shape."""
    _seed(seed_of_torch)
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
        nn.Linear(256, classes),
    )


def lenet(
    input_shape: tuple[int, ...] = (3, 32, 32), classes: int = CLASSES, seed_of_torch: int | None = None
) -> nn.Sequential:
    """The CNN of 62,006 parameters of PyTorch's tutorial on CIFAR-10, which BlazeFL's benchmark trains."""
    _seed(seed_of_torch)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def _seed(seed: int | None) -> None:
    """The product has a seed of its own for a model; this one is what the others begin with."""
    if seed is not None:
        torch.manual_seed(seed)


def workload(name: str, samples: int) -> Workload:
    """``small``, or ``shards``: BlazeFL's own CNN benchmark, which has 500 samples a client."""
    if name == "small":
        return Workload(small_cnn, (1, 8, 8), 10, samples, test=512, epochs=1, batch=16, lr=0.01)
    return Workload(lenet, (3, 32, 32), 100, samples, 20 * samples, epochs=5, batch=50, lr=0.1, shards=2)


def __getattr__(name: str) -> Any:
    """Data sets by name, for the product: ``small_64`` is that of ``workload("small", 64)``."""
    kind, _, samples = name.partition("_")
    if kind not in ("small", "shards") or not samples.isdigit():
        raise AttributeError(name)
    return workload(kind, int(samples)).arrays


def asked() -> tuple[Workload, int, int]:
    """What the command line ends with: ``NAME SAMPLES ROUNDS WORKERS``."""
    name, samples, rounds, workers = sys.argv[-4:]
    return workload(name, int(samples)), int(rounds), int(workers)


def report(marks: list[float], accuracy: float, loss: float) -> None:
    """The seconds between the marks, which are one more than the rounds, and how good the last model is."""
    print("seconds", *(later - earlier for earlier, later in zip(marks, marks[1:])))  # noqa: B905, RUF007
    print("test", accuracy, loss, flush=True)
