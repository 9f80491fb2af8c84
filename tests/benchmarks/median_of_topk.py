"""What a median makes of Top-K uploads, which ``aggregation.name=median`` refuses: the refusal is lifted here.

    python -m tests.benchmarks.median_of_topk runs/median_of_topk
    python -m tests.benchmarks.results --collect runs/median_of_topk --preset "quickstart, alpha 0.1, refusal lifted"

Digits at LDA alpha 0.1, nobody attacks; clients send the largest 2 % of their differences.
"""

import argparse
from pathlib import Path

from algorithms.flasc import Flasc
from cluster.configuration.config import resolve
from cluster.execution import run

SETTING = (
    "algorithm={name: flasc, sparsity: 0.98}",
    "partition.alpha=0.1",
    "rounds=12",
    "evaluate_every=4",
    "model.channels=[16,32]",
    "model.hidden=64",
    "execution=inline",
    "tracking.enabled=false",
)
RULES = {"mean": "aggregation.weighting=equal", "median": "aggregation.name=median"}


def main() -> None:
    """Run both rules with three seeds, in folders of their own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the runs go")
    folder = parser.parse_args().folder
    Flasc.shares_support = True  # they do not: that is the point
    for name, rule in RULES.items():
        for seed in range(3):
            run(resolve("quickstart", [*SETTING, rule, f"seed={seed}"]), folder / name / f"seed{seed}")


if __name__ == "__main__":
    main()
