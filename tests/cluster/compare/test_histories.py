"""Histories of many runs together against MLflow's own calls, run by run: SQLite, and a server's routes."""

import threading

import numpy as np
import pytest
from mlflow.entities import Metric

from cluster.compare import histories as module
from cluster.compare.histories import histories
from cluster.records import tracking_store

NAN, INFINITY = float("nan"), float("inf")

#: By run (value, timestamp, step), logged in this order.
LOGGED = {
    "plain": [(0.1, 10, 1), (0.2, 20, 2), (0.3, 30, 3)],
    "long": [(step / 7, 10 * step, step) for step in range(1, 12)],
    "without": [],
    "not a number": [(0.5, 10, 1), (NAN, 20, 2), (INFINITY, 30, 3)],
    # The later wins, and of one moment the larger, whichever came in first.
    "twice": [(0.9, 40, 1), (0.1, 20, 1), (0.2, 30, 2), (0.8, 30, 2), (0.4, 5, 3)],
    "backwards": [(0.3, 10, 3), (0.2, 20, 2), (0.1, 30, 1)],
    "one": [(1.0, 10, 7)],
}

LARGEST = 1.7976931348623157e308  # as MLflow stores infinity

#: What that makes, by hand.
EXPECTED = {
    "plain": {1: 0.1, 2: 0.2, 3: 0.3},
    "long": {step: step / 7 for step in range(1, 12)},
    "without": {},
    "not a number": {1: 0.5, 2: NAN, 3: LARGEST},
    "twice": {1: 0.9, 2: 0.8, 3: 0.4},
    "backwards": {1: 0.1, 2: 0.2, 3: 0.3},
    "one": {7: 1.0},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The uri of a store that holds :data:`LOGGED`, and the runs' ids by name."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    client = tracking_store.connect(uri)
    experiment = tracking_store.find_experiment(client, uri, "made")
    ids = {}
    for name, points in LOGGED.items():
        run_id = ids[name] = client.create_run(experiment).info.run_id
        for value, moment, step in points:  # of one call with a step twice MLflow keeps what it likes
            client.log_batch(run_id, [Metric("m", value, moment, step), Metric("other", 5.0, moment, step)])
    return uri, ids


@pytest.fixture(scope="module")
def server(store):
    """The routes of `mlflow server` over that store in a thread; ``closed`` are paths that it hides."""
    from mlflow.server import BACKEND_STORE_URI_ENV_VAR, app, handlers
    from werkzeug.serving import make_server

    closed = {}

    def through_a_proxy(environ, respond):
        hidden = closed.get(environ["PATH_INFO"].split("/")[1])
        if hidden is None:
            return app(environ, respond)
        respond(hidden, [("Content-Type", "text/html")])
        return [b"<html>Please log in</html>"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BACKEND_STORE_URI_ENV_VAR, store[0])
        patch.setattr(handlers, "_tracking_store", None)
        served = make_server("127.0.0.1", 0, through_a_proxy, threaded=True)
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}", closed
        served.shutdown()
        thread.join()
        served.server_close()


def by_name(found, ids):
    return {name: found[run_id] for name, run_id in ids.items()}


def one_by_one(client, ids):
    """What MLflow's client tells of each run alone."""
    return {
        name: {point.step: point.value for point in client.get_metric_history(run_id, "m")}
        for name, run_id in ids.items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert found[name].keys() == points.keys(), name
        np.testing.assert_array_equal([found[name][step] for step in points], list(points.values()))


@pytest.mark.parametrize("runs", [1, 3, 50])
@pytest.mark.parametrize("points", [1, 2, 4, 5, 11, 12, 25_000])
def test_together_is_what_one_by_one_is(store, monkeypatch, runs, points):
    uri, ids = store
    client = tracking_store.connect(uri)
    monkeypatch.setattr(module, "_RUNS", runs)
    monkeypatch.setattr(module, "_POINTS", points)
    found = by_name(histories(client, "m", ids.values()), ids)
    assert_same(found, one_by_one(client, ids))
    assert_same(found, EXPECTED)


def test_a_server_is_asked_together_too(store, server, monkeypatch):
    client = tracking_store.connect(server[0])
    assert_same(one_by_one(client, store[1]), EXPECTED)
    monkeypatch.setattr(client, "get_metric_history", None)
    assert_same(by_name(histories(client, "m", store[1].values()), store[1]), EXPECTED)


@pytest.mark.parametrize("hidden", ["404 NOT FOUND", "403 FORBIDDEN", "200 OK"])
def test_a_server_that_has_no_such_route_is_asked_run_by_run(store, server, monkeypatch, hidden):
    uri, closed = server
    monkeypatch.setitem(closed, "ajax-api", hidden)
    client = tracking_store.connect(uri)
    assert_same(by_name(histories(client, "m", store[1].values()), store[1]), EXPECTED)


def test_a_store_gets_one_query_for_many_runs(store, monkeypatch):
    uri, ids = store
    client = tracking_store.connect(uri)
    monkeypatch.setattr(client, "get_metric_history", None)
    asked = []
    together = module._together

    def counted(client, key, run_ids):
        asked.append(len(run_ids))
        return together(client, key, run_ids)

    monkeypatch.setattr(module, "_together", counted)
    histories(client, "m", ids.values())
    assert asked == [len(ids)]
