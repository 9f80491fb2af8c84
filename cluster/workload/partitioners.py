"""Ways to divide training samples among clients.

A partition is drawn from the labels (or the groups) and a seed alone, so that every process, every method and
every resumed run sees the same one. Images are never copied: a client's data set is a list of indices into
the node's memory-mapped arrays.

    parts = partition("lda", dataset.train.targets, clients=100, seed=1337, alpha=0.1)
    dataset.train.inputs[parts.client(7)]
"""

import numpy as np

from cluster.references import UserError, did_you_mean
from cluster.workload.partition import ListedPartition, Partition, SampledPartition

PARTITIONS = ("lda", "iid", "dirichlet", "shards", "natural", "sampled")
RENORMALISATION = 1e-5  # added by the authors' code to every class still in stock


class PartitionError(UserError):
    """A partition that cannot be drawn; the message names the key, what was found and what is allowed."""


def partition(
    name: str,
    labels: np.ndarray,
    *,
    clients: int,
    seed: int,
    alpha: float | None = 1.0,
    shards_per_client: int = 2,
    samples_per_client: int = 50,
    groups: np.ndarray | None = None,
    available: np.ndarray | None = None,
) -> Partition:
    """Divide training samples among clients.

    No sample goes to two clients (but in `sampled`), and every client gets at least one.

    Args:
        name: How to divide N available samples among n clients.
            `lda`: floor(N/n) samples each, of classes drawn by latent Dirichlet allocation (Hsu et al. 2019,
            arXiv 1909.06335); the N mod n samples that are last in stock go to nobody.
            `iid`: all samples, uniformly, with sizes that differ by at most one.
            `dirichlet`: all samples; each class is cut by proportions drawn from Dirichlet(alpha 1_n)
            (Yurochkin et al. 2019, arXiv 1905.12022), so that sizes differ widely. A client left with nothing
            gets one sample of the then largest client, where the usual re-drawing might never end.
            `shards`: all samples, sorted by label and cut into n shards_per_client even shards, dealt at
            random (McMahan et al. 2017, arXiv 1602.05629).
            `natural`: all samples, by group (writer, speaker, device). As many clients as groups: client i is
            group i in the order of the codes. Fewer: the groups are shuffled and dealt round-robin, each
            stays whole.
            `sampled`: samples_per_client samples each, drawn with replacement when the client is played and
            forgotten afterwards, so that a million clients take no memory. With alpha, a client's classes
            follow its own Dirichlet(alpha 1_C), as in `lda` with stocks that never run out; without, they are
            those of the data.
        labels: int64 [total], labels of the full training split.
        clients: Number of clients, n.
        seed: The only source of randomness.
        alpha: Concentration of `lda`, `dirichlet` and `sampled`, above 0: 1000 is nearly uniform, 0.1
            strongly skewed. None for `sampled` only.
        shards_per_client: For `shards`.
        samples_per_client: For `sampled`.
        groups: int64 [total], for `natural`.
        available: int64 indices of the samples that may be used, e.g. what a validation hold-out kept; None
            for all.

    Returns:
        Indices into the full training split.

    Raises:
        PartitionError: An unknown name, an argument out of range, too few samples or groups.
    """
    if name not in PARTITIONS:
        raise PartitionError(
            f"partition.name = {name!r} is unknown; allowed are {', '.join(PARTITIONS)}"
            f"{did_you_mean(name, PARTITIONS)}"
        )
    pool = np.arange(labels.size) if available is None else np.unique(available)
    if available is not None and pool.size != len(available):
        raise PartitionError(f"{len(available) - pool.size} of the available samples are listed twice")
    if clients < 1:
        raise PartitionError(f"partition.clients = {clients}; at least 1 is needed")
    skew = 0.0 if alpha is None else alpha
    if (name in ("lda", "dirichlet") or (name == "sampled" and alpha is not None)) and not 0 < skew < np.inf:
        found = "null" if alpha is None else alpha
        raise PartitionError(f"partition.alpha = {found}; a finite number above 0 is needed")
    if name == "sampled":
        if samples_per_client < 1:
            raise PartitionError(f"partition.samples_per_client = {samples_per_client}; at least 1 is needed")
        if not pool.size:
            raise PartitionError("no training samples are available to draw from")
        return SampledPartition.over(pool, labels, clients, seed, samples_per_client, alpha)
    if clients > pool.size:
        raise PartitionError(
            f"partition.clients = {clients} but only {pool.size} training samples are available: "
            f"every client needs at least one; partition.name = 'sampled' draws with replacement"
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    if name == "lda":
        owner = _lda(labels[pool], clients, skew, generator)
    elif name == "iid":
        owner = generator.permutation(pool.size) % clients
    elif name == "dirichlet":
        owner = _dirichlet(labels[pool], clients, skew, generator)
    elif name == "shards":
        owner = _shards(labels[pool], clients, shards_per_client, generator)
    else:
        if groups is None:
            raise PartitionError(
                "partition.name = 'natural' needs groups: name the column of writers, speakers or devices "
                "in data.group_column"
            )
        owner = _natural(groups[pool], clients, generator)
    sizes = np.bincount(owner + 1, minlength=clients + 1)  # the first entry counts samples of nobody (-1)
    order = np.argsort(owner, kind="stable")[sizes[0] :]
    return ListedPartition(indices=pool[order], offsets=np.concatenate([[0], np.cumsum(sizes[1:])]))


def _lda(labels: np.ndarray, clients: int, alpha: float, generator: np.random.Generator) -> np.ndarray:
    """Owner of every sample, int64 [N], -1 for nobody.

    Client after client draws a class distribution, then classes one by one, and takes a sample of each drawn
    class until its own number is reached. Draws from an unchanged distribution are independent, so they are
    made in batches and cut after the draw that takes the last sample of a class: the same procedure as one by
    one, but with at most (clients + classes) batches.
    """
    present, codes = np.unique(labels, return_inverse=True)
    pools = [generator.permutation(np.flatnonzero(codes == code)) for code in range(present.size)]
    stock = np.array([members.size for members in pools])
    owner = np.full(labels.size, -1)
    mixtures = generator.dirichlet(np.full(present.size, alpha), size=clients)
    for client, mixture in enumerate(mixtures):
        probabilities = _renormalise(mixture, stock)
        needed = labels.size // clients
        while needed:
            draws = generator.choice(present.size, size=needed, p=probabilities)
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


def _renormalise(probabilities: np.ndarray, stock: np.ndarray) -> np.ndarray:
    """Probability 0 for exhausted classes; the rest, each with the authors' 1e-5 added, sums to 1 again.

    The constant keeps the last clients going: at small alpha all classes in stock may have probability 0.
    """
    kept = np.where(stock > 0, probabilities + RENORMALISATION, 0.0)
    return kept / kept.sum()


def _dirichlet(labels: np.ndarray, clients: int, alpha: float, generator: np.random.Generator) -> np.ndarray:
    """Owner of every sample, int64 [N]: each class cut by proportions drawn for that class."""
    owner = np.empty(labels.size, dtype=np.int64)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * members.size).astype(np.int64)
        owner[members] = np.searchsorted(cuts, np.arange(members.size), side="right")
    sizes = np.bincount(owner, minlength=clients)
    for client in np.flatnonzero(sizes == 0):
        largest = int(sizes.argmax())
        owner[generator.choice(np.flatnonzero(owner == largest))] = client
        sizes[largest] -= 1
        sizes[client] += 1
    return owner


def _shards(
    labels: np.ndarray, clients: int, shards_per_client: int, generator: np.random.Generator
) -> np.ndarray:
    """Owner of every sample, int64 [N]: even runs of the samples in the order of their labels."""
    shards = clients * shards_per_client
    if not clients <= shards <= labels.size:
        raise PartitionError(
            f"partition.shards_per_client = {shards_per_client} for {clients} clients makes {shards} shards "
            f"of {labels.size} available samples; at least 1 shard a client and 1 sample a shard are needed"
        )
    shuffled = generator.permutation(labels.size)  # which of a class's samples share a shard is random
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    owner = np.empty(labels.size, dtype=np.int64)
    owner[order] = (generator.permutation(shards) % clients)[np.arange(labels.size) * shards // labels.size]
    return owner


def _natural(groups: np.ndarray, clients: int, generator: np.random.Generator) -> np.ndarray:
    """Owner of every sample, int64 [N]: whole groups."""
    present, codes = np.unique(groups, return_inverse=True)
    if clients > present.size:
        raise PartitionError(
            f"partition.clients = {clients} but the available samples have only {present.size} groups, "
            f"and 'natural' never splits one: use at most {present.size} clients"
        )
    if clients == present.size:
        return codes
    return (generator.permutation(present.size) % clients)[codes]
