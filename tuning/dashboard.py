"""What Optuna's dashboard shows of a study beside its values: notes, a picture a trial, where MLflow has it.

It is written whether optuna-dashboard is installed here or not, as it may be looked at elsewhere. A note is
kept as that program keeps its own (``optuna_dashboard.save_note``, as of 0.21): pieces of its text and a
version, attributes of the study. Pictures are Optuna's artifacts in a folder of the study's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.trial import Trial

from cluster.command_line.figures import shown
from cluster.logins import place
from cluster.records.outbox import Cursor
from cluster.records.sqlite_store import TrackingError, absolute_uri, is_sqlite, sqlite_file
from cluster.references import installed

#: Folder of the pictures in a study's.
ARTIFACTS = "artifacts"

#: A run's picture of what selects, sparsity and communication over the rounds.
_PICTURE = "curves.png"

#: Characters of a note's piece, as long as a value may be in a database.
_PIECE = 2045

#: Where ``sparsyfed ui`` serves MLflow unless another port is asked for.
_SERVED_AT = "http://127.0.0.1:5000"

_logger = logging.getLogger("sparsyfed.tuning")


def command(folder: Path, journal: str, url: str | None) -> str:
    """What opens the dashboard on a study.

    Args:
        folder: The study's folder.
        journal: The journal's name in it.
        url: The database that holds the trials; None where the journal does.
    """
    # In double quotes the shell looks up what stands for a password.
    storage = shown(folder / journal) if url is None else f'"{absolute_uri(url)}"'
    line = f"optuna-dashboard {storage} --artifact-dir {shown(folder / ARTIFACTS)}"
    return line if installed("optuna_dashboard") else f'{line}   # pip install "sparsyfed[dashboard]"'


def name_metrics(study: optuna.Study, names: Sequence[str]) -> None:
    """Have what a study's trials come to called by its name."""
    if study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(list(names))


def introduce(study: optuna.Study, text: str, root: Path) -> None:
    """Give a study its note, once.

    Args:
        study: One method's.
        text: What it is.
        root: The folder of the whole study.
    """
    lines = [
        text,
        f"- folder `{shown(root)}`",
        f"- tables and pictures: `sparsyfed tune --report {shown(root)}`",
    ]
    _write_note(study._storage, study._study_id, None, "\n".join([*lines, *_in_mlflow(_cursor(root))]) + "\n")


def keep(trial: Trial, run: Path, artifacts: Path, text: str) -> None:
    """Give a trial its note, its picture and where MLflow has it; before it is told, as it is fixed then.

    Args:
        trial: It is still running.
        run: Its run folder.
        artifacts: Where pictures are kept.
        text: What it came to.
    """
    cursor = _cursor(run)
    if cursor is not None and cursor.run_id is not None:
        trial.set_user_attr("mlflow_uri", place(cursor.uri))
        trial.set_user_attr("mlflow_run_id", cursor.run_id)
    lines = [text, f"- run folder `{run.parent.name}/{run.name}`", *_in_mlflow(cursor)]
    _write_note(trial.storage, trial.study._study_id, trial._trial_id, "\n".join(lines) + "\n")
    try:
        _attach(trial, run / _PICTURE, artifacts)
    except OSError as error:  # a picture is not worth a study
        _logger.warning("%s is not shown in the dashboard: %s", run / _PICTURE, error)


def _attach(trial: Trial, picture: Path, artifacts: Path) -> None:
    if not picture.is_file():
        return
    artifacts.mkdir(exist_ok=True)
    store = FileSystemArtifactStore(artifacts)
    known = get_all_artifact_meta(trial, storage=trial.storage)
    before = next((each.artifact_id for each in known if each.filename == picture.name), None)
    if before is None:
        upload_artifact(artifact_store=store, file_path=str(picture), study_or_trial=trial)
    else:  # by a coordinator that was killed in the midst of it
        with picture.open("rb") as file:
            store.write(before, file)


def _cursor(run: Path) -> Cursor | None:
    try:
        return Cursor.load(run)
    except TrackingError:
        return None


def _in_mlflow(cursor: Cursor | None) -> list[str]:
    """The line of a note that leads to a run in MLflow; none where it is not known there."""
    if cursor is None or cursor.run_id is None:
        return []
    uri, run = place(cursor.uri) or "", f"MLflow run `{cursor.run_id}` of experiment {cursor.experiment}"
    if uri.startswith(("http://", "https://")):
        return [f"- [{run}]({uri.rstrip('/')}/#/runs/{cursor.run_id})"]
    if is_sqlite(uri):
        served = f"while `sparsyfed ui --store {shown(sqlite_file(uri))}` serves it"
        return [f"- [{run}]({_SERVED_AT}/#/runs/{cursor.run_id}), {served}"]
    return [f"- {run}, at `{uri}`"]


def _write_note(storage: BaseStorage, study_id: int, trial_id: int | None, text: str) -> None:
    """Write a note where there is none: one that is there may have been edited."""
    key = "dashboard:" if trial_id is None else f"dashboard:{trial_id}:"
    if f"{key}note_ver" in storage.get_study_system_attrs(study_id):
        return
    for piece, start in enumerate(range(0, len(text), _PIECE)):
        storage.set_study_system_attr(study_id, f"{key}note_str:{piece}", text[start : start + _PIECE])
    storage.set_study_system_attr(study_id, f"{key}note_ver", 1)  # last: without it there is no note
