"""The connection to a Ray cluster, and the actors on it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.engine import RayEngine
from cluster.federation import Federation, prepare_arguments
from cluster.workload.datasets import prepare


class ClusterError(RuntimeError):
    """The Ray cluster cannot be reached or lost the driver; the message says what to do."""


def ray_engine(config: Config, federation: Federation) -> RayEngine:
    """Actors on the connected cluster, one a free core (or GPU share) unless configured."""
    actors = config.actors or max(1, min(room(config), config.cohort))
    _decode_on_every_node(config)
    return RayEngine(
        federation.workload(),
        federation.sizes,
        actors=actors,
        cpus=config.cpus_per_actor,
        gpus=config.gpus_per_actor,
    )


def room(config: Config) -> int:
    """How many of its actors the connected cluster holds."""
    import ray

    return sum(_actors_on(node["Resources"], config) for node in ray.nodes() if node["Alive"])


def local_room(config: Config) -> int:
    """How many of its actors a private cluster would hold by its cores, or the connected one has room for."""
    import ray

    if ray.is_initialized():
        return room(config)
    return max(1, int((os.cpu_count() or 1) / config.cpus_per_actor + 1e-9))


def _actors_on(resources: dict[str, float], config: Config) -> int:
    """How many actors one node holds; an actor's share never spans two GPUs."""
    room = int(resources.get("CPU", 0) / config.cpus_per_actor + 1e-9)
    gpus, share = resources.get("GPU", 0.0), config.gpus_per_actor
    if share > 0:
        room = min(room, int(gpus // share) if share >= 1 else int(gpus) * int(1 / share + 1e-9))
    return room


@contextmanager
def connected(config: Config, model_size: int) -> Iterator[None]:
    """A connection to the configured cluster, if execution needs one and the caller has none.

    Args:
        config: The experiment.
        model_size: Floats of the model; a private cluster's object store is sized by it.
    """
    if config.execution == "inline":
        yield
        return
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    namespace = f"sparsyfed-{os.getpid()}"
    local = config.address == "local"
    _check_answer(config.address)
    arguments: dict[str, Any] = {}
    if local:
        # Each actor's partial total (20 bytes a weight) and two broadcasts (8 each), twice, and spare room.
        cores = os.cpu_count() or 1
        actors = config.actors or max(1, min(config.cohort, int(cores / config.cpus_per_actor)))
        store = 2**28 + 2 * model_size * (20 * actors + 16)
        arguments = {"include_dashboard": False, "object_store_memory": store}
    if not local and _is_user_code(config):
        arguments["runtime_env"] = {"working_dir": str(Path.cwd())}
    try:
        ray.init(
            address=config.address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            **arguments,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"address: no Ray cluster answers at {config.address!r} ({str(error).splitlines()[0]}); "
            "start one with `ray start --head`, or use address=local"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answer(address: str, timeout_s: float = 5.0) -> None:
    """Refuse a ``host:port`` where no Ray listens; Ray itself would try for minutes."""
    place = address.removeprefix("ray://")
    host, colon, port = place.rpartition(":")
    if not colon:
        return  # local, auto
    import grpc

    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            # Another server, such as the dashboard's, takes the connection but does not speak Ray's protocol.
            with grpc.insecure_channel(place) as channel:
                grpc.channel_ready_future(channel).result(timeout=timeout_s)
    except (OSError, ValueError, OverflowError, grpc.FutureTimeoutError) as error:
        reason = str(error) or "something else listens there"
        raise ClusterError(
            f"address: no Ray cluster answers at {address!r} ({reason}); "
            "start one with `ray start --head` (port 6379), or use address=local"
        ) from None


def _decode_on_every_node(config: Config) -> None:
    """Each other node decodes the data set once, into its own cache, before its actors start."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    remote_prepare: Any = ray.remote(prepare)  # type: ignore[arg-type]
    decode = remote_prepare.options(num_cpus=0)
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    arguments = prepare_arguments(config)
    ray.get(
        [
            decode.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                **arguments
            )
            for node in others
        ]
    )


def _is_user_code(config: Config) -> bool:
    choices = (config.algorithm, config.model, config.data, config.sampler)
    return any(":" in choice.name for choice in choices)
