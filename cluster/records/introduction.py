"""How a run introduces itself in MLflow: its name, its group, a description and its final figures."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from algorithms import hyperparameters
from cluster.configuration.config import Config
from cluster.measures import lowered
from cluster.records.plots import COLOURS
from cluster.workload.objectives import selecting, selects_of

#: Methods that have a colour of the figures to themselves.
_FIRST = ("sparsyfed", "topk", "zerofl", "flash", "fedavg", "feddst", "fixed_mask")

#: Measured by some runs alone, as they were after the last round.
_LAST = ("clients/{}_mean", "clients/{}_worst_decile", "time/simulated_s", "energy/joules_total")


def in_short(config: Config) -> dict[str, str]:
    """Method and sparsity as a parameter that sorts before all hyperparameters in MLflow's charts."""
    return {"algorithm": _method(config)}


def run_name(config: Config) -> str:
    """Method, sparsity and seed, as in ``sparsyfed-0.9-s0``: what a chart's legend has to tell apart."""
    return f"{_method(config)}-s{config.seed}"


def colour(config: Config) -> str:
    """One for all runs of a method in MLflow's charts: for those compared most as in our figures."""
    name = config.algorithm.name
    if name in _FIRST:
        return COLOURS[_FIRST.index(name)]
    mark = hashlib.sha256(name.encode()).digest()
    red, green, blue = colorsys.hls_to_rgb(mark[0] / 256, (0.3, 0.42, 0.54)[mark[1] % 3], 0.75)
    return f"#{round(255 * red):02X}{round(255 * green):02X}{round(255 * blue):02X}"


def group_name(config: Config) -> str:
    """One name for all runs that differ only in their seed, for MLflow's grouping of runs by a tag."""
    return f"{_method(config)} {config.model_copy(update={'seed': 0}).digest()[:6]}"


def benchmark_name(config: Config) -> str:
    """Data and partition, as in ``cifar10-lda0.1``; runs of one benchmark are compared in one experiment."""
    data = config.data.path or config.data.name
    partition = config.partition
    alpha = "" if partition.skew is None else f"{partition.skew:g}"
    return f"{Path(data).name.replace(':', '.')}-{partition.name}{alpha}"


def description(config: Config, folder: Path) -> str:
    """What a run is, in Markdown: its facts, and the command that continues it."""
    return "  \n".join([*facts(config), f"`sparsyfed resume {folder}`"])


def facts(config: Config) -> list[str]:
    """What a run is, in Markdown, a line each: method, data and model, training, what it is judged by."""
    selects = selecting(config)
    method, data, partition, local = config.method, config.data, config.partition, config.local
    # What is zero, off or none goes without saying; the parameters have it all.
    settings = [
        f"{parameter.name} {value}"
        for parameter in hyperparameters(type(method))
        if (value := getattr(method, parameter.name))
    ]
    alpha = "" if partition.skew is None else f" {partition.skew:g}"
    return [
        f"**{config.algorithm.name}**, seed {config.seed}" + (f": {', '.join(settings)}" if settings else ""),
        f"{Path(data.path or data.name).name}, {partition.name}{alpha} over {partition.clients} clients, "
        f"{config.cohort} a round; {config.model.name}"
        + (f" with {config.adapter.name}" if config.adapter is not None else ""),
        f"{config.stop_after or config.rounds} rounds of {_counted(local.epochs, 'local epoch')}, "
        f"batch {local.batch_size}, lr {local.lr:g}"
        + (f" to {local.lr_final:g}" if local.lr_final is not None else "")
        + (f"; server {config.server.name}" if config.server.name != "fedavg" else ""),
        f"judged by {selects.title}: {lowered(selects.meaning).rstrip('.')} ({selects.better} is better)",
    ]


def final_scalars(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures that runs are compared by, for charts that show one value a run.

    Args:
        summary: What ``result.json`` holds.
        lines: The lines of ``rounds.jsonl``.
    """
    selects = selects_of(summary).key
    up, down = summary["uplink_bytes"] / 1e6, summary["downlink_bytes"] / 1e6
    scalars = {
        "rounds": summary["rounds"],
        selects: summary[selects],
        f"best_{selects}": summary[f"best_{selects}"],
        "sparsity": summary["sparsity"],
        "uplink_mb": up,
        "downlink_mb": down,
        "total_mb": up + down,
        "gflop": summary["flops_sparse"] / 1e9,
        "seconds": summary["seconds"],
    }
    if summary.get("stopped_by"):
        scalars["stopped_by_rule"] = 1.0
    for name in ("regrowth_share", "client_regrowth_share", "consensus"):
        # Round 1 starts from a dense model: what masks do is measured from round 2 on.
        key = f"masks/{name}"
        values = [line[key] for line in lines if line["round"] > 1 and line.get(key) is not None]
        if values:
            scalars[name] = float(np.mean(values))
    last = lines[-1] if lines else {}
    scalars |= {
        name.removeprefix("time/").replace("/", "_"): last[name]
        for name in (form.format(selects) for form in _LAST)
        if last.get(name) is not None
    }
    return {f"final/{name}": float(value) for name, value in scalars.items() if value is not None}


def _method(config: Config) -> str:
    sparsity = getattr(config.method, "sparsity", None)
    name = config.algorithm.name.rpartition(":")[2]
    return f"{name}-{sparsity:g}" if sparsity else name


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
