"""Tracking without waits, and a store for it."""

import pytest


@pytest.fixture(scope="module")
def fast_tracking():
    """MLflow without its noise and its waits."""
    from cluster.records import tracking, tracking_store

    with pytest.MonkeyPatch.context() as patch:
        for key, value in tracking_store.QUIET_DEFAULTS.items():
            patch.setenv(key, value)
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        patch.setattr(tracking, "_GATHER_S", 0.02)
        patch.setattr(tracking, "_FIRST_RETRY_S", 0.1)
        patch.setattr(tracking, "_LAST_RETRY_S", 0.3)
        patch.setattr(tracking, "_CLOSING_RETRY_S", 0.2)
        yield


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """One SQLite store for all tests (its first use costs seconds), in a folder with a space in its name."""
    return f"sqlite:///{tmp_path_factory.mktemp('a store')}/mlflow.db"
