"""Running an experiment: ``run`` and ``resume``, in this process or in a driver actor on a Ray cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from cluster import tracking
from cluster.client import build_model
from cluster.config import RESULT_FREE, Config, ConfigError, apply_overrides, code_digest, validate
from cluster.driver import Driver, Line
from cluster.engine import Engine, InlineEngine, RayEngine
from cluster.federation import Federation, prepare_arguments
from cluster.plots import curves
from cluster.run_folder import RunFolder, RunFolderError
from cluster.workload.datasets import open_dataset, prepare
from cluster.workload.partition import picture

if TYPE_CHECKING:
    import pandas

#: Seconds that the end of a run waits for a tracking server that is away.
TRACKING_DEADLINE_S = 30.0

Progress = Callable[[Line], None]


class ClusterError(RuntimeError):
    """The Ray cluster cannot be reached or lost the driver; the message says what to do."""


@dataclass(frozen=True)
class Result:
    """A finished (or stopped) run.

    Attributes:
        folder: The run's folder.
        summary: What ``result.json`` holds.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def rounds(self) -> pandas.DataFrame:
        """One row a round, columns named as in MLflow."""
        import pandas as pd

        return pd.DataFrame(RunFolder(self.folder).rounds()).set_index("round")

    def model(self) -> nn.Module:
        """The plain module with the final effective weights."""
        config = RunFolder(self.folder).config()
        model = build_model(config, open_dataset(prepare(**prepare_arguments(config))))
        model.load_state_dict(load_file(self.folder / "model.safetensors"))
        return model.eval()


def run(config: Config, output: str | Path | None = None, *, progress: Progress | None = None) -> Result:
    """Run one experiment.

    Args:
        config: The experiment, from ``cluster.resolve``.
        output: The run's folder, new or empty; by default a new one under ``runs/``.
        progress: Called with each round's line as it is stored.

    Raises:
        ConfigError, DataError, PartitionError, ModelError, TrackingError, ClusterError, PlacementError:
            Before anything was computed; the message says what to do.
        DivergedError: Every update was refused in three rounds in a row.
    """
    path = Path(output) if output is not None else _default_folder(config)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunFolderError(f"{path} exists and is not empty; resume it, or choose another --output")
    config = _with_tracking(config, path.absolute().parent)
    _preflight(config)
    with _connected(config):
        folder = RunFolder.create(path.absolute(), config)
        try:
            return _execute(folder, config, progress)
        except BaseException:
            folder.discard()
            raise


def resume(path: str | Path, overrides: Sequence[str] = (), *, progress: Progress | None = None) -> Result:
    """Continue an interrupted run from its last checkpoint; the result is that of an uninterrupted one.

    Args:
        path: The run's folder.
        overrides: ``key=value`` for what cannot change a result, such as ``actors`` or ``stop_after``.
        progress: Called with each new round's line.

    Raises:
        ConfigError: An override could change the result.
        CheckpointError: The last checkpoint is damaged.
    """
    folder = RunFolder.open(Path(path).absolute())
    config = folder.config()
    if overrides:
        changed = validate(apply_overrides(config.dump(), overrides))
        if changed.digest() != config.digest():
            old, new = config.flat(), changed.flat()
            keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            fixed = [key for key in keys if key.split(".")[0] not in RESULT_FREE]
            raise ConfigError(
                f"{', '.join(fixed)}: would change the result of a run that has begun. "
                f"resume accepts {', '.join(sorted(RESULT_FREE))}; start a new run for anything else"
            )
        config = changed
    _preflight(config)
    with _connected(config):
        folder.write_config(config)
        return _execute(folder, config, progress)


def conduct(
    path: Path,
    make_engine: Callable[[Config, Federation], Engine],
    on_line: Progress,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Run the experiment in ``path`` to its end on one engine; returns what ``result.json`` holds."""
    folder = RunFolder.open(path)
    config = folder.config()
    federation = Federation.of(config)
    engine = make_engine(config, federation)
    tracker = _tracker(folder, config, federation)
    try:

        def stored(line: Line) -> None:
            if tracker is not None:
                tracker.round_written()
            on_line(line)

        driver = Driver(folder, federation, engine, on_line=stored, should_stop=should_stop)
        if tracker is not None:
            tracker.start()
        started = time.perf_counter()
        try:
            driver.run()
        except BaseException as error:
            if tracker is not None:
                status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
                tracker.finish(status, [], {}, deadline_s=TRACKING_DEADLINE_S)
            raise
        summary = _summary(folder, config, federation, time.perf_counter() - started)
        folder.write_result(summary)
        artifacts = _artifacts(folder, federation)
        if tracker is not None:
            final = {f"final/{k}": v for k, v in summary.items() if isinstance(v, (int, float))}
            delivered = tracker.finish("FINISHED", artifacts, final, deadline_s=TRACKING_DEADLINE_S)
            summary |= {"mlflow_run_id": tracker.run_id, "tracking_delivered": delivered}
            folder.write_result(summary)
        return summary
    finally:
        engine.close()


def ray_engine(config: Config, federation: Federation) -> RayEngine:
    """Actors on the connected cluster, one a free core (or GPU share) unless configured."""
    import ray

    resources = ray.cluster_resources()
    actors = config.actors
    if actors is None:
        actors = int(resources.get("CPU", 1) // config.cpus_per_actor)
        if config.gpus_per_actor > 0:
            actors = min(actors, int(resources.get("GPU", 0) / config.gpus_per_actor))
        actors = max(1, min(actors, config.cohort))
    _decode_on_every_node(config)
    return RayEngine(
        federation.workload(),
        federation.sizes,
        actors=actors,
        cpus=config.cpus_per_actor,
        gpus=config.gpus_per_actor,
    )


class DriverActor:
    """Runs the rounds on the cluster and hands their lines to whoever asks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[Line] = []
        self._changed = threading.Condition()
        self._done = False
        self._stop = False

    def conduct(self) -> dict[str, Any]:
        """Run to the end; see :func:`conduct`."""
        try:
            return conduct(self._path, ray_engine, self._on_line, lambda: self._stop)
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def lines_after(self, count: int) -> tuple[list[Line], bool]:
        """Wait for lines beyond the first ``count``; returns them and whether the run is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._done or len(self._lines) > count, timeout=30.0)
            return self._lines[count:], self._done

    def stop(self) -> None:
        """End the run after the current round, with a checkpoint."""
        self._stop = True

    def _on_line(self, line: Line) -> None:
        with self._changed:
            self._lines.append(line)
            self._changed.notify_all()


# ------------------------------------------------------------------------------------------- both ways


def _execute(folder: RunFolder, config: Config, progress: Progress | None) -> Result:
    on_line = progress or (lambda line: None)
    if config.execution == "inline":
        torch.set_num_threads(config.threads)
        with _stop_on_signal() as stopped:
            summary = conduct(
                folder.path,
                lambda _, federation: InlineEngine(federation.workload()),
                on_line,
                stopped.is_set,
            )
    else:
        summary = _on_ray(folder, on_line)
    return Result(folder.path, summary)


def _on_ray(folder: RunFolder, on_line: Progress) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # The run's folder is on this node; the driver asks for no CPU, so that every core trains.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(DriverActor).options(num_cpus=0, max_concurrency=4, scheduling_strategy=here)
    driver = actor.remote(folder.path)
    finished = driver.conduct.remote()
    seen, done = 0, False
    with _stop_on_signal(lambda: driver.stop.remote()):
        try:
            while not done:
                lines, done = ray.get(driver.lines_after.remote(seen))
                seen += len(lines)
                for line in lines:
                    on_line(line)
            summary: dict[str, Any] = ray.get(finished)
            return summary
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.RayActorError as error:
            raise ClusterError(
                f"the driver died ({str(error).splitlines()[0]}); nothing computed is lost: "
                f"sparsyfed resume {folder.path}"
            ) from None


@contextmanager
def _stop_on_signal(also: Callable[[], Any] = lambda: None) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event; the second interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        print("stopping after this round; press again to stop at once", file=sys.stderr, flush=True)
        also()

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _connected(config: Config) -> Iterator[None]:
    """A connection to the configured cluster, if execution needs one and the caller has none."""
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
    arguments: dict[str, Any] = (
        {"include_dashboard": False, "object_store_memory": 512 * 2**20} if local else {}
    )
    if not local and _is_user_code(config):
        arguments["runtime_env"] = {"working_dir": str(Path.cwd())}
    try:
        ray.init(
            address=config.address,
            namespace=namespace,
            log_to_driver=False,
            logging_level="ERROR",
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


def _preflight(config: Config) -> None:
    """Find what is wrong with data, partition, model or tracking before anything starts."""
    if config.tracking.enabled and config.tracking.uri is not None:
        tracking.check(config.tracking.uri)
    Federation.of(config)


def _decode_on_every_node(config: Config) -> None:
    """Each other node decodes the data set once, into its own cache, before its actors start."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    decode = ray.remote(prepare).options(num_cpus=0)
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


# ------------------------------------------------------------------------------------------ what it leaves


def _summary(folder: RunFolder, config: Config, federation: Federation, seconds: float) -> dict[str, Any]:
    lines = folder.rounds()
    last = lines[-1]
    metric = federation.selection_metric
    measured = [line for line in lines if line.get(metric) is not None]
    best = max(measured, key=lambda line: (line[metric], -line["round"]))
    return {
        "method": config.algorithm.name,
        "seed": config.seed,
        "rounds": last["round"],
        "complete": last["round"] >= config.rounds,
        "accuracy": measured[-1]["test/accuracy"],
        "best_accuracy": best["test/accuracy"],
        "best_round": best["round"],
        "selected_by": metric,
        "sparsity": last["sparsity/global"],
        "uplink_bytes": last["comm/uplink_bytes_total"],
        "downlink_bytes": last["comm/downlink_bytes_total"],
        "flops_dense": last["flops/dense_total"],
        "flops_sparse": last["flops/sparse_total"],
        "seconds": round(seconds, 3),
        "config_hash": config.digest(),
        "code_hash": code_digest(),
        "partition_hash": federation.partition.digest(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _artifacts(folder: RunFolder, federation: Federation) -> list[Path]:
    lines = folder.rounds()
    layers = folder.path / "sparsity_per_layer.csv"
    names = [entry.name for entry in federation.layout.prunable]
    rows = [",".join(["round", *names])]
    rows += [",".join(map(str, [line["round"], *line["sparsity/layers"]])) for line in lines]
    layers.write_text("\n".join(rows) + "\n")
    pictures = [folder.path / "partition.png", folder.path / "curves.png"]
    dataset, config = federation.dataset, federation.config
    title = f"{dataset.name}, {config.partition.name}, {federation.partition.clients} clients"
    picture(federation.partition, dataset.train.labels, dataset.classes, pictures[0], title=title)
    curves(lines, pictures[1], title=f"{config.algorithm.name}, seed {config.seed}")
    return [folder.path / "config.yaml", folder.rounds_file, folder.model_file, layers, *pictures]


def _tracker(folder: RunFolder, config: Config, federation: Federation) -> tracking.Tracker | None:
    section = config.tracking
    if not section.enabled or section.uri is None:
        return None
    run_name = section.run_name or f"{config.algorithm.name}-s{config.seed}"
    tags = {
        "method": config.algorithm.name,
        "seed": str(config.seed),
        "config_hash": config.digest(),
        "code_hash": code_digest(),
        "partition_hash": federation.partition.digest(),
        "git_sha": _git_sha(),
        "kind": "run",
        **section.tags,
    }
    source = config.data.path or config.data.name
    dataset = {
        "name": federation.dataset.name,
        "digest": federation.dataset.fingerprint,
        "source_type": "local" if config.data.path else "hub",
        "source": source,
    }
    target = tracking.TrackingTarget(section.uri, section.experiment or benchmark_name(config), run_name)
    return tracking.Tracker(folder.path, target, params=config.flat(), tags=tags, dataset=dataset)


def benchmark_name(config: Config) -> str:
    """Data and partition, such as ``cifar10-lda0.1``: runs of one benchmark are compared in one experiment."""
    data = config.data.path or config.data.name
    partition = config.partition
    alpha = f"{partition.alpha:g}" if partition.name in ("lda", "dirichlet") else ""
    return f"{Path(data).name.replace(':', '.')}-{partition.name}{alpha}"


def _with_tracking(config: Config, root: Path) -> Config:
    """Runs beside each other share one store, unless the configuration names another."""
    if not config.tracking.enabled or config.tracking.uri is not None:
        return config
    root.mkdir(parents=True, exist_ok=True)
    tree = config.dump()
    tree["tracking"]["uri"] = f"sqlite:///{root / 'mlflow.db'}"
    return validate(tree)


def _default_folder(config: Config) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{benchmark_name(config)}-{config.algorithm.name.split(':')[-1]}-s{config.seed}-{stamp}"
    path, copy = Path("runs") / name, 1
    while path.exists():
        copy += 1
        path = Path("runs") / f"{name}-{copy}"
    return path


def _is_user_code(config: Config) -> bool:
    return any(":" in name for name in (config.algorithm.name, config.model.name, config.data.name))


def _git_sha() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
