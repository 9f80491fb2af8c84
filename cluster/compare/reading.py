"""Runs in one form, whether they come from their folders or from an MLflow store."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.compare.histories import histories
from cluster.configuration.choices import ChoiceError, choice_named
from cluster.configuration.config import validate
from cluster.configuration.earlier import earlier_keys
from cluster.configuration.plain_yaml import as_value
from cluster.configuration.trees import ConfigError, flatten, read_stored
from cluster.measures import Measure, from_values
from cluster.records.run_folder import RunFolder
from cluster.records.tracking_store import check, connect, first_line
from cluster.references import UserError, did_you_mean
from cluster.workload.objectives import Classification

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient

#: What is read of every round beside the objective's; a run may lack any of them.
METRICS = (
    "sparsity/global",
    "masks/regrowth_share",
    "masks/client_regrowth_share",
    "masks/client_cut",
    "masks/consensus",
    "masks/overlap_10",
    "comm/dense_bytes",
    "comm/uplink_bytes_total",
    "comm/downlink_bytes_total",
    "flops/sparse_total",
    "time/simulated_s",
    "energy/joules_total",
)
#: The same of what selects.
OF_SELECTS = ("test/{}", "val/{}", "clients/{}_mean", "clients/{}_mean_after", "clients/{}_worst_decile")

#: Files of a run that hold what is no number a round.
LAYERS_FILE, CLIENTS_FILE = "sparsity_per_layer.csv", "clients.csv"

#: Value of ``mlflow``'s ``kind`` tag on what this package itself logs.
COMPARISON_KIND = "comparison"

#: How MLflow and the configuration write that a parameter does not apply.
ABSENT = frozenset({"", "None", "-"})

_READERS = 8


class ComparisonError(UserError):
    """There is nothing to compare, or the source is not what it is called; the message says what to do."""


@dataclass(frozen=True)
class Series:
    """One metric: ``values[i]``, float64, was measured after round ``rounds[i]``, int64, ascending."""

    rounds: np.ndarray
    values: np.ndarray

    def until(self, last: int) -> Series:
        """What was measured up to round ``last``."""
        kept = self.rounds <= last
        return Series(self.rounds[kept], self.values[kept])


@dataclass(frozen=True)
class Run:
    """One run, as far as a comparison needs it.

    Attributes:
        name: What it is called in a list of runs.
        place: Its folder, or its id in MLflow.
        params: Flattened configuration as text; what does not apply is left out.
        series: By metric; empty ones are left out.
        layers: Sparsity of every prunable layer after the last round.
        clients: What selects, of the final model on each client, float64[clients].
        reached: Last round computed; 0 where there is none.
        status: How it ended in the words of its source, where that knows; else "".
        stopped: Whether a rule of its own (``stop``) ended it.
        started: Orders runs by age, seconds.
        measures: Version of the rule by which each family of metrics was measured, 1 where it names none;
            None where the run does not say yet. See :mod:`cluster.compare.versions`.
        metrics: Those of its objective, the one that selects first; empty where nothing tells them yet.
    """

    name: str
    place: str
    params: Mapping[str, str]
    series: Mapping[str, Series]
    layers: Mapping[str, float] = field(default_factory=dict)
    clients: np.ndarray = field(default_factory=lambda: np.empty(0))
    reached: int = 0
    status: str = ""
    stopped: bool = False
    started: float = 0.0
    measures: Mapping[str, int] | None = field(default_factory=dict)
    metrics: tuple[Measure, ...] = Classification.measures

    @property
    def seed(self) -> str:
        """The seed; runs of two groups with one seed are paired."""
        return self.params.get("seed", "")

    @property
    def objective(self) -> str:
        """Name of what is learned."""
        return self.params.get("objective.name", "classification")

    @property
    def planned(self) -> int | None:
        """The round it was to end after, unless ``stop`` ended it before."""
        text = self.params.get("stop_after") or self.params.get("rounds")
        return int(text) if text else None

    @property
    def length(self) -> str:
        """How long it was to be: the planned round, and the rule that may end it before."""
        rule = [f"{key}={own}" for key, own in sorted(self.params.items()) if key.startswith("stop.")]
        ruled = {"stop.target", "stop.patience"} & self.params.keys()
        return " or ".join([str(self.planned), *([" ".join(rule)] if ruled else [])])

    def until(self, last: int) -> Run:
        """The run as it was after round ``last``, without what is known of its end alone."""
        series = {key: cut for key, own in self.series.items() if len((cut := own.until(last)).rounds)}
        if last >= self.reached:
            return replace(self, series=series)
        return replace(self, series=series, layers={}, clients=np.empty(0), reached=last)


# ------------------------------------------------------------------------------------------ run folders


def find_folders(paths: Iterable[Path]) -> list[Path]:
    """The run folders among and below ``paths``; MLflow's copies of their files are none."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise ComparisonError(f"{path}: there is no such folder")
        for where, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if name not in ("mlartifacts", "checkpoints"))
            if "config.yaml" in files:
                found[Path(where)] = None
                folders.clear()
    return list(found)


def read_folders(paths: Iterable[Path]) -> list[Run]:
    """Read every run among and below ``paths``.

    Raises:
        ComparisonError: A path is no folder, or none holds a run.
    """
    paths = list(paths)
    folders = find_folders(paths)
    if not folders:
        raise ComparisonError(f"no run lies in {', '.join(map(str, paths))}; `sparsyfed run` makes one")
    runs = [read_folder(folder) for folder in folders]
    known = _known_metrics(runs)
    return [
        run if run.metrics else read_folder(folder, known.get(run.objective, ()))
        for folder, run in zip(folders, runs, strict=True)
    ]


def read_folder(path: Path, metrics: Sequence[Measure] = ()) -> Run:
    """Read one run; one that cannot be read has its reason as ``status``, and no series.

    Args:
        path: Its folder.
        metrics: Those of its objective, where nothing in the folder tells them.
    """
    try:
        params, lines = _params_of(path), RunFolder(path).rounds()
        layers: list[float] = lines[-1].get("sparsity/layers", []) if lines else []
        result = RunFolder(path).result()
        stored = (result or {}).get("objective", {}).get("metrics")
        metrics = _metrics(stored, params) or tuple(metrics)
        names = _layer_names(path / LAYERS_FILE) or [str(number) for number in range(1, len(layers) + 1)]
        return Run(
            path.name,
            str(path),
            params,
            series_of(lines, metrics),
            dict(zip(names, layers, strict=False)),
            values_of_clients(path / CLIENTS_FILE, metrics),
            reached=max((line["round"] for line in lines), default=0),
            stopped=bool((result or {}).get("stopped_by")),
            started=lines[0].get("timestamp", 0.0) if lines else 0.0,
            measures=None if result is None else result.get("measures", {}),
            metrics=metrics,
        )
    except (ValueError, KeyError, TypeError, OSError, csv.Error) as error:
        return Run(path.name, str(path), {}, {}, status=f"cannot be read: {first_line(error)}")


def read_of(metrics: Sequence[Measure]) -> tuple[str, ...]:
    """The keys of a line that are read of a run of an objective with these metrics."""
    return (*(form.format(metric.key) for metric in metrics[:1] for form in OF_SELECTS), *METRICS)


def _metrics(stored: Any, params: Mapping[str, str]) -> tuple[Measure, ...]:
    """A run's metrics, as it says or as its objective declares them; code of others is not asked."""
    if stored:
        return from_values(stored)
    name = params.get("objective.name", "classification")
    return () if ":" in name else tuple(choice_named("objective", name).measures)


def _known_metrics(runs: Iterable[Run]) -> dict[str, tuple[Measure, ...]]:
    return {run.objective: run.metrics for run in runs if run.metrics}


def series_of(lines: Sequence[Mapping[str, Any]], metrics: Sequence[Measure]) -> dict[str, Series]:
    """The series that are compared, in the lines of ``rounds.jsonl``; null is not measured."""
    series = {}
    for key in read_of(metrics):
        measured = [(line["round"], line[key]) for line in lines if line.get(key) is not None]
        if measured:
            rounds, values = zip(*measured, strict=True)
            series[key] = Series(np.array(rounds, np.int64), np.array(values, np.float64))
    return series


def values_of_clients(path: Path, metrics: Sequence[Measure]) -> np.ndarray:
    """What selects, in a table of clients (of older ones column ``accuracy_global``); empty without any."""
    if not path.is_file() or not metrics:
        return np.empty(0)
    key = metrics[0].key
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [row.get(key) or row.get(f"{key}_global") for row in rows]
    return np.array([float(text) for text in texts if text], np.float64)


def _params_of(path: Path) -> dict[str, str]:
    tree = read_stored(path / "config.yaml")
    try:
        flat = validate(tree, inert=True).flat()
    except (ConfigError, ChoiceError):
        flat = flatten(as_value(tree))  # a method or a key that this installation does not know
    return {key: str(value) for key, value in flat.items() if str(value) not in ABSENT}


def _layer_names(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])[1:]


# ----------------------------------------------------------------------------------------------- MLflow


def read_experiment(uri: str, name: str, rule: str = "") -> list[Run]:
    """Read the runs of an MLflow experiment through their metric histories.

    Args:
        uri: The store, ``sqlite:///...`` or the address of a server.
        name: The experiment.
        rule: MLflow's filter string, such as ``params.seed = '0'``.

    Raises:
        TrackingError: The store cannot be used.
        ComparisonError: There is no such experiment, the filter is wrong, or no run passes it.
    """
    check(uri)
    client = connect(uri)
    stored = [run for run in _search(client, uri, name, rule) if run.data.tags.get("kind") != COMPARISON_KIND]
    if not stored:
        passes = f" passes the filter {rule!r}" if rule else ""
        raise ComparisonError(f"no run of experiment {name!r}{passes or ' is left'} in {uri}")
    own = [_metrics(json.loads(run.data.tags.get("metrics", "[]")), run.data.params) for run in stored]
    keys = list(dict.fromkeys(key for metrics in own for key in read_of(metrics)))
    logged = {key: [run.info.run_id for run in stored if key in run.data.metrics] for key in keys}
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda key: histories(client, key, logged[key]), keys)
        points = dict(zip(keys, found, strict=True))
        return list(pool.map(lambda run, metrics: _read_stored(client, run, points, metrics), stored, own))


def _search(client: MlflowClient, uri: str, name: str, rule: str) -> list[StoredRun]:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = [each.name for each in client.search_experiments()]
        raise ComparisonError(
            f"{name}: neither a folder nor an experiment in {uri}; known there: {', '.join(known)}"
            + did_you_mean(name, known)
        )
    runs: list[StoredRun] = []
    token = None
    while token != "":
        try:
            page = client.search_runs([experiment.experiment_id], rule, page_token=token)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise ComparisonError(f"--filter {rule!r}: {first_line(error)}") from error
        runs += page
        token = page.token or ""
    return runs


def _read_stored(
    client: MlflowClient,
    run: StoredRun,
    points: Mapping[str, Mapping[str, Mapping[int, float]]],
    metrics: tuple[Measure, ...],
) -> Run:
    series = {}
    for key, of_runs in points.items():
        if own := of_runs.get(run.info.run_id):
            rounds, values = zip(*sorted(own.items()), strict=True)
            series[key] = Series(np.array(rounds, np.int64), np.array(values, np.float64))
    layers = _artifact(client, run, LAYERS_FILE)
    clients = _artifact(client, run, CLIENTS_FILE)
    # ``algorithm`` alone repeats what the keys below it say; up to 0.1 keys of other choices were there too.
    besides = {"algorithm", *earlier_keys(run.data.params)}
    return Run(
        run.info.run_name,
        run.info.run_id,
        {key: own for key, own in run.data.params.items() if own not in ABSENT and key not in besides},
        series,
        _last_row(layers) if layers else {},
        values_of_clients(clients, metrics) if clients else np.empty(0),
        reached=max((int(own.rounds[-1]) for own in series.values()), default=0),
        status=run.info.status.lower(),
        stopped=bool(run.data.metrics.get("stopped_by_rule")),
        started=run.info.start_time / 1000,
        measures=json.loads(run.data.tags.get("measures", "{}")),
        metrics=metrics,
    )


def _artifact(client: MlflowClient, run: StoredRun, name: str) -> Path | None:
    """A file kept with the run; None where there is none or its place cannot be reached."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.utils.uri import append_to_uri_path

    if run.info.status == "RUNNING":
        return None  # files come with the end
    try:  # by its place: the client would ask the store five times for what the run says itself
        place = append_to_uri_path(run.info.artifact_uri, name)
        return Path(download_artifacts(place, tracking_uri=client.tracking_uri))
    except (MlflowException, OSError):
        return None


def _last_row(path: Path) -> dict[str, float]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        last = zip(rows[0][1:], rows[-1][1:], strict=True) if rows[1:] else ()
        return {name: float(text) for name, text in last}
    except (ValueError, csv.Error):
        return {}  # a table that was damaged since
