"""What many stored runs logged of a metric, read by one query for dozens of runs where the store can.

MLflow's client asks run by run, and SQLite answers each such call through the index of the metric's name: it
costs what all runs of the store have logged of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

#: Runs a query: their ids are part of an address, of which some servers take 4 kB (MLflow's limit is 100).
_RUNS = 50

#: Most points of an answer, MLflow's limit; of one that is as long the rest may be missing.
_POINTS = 25_000

_ROUTE = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"


def histories(client: MlflowClient, key: str, run_ids: Iterable[str]) -> dict[str, dict[int, float]]:
    """The value at every step by run; of a step logged more than once the latest.

    Args:
        client: Of an SQLite store or of a server.
        key: The metric.
        run_ids: The runs.

    Raises:
        MlflowException: The store fails.
    """
    found: dict[str, dict[int, float]] = {}
    waiting = list(run_ids)
    while waiting:
        asked = waiting[:_RUNS]
        answer = _together(client, key, asked)
        whole, alone = asked, []
        points: dict[str, dict[int, float]] = {}
        for run_id, step, value in answer or ():
            points.setdefault(run_id, {})[step] = value
        if answer is None:
            whole, alone = [], waiting
        elif len(answer) >= _POINTS:
            last = answer[-1][0]
            whole = [run_id for run_id in points if run_id != last]
            alone = [] if whole else [last]
        found |= {run_id: points.get(run_id, {}) for run_id in whole}
        for run_id in alone:
            found[run_id] = {point.step: point.value for point in client.get_metric_history(run_id, key)}
        waiting = [run_id for run_id in waiting if run_id not in found]
    return found


def _together(client: MlflowClient, key: str, run_ids: Sequence[str]) -> list[tuple[str, int, float]] | None:
    """Run, step and value of the first :data:`_POINTS` points, each run's in one piece and in order of time.

    None where the store cannot be asked so: a server of another kind, or a proxy that lets nothing but the
    public interface pass.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.store.tracking.rest_store import RestStore
    from mlflow.utils.rest_utils import http_request_safe

    store = client._tracking_client.store
    if not isinstance(store, RestStore):
        points = store.get_metric_history_bulk(run_ids, key, _POINTS)
        return [(point.run_id, point.step, point.value) for point in points]
    asked = {"run_id": run_ids, "metric_key": key, "max_results": _POINTS}
    try:
        answer = http_request_safe(store.get_host_creds(), _ROUTE, "GET", params=asked)
        return [(point["run_id"], point["step"], point["value"]) for point in answer.json()["metrics"]]
    except (MlflowException, ValueError, KeyError, TypeError):
        return None
