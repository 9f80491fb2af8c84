"""Whether BatchNorm's averaged statistics fit the model that a cut leaves.

    python -m tests.benchmarks.batch_statistics runs/paper-laptop

Clients' running means and variances are those of the models that they trained, and are averaged like weights;
a method that cuts after training sends other weights than those they belong to. For every finished run below
some folders: test accuracy of the final model as it is, and with statistics drawn anew from training images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from cluster.compare.reading import find_folders
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.workload.datasets import Split
from cluster.workload.inputs import to_input

CPU = torch.device("cpu")


def accuracy(model: nn.Module, split: Split) -> float:
    """Percent of correct predictions on a split."""
    model.eval()
    correct = 0
    with torch.no_grad():
        for start in range(0, len(split.targets), 256):
            rows = slice(start, start + 256)
            found = model(to_input(split.inputs[rows], CPU)).argmax(1)
            correct += int((found == torch.tensor(split.targets[rows])).sum())
    return 100.0 * correct / len(split.targets)


def renew_statistics(model: nn.Module, split: Split, images: int, batch: int = 50) -> None:
    """Draw the running statistics anew: their means over batches of the first ``images`` images."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over batches
    model.train()
    with torch.no_grad():
        for start in range(0, images, batch):
            model(to_input(split.inputs[start : start + batch], CPU))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of the finished runs below some folders."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.batch_statistics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=2000, help="training images for the new statistics")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| run | accuracy % | with new statistics % |\n|---|---:|---:|")
    for path in find_folders(options.folders):
        folder = RunFolder.open(path)
        if folder.result() is None:
            continue
        federation = Federation.of(folder.config())
        model, data = federation.model, federation.dataset
        model.load_state_dict(load_file(folder.model_file))
        before = accuracy(model, data.test)
        renew_statistics(model, data.train, options.images)
        print(f"| {path.name} | {before:.1f} | {accuracy(model, data.test):.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
