"""Running an experiment: ``run`` and ``resume``, in this process or in a driver actor on a Ray cluster."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import nn

from cluster.actors.ray_session import connected
from cluster.configuration.attacks import weak_attack
from cluster.configuration.config import Config, validate
from cluster.configuration.foreign import refuse_foreign_code, whose
from cluster.configuration.identity import RESULT_FREE, changes_results
from cluster.configuration.trees import ConfigError, apply_overrides, read_stored
from cluster.federation import Federation, prepare_arguments
from cluster.records import tracking
from cluster.records.outputs import (
    default_folder,
    missing_packages,
    with_tracking,
)
from cluster.records.resuming import check_ground, forget_later_rounds, standing
from cluster.records.run_folder import RunFolder, RunFolderError, check_free
from cluster.records.shared_storage import SharedStorage, is_uri
from cluster.references import UserError, installed, reason_of, root_of
from cluster.rounds.callbacks import Callbacks
from cluster.rounds.conduct import Progress, RunGoesOn, conduct, stop_on_signal
from cluster.rounds.engine import InlineEngine
from cluster.trained_model import build_model
from cluster.workload.datasets import open_dataset
from cluster.workload.preparing import prepare

if TYPE_CHECKING:
    import pandas

_logger = logging.getLogger("sparsyfed.run")


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
    def ended(self) -> bool:
        """Whether the run came to its planned end, ``stop_after`` or what ``stop`` waits for."""
        config = RunFolder(self.folder).config(inert=True)
        last = config.stop_after or config.rounds
        return bool(self.summary["complete"] or self.summary["rounds"] >= last)

    @property
    def rounds(self) -> pandas.DataFrame:
        """One row a round, columns named as in MLflow."""
        import pandas as pd

        return pd.DataFrame(RunFolder(self.folder).rounds()).set_index("round")

    def model(self) -> nn.Module:
        """The plain module with the final effective weights."""
        config = RunFolder(self.folder).config()
        model = build_model(config, open_dataset(prepare(**prepare_arguments(config))), filled=False)
        model.load_state_dict(load_file(self.folder / "model.safetensors"))
        return model.eval()


def run(
    config: Config,
    output: str | Path | None = None,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Run one experiment.

    Args:
        config: The experiment, from ``cluster.resolve``.
        output: The run's folder, new or empty; by default a new one under ``runs/``.
        progress: Called with each round's line as it is stored.
        should_stop: Asked after each round; True ends the run with a checkpoint.

    Raises:
        ConfigError, DataError, PartitionError, ModelError, TrackingError, ClusterError, PlacementError:
            Before anything was computed; the message says what to do.
        DivergedError: Every update was refused in three rounds in a row.
        ClientError: A client failed; where such are skipped, every one in three rounds in a row.
    """
    path = Path(output) if output is not None else default_folder(config)
    check_free(path)
    federation = _preflight(config)
    if config.checkpoint_uri is not None:
        SharedStorage.of_run(config.checkpoint_uri, path).check(new=True)
    config = with_tracking(config, path.absolute().parent)
    with connected(config, federation.stored_floats):
        folder = RunFolder.create(path.absolute(), config)
        try:
            return _execute(folder, config, progress, should_stop)
        except RunGoesOn:
            raise
        except BaseException:
            folder.discard()
            raise


def resume(
    path: str | Path,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    *,
    trust: bool = False,
    anyway: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Continue an interrupted run from its last checkpoint; the result is that of an uninterrupted one.

    Args:
        path: The run's folder, or the URI of its copy on shared storage (see ``checkpoint_uri``).
        overrides: ``key=value`` for what cannot change a result, such as ``actors`` or ``stop_after``.
        output: The folder to rebuild from the copy; by default one of its name under ``runs/``.
        trust: Run the code that the folder of somebody else names; in one's own it runs anyway.
        anyway: Go on though data, partition, code or torch have changed since; rounds beyond the checkpoint
            are computed anew.
        progress: Called with each new round's line.
        should_stop: Asked after each round; True ends the run with a checkpoint.

    Raises:
        ConfigError: An override could change the result.
        CheckpointError: The last checkpoint is damaged, or of another configuration or version.
        RunFolderError: Lines of rounds.jsonl are missing, and no checkpoint is old enough.
        ChangedError: Data, partition, code or torch have changed since the checkpoint.
        StorageError: There is no such copy, or ``output`` is taken.
        ForeignCodeError: The folder is somebody else's and names code, which is not trusted.
    """
    folder = open_run(path, output, trust=trust)
    config = begun = folder.config()
    if overrides:
        changed = validate(apply_overrides(config.dump(), overrides))
        if changed.digest() != config.digest():
            old, new = config.flat(), changed.flat()
            keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            fixed = [key for key in keys if changes_results(key)]
            raise ConfigError(
                f"{', '.join(fixed)}: would change the result of a run that has begun. "
                f"resume accepts {', '.join(sorted(RESULT_FREE))}; start a new run for anything else"
            )
        config = changed
    found = standing(folder, config)
    federation = _preflight(config, begun)
    moved = check_ground(found, federation, anyway=anyway)
    if config.checkpoint_uri is not None:
        SharedStorage.of_run(config.checkpoint_uri, folder.path).check(new=False)
    with connected(config, federation.stored_floats):
        with folder.locked():  # of another process's run not even the configuration is touched
            if moved:
                forget_later_rounds(folder, found)
            folder.write_config(config)
        return _execute(folder, config, progress, should_stop)


def stored(config: Config, path: Path) -> Result | None:
    """The result of ``config`` in ``path``, also of a stop before its end; None where there is none yet.

    Raises:
        ConfigError: The folder holds a run of another configuration.
    """
    if not (path / "config.yaml").exists():
        return None
    folder = RunFolder.open(path)
    if not _same_code(folder, config) or folder.config().digest() != config.digest():
        raise ConfigError(f"{path} holds a run of another configuration; choose another --output")
    result = folder.result()
    return Result(path, result) if result is not None else None


def complete(config: Config, path: Path) -> Result | None:
    """The finished run of ``config`` in ``path``, or None where there is none yet; see :func:`stored`."""
    result = stored(config, path)
    return result if result is not None and result.summary["complete"] else None


def run_or_resume(
    config: Config,
    path: Path,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Run ``config`` in ``path``, or go on with what an interrupted run of it left there; see :func:`run`."""
    if not (path / "config.yaml").exists():
        return run(config, path, progress=progress, should_stop=should_stop)
    now = [f"{key}={json.dumps(config.dump()[key])}" for key in RESULT_FREE - {"tracking"}]
    trust = _same_code(RunFolder.open(path), config)
    return resume(path, now, trust=trust, progress=progress, should_stop=should_stop)


def tell_of_another_try(name: str, error: Exception) -> None:
    """Warn that a run of many failed and is tried again; what no message explains keeps its traceback."""
    unexplained = not isinstance(root_of(error), UserError)
    _logger.warning(
        "%s is tried once more: %s", name, reason_of(error), exc_info=error if unexplained else None
    )


def _same_code(folder: RunFolder, config: Config) -> bool:
    """Whether a folder names no other code of a user's own than the experiment that is asked for."""
    return folder.config(inert=True).references == config.references


def open_run(place: str | Path, output: str | Path | None = None, *, trust: bool = False) -> RunFolder:
    """A run's folder to go on with, rebuilt from its copy on shared storage where ``place`` is a URI.

    Raises:
        ForeignCodeError: It is somebody else's and names code, which is not trusted.
    """
    if is_uri(place):
        name = str(place).rstrip("/").rpartition("/")[2]
        copy = SharedStorage(str(place))
        if not trust:
            refuse_foreign_code(place, copy.config(), "does not tell who wrote it", "sparsyfed resume")
        return copy.fetch(Path(output or Path("runs") / name).absolute())
    if output is not None:
        raise RunFolderError(f"{place} is continued where it is; --output is for a run named by its URI")
    folder = RunFolder.open(Path(place).absolute())
    if not trust:
        tree = read_stored(folder.config_file)
        refuse_foreign_code(place, tree, whose(folder.config_file), "sparsyfed resume")
    return folder


# ------------------------------------------------------------------------------------------- both ways


def _execute(
    folder: RunFolder, config: Config, progress: Progress | None, should_stop: Callable[[], bool]
) -> Result:
    on_line = progress or (lambda line: None)
    if config.execution == "inline":
        with stop_on_signal() as stopped:
            summary = conduct(
                folder.path,
                lambda _, federation: InlineEngine(federation.setup()),
                on_line,
                lambda: stopped.is_set() or should_stop(),
            )
    else:
        from cluster.actors import remote

        summary = remote.drive(folder, config, on_line, should_stop)
    return Result(folder.path, summary)


def _preflight(config: Config, begun: Config | None = None) -> Federation:
    """Find what is wrong with packages, tracking, data, partition or model before anything starts.

    Args:
        config: The experiment.
        begun: As which it began, where it is resumed: a tracking store that is away now does not stop it.
    """
    Callbacks(config.callbacks)
    if config.execution == "ray" and not installed("ray"):
        raise ConfigError(
            "execution: ray, and Ray is not installed here; install it (pip install 'ray[default]'), or set "
            "execution=inline"
        )
    if config.tracking.enabled:
        try:
            if config.tracking.uri is not None:
                tracking.check(config.tracking.uri)
            tracking.check_also(config.tracking.also)
        except tracking.TrackingError as error:
            if begun is None or begun.tracking != config.tracking:
                raise
            _logger.warning("%s. The run goes on; `sparsyfed sync` delivers what waits", error)
    federation = Federation.of(config)
    if (missing := missing_packages(config)) is not None:
        _logger.warning(missing)
    if (weak := weak_attack(config)) is not None:
        _logger.warning(weak)
    if (lost := federation.trained.lost_to_a_cut(config, federation.layout)) is not None:
        _logger.warning(lost)
    if config.cuda_graphs and config.gpus_per_actor and not config.method.recordable:
        _logger.warning(
            "%s trains by passes of its own: they are launched op by op, cuda_graphs=true is for methods "
            "whose steps are one pass",
            config.algorithm.name,
        )
    return federation
