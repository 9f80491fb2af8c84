"""Accuracy by round that the authors of SparsyFed logged, to be drawn beside curves of our own.

Their CIFAR-10 experiment: ResNet-18, LDA 1, 95 % sparsity, 700 rounds, one run of each method (seed 1337). A
round's accuracy is that of the global model on the test shards of 10 sampled clients, so single rounds
scatter by a point or two; each figure here is the mean of the 13 rounds around the one named (of the last 11
at 695; round 0 is as logged). Our own figures are of the whole test set: compare levels, not the scatter.
"""

from __future__ import annotations

#: Rounds of the figures below.
_ROUNDS = (0, *range(7, 684, 13), 695)

# fmt: off
_ACCURACY = {
    "fedavg": (
        0.085, 0.199, 0.370, 0.438, 0.485, 0.521, 0.580, 0.613, 0.656, 0.695, 0.708, 0.737, 0.738,
        0.759, 0.773, 0.778, 0.796, 0.796, 0.804, 0.808, 0.809, 0.817, 0.811, 0.818, 0.826, 0.823,
        0.820, 0.804, 0.820, 0.826, 0.834, 0.824, 0.826, 0.830, 0.834, 0.829, 0.835, 0.832, 0.838,
        0.834, 0.832, 0.837, 0.832, 0.838, 0.835, 0.836, 0.834, 0.836, 0.837, 0.839, 0.835, 0.836,
        0.839, 0.836, 0.841,
    ),
    "sparsyfed": (
        0.099, 0.217, 0.389, 0.485, 0.558, 0.619, 0.655, 0.690, 0.721, 0.741, 0.743, 0.759, 0.768,
        0.775, 0.771, 0.780, 0.792, 0.794, 0.791, 0.802, 0.793, 0.805, 0.799, 0.798, 0.806, 0.810,
        0.808, 0.812, 0.816, 0.820, 0.820, 0.811, 0.816, 0.811, 0.823, 0.816, 0.819, 0.824, 0.824,
        0.823, 0.821, 0.820, 0.817, 0.825, 0.817, 0.823, 0.826, 0.820, 0.822, 0.824, 0.819, 0.822,
        0.822, 0.824, 0.820,
    ),
    "topk": (
        0.100, 0.100, 0.161, 0.252, 0.302, 0.356, 0.390, 0.413, 0.430, 0.464, 0.454, 0.510, 0.535,
        0.538, 0.578, 0.584, 0.619, 0.635, 0.631, 0.661, 0.662, 0.679, 0.666, 0.684, 0.712, 0.707,
        0.721, 0.707, 0.736, 0.740, 0.752, 0.748, 0.747, 0.760, 0.758, 0.765, 0.769, 0.766, 0.770,
        0.770, 0.773, 0.769, 0.777, 0.777, 0.776, 0.778, 0.775, 0.763, 0.774, 0.778, 0.769, 0.781,
        0.775, 0.778, 0.773,
    ),
    "zerofl": (
        0.106, 0.101, 0.085, 0.112, 0.099, 0.103, 0.102, 0.123, 0.111, 0.111, 0.097, 0.139, 0.214,
        0.241, 0.261, 0.324, 0.347, 0.374, 0.426, 0.420, 0.490, 0.496, 0.516, 0.558, 0.588, 0.592,
        0.616, 0.630, 0.641, 0.648, 0.672, 0.675, 0.689, 0.711, 0.693, 0.712, 0.713, 0.735, 0.729,
        0.737, 0.745, 0.739, 0.731, 0.739, 0.745, 0.738, 0.747, 0.758, 0.739, 0.751, 0.757, 0.753,
        0.748, 0.739, 0.759,
    ),
}
# fmt: on

#: Method -> (round, accuracy in [0, 1]), ascending.
AUTHORS_CURVES: dict[str, list[tuple[int, float]]] = {
    method: list(zip(_ROUNDS, accuracy, strict=True)) for method, accuracy in _ACCURACY.items()
}

#: The first 40 rounds more finely, in percent: the mean of the five rounds around each of these.
EARLY_ROUNDS = (5, 10, 15, 20, 25, 30, 35, 40)
EARLY_CURVES = {
    "fedavg": (16.9, 24.4, 33.7, 37.1, 40.1, 43.5, 44.6, 46.1),
    "sparsyfed": (18.9, 26.3, 34.8, 38.1, 43.2, 47.1, 50.3, 53.1),
    "topk": (9.0, 9.3, 12.8, 16.4, 19.9, 24.3, 25.7, 26.6),
    "zerofl": (11.4, 9.2, 8.6, 6.7, 10.4, 11.4, 9.7, 11.5),
}
