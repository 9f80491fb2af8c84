"""The same workload here, in Flower's simulation and in pfl-research, run in turns; see ``peers/README.md``.

The environments are looked for in the folder that SPARSYFED_PEERS names.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import cluster
from cluster.actors.ray_session import ray_engine
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from tests.benchmarks.bench_round import bench_cluster
from tests.benchmarks.peers import workload
from tests.benchmarks.report import Figure

_HERE = Path(__file__).parent / "peers"
_WORKERS = os.cpu_count() or 1


def _peers() -> dict[str, list[str]]:
    """The command of each peer whose environment is there, less the number of rounds."""
    folder = Path(os.environ.get("SPARSYFED_PEERS", "peers")).absolute()
    found = {}
    for name, package in (("flower", "flwr"), ("pfl", "pfl")):
        python = folder / name / "bin" / "python"
        if (
            not python.is_file()
            or subprocess.run([python, "-c", f"import {package}"], check=False).returncode
        ):
            print(f"  {name}: no environment with {package} in {folder / name}; see {_HERE}/README.md")
            continue
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(_WORKERS)] if name == "pfl" else []
        found[name] = [str(python), *torchrun, str(_HERE / f"{name}_app.py")]
    return found


def _run_peer(command: list[str], rounds: int) -> list[float]:
    """Seconds of the peer's rounds, the first two left out."""
    words = [*command, str(rounds + 3), str(_WORKERS)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("seconds ")]
    if not lines:
        raise RuntimeError(f"{' '.join(words)} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return [float(word) for word in lines[-1].split()[1:]][2:]


def figures(name: str, quick: bool) -> list[Figure]:
    """Median round of each simulator, and its ratio to ours."""
    rounds, turns = (8, 1) if quick else (25, 2)
    config = cluster.resolve(
        {
            "rounds": 10_000,
            "cohort": workload.COHORT,
            "actors": _WORKERS,
            "algorithm": {"name": "fedavg"},
            "model": {"name": "small_cnn"},
            "data": {"name": "tests.benchmarks.peers.workload:arrays", "cache": tempfile.mkdtemp()},
            "partition": {"name": "iid", "clients": workload.CLIENTS},
            "local": {"epochs": 1, "batch_size": workload.BATCH, "lr": workload.LR},
            "tracking": {"enabled": False},
        }
    )
    peers = _peers()
    with bench_cluster():
        federation = Federation.of(config)
        engine = ray_engine(config, federation)
        folder = RunFolder.create(Path(tempfile.mkdtemp()) / "run", config)
        driver = Driver(folder, federation, engine)
        for _ in range(3):
            driver._round()
        seconds: dict[str, list[float]] = {"sparsyfed": [], **{peer: [] for peer in peers}}
        for _ in range(turns):
            started = time.perf_counter()
            for _ in range(rounds):
                driver._round()
            driver._book_keeping()  # with the last evaluation
            seconds["sparsyfed"].append((time.perf_counter() - started) / rounds)
            for peer, command in peers.items():
                seconds[peer] += _run_peer(command, rounds)
        engine.close()
    ours = statistics.median(seconds["sparsyfed"])
    return [
        figure
        for who, values in seconds.items()
        for figure in (
            Figure(name, who, "round ms", 1e3 * statistics.median(values)),
            Figure(name, who, "clients/s", workload.COHORT / statistics.median(values)),
            Figure(name, who, "times ours", statistics.median(values) / ours),
        )
    ]
