"""A million clients, a thousand a round, as ``sparsyfed run`` plays them on Ray, and in one process.

Digits, an MLP of 15,010 parameters, one local step of 16 samples: what surrounds the step is what is
measured. CPU time is that of all processes, Ray's included; a thousand of 10,000 clients stand beside it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import cluster
from tests.benchmarks.bench_long import Watch
from tests.benchmarks.report import Figure

COHORT = 1000
_OVERRIDES = (
    "model.name=mlp",
    "partition.name=sampled",
    "partition.samples_per_client=16",
    f"cohort={COHORT}",
    "local.epochs=1",
    "tracking.enabled=false",
)


def figures(name: str, quick: bool) -> list[Figure]:
    """CPU milliseconds a client by execution and population, and memory of later rounds over earlier ones."""
    rounds = 10 if quick else 30
    found: list[Figure] = []
    cpu: dict[tuple[str, int], float] = {}
    for execution in ("inline", "ray"):
        for population in (10_000, 1_000_000):
            more = [f"rounds={rounds}", f"evaluate_every={rounds}", f"checkpoint_every={rounds}"]
            more += [f"execution={execution}", f"partition.clients={population}"]
            with tempfile.TemporaryDirectory() as folder:
                watch = Watch(Path(folder), step=2)
                config = cluster.resolve("quickstart", [*more, *_OVERRIDES])
                cluster.run(config, Path(folder) / "run", progress=watch)
            case, last = f"{execution}, {population:,} clients", max(watch.cpu_s)
            spent = (watch.cpu_s[last - 2] - watch.cpu_s[2]) / (last - 4)
            cpu[execution, population] = 1000 * spent / COHORT
            found.append(Figure(name, case, "CPU ms a client", cpu[execution, population]))
            for who, own in watch.own_mib.items():
                if who.endswith("Actor") or execution == "inline":
                    found.append(Figure(name, case, f"MiB of {who} after {last}", own[last]))
                    bound = 1.05 if population > 10_000 else None
                    found.append(Figure(name, case, f"{who}: round {last} over 4", own[last] / own[4], bound))
            print(f"  {case}: {cpu[execution, population]:.2f} ms of CPU a client", flush=True)
    for execution in ("inline", "ray"):
        ratio = cpu[execution, 1_000_000] / cpu[execution, 10_000]
        found.append(Figure(name, execution, "CPU a client, 1,000,000 over 10,000", ratio, 1.1))
    found.append(
        Figure(name, "1,000,000 clients", "CPU, Ray over inline", cpu["ray", 10**6] / cpu["inline", 10**6])
    )
    return found
