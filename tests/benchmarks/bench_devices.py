"""What a population of devices costs: seconds and memory to describe it, and to draw a cohort of it.

python -m tests.benchmarks.bench_devices [--clients 1000000] [--cohort 1000]
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

import cluster
from cluster import seeding
from cluster.configuration.choices import build_choice, names
from cluster.simulation.devices import Devices
from cluster.simulation.samplers import Candidates, draw


def milliseconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median of a few repeats."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=1_000_000)
    parser.add_argument("--cohort", type=int, default=1000)
    arguments = parser.parse_args()
    clients, cohort = arguments.clients, arguments.cohort
    config = cluster.resolve(
        "quickstart", ["devices.profile=phones", f"partition.clients={clients}", f"cohort={cohort}"]
    )
    tracemalloc.start()
    started = time.perf_counter()
    devices = Devices(config)
    _ = devices.tiers
    seconds = time.perf_counter() - started
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kept = f"{held / 1e6:.1f} MB kept, {peak / 1e6:.1f} MB at most"
    print(f"{clients:,} devices: {1e3 * seconds:.0f} ms once, {kept}")
    drawn = np.arange(0, clients, max(1, clients // cohort))[:cohort]
    print(f"{cohort:,} devices looked up: {milliseconds(lambda: devices.of(drawn)):.2f} ms")
    print(f"their availability: {milliseconds(lambda: devices.available(drawn, 4e4)):.2f} ms")
    print(f"their drop-outs: {milliseconds(lambda: devices.drop_outs(drawn, 3)):.2f} ms")
    sizes = np.broadcast_to(np.int64(50), clients)
    # Noon: one device in five is there.
    candidates = Candidates(
        sizes, lambda some: devices.available(some, 12 * 3600.0), 1, 12 * 3600.0, devices.tiers
    )
    for name in names("sampler"):
        sampler = build_choice("sampler", name, {})
        took = milliseconds(lambda s=sampler: draw(s, seeding.generator(0, "cohort"), cohort, candidates))  # type: ignore[misc]
        print(f"a cohort drawn by {name}: {took:.2f} ms")


if __name__ == "__main__":
    main()
