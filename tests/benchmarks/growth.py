"""How the cost of a round grows, drawn: ``python -m tests.benchmarks.growth [--quick] [--output FILE]``.

CPU seconds of driver and actors against those of bare PyTorch loops that do the same local steps and the same
evaluation at the same time, by population, cohort, model size, sparsity and actors; and memory over many
rounds. CPU seconds, because a machine that others use changes them less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from cluster.workload import models
from tests.benchmarks import bench_memory
from tests.benchmarks.bench_round import Case, bench_cluster, measure
from tests.benchmarks.report import Figure, table

BLUE, GREY, INK = "#2563eb", "#94a3b8", "#1e293b"


@dataclass(frozen=True)
class Sweep:
    """One panel: a quantity, its values and the case of each."""

    title: str
    values: tuple[float, ...]
    case: Callable[[float], Case]
    labels: tuple[str, ...]


def sweeps(quick: bool) -> list[Sweep]:
    """Population, cohort, model size, sparsity and actors."""
    usual: dict[str, Any] = {"blocks": 3, "rounds": 3 if quick else 8}
    widths = ((16, 32), (32, 64), (64, 128), (128, 256))
    weights = tuple(
        float(
            sum(
                parameter.numel()
                for parameter in models.build(
                    "small_cnn", input_shape=(1, 8, 8), classes=10, seed=0, channels=list(width)
                ).parameters()
            )
        )
        for width in widths
    )
    by_weights = dict(zip(weights, widths, strict=True))
    cohorts = (2.0, 10.0, 100.0) if quick else (2.0, 10.0, 100.0, 1000.0)
    populations = (100.0, 1000.0, 10000.0)
    sparsities = (0.5, 0.9, 0.95, 0.99)
    actors = tuple(float(count) for count in range(1, (os.cpu_count() or 1) + 1))
    return [
        Sweep(
            "clients in all (cohort 10)",
            populations,
            lambda value: Case(clients=int(value), **usual),
            tuple(f"{value:,.0f}" for value in populations),
        ),
        Sweep(
            "cohort",
            cohorts,
            lambda value: Case(
                cohort=int(value),
                clients=max(100, int(value)),
                blocks=3,
                rounds=max(1, int(100 / (10 + value))),
            ),
            tuple(f"{value:,.0f}" for value in cohorts),
        ),
        Sweep(
            "weights of the model (SparsyFed, 95 %)",
            weights,
            lambda value: Case(method="sparsyfed", model={"channels": list(by_weights[value])}, **usual),
            tuple(f"{value / 1000:,.0f}k" for value in weights),
        ),
        Sweep(
            "sparsity (SparsyFed)",
            sparsities,
            lambda value: Case(method="sparsyfed", sparsity=value, **usual),
            tuple(f"{value:g}" for value in sparsities),
        ),
        Sweep(
            "actors",
            actors,
            lambda value: Case(actors=int(value), **usual),
            tuple(f"{value:.0f}" for value in actors),
        ),
    ]


def main() -> None:
    """Measure every sweep, print the figures and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("docs/growth.png"))
    arguments = parser.parse_args()
    picture, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    found: list[Figure] = []
    with bench_cluster(), tempfile.TemporaryDirectory() as folder:
        for panel, sweep in zip(axes.flat, sweeps(arguments.quick), strict=False):
            costs: dict[str, list[float]] = {"cpu ms": [], "bare cpu ms": []}
            for value, label in zip(sweep.values, sweep.labels, strict=True):
                case = sweep.case(value)
                measured = {figure.metric: figure.value for figure in measure(case, Path(folder), "growth")}
                for metric, collected in costs.items():
                    collected.append(measured[metric] / case.cohort)
                    found.append(
                        Figure("growth", f"{sweep.title} {label}", metric + " a client", collected[-1])
                    )
                print(f"  {sweep.title} {label}: {measured['cpu ray/bare']:.2f} of the bare loop", flush=True)
            _draw(panel, sweep, costs)
    _draw_memory(axes.flat[5], bench_memory.series(200 if arguments.quick else 1000))
    picture.suptitle("CPU milliseconds a client, and memory over the rounds", color=INK)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(arguments.output, dpi=90)
    print(f"\n{table(found)}\n\n{arguments.output}")


def _draw(panel: pyplot.Axes, sweep: Sweep, costs: dict[str, list[float]]) -> None:
    places = range(len(sweep.values))
    panel.plot(places, costs["bare cpu ms"], "o--", color=GREY, label="bare PyTorch loop")
    panel.plot(places, costs["cpu ms"], "o-", color=BLUE, label="round on Ray")
    panel.set_xticks(places, sweep.labels)
    panel.set_xlabel(sweep.title)
    panel.set_ylabel("CPU ms a client")
    panel.set_ylim(0, 1.25 * max(max(values) for values in costs.values()))
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_memory(panel: pyplot.Axes, own: dict[str, dict[int, float]]) -> None:
    for (who, sizes), color in zip(own.items(), (INK, BLUE, GREY), strict=True):
        panel.plot(list(sizes), list(sizes.values()), color=color, label=who)
    panel.set_xlabel("round")
    panel.set_ylabel("MiB of its own")
    panel.set_ylim(0, 1.25 * max(max(sizes.values()) for sizes in own.values()))
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
