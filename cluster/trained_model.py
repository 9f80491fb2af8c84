"""What an experiment trains: the plain module, or, with an adapter, a frozen base and adapters in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from cluster import seeding
from cluster.configuration.config import Config
from cluster.transport import wire
from cluster.workload import models
from cluster.workload.adapters import Adapted, base_of, frozen_size, share_base
from cluster.workload.datasets import Dataset
from cluster.workload.weights import load_weights


def build_model(config: Config, dataset: Dataset, *, filled: bool = True) -> nn.Module:
    """The plain module with the common initialisation, of the configured seed or file.

    Args:
        config: The configuration.
        dataset: The decoded data set.
        filled: False where other tensors take the place of all: ``model.weights`` may be gone by then.
    """
    model = models.build(
        config.model.name,
        input_shape=dataset.input_shape,
        classes=config.build_objective().count(dataset),
        tokens=len(dataset.vocabulary),
        seed=seeding.integer(config.seed, "initialisation"),
        **config.model.options,
    )
    if filled and config.model.weights is not None:
        load_weights(model, config.model.weights)
    return model


@dataclass(frozen=True)
class TrainedModel:
    """What is trained of an experiment's model, and what is not.

    Attributes:
        module: The module that computes.
        adapted: What an adapter made of it; None where the whole model is trained.
    """

    module: nn.Module
    adapted: Adapted | None = None

    @classmethod
    def of(cls, config: Config, dataset: Dataset, base: np.ndarray | None = None) -> TrainedModel:
        """Build it.

        Args:
            config: The configuration.
            dataset: The decoded data set.
            base: What is frozen, float32[frozen], which the module is to stand on; None to build it too.

        Raises:
            ChoiceError, ModelError: What is wrong with the model, its file or the adapter.
        """
        module = build_model(config, dataset, filled=base is None)
        adapter = config.build_adapter()
        if adapter is None:
            return cls(module)
        outputs = config.build_objective().count(dataset)
        adapted = adapter.attach(module, outputs, seeding.integer(config.seed, "adapter"))
        if base is not None:
            share_base(module, base)
        return cls(module, adapted)

    @cached_property
    def base(self) -> np.ndarray | None:
        """What is frozen below an adapter, float32[frozen], on which the module stands from then on."""
        if self.adapted is None:
            return None
        base = base_of(self.module)
        share_base(self.module, base)
        return base

    @cached_property
    def base_bytes(self) -> int:
        """Bytes of the base as a message of its own, which a client is sent once; 0 without an adapter."""
        if self.base is None:
            return 0
        return len(wire.encode(self.base, None, wire.Shape(0, 0, len(self.base), ())))

    @property
    def frozen_size(self) -> int:
        """Floats that are not trained, whoever froze them."""
        return frozen_size(self.module)
