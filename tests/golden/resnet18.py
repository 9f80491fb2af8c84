"""The sparsity of ResNet-18 after its first rounds against the authors' logs.

    python -m tests.golden.resnet18 --data FOLDER                       # CIFAR-10 as parquet files
    python -m tests.golden.resnet18 --data FOLDER --methods sparsyfed

CIFAR-10, LDA 1, 95 %, 10 of 100 clients a round, the methods as the preset ``paper-methods`` has them. Three
rounds of SparsyFed and one each of Top-K and ZeroFL take a quarter of an hour of one core. Interrupted, the
same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

import cluster
from cluster.execution import run_or_resume
from cluster.federation import Federation

#: Rows of the test split that are kept: training is what is compared, and a test pass costs nearly a round.
_TEST_ROWS = 100


@dataclass(frozen=True)
class Logged:
    """What the authors logged: one run (seed 1337) of each method.

    Attributes:
        sparsity: Percent of all 11,173,962 parameters that are 0 in the global model, after rounds 1, 2, ...
        within: How far from it this simulator may be, in points.
    """

    sparsity: tuple[float, ...]
    within: tuple[float, ...]


LOGGED = {
    "sparsyfed": Logged((91.54, 94.64, 94.83), (0.6, 0.3, 0.2)),
    "topk": Logged((86.4,), (2.5,)),
    "zerofl": Logged((80.2,), (3.0,)),
}


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="python -m tests.golden.resnet18",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10's parquet files")
    result.add_argument("--methods", nargs="+", choices=list(LOGGED), default=list(LOGGED))
    result.add_argument("--output", type=Path, default=Path("runs/golden-resnet18"))
    return result


def with_short_test(data: Path, folder: Path) -> Path:
    """A folder with the training files of ``data`` and the first rows of its test split."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in data.glob("train-*.parquet"):
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.absolute())
    short = folder / "test-00000-of-00001.parquet"
    if not short.exists():
        table = pyarrow.parquet.read_table(min(data.glob("test-*.parquet")))
        pyarrow.parquet.write_table(table.slice(0, _TEST_ROWS), short)
    return folder


def overrides(method: str, data: Path) -> list[str]:
    """What sets the check's run apart from the preset's."""
    return [
        f"method={method}",
        f"stop_after={len(LOGGED[method].sparsity)}",
        "partition.alpha=1",
        f"data.path={data}",
        "evaluate_every=700",
        "evaluate_clients.every=0",
        "checkpoint_every=1",
        "execution=inline",
        "threads=1",
        "tracking.enabled=false",
    ]


def sparsities(method: str, data: Path, output: Path) -> list[float]:
    """Percent of zeros among all trained parameters after each round."""
    config = cluster.resolve("paper-methods", overrides(method, data))
    layout = Federation.of(config).layout
    # Biases and the norms' parameters are a thousandth of the model, and hardly one of them is 0.
    prunable_share = layout.prunable_size / layout.trained_size

    def tell(line: dict[str, Any]) -> None:
        print(f"  round {line['round']} done", flush=True)

    result = run_or_resume(config, output, progress=tell)
    return [100 * prunable_share * share for share in result.rounds["sparsity/global"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line a method and round; 1 when any is too far from the log."""
    options = parser().parse_args(arguments)
    for split in ("train", "test"):
        if not any(options.data.glob(f"{split}-*.parquet")):
            parser().error(f"--data {options.data}: no {split}-*.parquet in it")
    data = with_short_test(options.data, options.output / "data")
    missed = 0
    for method in options.methods:
        print(method, flush=True)
        logged = LOGGED[method]
        measured = sparsities(method, data, options.output / method)
        for number, (found, expected, within) in enumerate(
            zip(measured, logged.sparsity, logged.within, strict=True), start=1
        ):
            far = abs(found - expected) > within
            missed += far
            print(
                f"  round {number}: {found:.2f} %, authors {expected:.2f} %, difference "
                f"{found - expected:+.2f}, allowed {within:.2f}{'  TOO FAR' if far else ''}",
                flush=True,
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
