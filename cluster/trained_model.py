"""What an experiment trains: the plain module, or, with an adapter, a frozen base and adapters in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from algorithms.core.masks import kth_largest
from algorithms.core.parameters import ParameterLayout
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


#: A trained head is said to be cut where less than so much of it is left.
_HEAD_LEFT = 0.5


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

    def lost_to_a_cut(self, config: Config, layout: ParameterLayout) -> str | None:
        """What of adapters and of a trained head the method's first cut or mask would not leave, in a line.

        One threshold over all layers compares B, at or near 0, with A and the head: B is cut and stays 0. And
        no adapter makes up for most of a head.
        """
        if self.adapted is None:
            return None
        method, size = config.method, layout.prunable_size
        rng = seeding.generator(config.seed, "server")
        weights = method.initial_state(layout.flatten(self.module), layout, rng).weights
        magnitudes, threshold = weights[:size].abs(), 0.0
        if method.kept_weights < 1.0:
            threshold = kth_largest(magnitudes, max(1, round(method.kept_weights * size)))
        left = method.nonzeros(weights, layout) & (magnitudes >= threshold)
        lost = []
        head = [entry for entry in layout.prunable if entry.name == f"{self.adapted.head}.weight"]
        share = float(left[head[0].span].float().mean()) if head else 1.0
        if share < _HEAD_LEFT and config.model.weights is not None:
            lost.append(f"{share:.0%} of the trained head (adapter.freeze_head=true keeps it whole)")
        below = [entry for entry in layout.prunable if magnitudes[entry.span].max() < threshold]
        if below:
            name = below[0].name.removesuffix(".weight")
            some = f" and {len(below) - 1} more layers" if len(below) > 1 else ""
            lost.append(f"nothing of {name}{some} (adapter.freeze_a=true leaves one kind to compare)")
        if not lost:
            return None
        return (
            f"algorithm.name={config.algorithm.name} at this sparsity would leave {' and '.join(lost)}; or "
            "cut differences alone: algorithm.name=flasc, algorithm.down_sparsity=0"
        )

    @property
    def frozen_size(self) -> int:
        """Floats that are not trained, whoever froze them."""
        return frozen_size(self.module)
