"""The MLflow store itself: whether it answers, how it is opened, and its pages in the browser."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from cluster.logins import masked
from cluster.records.sqlite_store import (
    TrackingError,
    artifact_folder,
    as_mlflow_takes_it,
    check_file,
    is_sqlite,
    prepare,
)
from cluster.references import ensure_home, installed

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# A call may not hang for minutes (MLflow's defaults: 120 s, 7 retries); this module retries by itself.
QUIET_DEFAULTS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}

# Runs that are shown side by side: as many as a legend tells apart.
_COMPARED = 12

# Has MLflow open the experiment on its runs and their charts, not on the traces of language models.
_TRAINING = {"mlflow.experimentKind": "custom_model_development"}

# Has a page show the menu of model training; a browser that is new to MLflow is shown that of agents.
_AS_TRAINING = "workflowType=machine_learning"


def check(uri: str, timeout_s: float = 5.0) -> None:
    """Refuses a store that cannot be used, before anything starts and without importing MLflow.

    Args:
        uri: The tracking store.
        timeout_s: Longest wait for a server in seconds.

    Raises:
        TrackingError: Names the uri, what is wrong with it and what would be right; or MLflow is missing.
    """
    if not installed("mlflow"):
        raise TrackingError(
            f"tracking store {uri}: MLflow is not installed here; install it (pip install mlflow), or set "
            "tracking.enabled=false"
        )
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        if parts.username or parts.password:  # they would end up in files and messages
            raise TrackingError(
                f"tracking store at {parts.hostname}: give the login as MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, not inside the address"
            )
        _check_server(uri, timeout_s)
    elif is_sqlite(uri):
        check_file(uri)
    else:
        hint = " (MLflow 3 has given up its file store)" if parts.scheme in ("", "file") else ""
        raise TrackingError(
            f"tracking store {masked(uri)!r} is not supported{hint}; give sqlite:////folder/mlflow.db or the "
            "http(s) address of an `mlflow server`, which may keep its data in any database"
        )


def _check_server(uri: str, timeout_s: float) -> None:
    fix = "start it, correct the address, or track into sqlite:////folder/mlflow.db"
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=timeout_s) as answer:
            healthy = answer.read(64).strip() == b"OK"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # a proxy in front that wants the login which MLflow's client will send
            return
        raise TrackingError(f"tracking server {uri} answers with HTTP {error.code}; {fix}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise TrackingError(f"tracking server {uri} does not answer ({reason}); {fix}") from error
    if not healthy:
        raise TrackingError(f"{uri} answers but is not an MLflow tracking server; {fix}")


def use_quiet_defaults(environment: MutableMapping[str, str]) -> None:
    """Sets MLflow's switches (bounded calls, no telemetry, no chatter) where the user has not."""
    for key, value in QUIET_DEFAULTS.items():
        environment.setdefault(key, value)


def connect(uri: str) -> MlflowClient:
    """Opens the store; an SQLite store that is not there yet is made, for seconds.

    Raises:
        TrackingError: The file cannot be a store; names the cure.
    """
    ensure_home()
    use_quiet_defaults(os.environ)
    if is_sqlite(uri):
        check_file(uri)
    from mlflow.tracking import MlflowClient

    if is_sqlite(uri):
        prepare(uri)
    return MlflowClient(as_mlflow_takes_it(uri))


def find_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Finds the experiment or creates it, also when another run does so at the same moment."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = artifact_folder(uri).as_uri() if is_sqlite(uri) else None
        try:
            return client.create_experiment(name, artifact_location=location, tags=_TRAINING)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise TrackingError(f"the experiment {name!r} cannot be created nor found in MLflow")
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the experiment {name!r} was deleted in MLflow: choose another name, or "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return experiment.experiment_id


def first_line(error: Exception) -> str:
    """The first line of an error's message that says what happened, cut to 300 characters."""
    said = [line for line in str(error).splitlines() if not line.startswith("(raised as a result of")]
    return (said or [type(error).__name__])[0][:300]


def serve_ui(uri: str, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Serves MLflow's pages for a store until Ctrl-C (or SIGTERM, or the terminal closes).

    One worker and no job runners: up in 6 s with 2 processes and 0.5 GB, where MLflow's defaults take 28 s
    with 15 processes and 2.4 GB (2 cores). A name under which it is reached, other than localhost and private
    addresses, has to be listed in MLFLOW_SERVER_ALLOWED_HOSTS.

    Args:
        uri: The tracking store; that of a server is only named, since its pages are served already.
        host: The interface to listen on.
        port: The port; the next free one is taken, with a message, if it is in use.

    Returns:
        The exit status for the command line.

    Raises:
        TrackingError: The store cannot be used, or no port is free.
    """
    check(uri)
    if not is_sqlite(uri):
        print(f"MLflow is served at {uri}", flush=True)
        _show_last_runs(uri, uri.rstrip("/"))
        return 0
    free = _free_port(host, port)
    if free != port:
        print(f"port {port} is in use, taking {free}", flush=True)
    ensure_home()
    use_quiet_defaults(os.environ)
    prepare(uri)
    environment = dict(os.environ)
    environment.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--workers",
        "1",
        "--host",
        host,
        "--port",
        str(free),
    ]
    command += [
        "--backend-store-uri",
        as_mlflow_takes_it(uri),
        "--artifacts-destination",
        artifact_folder(uri).as_uri(),
    ]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # A signal that is ignored already (nohup) stays ignored.
    wanted = (signal.SIGTERM, signal.SIGHUP)
    stopping = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
    before = [signal.signal(number, interrupt) for number in stopping]
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    # In a process group of its own, so that a Ctrl-C reaches only this process and all of them end here.
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{free}"
        while server.poll() is None and not answers(address):
            time.sleep(0.2)
        if server.poll() is None:
            print(f"MLflow is served at {address} (Ctrl-C ends it)", flush=True)
            _show_last_runs(uri, address)
        status = server.wait()
        log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
        print(
            f"the MLflow server ended with status {status}:\n{log.read().decode(errors='replace')}",
            flush=True,
        )
        return status or 1
    except KeyboardInterrupt:
        return 0
    finally:
        for number, handler in zip(stopping, before, strict=True):
            signal.signal(number, handler)
        _end_group(server)
        log.close()


def _show_last_runs(uri: str, address: str) -> None:
    """Name the page of the last runs side by side and, before a screen, open it."""
    with contextlib.suppress(Exception):  # the pages are served whatever a look at the store says
        experiment, runs = last_runs(uri)
        if not runs:
            return
        asked = {"runs": json.dumps(runs), "experiments": json.dumps([experiment])}
        page = f"{address}/#/experiments/{experiment}/runs/{runs[0]}?{_AS_TRAINING}"
        if len(runs) > 1:
            asked_for = urllib.parse.urlencode(asked, quote_via=urllib.parse.quote)
            page = f"{address}/#/compare-runs?{asked_for}&{_AS_TRAINING}"
        print(f"the last {len(runs)} runs: {page}" if len(runs) > 1 else f"its run: {page}", flush=True)
        screen = any(os.environ.get(key) for key in ("DISPLAY", "WAYLAND_DISPLAY"))
        # Elsewhere a browser of texts would take the terminal.
        if sys.stdout.isatty() and (screen or sys.platform == "darwin"):
            webbrowser.open(page)


def last_runs(uri: str) -> tuple[str, list[str]]:
    """The experiment that has the newest run of all, and its newest runs, the oldest first; by their ids."""
    client = connect(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    # A study's own run and comparisons have nothing to compare.
    rule = "tags.kind != 'comparison' and tags.kind != 'study'"
    newest = client.search_runs(experiments, rule, max_results=1) if experiments else []
    if not newest:
        return "", []
    experiment = str(newest[0].info.experiment_id)
    runs = client.search_runs([experiment], rule, max_results=_COMPARED)  # by start time, newest first
    return experiment, [run.info.run_id for run in reversed(runs)]


def answers(address: str) -> bool:
    """Whether a tracking server answers at ``address``."""
    try:
        check(address, timeout_s=2.0)
    except TrackingError:
        return False
    return True


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port, min(port + 100, 65536)):
        try:
            with socket.create_server((host, candidate), family=family):
                return candidate
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise TrackingError(f"cannot listen on {host}: {error}") from error
    raise TrackingError(f"no port from {port} on is free on {host}")


def _end_group(server: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):  # the group is gone
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience_s)
