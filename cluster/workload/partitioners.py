"""Ways to divide training samples among clients, by ``partition.name``.

A partition is drawn from the labels (or the groups) and a seed alone, so that every process, every method and
every resumed run sees the same one. Images are never copied: a client's data set is a list of indices into
the node's memory-mapped arrays.

    parts = Lda(alpha=0.1).divide(dataset.train.targets, clients=100, seed=1337)
    dataset.train.inputs[parts.client(7)]

One of your own says who gets each sample; ``partition.name=my_module:ByParity``::

    @dataclass(frozen=True, kw_only=True)
    class ByParity(Partitioner):
        '''Odd and even clients see odd and even labels.'''

        leak: float = hyperparameter(0.0, "share that goes anywhere", low=0.0, high=1.0)

        def owners(self, labels, clients, rng, groups):
            owner = 2 * rng.integers(clients // 2, size=labels.size) + labels % 2
            anywhere = rng.random(labels.size) < self.leak
            return np.where(anywhere, rng.integers(clients, size=labels.size), owner)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from algorithms.core.hyperparameters import hyperparameter
from cluster.references import UserError
from cluster.workload.partition import ListedPartition, Partition, SampledPartition

RENORMALISATION = 1e-5  # added by the authors' code to every class still in stock


class PartitionError(UserError):
    """A partition that cannot be drawn; the message names the key, what was found and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Partitioner:
    """A way to divide samples. No sample goes to two clients, and every client gets at least one."""

    @property
    def by_class(self) -> bool:
        """Whether it looks at labels. Where the objective has no classes, only what does not is allowed."""
        return True

    def divide(
        self,
        labels: np.ndarray,
        *,
        clients: int,
        seed: int,
        groups: np.ndarray | None = None,
        available: np.ndarray | None = None,
    ) -> Partition:
        """Divide training samples among clients.

        Args:
            labels: int64 [total], labels of the full training split.
            clients: Number of clients, n.
            seed: The only source of randomness.
            groups: int64 [total], codes of writers, speakers or devices, where the data has such.
            available: int64 indices of the samples that may be used, such as those that are not validation
                data; None for all.

        Returns:
            Indices into the full training split.

        Raises:
            PartitionError: Too few samples or groups, or they cannot be divided so.
        """
        pool = _pool(labels, clients, available)
        if clients > pool.size:
            raise PartitionError(
                f"partition.clients = {clients} but only {pool.size} training samples are available: "
                f"every client needs at least one; partition.name = 'sampled' draws with replacement"
            )
        rng = np.random.Generator(np.random.PCG64(seed))
        owner = self.owners(labels[pool], clients, rng, None if groups is None else groups[pool])
        sizes = self._sizes(owner, pool.size, clients)
        order = np.argsort(owner, kind="stable")[pool.size - sizes.sum() :]
        return ListedPartition(indices=pool[order], offsets=np.concatenate([[0], np.cumsum(sizes)]))

    def owners(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> np.ndarray:
        """Who gets each sample.

        Args:
            labels: int64 [N], labels of the samples that may be used.
            clients: Number of clients.
            rng: The only source of randomness.
            groups: int64 [N], or None.

        Returns:
            int64 [N]: a client from 0 on, -1 for nobody.
        """
        raise PartitionError(
            f"partition.name: {type(self).__name__} has neither `owners` nor `divide` of its own"
        )

    def _sizes(self, owner: np.ndarray, samples: int, clients: int) -> np.ndarray:
        """Samples of every client, int64 [clients], once it is sure that these are owners."""
        owner, kind = np.asarray(owner), type(self).__name__
        if owner.shape != (samples,) or owner.dtype.kind not in "iu":
            raise PartitionError(
                f"partition.name: owners of {kind} returned {owner.dtype} {list(owner.shape)}; expected the "
                f"client of each sample, int64 [{samples}]"
            )
        if owner.min() < -1 or owner.max() >= clients:
            raise PartitionError(
                f"partition.name: {kind} gives samples to clients {owner.min()} to {owner.max()}; there are "
                f"0 to {clients - 1}, and -1 is nobody"
            )
        sizes = np.bincount(owner + 1, minlength=clients + 1)[1:]  # the first entry counts samples of nobody
        if sizes.min() < 1:
            raise PartitionError(
                f"partition.name: {kind} leaves client {sizes.argmin()} without a sample; every one of the "
                f"{clients} clients needs at least one"
            )
        return sizes


def _pool(labels: np.ndarray, clients: int, available: np.ndarray | None) -> np.ndarray:
    """The samples that may be used, int64, ascending."""
    pool = np.arange(labels.size) if available is None else np.unique(available)
    if available is not None and pool.size != len(available):
        raise PartitionError(f"{len(available) - pool.size} of the available samples are listed twice")
    if clients < 1:
        raise PartitionError(f"partition.clients = {clients}; at least 1 is needed")
    return pool


@dataclass(frozen=True, kw_only=True)
class Lda(Partitioner):
    """Equal sizes, classes by latent Dirichlet allocation (Hsu et al. 2019, arXiv 1909.06335).

    floor(N/n) samples each; the N mod n samples that are last in stock go to nobody.
    """

    alpha: float = hyperparameter(
        1.0, "concentration: 1000 is nearly uniform, 0.1 strongly skewed", above=0.0
    )
    order: str = hyperparameter(
        "clients",
        "who draws next: a client until it is full, so that the last ones meet empty classes, or in turns of "
        "all clients that are shuffled (`shuffled`), so that the last draws of each do",
        choices=("clients", "shuffled"),
        source="Hsu et al.; the runs of SSFL",
    )

    def owners(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> np.ndarray:
        """See :class:`Partitioner`.

        Client after client draws a class distribution, then classes one by one, and takes a sample of each
        drawn class until its own number is reached. Draws from an unchanged distribution are independent, so
        they are made in batches and cut after the draw that takes the last sample of a class: the same
        procedure as one by one, but with at most (clients + classes) batches.
        """
        present, codes = np.unique(labels, return_inverse=True)
        pools = [rng.permutation(np.flatnonzero(codes == code)) for code in range(present.size)]
        stock = np.array([members.size for members in pools])
        owner = np.full(labels.size, -1)
        mixtures = rng.dirichlet(np.full(present.size, self.alpha), size=clients)
        if self.order == "shuffled":
            for who, which in _in_turns(mixtures, stock, labels.size // clients, rng):
                owner[pools[which][stock[which]]] = who
            return owner
        for client, mixture in enumerate(mixtures):
            probabilities = _renormalise(mixture, stock)
            needed = labels.size // clients
            while needed:
                draws = rng.choice(present.size, size=needed, p=probabilities)
                end = needed
                for code in np.flatnonzero((np.bincount(draws, minlength=stock.size) >= stock) & (stock > 0)):
                    end = min(end, int(np.flatnonzero(draws == code)[stock[code] - 1]) + 1)
                taken = np.bincount(draws[:end], minlength=stock.size)
                for code in np.flatnonzero(taken):
                    owner[pools[code][stock[code] - taken[code] : stock[code]]] = client
                stock -= taken
                needed -= end
                if needed:
                    probabilities = _renormalise(probabilities, stock)
        return owner


def _in_turns(
    mixtures: np.ndarray, stock: np.ndarray, each: int, rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Clients in turns, and the class that each draws by its mixture of what is in stock; that loses one."""
    turns = rng.permutation(np.repeat(np.arange(len(mixtures)), each))
    bounds = _bounds(mixtures, stock)
    for client, drawn in zip(turns.tolist(), rng.random(turns.size), strict=True):
        code = int(np.searchsorted(bounds[client], drawn, side="right"))
        stock[code] -= 1
        yield client, code
        if stock[code] == 0 and stock.any():
            bounds = _bounds(mixtures, stock)


def _bounds(mixtures: np.ndarray, stock: np.ndarray) -> np.ndarray:
    """Where each class in stock ends in [0, 1), by each client's mixture, float64[clients, classes]."""
    ends = np.cumsum([_renormalise(mixture, stock) for mixture in mixtures], axis=1)
    last = int(np.flatnonzero(stock)[-1])
    ends[:, last:] = 1.0  # rounding must not lead beyond the last class in stock
    return ends


def _renormalise(probabilities: np.ndarray, stock: np.ndarray) -> np.ndarray:
    """Probability 0 for exhausted classes; the rest, each with the authors' 1e-5 added, sums to 1 again.

    The constant keeps the last clients going: at small alpha all classes in stock may have probability 0.
    """
    kept = np.where(stock > 0, probabilities + RENORMALISATION, 0.0)
    return kept / kept.sum()


@dataclass(frozen=True, kw_only=True)
class Iid(Partitioner):
    """All samples, uniformly, with sizes that differ by at most one."""

    by_class = False

    def owners(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> np.ndarray:
        """See :class:`Partitioner`."""
        return rng.permutation(labels.size) % clients


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Partitioner):
    """All samples; each class is cut by proportions of its own (Yurochkin et al. 2019, arXiv 1905.12022).

    They are drawn from Dirichlet(alpha 1_n), so that sizes differ widely. A client left with nothing gets one
    sample of the then largest client, where the usual re-drawing might never end.
    """

    alpha: float = hyperparameter(
        1.0, "concentration: 1000 is nearly uniform, 0.1 strongly skewed", above=0.0
    )

    def owners(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> np.ndarray:
        """See :class:`Partitioner`."""
        owner = np.empty(labels.size, dtype=np.int64)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(clients, self.alpha))
            cuts = np.rint(np.cumsum(shares)[:-1] * members.size).astype(np.int64)
            owner[members] = np.searchsorted(cuts, np.arange(members.size), side="right")
        sizes = np.bincount(owner, minlength=clients)
        for client in np.flatnonzero(sizes == 0):
            largest = int(sizes.argmax())
            owner[rng.choice(np.flatnonzero(owner == largest))] = client
            sizes[largest] -= 1
            sizes[client] += 1
        return owner


@dataclass(frozen=True, kw_only=True)
class Shards(Partitioner):
    """All samples, sorted by label and cut into even shards, dealt at random (McMahan et al. 2017)."""

    shards_per_client: int = hyperparameter(2, "shards of sorted labels that a client gets", low=1)

    def owners(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> np.ndarray:
        """See :class:`Partitioner`; arXiv 1602.05629."""
        shards = clients * self.shards_per_client
        if not clients <= shards <= labels.size:
            raise PartitionError(
                f"partition.shards_per_client = {self.shards_per_client} for {clients} clients makes "
                f"{shards} shards of {labels.size} available samples; at least 1 shard a client and 1 sample "
                "a shard are needed"
            )
        shuffled = rng.permutation(labels.size)  # which of a class's samples share a shard is random
        order = shuffled[np.argsort(labels[shuffled], kind="stable")]
        owner = np.empty(labels.size, dtype=np.int64)
        owner[order] = (rng.permutation(shards) % clients)[np.arange(labels.size) * shards // labels.size]
        return owner


@dataclass(frozen=True, kw_only=True)
class Natural(Partitioner):
    """All samples, by the writer, speaker or device in ``data.group_column``; no group is split.

    As many clients as groups: client i is group i in the order of the codes. Fewer: the groups are shuffled
    and dealt round-robin. Samples of groups that are too small go to nobody.
    """

    by_class = False

    min_samples: int = hyperparameter(
        1, "samples that a group has at least; smaller ones are left out", low=1
    )

    def owners(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> np.ndarray:
        """See :class:`Partitioner`."""
        if groups is None:
            raise PartitionError(
                "partition.name = 'natural' needs groups: name the column of writers, speakers or devices "
                "in data.group_column"
            )
        found, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        large = np.flatnonzero(sizes >= self.min_samples)
        if not large.size:
            raise PartitionError(
                f"partition.min_samples = {self.min_samples} but the largest of {found.size} groups has "
                f"{sizes.max()} samples: lower it"
            )
        if clients > large.size:
            few = f" of at least {self.min_samples} samples" if large.size < found.size else ""
            raise PartitionError(
                f"partition.clients = {clients} but the available samples have only {large.size} groups{few}"
                f", and 'natural' never splits one: use at most {large.size} clients"
            )
        owner = np.full(found.size, -1)
        owner[large] = (
            np.arange(large.size) if clients == large.size else rng.permutation(large.size) % clients
        )
        return owner[codes]


@dataclass(frozen=True, kw_only=True)
class Sampled(Partitioner):
    """Drawn with replacement when a client is played and forgotten afterwards: a million take no memory.

    With alpha, a client's classes follow its own Dirichlet(alpha 1_C), as in `lda` with stocks that never run
    out; without, they are those of the data.
    """

    alpha: float | None = hyperparameter(
        1.0, "concentration of a client's classes; null: those of the data", above=0.0
    )
    samples_per_client: int = hyperparameter(50, "samples that a client draws", low=1)

    @property
    def by_class(self) -> bool:
        """See :class:`Partitioner`."""
        return self.alpha is not None

    def divide(
        self,
        labels: np.ndarray,
        *,
        clients: int,
        seed: int,
        groups: np.ndarray | None = None,
        available: np.ndarray | None = None,
    ) -> Partition:
        """See :class:`Partitioner`; a sample may have several owners."""
        pool = _pool(labels, clients, available)
        if not pool.size:
            raise PartitionError("no training samples are available to draw from")
        return SampledPartition.over(pool, labels, clients, seed, self.samples_per_client, self.alpha)
