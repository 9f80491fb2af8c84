"""What a run leaves: its folder's name, its summary, pictures and tables, and its entry in MLflow."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cluster.configuration.choices import fields, names
from cluster.configuration.config import Config, validate
from cluster.configuration.identity import loaded_code
from cluster.federation import Federation
from cluster.measures import VERSIONS, as_values
from cluster.records import introduction, tracking
from cluster.records.plots import curves, population
from cluster.records.run_folder import RunFolder
from cluster.references import file_name, installed
from cluster.workload.partition_picture import picture


def versions_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The versions of what some rounds' lines hold; 0 where an older version measured a part of them."""
    # Version 0.1, which measured by the older rule, logged no client_cut.
    return VERSIONS if all("masks/client_cut" in line for line in lines) else dict.fromkeys(VERSIONS, 0)


_logger = logging.getLogger("sparsyfed.outputs")


def summary_of(
    folder: RunFolder,
    config: Config,
    federation: Federation,
    last: dict[str, Any],
    seconds: float,
    stopped_by: str | None = None,
) -> dict[str, Any]:
    """What ``result.json`` holds.

    Args:
        folder: The run's folder.
        config: Its configuration.
        federation: Data and model.
        last: The last round's line with its evaluation.
        seconds: What it took.
        stopped_by: What ``stop`` ended it for, in words.
    """
    lines = [*folder.rounds()[:-1], last]
    metric, selects = federation.selection_metric, federation.objective.selects
    measured = [line for line in lines if line.get(metric) is not None]
    best = max(measured, key=lambda line: (selects.merit(line[metric]), -line["round"]))
    key, test = selects.key, f"test/{selects.key}"
    return {
        "method": config.algorithm.name,
        "seed": config.seed,
        "rounds": last["round"],
        "complete": last["round"] >= config.rounds or stopped_by is not None,
        "stopped_by": stopped_by,
        key: last.get(test),  # None where test data is not evaluated
        f"best_{key}": best.get(test),
        f"val_{key}": last.get(f"val/{key}"),
        "best_round": best["round"],
        "selected_by": metric,
        "objective": {
            "name": config.objective.name,
            "metrics": as_values(federation.objective.measures),
        },
        "sparsity": last["sparsity/global"],
        "uplink_bytes": last["comm/uplink_bytes_total"],
        "downlink_bytes": last["comm/downlink_bytes_total"],
        "flops_dense": last["flops/dense_total"],
        "flops_sparse": last["flops/sparse_total"],
        "simulated_s": last["time/simulated_s"],
        "joules": last.get("energy/joules_total"),  # None where an older version began the run
        "seconds": round(seconds, 3),
        "config_hash": config.digest(),
        "code_hash": loaded_code(),
        "partition_hash": federation.partition.digest(),
        "measures": versions_of(lines),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def write_artifacts(folder: RunFolder, federation: Federation) -> list[Path]:
    """Write tables and, where matplotlib is installed, pictures; returns every file that MLflow keeps."""
    lines = folder.rounds()
    names = [entry.name for entry in federation.layout.prunable]
    layers = []
    for what in (key.removesuffix("/layers") for key in lines[-1] if key.endswith("/layers")):
        layers.append(folder.path / f"{what}_per_layer.csv")
        rows = [",".join(["round", *names])]
        rows += [",".join(map(str, [line["round"], *line[f"{what}/layers"]])) for line in lines]
        layers[-1].write_text("\n".join(rows) + "\n", encoding="utf-8")
    clients = [path for path in [folder.path / "clients.csv"] if path.exists()]
    models = [path for path in (folder.model_file, folder.adapter_file) if path.exists()]
    card = [path for path in [folder.card_file] if path.exists()]
    tables = [folder.path / "config.yaml", folder.rounds_file, *card, *models, *layers, *clients]
    return tables + (_pictures(folder, federation, lines) if installed("matplotlib") else [])


def _pictures(folder: RunFolder, federation: Federation, lines: list[dict[str, Any]]) -> list[Path]:
    """Draw what can be drawn: a picture that fails is left out and named, and never ends a computed run."""
    dataset, config = federation.dataset, federation.config
    labels, classes = federation.labels, federation.classes
    title = f"{dataset.name}, {config.partition.name}, {federation.partition.clients} clients"
    method = f"{config.algorithm.name}, seed {config.seed}"
    draw: dict[str, Callable[[Path], None]] = {
        "partition": lambda path: picture(federation.partition, labels, classes, path, title=title),
        "curves": lambda path: curves(lines, path, federation.objective.selects, title=method),
        "devices": lambda path: population(federation, path),
    }
    if federation.shifted:
        after = f"{title}, from round {config.shift.round} on"
        draw["partition_shifted"] = lambda path: picture(
            federation.shifted[0], labels, classes, path, title=after
        )
    drawn = []
    for name, function in draw.items():
        path = folder.path / f"{name}.png"
        try:
            function(path)
        except Exception as error:
            path.unlink(missing_ok=True)
            _logger.warning("%s is not drawn: %s", path, " ".join(f"{type(error).__name__}: {error}".split()))
        else:
            drawn.append(path)
    return drawn


def missing_packages(config: Config) -> str | None:
    """What a run leaves out because a package is not installed here, as one line; None for nothing."""
    parts = []
    if config.tracking.enabled and not installed("mlflow"):
        parts.append("mlflow (the run is not tracked)")
    if not installed("matplotlib"):
        parts.append("matplotlib (no pictures)")
    return f"not installed here: {', '.join(parts)}" if parts else None


def make_tracker(folder: RunFolder, config: Config, federation: Federation) -> tracking.Tracker | None:
    """What delivers the run to MLflow and other sinks, or None where tracking is off."""
    section = config.tracking
    if not section.enabled or (section.uri is None and not section.also):
        return None
    commit = _git_commit()
    tags = {
        "method": config.algorithm.name,
        "seed": str(config.seed),
        "group": introduction.group_name(config),
        "mlflow.note.content": introduction.description(config, folder.path),
        "config_hash": config.digest(),
        "code_hash": loaded_code(),
        "partition_hash": federation.partition.digest(),
        "measures": json.dumps(versions_of(folder.rounds())),
        "metrics": json.dumps(as_values(federation.objective.measures)),
        "git_sha": commit[:7] or "unknown",
        "mlflow.source.name": "sparsyfed",
        "mlflow.source.type": "LOCAL",
        **({"mlflow.source.git.commit": commit} if commit else {}),
        "mlflow.runColor": introduction.colour(config),
        "kind": "run",
        **section.tags,
    }
    source = config.data.path or config.data.name
    dataset = {
        "name": federation.dataset.name,
        "digest": federation.dataset.fingerprint,
        "source_type": "local" if config.data.path else "hub",
        "source": source,
    }
    name = section.run_name or introduction.run_name(config)
    experiment = section.experiment or introduction.benchmark_name(config)
    return tracking.Tracker(
        folder.path,
        tracking.TrackingTarget(section.uri, experiment, name, section.register),
        params=_parameters(config),
        tags=tags,
        dataset=dataset,
        also=section.also,
    )


def _parameters(config: Config) -> dict[str, Any]:
    """The flat configuration under keys that are the same for all choices, so that MLflow compares runs."""
    absent = {
        f"{section}.{field}": "-"
        for section in ("algorithm", "server", "partition", "schedule")
        for name in names(section)
        for field in fields(section, name)
    }
    return absent | introduction.in_short(config) | config.flat()


def with_tracking(config: Config, root: Path) -> Config:
    """Runs beside each other share one store, unless the configuration names another or MLflow is missing.

    Raises:
        TrackingError: A file is there that cannot be a store.
    """
    if not config.tracking.enabled or config.tracking.uri is not None or not installed("mlflow"):
        return config
    tree = config.dump()
    tree["tracking"]["uri"] = tracking.sqlite_uri(root / "mlflow.db")
    if (root / "mlflow.db").exists():
        tracking.check(tree["tracking"]["uri"])
    return validate(tree)


def default_folder(config: Config) -> Path:
    """A new folder under ``runs/``, named after benchmark, method, seed and time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    what = f"{introduction.benchmark_name(config)}-{config.algorithm.name.split(':')[-1]}-s{config.seed}"
    name = f"{file_name(what)}-{stamp}"
    path, copy = Path("runs") / name, 1
    while path.exists():
        copy += 1
        path = Path("runs") / f"{name}-{copy}"
    return path


def _git_commit() -> str:
    """The commit that the packages, or what they are installed in, are at; empty where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
