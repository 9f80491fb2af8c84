"""Where a study's trials are kept, and the samplers and pruners that read them."""

from __future__ import annotations

import bisect
import itertools
import json
import os
import tempfile
from pathlib import Path

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from cluster import seeding
from cluster.configuration.trees import ConfigError
from cluster.logins import LoginError, hidden, written_out
from cluster.records.run_folder import BusyError, RunFolderError
from cluster.records.sqlite_store import absolute_uri
from tuning.dashboard import name_metrics
from tuning.study import Plan, SamplerSection

#: Name of the default storage in a study's folder.
JOURNAL = "study.journal"

_BITS = 2**32


def open_journal(folder: Path) -> BaseStorage:
    """The journal file in a study's folder: the default, fast, and safe on a shared file system.

    Raises:
        RunFolderError: It is damaged; says where, and what can be saved.
    """
    path = folder / JOURNAL
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except OSError:
        raise
    except Exception as error:  # Optuna plays the journal again, and fails by whatever its lines lead to
        sound = _sound_lines(path)
        raise RunFolderError(
            f"{path}: line {sound + 1} is damaged or does not belong there ({type(error).__name__}). Restore "
            f"the file; or keep the lines before it (head -n {sound}), and `sparsyfed tune` with the same "
            "study goes on from there: what is complete in the folders of its trials is not computed again"
        ) from None


def _sound_lines(path: Path) -> int:
    """How many lines from the first on are entries of a journal that follow from one another."""
    lines = list(itertools.takewhile(_is_entry, path.read_bytes().splitlines(keepends=True)))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / JOURNAL

        def sound(count: int) -> bool:
            copy.write_bytes(b"".join(lines[:count]))
            try:
                JournalStorage(JournalFileBackend(str(copy)))
            except Exception:
                return False
            return True

        # The first line that cannot be played makes every longer journal unplayable.
        return bisect.bisect_left(range(1, len(lines) + 1), True, key=lambda count: not sound(count))


def open_database(url: str) -> BaseStorage:
    """The database that ``url`` names.

    Raises:
        ConfigError: Its driver is not installed, or it does not answer.
    """
    fix = "correct study.storage, or leave it out for a journal file in the study's folder"
    try:
        return RDBStorage(absolute_uri(written_out("study.storage", url, quoted=True)))
    except LoginError:
        raise
    except ImportError as error:
        cause = error.__cause__ or error.__context__ or error
        raise ConfigError(f"study.storage: the driver of {url} is not installed ({cause}); {fix}") from None
    except Exception as error:  # SQLAlchemy has no common base for a bad dialect, address or login
        reason = hidden(str(error).strip().partition("\n")[0], url)
        raise ConfigError(f"study.storage: {url} cannot be opened ({reason}); {fix}") from None


def _is_entry(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def heal_journal(folder: Path) -> None:
    """Cut off a line that a crash tore; for the one coordinator, before anything is appended behind it."""
    path = folder / JOURNAL
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def make_sampler(section: SamplerSection, seed: int, trial: int) -> BaseSampler:
    """The sampler of one trial.

    It is seeded by (study seed, trial): a study that is resumed would else repeat its start. The
    quasi-random sequence alone keeps one seed, under which the storage knows its position.
    """
    if section.name == "qmc":
        return QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False)
    own = seeding.integer(seed, "sampler", trial) % _BITS
    if section.name == "random":
        return RandomSampler(seed=own)
    return TPESampler(n_startup_trials=section.startup_trials, seed=own)


def make_pruner(plan: Plan) -> BasePruner:
    """The pruner of a study; its resource is the round."""
    section = plan.section.pruner
    if section.name == "successive_halving":
        return SuccessiveHalvingPruner(
            min_resource=section.min_rounds, reduction_factor=section.reduction_factor
        )
    if section.name == "hyperband":
        return HyperbandPruner(
            min_resource=section.min_rounds,
            max_resource=plan.base.rounds,
            reduction_factor=section.reduction_factor,
        )
    return NopPruner()


def study_name(plan: Plan, label: str) -> str:
    """Name of one method's Optuna study."""
    return f"{plan.name}/{label}"


def open_study(plan: Plan, label: str, storage: BaseStorage, owner: str) -> optuna.Study:
    """One method's study, new or as it was left.

    Args:
        plan: The study.
        label: The method.
        storage: Where it is kept.
        owner: Mark of the study's folder: a database may hold studies of one name from elsewhere.

    Raises:
        BusyError: The storage holds a study of this name that belongs to another folder.
    """
    lower = plan.selects.better == "lower"
    directions = [StudyDirection.MINIMIZE if lower else StudyDirection.MAXIMIZE]
    directions += [StudyDirection.MINIMIZE] * plan.section.two_objectives
    name = study_name(plan, label)
    study = optuna.create_study(
        storage=storage, study_name=name, directions=directions, load_if_exists=True, pruner=make_pruner(plan)
    )
    found = study.user_attrs.get("owner")
    if found is None:
        study.set_user_attr("owner", owner)
        study.set_user_attr("method", label)
    elif found != owner:
        raise BusyError(
            f"study.name: the storage holds a study {name!r} of another folder; set study.name to another one"
        )
    name_metrics(study, [f"val_{plan.selects.key}", *["uplink_bytes"] * plan.section.two_objectives])
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(plan.contenders[label].default)
    return study
