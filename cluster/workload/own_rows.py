"""Rows that a client does not train on and is judged by: held out of its own, or all of a new client's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster import seeding
from cluster.workload.datasets import stratified_split
from cluster.workload.partition import ListedPartition, Partition


def listed(rows: Sequence[np.ndarray]) -> ListedPartition:
    """The partition in which client i has ``rows[i]``."""
    offsets = np.cumsum([0, *(len(own) for own in rows)], dtype=np.int64)
    return ListedPartition(np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64), offsets)


def hold_out(
    partition: Partition, labels: np.ndarray, *, share: float, unseen: int, shots: int, seed: int
) -> tuple[ListedPartition, ListedPartition]:
    """Divide each client's rows into those that it trains on and those that it is judged by.

    Args:
        partition: Who has which rows.
        labels: Class of every row, int64[N].
        share: Share of a client's rows that is held out, of each class.
        unseen: How many clients, the last ones, never train: they may adapt to ``shots`` rows of each class
            (to all but one where there are not more) and are judged by the others.
        shots: See ``unseen``.
        seed: The only source of randomness.

    Returns:
        (trained on, judged by); of the first the rows are sorted.
    """
    trained, judged = [], []
    for client in range(partition.clients):
        rows = partition.client(client)
        if client >= partition.clients - unseen:
            support = few(rows, labels, shots, seed, client, leave=1)
            rest = np.setdiff1d(rows, support)
        elif share and round(share * len(rows)):
            own = seeding.integer(seed, "evaluation", client=client)
            kept, drawn = stratified_split(labels[rows], share, own)
            support, rest = rows[kept], rows[drawn]
        else:
            support, rest = rows, rows[:0]
        trained.append(support)
        judged.append(rest)
    return listed(trained), listed(judged)


def few(
    rows: np.ndarray, labels: np.ndarray, shots: int, seed: int, client: int, *, leave: int = 0
) -> np.ndarray:
    """So many rows of each class, sorted; those of fewer shots are among those of more.

    Args:
        rows: The client's rows, int64[n].
        labels: Class of every row, int64[N].
        shots: Rows of a class.
        seed: Seed of the order, which is one for all numbers of shots.
        client: Index of the client.
        leave: Rows of each class that are left out in any case.
    """
    rng = seeding.generator(seed, "evaluation", 1, client)
    chosen = [rows[:0]]
    for code in np.unique(labels[rows]):
        own = rng.permutation(rows[labels[rows] == code])
        chosen.append(own[: min(shots, len(own) - leave)])
    return np.sort(np.concatenate(chosen))
