"""The final and the best model of a run as MLflow's LoggedModels: made from its files, then delivered once.

A model is an exported graph (``torch.export``, no pickle), which ``mlflow.pytorch`` and ``mlflow.pyfunc``
load without this package. One that cannot be exported, such as one that branches on its inputs, is there with
its weights alone, and says why.
"""

from __future__ import annotations

import copy
import logging
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.configuration.foreign import refuse_foreign_code, whose
from cluster.configuration.trees import read_stored
from cluster.federation import Federation
from cluster.records.checkpoint import list_rounds, load_checkpoint
from cluster.records.model_file import evaluated
from cluster.records.outbox import OUTBOX_TAG, Cursor, StoredModel
from cluster.records.run_folder import RunFolder
from cluster.references import UserError
from cluster.workload.inputs import to_input

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.tracking import MlflowClient

_logger = logging.getLogger("sparsyfed.tracking")

#: Rows of the example. More than one, as an export takes 1 for the size of every batch.
_ROWS = 2


def effective_model(federation: Federation, weights: Tensor) -> nn.Module:
    """A copy of the module with a global model's effective weights, adapters and all.

    Args:
        federation: Data and model.
        weights: The server's, float32[size].
    """
    layout = federation.layout
    # Through the module, so that tied, frozen and integer tensors are there too.
    model = copy.deepcopy(federation.model)
    layout.bind(model, federation.config.method.effective_weights(weights, layout))
    return model


def make_models(folder: RunFolder, federation: Federation) -> list[StoredModel]:
    """Make the final model and, where an earlier one that has a checkpoint was better, the best of those.

    What cannot be made is left out and named: a run that was computed does not end for it.
    """
    lines = {line["round"]: line for line in folder.rounds()}
    merit, metric = federation.objective.selects.merit, federation.selection_metric
    stored = [number for number in list_rounds(folder.checkpoints) if number in lines]
    measured = [number for number in stored if lines[number].get(metric) is not None]
    best = max(measured, key=lambda number: (merit(lines[number][metric]), -number), default=None)
    wanted = {"final": max(lines)} | ({"best": best} if best not in (None, max(lines)) else {})
    made = []
    for name, number in wanted.items():
        place = folder.path / "models" / name
        try:
            checkpoint = load_checkpoint(folder.checkpoints / f"round-{number:06d}.safetensors")
            model = effective_model(federation, checkpoint.state.weights)
            if (adapter := federation.config.build_adapter()) is not None:
                adapter.merge(model)
            problem = _write(model.eval(), to_input(federation.dataset.train.inputs[:_ROWS], _CPU), place)
        except Exception as error:
            _logger.warning("the %s model is not logged: %s: %s", name, type(error).__name__, error)
            continue
        tags = {"best": str(best in (None, number)).lower()} | ({"not_loadable": problem} if problem else {})
        metrics = evaluated(federation.config, lines[number])
        seconds = lines[number].get("timestamp", 0.0)
        made.append(StoredModel(name, f"models/{name}", number, tags, metrics, round(seconds * 1000)))
    return made


def models_of_folder(path: Path) -> list[StoredModel]:
    """Make the models of a run that has ended, in a process that did not compute it.

    Raises:
        UserError: They cannot be made here: data is missing, or the folder is somebody else's and names code.
    """
    try:
        folder = RunFolder.open(path)
        refuse_foreign_code(path, read_stored(folder.config_file), whose(folder.config_file), _RESUME)
        return make_models(folder, Federation.of(folder.config()))
    except UserError as error:
        message = f"its models are missing and cannot be made here ({_RESUME} makes them): {error}"
        raise UserError(message) from error


#: What makes and delivers the models too.
_RESUME = "sparsyfed resume"

_CPU = torch.device("cpu")

#: A tag that finds a model's version in the registry, which forgets the model's id.
_MODEL_TAG = "sparsyfed.model"

#: Tags of the run that its models have too; of its source MLflow fills the column "Logged from".
_TOLD = (
    *("method", "seed", "group", "config_hash"),
    *("mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit"),
)


def _write(model: nn.Module, example: Tensor, place: Path) -> str | None:
    """Write one model as MLflow's; returns why it holds weights alone, where it does."""
    import mlflow.pytorch
    from mlflow.models import infer_signature

    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True)
    with torch.no_grad():
        outputs = model(example)
    signature = infer_signature(example.numpy(), outputs.numpy())
    try:
        with warnings.catch_warnings():  # about tensors on other devices, of which there are none
            warnings.simplefilter("ignore")
            mlflow.pytorch.save_model(
                model,
                place,
                signature=signature,
                input_example=example.numpy(),
                serialization_format="pt2",
                # Guessing them takes a process that loads the model.
                pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", "mlflow"],
            )
        return None
    except Exception as error:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        said = (str(error).strip().splitlines() or [""])[0]
        return f"weights alone, as torch.export refuses the model: {type(error).__name__}: {said}"[:500]


def deliver_model(client: MlflowClient, cursor: Cursor, folder: Path, model: StoredModel) -> LoggedModel:
    """Bring one model to MLflow, where it may be already, wholly or in part; returns it.

    Its state there is READY last of all: one that is pending is gone on with, and one that a lost answer led
    to a second of is left once.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
    from mlflow.models import Model

    assert cursor.run_id is not None
    run = client.get_run(cursor.run_id)
    experiment = run.info.experiment_id
    rule = f"name = '{model.name}' AND tags.`{OUTBOX_TAG}` = '{cursor.token}' AND tags.round = '{model.step}'"
    found = sorted(
        client.search_logged_models([experiment], rule),
        key=lambda each: (each.creation_timestamp, each.model_id),
    )
    for spare in found[1:]:
        client.delete_logged_model(spare.model_id)
    if found and found[0].status == LoggedModelStatus.READY:
        return found[0]
    told = {key: text for key, text in cursor.tags.items() if key in _TOLD}
    logged = (
        found[0]
        if found
        else client.create_logged_model(
            experiment,
            name=model.name,
            source_run_id=cursor.run_id,
            tags={**told, **model.tags, "round": str(model.step), OUTBOX_TAG: cursor.token},
            params={"run": cursor.run_name, "round": str(model.step)},
        )
    )
    place = folder / model.folder
    if (place / "MLmodel").exists():
        written = Model.load(str(place))
        written.model_id, written.run_id = logged.model_id, cursor.run_id
        written.artifact_path = logged.artifact_location
        written.save(str(place / "MLmodel"))
    client.log_model_artifacts(logged.model_id, str(place))
    data: Mapping[str, Any] = cursor.dataset or {}
    metrics = [
        # As they are in the run, where equal points are kept once.
        Metric(
            key, value, model.written_ms, model.step, logged.model_id, data.get("name"), data.get("digest")
        )
        for key, value in model.metrics.items()
    ]
    if metrics:
        client.log_batch(cursor.run_id, metrics=metrics, synchronous=True)
    known = run.outputs.model_outputs if run.outputs else []
    if all(each.model_id != logged.model_id for each in known):
        client.log_outputs(cursor.run_id, [LoggedModelOutput(logged.model_id, model.step)])
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return logged


def register(client: MlflowClient, cursor: Cursor, model: LoggedModel) -> None:
    """Enter a model in MLflow's registry under the name that was asked for, as a new version, once."""
    from mlflow.exceptions import MlflowException

    name = cursor.register
    assert name is not None
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}' AND run_id = '{cursor.run_id}'")
    if any(version.tags.get(_MODEL_TAG) == model.model_id for version in versions):
        return
    client.create_model_version(
        name,
        # By its place: what `models:/ID` stands for, MLflow's own store of SQLite asks another store.
        model.artifact_location,
        run_id=cursor.run_id,
        model_id=model.model_id,
        tags={_MODEL_TAG: model.model_id},
    )
