"""Runs made by hand: what a run leaves, with numbers of one's choice."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cluster.compare.reading import Run, Series
from cluster.configuration.config import resolve

LAYERS = ("conv1.weight", "conv2.weight", "head.weight")


def line(number: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    """One round's line: 2 MB up, 3 MB down and 1 GFLOP a round, at regrowth ``number`` per mille."""
    return {
        "round": number,
        "timestamp": 1000.0 + number,
        "test/accuracy": accuracy,
        "sparsity/global": 0.5,
        "sparsity/layers": [0.25, 0.5, 0.75],
        "masks/regrowth_share": 0.001 * number,
        "masks/consensus": 0.5,
        "comm/uplink_bytes_total": 2_000_000 * number,
        "comm/downlink_bytes_total": 3_000_000 * number,
        "flops/sparse_total": 1e9 * number,
        "time/round_s": 0.1,
        **more,
    }


def write_run(
    folder: Path,
    accuracies: Sequence[float | None],
    *overrides: str,
    rounds: int | None = None,
    drop: Sequence[str] = (),
    **more: Any,
) -> Path:
    """A run folder with one line an accuracy.

    Args:
        folder: Where; must not exist.
        accuracies: Of every round computed.
        overrides: Of the quickstart's configuration.
        rounds: Planned; by default as many as there are.
        drop: Keys that its lines lack.
        more: Further keys of every line.
    """
    planned = f"rounds={len(accuracies) if rounds is None else rounds}"
    config = resolve("quickstart", [planned, "tracking.enabled=false", *overrides])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.dump(), sort_keys=False))
    lines = [line(number, accuracy, **more) for number, accuracy in enumerate(accuracies, start=1)]
    kept = [{key: value for key, value in own.items() if key not in drop} for own in lines]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(own) + "\n" for own in kept))
    rows = [",".join(["round", *LAYERS]), "1,0.25,0.5,0.75"]
    (folder / "sparsity_per_layer.csv").write_text("\n".join(rows) + "\n")
    return folder


def made(final: float, name: str = "run", seed: int = 0, rounds: int = 1, **params: object) -> Run:
    """A run in memory with a final accuracy; ``algorithm__name`` stands for the key ``algorithm.name``."""
    keys = {key.replace("__", "."): str(value) for key, value in params.items()}
    series = {"test/accuracy": Series(np.array([rounds]), np.array([final]))}
    params_of_all = {"algorithm.name": "topk", "seed": str(seed), "rounds": str(rounds)}
    return Run(name, name, params_of_all | keys, series, reached=rounds)
