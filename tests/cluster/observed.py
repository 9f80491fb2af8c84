"""What tests of whole runs look at: supports, uploads, the accuracy of a plain module."""

import numpy as np
import torch


def support(layout, flat):
    """Positions of nonzero prunable weights, as a set."""
    return {j for j, value in enumerate(flat[: layout.prunable_size].tolist()) if value != 0}


def flat_upload(run, key):
    """An upload as a flat list, in the layout's order."""
    values, mask = run.uploads[key]
    layout = run.driver.layout
    flat = torch.cat([values[entry.name].flatten() for entry in layout.trained + layout.buffers])
    kept = None
    if mask is not None:
        bits = torch.cat([mask[entry.name].flatten() for entry in layout.prunable])
        kept = {j for j, bit in enumerate(bits.tolist()) if bit}
    return flat, kept


def accuracy(model, dataset):
    images = (torch.tensor(np.array(dataset.test.inputs)).float() / 255 - 0.5) / 0.5
    hits = 0
    with torch.no_grad():
        for start in range(0, len(images), 256):
            found = model(images[start : start + 256]).argmax(1).numpy()
            hits += int((found == dataset.test.targets[start : start + 256]).sum())
    return hits / len(images)
