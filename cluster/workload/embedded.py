"""Tables of numbers that come with scikit-learn, for trying regression and classification out.

- ``diabetes``: 442 patients, 10 figures each; the target is how far the disease went in a year, 25 to 346.
- ``breast_cancer``: 569 tumours, 30 figures each, malignant or benign.

A fifth of the rows, drawn once for all (of classes a fifth of each), is the test split. Inputs are float32,
less the mean of the training split over its standard deviation; targets are as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cluster.references import DataError
from cluster.workload import cache
from cluster.workload.datasets import stratified_split

TABLES = ("diabetes", "breast_cancer")
TEST_SHARE, SPLIT_SEED = 0.2, 1337


def write_table(name: str, folder: Path) -> dict[str, Any]:
    """Write the arrays of a table; returns the names for meta.json.

    Raises:
        DataError: scikit-learn is not installed.
    """
    inputs, targets, classes = _load(name)
    labels = targets if classes else np.zeros(len(targets), np.int64)
    train, test = stratified_split(labels, TEST_SHARE, SPLIT_SEED)
    mean, deviation = inputs[train].mean(axis=0), inputs[train].std(axis=0)
    standard = ((inputs - mean) / deviation).astype(np.float32)
    for split, rows in (("train", train), ("test", test)):
        cache.save(folder / f"{split}-images.npy", standard[rows])
        cache.save(folder / f"{split}-labels.npy", targets[rows])
    return {"classes": classes, "group_names": None}


def _load(name: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Inputs float64 [N, F], targets [N], int64 codes or float32, and the names of the classes, if any."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise DataError(
            f"data.name = {name!r} is a part of scikit-learn, which is not installed here; install it "
            "(pip install scikit-learn)"
        ) from None
    if name == "diabetes":
        stored = datasets.load_diabetes(scaled=False)
        return np.asarray(stored.data, np.float64), stored.target.astype(np.float32), []
    stored = datasets.load_breast_cancer()
    return stored.data.astype(np.float64), stored.target.astype(np.int64), list(map(str, stored.target_names))
