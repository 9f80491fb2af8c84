"""Delivery of a run to MLflow: what a run is there, and the calls that bring it up to date."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.records.outbox import (
    NUMBERS_PER_BATCH,
    OUTBOX_TAG,
    Cursor,
    Delivery,
    Ending,
    Row,
    StoredModel,
    numbers_in,
)
from cluster.records.tracking_store import connect, find_experiment

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Metric, Run
    from mlflow.tracking import MlflowClient

# MLflow's own limit (mlflow/utils/validation.py).
_PARAMS_PER_BATCH = 100

_logger = logging.getLogger("sparsyfed.tracking")


class MlflowDelivery(Delivery):
    """Brings MLflow up to date with a run's folder."""

    def __init__(self, folder: Path, cursor: Cursor) -> None:
        super().__init__(folder, cursor)
        self._client: MlflowClient
        # Steps the server already holds, per metric; None where nothing unconfirmed can be there.
        self._present: dict[str, set[int]] | None = {}
        #: Makes the models that end with the run, off its path; None: they are made from its folder.
        self.make_models: Callable[[], list[StoredModel]] | None = None

    @property
    def place(self) -> str:
        """Where it delivers, in words."""
        return f"MLflow ({self.cursor.uri})"

    def _open(self) -> None:
        """Connects, finds or creates the run, and describes it where MLflow differs from the cursor."""
        self._present = {}
        self._client = client = connect(self.cursor.uri)
        run = self._existing_run(client) or self._new_run(client)
        self._describe(client, run)

    def _existing_run(self, client: MlflowClient) -> Run | None:
        from mlflow.exceptions import MlflowException

        cursor = self.cursor
        if cursor.run_id is None:
            return None
        try:
            run = client.get_run(cursor.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage == "deleted":
            _logger.warning("MLflow run %s is gone: delivering to a new one", cursor.run_id)
            cursor.forget_deliveries()
            self._offset = 0
            return None
        return run

    def _new_run(self, client: MlflowClient) -> Run:
        cursor = self.cursor
        experiment_id = find_experiment(client, cursor.uri, cursor.experiment)
        # An earlier attempt may have succeeded without our knowing.
        run = next(iter(self._runs_of_this_outbox(client, experiment_id)), None)
        if run is None:
            cursor.creations += 1
            cursor.save(self.folder)
            run = client.create_run(
                experiment_id,
                start_time=cursor.created_ms,
                tags={**cursor.tags, OUTBOX_TAG: cursor.token},
                run_name=cursor.run_name,
            )
            self._present = None if cursor.creations == 1 else {}
        cursor.run_id = run.info.run_id
        cursor.save(self.folder)
        return run

    def _runs_of_this_outbox(self, client: MlflowClient, experiment_id: str) -> Sequence[Run]:
        rule = f"tags.`{OUTBOX_TAG}` = '{self.cursor.token}'"
        return client.search_runs([experiment_id], rule, order_by=["attributes.start_time ASC"])

    def _describe(self, client: MlflowClient, run: Run) -> None:
        from mlflow.entities import Dataset, DatasetInput, Param, RunTag

        cursor, run_id = self.cursor, run.info.run_id
        # MLflow refuses a whole batch over one changed parameter: the values a run began with stay.
        params = [Param(k, v) for k, v in cursor.params.items() if k not in run.data.params]
        for start in range(0, len(params), _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=params[start : start + _PARAMS_PER_BATCH], synchronous=True)
        tags = [RunTag(k, v) for k, v in cursor.tags.items() if run.data.tags.get(k) != v]
        for start in range(0, len(tags), _PARAMS_PER_BATCH):
            client.log_batch(run_id, tags=tags[start : start + _PARAMS_PER_BATCH], synchronous=True)
        if cursor.dataset is not None:
            dataset = Dataset(**cursor.dataset)
            known = run.inputs.dataset_inputs if run.inputs else []
            if all(each.dataset.digest != dataset.digest for each in known):
                client.log_inputs(run_id, datasets=[DatasetInput(dataset)])
        if cursor.ending is None and run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")

    def _all_sent(self) -> None:
        self._present = None  # everything written so far is confirmed

    def _send(self, rows: Sequence[Row]) -> None:
        self._log([metric for row in rows for metric in points(row.numbers, row.step, row.written_ms)])

    def _log(self, metrics: list[Metric]) -> None:
        client, run_id = self._client, self.cursor.run_id
        assert run_id is not None
        if self._present is not None:
            for key in {metric.key for metric in metrics} - self._present.keys():
                self._present[key] = {point.step for point in client.get_metric_history(run_id, key)}
            metrics = [metric for metric in metrics if metric.step not in self._present[metric.key]]
        for start in range(0, len(metrics), NUMBERS_PER_BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + NUMBERS_PER_BATCH], synchronous=True)

    def _send_ending(self, ending: Ending, stop: Callable[[], bool]) -> bool:
        """Sends the summary, the artifacts, the status and, last, the models.

        A run shown as finished is complete but for its models: what a registry refuses, or data that is not
        where the models are to be made, does not leave the run going on for ever.
        """
        client, cursor = self._client, self.cursor
        assert cursor.run_id is not None
        self._present = {}  # a repeated `sync` sends the summary again
        self._log(points(numbers_in(ending.summary), cursor.last_round or 0, ending.end_ms))
        for name in ending.artifacts:
            path = self.folder / name
            if stop():
                return False
            if not path.is_file():
                _logger.warning("the artifact %s does not exist and is not logged", path)
                continue
            version = f"{path.stat().st_size}:{path.stat().st_mtime_ns}"
            if cursor.artifacts_logged.get(name) != version:
                client.log_artifact(cursor.run_id, str(path))
                cursor.artifacts_logged[name] = version
                cursor.save(self.folder)
        if cursor.creations > 1:  # a creation given up as timed out may have been carried out later
            for run in self._runs_of_this_outbox(client, client.get_run(cursor.run_id).info.experiment_id):
                if run.info.run_id != cursor.run_id:
                    client.delete_run(run.info.run_id)
        client.set_terminated(cursor.run_id, ending.status, ending.end_ms)
        return self._send_models(client, ending, stop)

    def _send_models(self, client: MlflowClient, ending: Ending, stop: Callable[[], bool]) -> bool:
        cursor = self.cursor
        if not ending.models and not ending.models_wanted:
            return True
        from cluster.records import logged_models  # loads the data's side, which nothing else here needs

        if ending.models_wanted:
            make = self.make_models or partial(logged_models.models_of_folder, self.folder)
            ending.models, ending.models_wanted = make(), False
            cursor.save(self.folder)
        best: LoggedModel | None = None
        for model in ending.models:
            if stop():
                return False
            logged = logged_models.deliver_model(client, cursor, self.folder, model)
            best = logged if model.tags["best"] == "true" else best
        if cursor.register is not None and best is not None:
            logged_models.register(client, cursor, best)
        shutil.rmtree(self.folder / "models", ignore_errors=True)
        return True


def points(numbers: Mapping[str, float], step: int, written_ms: int) -> list[Metric]:
    """Some numbers as MLflow's points."""
    from mlflow.entities import Metric

    return [Metric(name, value, written_ms, step) for name, value in numbers.items()]
