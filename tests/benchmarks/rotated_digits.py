"""Digits in seven domains: turned by 0, 15, ... 90 degrees, six clients each; a client is a group.

    sparsyfed run compare-meta data.name=tests.benchmarks.rotated_digits:arrays \
        partition.name=natural partition.clients=42

The last six clients, of 90 degrees, are the ones that ``evaluate_clients.unseen=6`` keeps from training.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import rotate

from cluster.workload.arrays import Arrays

ANGLES = range(0, 91, 15)
CLIENTS = 6  # of each angle


def arrays() -> dict[str, np.ndarray]:
    """Every training image belongs to one client, drawn at random; test images are turned at random too."""
    digits, rng = Arrays.digits(), np.random.default_rng(0)
    found = {}
    for split in ("train", "test"):
        images, labels = digits.images[split][..., 0], digits.labels[split]
        client = rng.permutation(len(images)) % (len(ANGLES) * CLIENTS)
        angles = np.array(ANGLES)[client // CLIENTS]
        pairs = zip(images, angles, strict=True)
        turned = [rotate(np.float32(one), angle, reshape=False, order=1) for one, angle in pairs]
        found[f"{split}_images"] = np.clip(np.rint(turned), 0, 255).astype(np.uint8)
        found[f"{split}_labels"] = labels
        if split == "train":
            names = [f"{angle:02d}-{c % CLIENTS}" for angle, c in zip(angles, client, strict=True)]
            found["train_groups"] = np.array(names)
    return found
