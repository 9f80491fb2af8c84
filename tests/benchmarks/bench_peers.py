"""The same workloads here and in other simulators, run in turns; see ``peers/README.md``.

``peers`` has light rounds, ``peers-cnn`` is what BlazeFL's authors measure, on fewer samples. The
environments are looked for in the folder that SPARSYFED_PEERS names. Accuracy and loss after as many rounds
tell that everybody did the same work; orders of batches, and of ``peers`` the clients of a round, are each
one's own.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cluster
from cluster.actors.ray_session import ray_engine
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from tests.benchmarks.bench_round import bench_cluster
from tests.benchmarks.peers.workload import workload
from tests.benchmarks.report import Figure

_HERE = Path(__file__).parent / "peers"
_WORKERS = os.cpu_count() or 1
_WARM = 2  # rounds that nobody's figures have


@dataclass(frozen=True)
class Scale:
    """How much of a workload is run.

    Attributes:
        workload: Its name in ``peers/workload.py``.
        samples: Training samples of a client.
        rounds: Measured rounds of a turn.
        turns: How often everybody has a turn.
    """

    workload: str
    samples: int
    rounds: int
    turns: int


#: Benchmark -> (whole, quick).
SCALES = {
    "peers": (Scale("small", 64, 25, 2), Scale("small", 64, 8, 1)),
    # Half of BlazeFL's 500 samples a client, and a tenth.
    "peers-cnn": (Scale("shards", 250, 5, 1), Scale("shards", 50, 2, 1)),
}


def _peers() -> dict[str, list[str]]:
    """The command of each peer whose environment is there, less what the workload says."""
    folder = Path(os.environ.get("SPARSYFED_PEERS", "peers")).absolute()
    found = {}
    for name, package in (("flower", "flwr"), ("pfl", "pfl"), ("blazefl", "blazefl.contrib")):
        python, app = str(folder / name / "bin" / "python"), str(_HERE / f"{name}_app.py")
        lock = _lock(python, package)
        if lock is None:
            print(f"  {name}: no environment with {package} in {folder / name}; see {_HERE}/README.md")
        elif name == "blazefl":
            found["blazefl processes"] = [python, app, "processes"]
            found[f"blazefl threads{lock}"] = [python, app, "threads"]
        elif name == "pfl":
            found[name] = [python, "-m", "torch.distributed.run", "--nproc_per_node", str(_WORKERS), app]
        else:
            found[name] = [python, app]
    return found


def _lock(python: str, package: str) -> str | None:
    """Whether threads of an interpreter with the package share a lock, in words; None without either."""
    words = [python, "-c", f"import {package}, sys; print(getattr(sys, '_is_gil_enabled', int)())"]
    if not Path(python).is_file():
        return None
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        return None
    return "" if result.stdout.strip() == "False" else ", with the GIL"


def _run_peer(command: list[str], scale: Scale) -> tuple[list[float], float, float]:
    """Seconds of the peer's rounds, and accuracy and loss after the last."""
    words = [*command, scale.workload, str(scale.samples), str(_WARM + scale.rounds), str(_WORKERS)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, capture_output=True, text=True, check=False, env=alone)
    told = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    if not {"seconds", "test"} <= told.keys():
        raise RuntimeError(f"{' '.join(words)} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    accuracy, loss = map(float, told["test"])
    return list(map(float, told["seconds"]))[_WARM:], accuracy, loss


def figures(name: str, quick: bool) -> list[Figure]:
    """Median round of each simulator, its ratio to ours, and how good its model is after one turn."""
    scale = SCALES[name][quick]
    load = workload(scale.workload, scale.samples)
    here = f"tests.benchmarks.peers.workload:{scale.workload}_{scale.samples}"
    config = cluster.resolve(
        {
            "rounds": 10_000,
            "cohort": load.cohort,
            "actors": _WORKERS,
            "algorithm": {"name": "fedavg"},
            "model": {"name": f"tests.benchmarks.peers.workload:{load.network.__name__}", "seed_of_torch": 0},
            "data": {"name": here, "cache": tempfile.mkdtemp()},
            "partition": {"name": "natural", "clients": load.clients},
            "local": {"epochs": load.epochs, "batch_size": load.batch, "lr": load.lr},
            "tracking": {"enabled": False},
        }
    )
    peers = _peers()
    with bench_cluster():
        federation = Federation.of(config)
        engine = ray_engine(config, federation)
        folder = RunFolder.create(Path(tempfile.mkdtemp()) / "run", config)
        driver = Driver(folder, federation, engine)
        for _ in range(_WARM):
            driver._round()
        seconds: dict[str, list[float]] = {"sparsyfed": [], **{peer: [] for peer in peers}}
        tested: dict[str, tuple[float, float]] = {}
        for _ in range(scale.turns):
            started = time.perf_counter()
            for _ in range(scale.rounds):
                driver._round()
            driver._book_keeping()  # its evaluation rides on the next round, as that before on the first
            seconds["sparsyfed"].append((time.perf_counter() - started) / scale.rounds)
            for peer, command in peers.items():
                measured, *told = _run_peer(command, scale)
                seconds[peer] += measured
                tested[peer] = told[0], told[1]
                print(f"  {peer}: {statistics.median(measured):.3g} s a round", flush=True)
        driver._settle()
        engine.close()
    last = folder.rounds()[_WARM + scale.rounds - 1]
    tested["sparsyfed"] = last["test/accuracy"], last["test/loss"]
    ours = statistics.median(seconds["sparsyfed"])
    return [
        figure
        for who, values in seconds.items()
        for figure in (
            Figure(name, who, "round ms", 1e3 * statistics.median(values)),
            Figure(name, who, "clients/s", load.cohort / statistics.median(values)),
            Figure(name, who, "times ours", statistics.median(values) / ours),
            Figure(name, who, "accuracy %", 100 * tested[who][0]),
            Figure(name, who, "loss", tested[who][1]),
        )
    ]
