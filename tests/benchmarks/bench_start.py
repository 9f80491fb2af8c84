"""Seconds from the command to the first round: a cold ``sparsyfed run`` against a bare ``ray.init``."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.report import Figure

_BARE = "import ray; ray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False)"


def _bare() -> float:
    started = time.time()
    subprocess.run([sys.executable, "-c", _BARE], check=True, capture_output=True)
    return time.time() - started


def _run(folder: Path) -> float:
    """Seconds until the first round's work begins; its line says when it ended and how long it took."""
    started = time.time()
    command = [sys.executable, "-m", "cluster", "run", "rounds=1", "local.epochs=1", "--output", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    line = json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])
    return float(line["timestamp"] - line["time/round_s"] - started)


def figures(name: str, quick: bool) -> list[Figure]:
    """Medians of interleaved starts, MLflow store included."""
    seconds: dict[str, list[float]] = {"bare": [], "run": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(1 if quick else 3):
            seconds["bare"].append(_bare())
            seconds["run"].append(_run(Path(folder) / str(turn)))
    bare, run = (statistics.median(seconds[side]) for side in ("bare", "run"))
    case = "quickstart"
    return [
        Figure(name, case, "process with bare ray.init s", bare),
        Figure(name, case, "sparsyfed run to round 1 s", run),
        Figure(name, case, "difference s", run - bare, 5.0),
    ]
