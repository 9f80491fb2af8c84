"""One round of clients without a class in common: the mean of their models, MA-Echo's, and their ensemble.

    python -m tests.benchmarks.one_shot                                 # the preset ma-echo, on Fashion-MNIST
    python -m tests.benchmarks.one_shot data.name=digits local.epochs=50
    python -m tests.benchmarks.one_shot algorithm.own_initialisation=false seed=1

Also accuracy by iteration, and of each client alone. The mean has the head's rule too, as the authors' has.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cluster.configuration.config import resolve
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from cluster.workload.inputs import to_input

ITERATIONS = (0, 1, 2, 5, 10, 20, 30, 60)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.one_shot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the preset ma-echo")
    overrides = parser.parse_args().overrides
    config = resolve("ma-echo", ["execution=inline", "tracking.enabled=false", *overrides])
    federation = Federation.of(config)
    engine = InlineEngine(federation.setup())
    totals = []
    method, layout = config.method, federation.layout
    kept = type(method).aggregate

    def noting(self, state, total, layout):
        totals.append((state, total))
        return kept(self, state, total, layout)

    type(method).aggregate = noting  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as place:
        driver = Driver(RunFolder.create(Path(place) / "run", config), federation, engine)
        driver.run()
        up = driver.folder.rounds()[-1]["comm/uplink_bytes"] / 1e6
    type(method).aggregate = kept  # type: ignore[method-assign]
    (state, total), test = totals[0], federation.dataset.test
    targets = torch.from_numpy(np.asarray(test.targets))

    def outputs(flat: torch.Tensor) -> torch.Tensor:
        layout.bind(federation.model, flat[: layout.model_size].clone())
        with torch.no_grad():
            return federation.model.eval()(to_input(test.inputs, torch.device("cpu"))).softmax(1)

    def percent(probabilities: torch.Tensor) -> str:
        return f"{100 * float((probabilities.argmax(1) == targets).float().mean()):5.1f}"

    alone = [outputs(torch.from_numpy(values.copy())) for values, _ in total.updates.values()]
    print("clients alone     ", " ".join(map(percent, alone)))
    print("ensemble          ", percent(torch.stack(alone).mean(0)))
    for iterations in ITERATIONS:
        result = replace(method, iterations=iterations).aggregate(state, total, layout)
        print(f"{iterations:3d} iterations    ", percent(outputs(result)))
    print(f"MB up             {up:7.2f}")


if __name__ == "__main__":
    main()
