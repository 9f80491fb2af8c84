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
from cluster.configuration.choices import ChoiceError
from cluster.configuration.config import validate
from cluster.configuration.plain_yaml import as_value
from cluster.configuration.trees import ConfigError, flatten, read_stored
from cluster.records.run_folder import RunFolder
from cluster.records.tracking_store import check, connect, first_line
from cluster.references import UserError, did_you_mean

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient

#: What is read of every round; a run may lack any of them.
METRICS = (
    "test/accuracy",
    "val/accuracy",
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
    "clients/accuracy_mean",
    "clients/accuracy_mean_after",
    "clients/accuracy_worst_decile",
)

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
        clients: Accuracy of the final model on each client, float64[clients].
        reached: Last round computed; 0 where there is none.
        status: How it ended in the words of its source, where that knows; else "".
        started: Orders runs by age, seconds.
        measures: Version of the rule by which each family of metrics was measured, 1 where it names none;
            None where the run does not say yet. See :mod:`cluster.compare.measures`.
    """

    name: str
    place: str
    params: Mapping[str, str]
    series: Mapping[str, Series]
    layers: Mapping[str, float] = field(default_factory=dict)
    clients: np.ndarray = field(default_factory=lambda: np.empty(0))
    reached: int = 0
    status: str = ""
    started: float = 0.0
    measures: Mapping[str, int] | None = field(default_factory=dict)

    @property
    def seed(self) -> str:
        """The seed; runs of two groups with one seed are paired."""
        return self.params.get("seed", "")

    @property
    def planned(self) -> int | None:
        """The round it was to end after."""
        text = self.params.get("stop_after") or self.params.get("rounds")
        return int(text) if text else None

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
    return [read_folder(folder) for folder in folders]


def read_folder(path: Path) -> Run:
    """Read one run; one that cannot be read has its reason as ``status``, and no series."""
    try:
        params, lines = _params_of(path), RunFolder(path).rounds()
        layers: list[float] = lines[-1].get("sparsity/layers", []) if lines else []
        result = RunFolder(path).result()
        names = _layer_names(path / LAYERS_FILE) or [str(number) for number in range(1, len(layers) + 1)]
        return Run(
            path.name,
            str(path),
            params,
            series_of(lines),
            dict(zip(names, layers, strict=False)),
            client_accuracies(path / CLIENTS_FILE),
            reached=max((line["round"] for line in lines), default=0),
            started=lines[0].get("timestamp", 0.0) if lines else 0.0,
            measures=None if result is None else result.get("measures", {}),
        )
    except (ValueError, KeyError, TypeError, OSError, csv.Error) as error:
        return Run(path.name, str(path), {}, {}, status=f"cannot be read: {first_line(error)}")


def series_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """The series of :data:`METRICS` in the lines of ``rounds.jsonl``; null is not measured."""
    series = {}
    for key in METRICS:
        measured = [(line["round"], line[key]) for line in lines if line.get(key) is not None]
        if measured:
            rounds, values = zip(*measured, strict=True)
            series[key] = Series(np.array(rounds, np.int64), np.array(values, np.float64))
    return series


def client_accuracies(path: Path) -> np.ndarray:
    """Column ``accuracy`` (or ``accuracy_global``) of a table of clients; empty where there is none."""
    if not path.is_file():
        return np.empty(0)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [row.get("accuracy") or row.get("accuracy_global") for row in rows]
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
    logged = {key: [run.info.run_id for run in stored if key in run.data.metrics] for key in METRICS}
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda key: histories(client, key, logged[key]), METRICS)
        points = dict(zip(METRICS, found, strict=True))
        return list(pool.map(lambda run: _read_stored(client, run, points), stored))


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
    client: MlflowClient, run: StoredRun, points: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> Run:
    series = {}
    for key, of_runs in points.items():
        if own := of_runs.get(run.info.run_id):
            rounds, values = zip(*sorted(own.items()), strict=True)
            series[key] = Series(np.array(rounds, np.int64), np.array(values, np.float64))
    layers = _artifact(client, run, LAYERS_FILE)
    clients = _artifact(client, run, CLIENTS_FILE)
    return Run(
        run.info.run_name,
        run.info.run_id,
        # `algorithm` alone repeats what the keys below it say.
        {key: own for key, own in run.data.params.items() if own not in ABSENT and key != "algorithm"},
        series,
        _last_row(layers) if layers else {},
        client_accuracies(clients) if clients else np.empty(0),
        reached=max((int(own.rounds[-1]) for own in series.values()), default=0),
        status=run.info.status.lower(),
        started=run.info.start_time / 1000,
        measures=json.loads(run.data.tags.get("measures", "{}")),
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
