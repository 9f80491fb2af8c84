"""Which client has which training samples: listed once, or drawn a client at a time.

Nobody else asks which form it has. What is asked of all clients at once (``clients``, ``sizes``) costs no
memory in the drawn form; everything else is asked of the clients of one round.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from cluster import seeding


class Partition(ABC):
    """Which training samples each client has."""

    @property
    @abstractmethod
    def clients(self) -> int:
        """Number of clients."""

    @property
    @abstractmethod
    def sizes(self) -> np.ndarray:
        """int64 [clients], the number of samples of each client."""

    @abstractmethod
    def client(self, index: int) -> np.ndarray:
        """int64 [size], the samples of one client, sorted; read-only.

        Raises:
            IndexError: `index` is outside 0..clients-1.
        """

    @abstractmethod
    def digest(self) -> str:
        """Sixteen hexadecimal digits that two partitions share only if they are equal."""

    def class_histogram(
        self, labels: np.ndarray, classes: int, clients: np.ndarray | None = None
    ) -> np.ndarray:
        """Samples of every class that clients have.

        Args:
            labels: int64 [N], the labels of the full training split.
            classes: Number of classes.
            clients: int64 [n], the clients that are asked about; None for all.

        Returns:
            int64 [n, classes].
        """
        asked = range(self.clients) if clients is None else map(int, clients)
        rows = [np.bincount(labels[self.client(index)], minlength=classes) for index in asked]
        return np.array(rows, np.int64).reshape(-1, classes)

    def _check(self, index: int) -> None:
        if not 0 <= index < self.clients:
            raise IndexError(f"client {index} of a partition with {self.clients} clients")


@dataclass(frozen=True, eq=False)
class ListedPartition(Partition):
    """Clients' samples in CSR form: client i owns `indices[offsets[i]:offsets[i + 1]]`.

    Attributes:
        indices: int64 [total], positions in the full training split, each at most once; read-only.
        offsets: int64 [clients + 1], from 0 to total; read-only.
    """

    indices: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        # `client` hands out views: shuffling one in place must fail, not change who owns what.
        self.indices.flags.writeable = False
        self.offsets.flags.writeable = False

    @property
    def clients(self) -> int:
        """See :class:`Partition`."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """See :class:`Partition`."""
        return np.diff(self.offsets)

    def client(self, index: int) -> np.ndarray:
        """See :class:`Partition`; a view."""
        self._check(index)
        return self.indices[self.offsets[index] : self.offsets[index + 1]]

    def digest(self) -> str:
        """See :class:`Partition`."""
        content = self.offsets.astype("<i8").tobytes() + self.indices.astype("<i8").tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class SampledPartition(Partition):
    """Clients whose samples are a pure function of (seed, client), drawn with replacement when asked for.

    Memory is that of the samples' positions, whatever the number of clients.

    Attributes:
        pool: int64 [N], positions in the full training split, class after class; read-only.
        edges: int64 [classes + 1]: class c is `pool[edges[c]:edges[c + 1]]`, of the classes that occur.
        population: Number of clients.
        seed: The only source of randomness.
        samples: Samples of each client.
        alpha: Concentration of a client's own class mixture, Dirichlet(alpha 1_classes); None draws uniformly
            from the pool.
    """

    pool: np.ndarray
    edges: np.ndarray
    population: int
    seed: int
    samples: int
    alpha: float | None

    @classmethod
    def over(
        cls,
        available: np.ndarray,
        labels: np.ndarray,
        clients: int,
        seed: int,
        samples: int,
        alpha: float | None,
    ) -> SampledPartition:
        """A partition that draws from `available`, int64 indices into `labels`, int64 [total]."""
        pool = available[np.argsort(labels[available], kind="stable")]
        counts = np.unique(labels[available], return_counts=True)[1]
        pool.flags.writeable = False
        return cls(pool, np.concatenate([[0], np.cumsum(counts)]), clients, seed, samples, alpha)

    @property
    def clients(self) -> int:
        """See :class:`Partition`."""
        return self.population

    @property
    def sizes(self) -> np.ndarray:
        """See :class:`Partition`; one number seen `clients` times, which takes no memory."""
        return np.broadcast_to(np.int64(self.samples), self.population)

    def client(self, index: int) -> np.ndarray:
        """See :class:`Partition`; a sample may occur twice."""
        self._check(index)
        generator = seeding.generator(self.seed, "partition", client=index)
        if self.alpha is None:
            places = generator.integers(self.pool.size, size=self.samples)
        else:
            sizes = np.diff(self.edges)
            mixture = generator.dirichlet(np.full(sizes.size, self.alpha))
            classes = generator.choice(sizes.size, size=self.samples, p=mixture)
            places = self.edges[classes] + generator.integers(sizes[classes])
        rows = np.sort(self.pool[places])
        rows.flags.writeable = False
        return rows

    def digest(self) -> str:
        """See :class:`Partition`; of what every client is drawn from."""
        digest = hashlib.sha256(
            repr(("sampled", self.population, self.seed, self.samples, self.alpha)).encode()
        )
        digest.update(self.edges.astype("<i8").tobytes() + self.pool.astype("<i8").tobytes())
        return digest.hexdigest()[:16]
