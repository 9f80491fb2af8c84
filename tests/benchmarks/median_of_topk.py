"""What a median makes of Top-K uploads: ``aggregation.name=median`` refuses them, here the refusal is lifted.

    python -m tests.benchmarks.median_of_topk runs/median_of_topk        # prints the rows of docs/results

Digits at LDA alpha 0.1; nobody attacks. Clients send the largest 2 % of their differences, or all of them.
"""

import argparse
from pathlib import Path

from algorithms.flasc import Flasc
from cluster.configuration.config import resolve
from cluster.execution import run
from tests.benchmarks.results import as_csv, rows_of

SETTING = (
    "partition.alpha=0.1",
    "rounds=12",
    "evaluate_every=4",
    "model.channels=[16,32]",
    "model.hidden=64",
    "execution=inline",
    "tracking.enabled=false",
)
ARMS = {
    "Top-K, mean": ("algorithm={name: flasc, sparsity: 0.98}", "aggregation.weighting=equal"),
    "Top-K, median": ("algorithm={name: flasc, sparsity: 0.98}", "aggregation.name=median"),
    "all, median": ("algorithm={name: flasc, sparsity: 0.0}", "aggregation.name=median"),
}


def main() -> None:
    """Run every arm with three seeds, in folders of their own; those that are there are not run again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the runs go")
    folder = parser.parse_args().folder
    Flasc.shares_support = True  # they do not: that is the point
    rows = []
    for name, arm in ARMS.items():
        for seed in range(3):
            place = folder / f"{name.replace(', ', '-')}-seed{seed}"
            if not (place / "result.json").exists():
                run(resolve("quickstart", [*SETTING, *arm, f"seed={seed}"]), place)
            rows += rows_of([place], preset="median of Top-K", label=name)
    print(as_csv(rows), end="")


if __name__ == "__main__":
    main()
