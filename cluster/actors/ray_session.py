"""The connection to a Ray cluster, and the actors on it."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil

from cluster.actors.actor_pool import MakeHost
from cluster.actors.placement import Node, bundles, kinds_of
from cluster.actors.ray_engine import KeptPool, RayEngine
from cluster.clients.client import ClientHost
from cluster.configuration.config import Config
from cluster.federation import Federation, prepare_arguments
from cluster.references import DataError, UserError, ensure_home
from cluster.simulation.devices import Devices
from cluster.workload.preparing import prepare

#: Objects of so many bytes travel in the messages of a private cluster; a round of a small model then never
#: waits for the object store, whose every step is a message to Ray's daemon and back.
INLINED_BYTES = 4 * 2**20

#: The same on a cluster of somebody else's: Ray's 100 KiB, less what goes with a model.
RAYS_INLINED_BYTES = 90_000


class ClusterError(UserError):
    """The Ray cluster cannot be reached or lost the driver; the message says what to do."""

    passes = True


def ray_engine(
    config: Config,
    federation: Federation,
    make_host: MakeHost = ClientHost,
    *,
    watched_as: str | None = None,
    kept: KeptPool | None = None,
) -> RayEngine:
    """Actors on the connected cluster, one a core (or GPU share) of its nodes unless configured.

    Args:
        config: The experiment.
        federation: Data and partition.
        make_host: Builds the host of an actor from the setup and the actor's GPUs.
        watched_as: Name of the run whose machines are watched by the driver actor that this is called in.
        kept: See :class:`RayEngine`.

    Raises:
        PlacementError: They were not placed in time; names asked and free resources.
    """
    kinds = kinds_of(config)
    devices, own = Devices(config), {kind.name for kind in kinds}
    tiers = list(config.devices.kinds)

    def kind_of(client: int) -> str:
        tier = tiers[devices.tiers[client]]
        return tier if tier in own else ""

    _decode_on_every_node(config, federation.dataset.folder)
    return RayEngine(
        federation.setup(),
        federation.sizes,
        bundles(kinds, _nodes(), config.actors, config.cohort),
        kind_of=kind_of,
        make_host=make_host,
        inlined_bytes=INLINED_BYTES if config.address == "local" else RAYS_INLINED_BYTES,
        watched_as=watched_as if config.tracking.enabled else None,
        kept=kept,
    )


def room(config: Config) -> int:
    """How many of its actors the connected cluster holds."""
    return sum(bundle.actors for bundle in bundles(kinds_of(config), _nodes(), None, sys.maxsize))


def local_room(config: Config) -> int:
    """How many of its actors a private cluster would hold by its cores, or the connected one has room for."""
    import ray

    if ray.is_initialized():
        return room(config)
    return max(1, int((os.cpu_count() or 1) / config.cpus_per_actor + 1e-9))


def _nodes() -> list[Node]:
    import ray

    return [
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0), node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]


@contextmanager
def connected(config: Config, model_size: int, also: Iterable[Config] = ()) -> Iterator[None]:
    """A connection to the configured cluster, if execution needs one and the caller has none.

    Args:
        config: The experiment.
        model_size: Floats by which a private cluster's object store is sized (``Federation.stored_floats``).
        also: Experiments that share the connection; the user's code of each travels with it.
    """
    if config.execution == "inline":
        yield
        return
    local = config.address == "local"
    arguments: dict[str, Any] = {}
    if local:
        cores = os.cpu_count() or 1
        actors = config.actors or max(1, min(config.cohort, int(cores / config.cpus_per_actor)))
        arguments = private_cluster(model_size, actors)
    user_code = any(each.references for each in (config, *also))
    if not local and user_code and not _job_ships_code():
        arguments["runtime_env"] = {"working_dir": str(Path.cwd())}
    with connection(config.address, **arguments):
        yield


def private_cluster(model_size: int, actors: int) -> dict[str, Any]:
    """Arguments of ``ray.init`` for a cluster of one run: so many actors, a model of so many floats."""
    # Each actor's partial total (20 bytes a weight) and two broadcasts (8 each), twice, and spare room.
    store = 2**28 + 2 * model_size * (20 * actors + 16)
    # Without a dashboard nobody reads Ray's events and metrics, which cost CPU all the time. Ray promises
    # nothing about these settings, which is one more reason to pin it.
    settings = {
        "max_direct_call_object_size": INLINED_BYTES,
        "event_stats": False,
        "task_events_report_interval_ms": 0,
        "enable_metrics_collection": False,
    }
    return {"include_dashboard": False, "object_store_memory": store, "_system_config": settings}


@contextmanager
def connection(address: str, **arguments: Any) -> Iterator[None]:
    """A connection to a cluster, unless the caller has one.

    Args:
        address: local (a private cluster that ends with the connection), auto, or host:port.
        arguments: More of ``ray.init``.

    Raises:
        ClusterError: No cluster answers there.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    ensure_home()
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _check_answer(address)
    local = address == "local"
    before = {child.pid for child in psutil.Process().children()}
    try:
        with _on_loopback() if local else nullcontext():
            ray.init(
                address=address,
                namespace=f"sparsyfed-{os.getpid()}",
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
                **arguments,
            )
    except Exception as error:
        if local:
            cure = "where the machine is too busy for it, try again later"
            if isinstance(error, PermissionError):  # a container's HOME is / or is not there
                cure = "see that HOME, and RAY_TMPDIR where it is set, name folders of yours"
            raise ClusterError(
                f"address: the run's own Ray did not start ({str(error).partition(chr(10))[0]}); "
                f"{cure}, or use execution=inline"
            ) from error
        if not isinstance(error, (ConnectionError, RuntimeError, ValueError, TimeoutError)):
            raise
        raise ClusterError(
            f"address: no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}); "
            "start one with `ray start --head`, or use address=local"
        ) from None
    try:
        with _ended_with_us(before) if local and os.name == "posix" else nullcontext():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts meanwhile can be reached from this machine alone and takes no port of another Ray.

    ``ray.init`` replaces a loopback address by a reachable one and gives the dashboard's agent the port that
    ``ray start`` gives it, so the parameters are set where ``ray.init`` has put them together. No autoscaler
    and no tailing of logs either: nobody asks them. A terminal that closes does not end it.
    """
    from ray._private import parameter

    made, metrics = parameter.RayParams, os.environ.get("DASHBOARD_METRIC_PORT")
    own: dict[str, Any] = {
        "node_ip_address": "127.0.0.1",
        "dashboard_agent_listen_port": 0,
        "no_monitor": True,
        "include_log_monitor": False,
    }
    parameter.RayParams = lambda **given: made(**given | own)  # type: ignore[assignment, misc]
    os.environ["DASHBOARD_METRIC_PORT"] = "0"  # any free one
    # As Ray itself does with Ctrl-C: a terminal that closes tells the whole group, and the run's last round
    # and checkpoint need the actors.
    posix = os.name == "posix"
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP}) if posix else None
    try:
        yield
    finally:
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        parameter.RayParams = made  # type: ignore[misc]
        del os.environ["DASHBOARD_METRIC_PORT"]
        if metrics is not None:
            os.environ["DASHBOARD_METRIC_PORT"] = metrics


@contextmanager
def _ended_with_us(before: set[int]) -> Iterator[None]:
    """Whatever was started since ``before`` ends with this process, even where that is killed.

    Ray sees to most of it; its agents, though, try for a minute to tell a server that died as they did.
    """
    ours = [child for child in psutil.Process().children() if child.pid not in before]
    pids = [str(each.pid) for child in ours for each in [child, *child.children(recursive=True)]]
    # Its stdin ends with this process; a session of its own, so that Ctrl-C does not end it.
    watcher = subprocess.Popen(
        ["sh", "-c", f"read -r _; kill -KILL {' '.join(pids)}"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        watcher.kill()
        watcher.communicate()


def _check_answer(address: str, timeout_s: float = 5.0) -> None:
    """Refuse a cluster that is not there or takes no call of ours; Ray itself would try for half a minute."""
    from ray._private import services

    place = address.removeprefix("ray://")
    if address == "auto":  # where none is found, or it is written otherwise, Ray says so
        with suppress(ValueError):
            place = services.canonicalize_bootstrap_address(address) or address
    host, colon, port = place.rpartition(":")
    if not colon:
        return  # local, auto
    import grpc

    known = True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            # Another server, such as the dashboard's, takes the connection but does not speak Ray's protocol.
            with grpc.insecure_channel(place) as channel:
                grpc.channel_ready_future(channel).result(timeout=timeout_s)
                known = _knows_our_token(channel, timeout_s)
    except (OSError, ValueError, OverflowError, grpc.FutureTimeoutError) as error:
        reason = str(error) or "something else listens there"
        raise ClusterError(
            f"address: no Ray cluster answers at {address!r} ({reason}); "
            "start one with `ray start --head` (port 6379), or use address=local"
        ) from None
    if not known:
        raise ClusterError(
            f"address: the Ray cluster at {address!r} wants its token: set RAY_AUTH_MODE=token, and have the "
            "token in ~/.ray/auth_token or in a file that RAY_AUTH_TOKEN_PATH names"
        )


def _knows_our_token(channel: Any, timeout_s: float) -> bool:
    """False where a cluster demands another token than this process has, or this process has lost its own."""
    import grpc
    from ray._private.authentication import grpc_authentication_client_interceptor as ours
    from ray.exceptions import AuthenticationError

    channel = grpc.intercept_channel(channel, ours.SyncAuthenticationMetadataClientInterceptor())
    try:
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=timeout_s)
    except AuthenticationError:
        return False
    except grpc.RpcError as error:  # what else there is to say of it Ray says better
        return bool(error.code() is not grpc.StatusCode.UNAUTHENTICATED)
    return True


def _decode_on_every_node(config: Config, expected: Path) -> None:
    """Each other node that may hold actors decodes the data set once, into its own cache, before that.

    Raises:
        DataError: A node has other data than this one.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    decode: Any = ray.remote(prepare)  # type: ignore[arg-type]
    labels = [kind.label.items() for kind in kinds_of(config)]
    others = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] != here
        and any(asked <= node["Labels"].items() for asked in labels)
    ]
    arguments = prepare_arguments(config)
    folders = ray.get(
        [
            decode.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(**arguments)
            for node in others
        ]
    )
    for node, folder in zip(others, folders, strict=True):
        if folder != expected:
            raise DataError(
                f"{'data.path' if config.data.path else 'data.name'} = "
                f"{config.data.path or config.data.name!r} holds other data on node {node} than here: "
                f"{folder.name} there, {expected.name} here"
            )


def _job_ships_code() -> bool:
    """Whether this is a job that was submitted with a working directory, beside which Ray takes no other."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return "working_dir" in (job.get("runtime_env") or {})
