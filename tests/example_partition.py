"""A partition of your own: run it with ``partition.name=tests.example_partition:Halves``."""

from dataclasses import dataclass

import numpy as np

from algorithms import hyperparameter
from cluster.workload.partitioners import Partitioner


@dataclass(frozen=True, kw_only=True)
class Halves(Partitioner):
    """The first half of the clients see the lower classes, the others the upper ones."""

    leak: float = hyperparameter(0.1, "share of samples that go to anybody", low=0.0, high=1.0)

    def owners(self, labels, clients, rng, groups):
        """The client of each sample, int64 [N]; -1 for nobody."""
        half, anybody = clients // 2, rng.integers(clients, size=labels.size)
        owner = np.where(labels <= np.median(labels), anybody % half, half + anybody % (clients - half))
        return np.where(rng.random(labels.size) < self.leak, anybody, owner)
