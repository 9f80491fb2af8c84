"""An experiment as Optuna's own loop takes it: ``study.optimize(tuning.objective(config))``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from optuna.exceptions import TrialPruned
from optuna.study import StudyDirection
from optuna.trial import Trial

from cluster.configuration.config import Config, validate
from cluster.configuration.trees import ConfigError, merge
from cluster.execution import run_or_resume
from cluster.records.outputs import default_folder, with_tracking
from cluster.references import did_you_mean
from cluster.workload.objectives import selecting
from tuning.dashboard import ARTIFACTS
from tuning.search import judge, present, suggest
from tuning.study import Contender, plan_of


def objective(
    config: Config,
    *,
    fixed: Sequence[str] = (),
    search: Mapping[str, Any] | None = None,
    shared: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
) -> Callable[[Trial], float]:
    """What Optuna's ``study.optimize`` calls with each trial: run the experiment with the trial's values.

    A trial is judged as in ``sparsyfed tune``: on data held out of the clients' training data
    (``data.validation``), after every evaluated round by ``trial.report``, and pruned after a round where
    ``trial.should_prune`` says so. Every trial is a run with a folder of its own::

        config = cluster.resolve("quickstart", ["data.validation=0.2"])
        study = optuna.create_study(direction="maximize", pruner=optuna.pruners.HyperbandPruner())
        study.optimize(tuning.objective(config, search={"beta": {"low": 1, "high": 3}}), n_trials=20)

    Args:
        config: The experiment, from ``cluster.resolve``; its values are where ranges start from.
        fixed: Fields of its method that are not tuned. All others are, over their declared ranges.
        search: Ranges by field instead of the declared ones: ``{low, high, log}`` or a list of choices.
        shared: Ranges of keys of ``local`` and ``server``, such as ``{"local.lr": [0.03, 0.1, 0.3]}``.
        output: Folder of the trials' folders; by default a new one under ``runs/``.

    Returns:
        The objective; its value is what selects, such as accuracy. It raises what ``cluster.run`` raises,
        such as ``cluster.DivergedError``, which ``catch=`` of ``study.optimize`` counts as a failed trial.
        Notes and pictures are for ``optuna-dashboard STORAGE --artifact-dir OUTPUT/artifacts``.

    Raises:
        ConfigError: The experiment cannot be tuned, or a range is wrong; names the key.
    """
    options = {field: vars(config.method)[field] for field in fixed if field in vars(config.method)}
    if unknown := sorted(set(fixed) - options.keys()):
        raise ConfigError(
            f"fixed: {config.algorithm.name} has no field {unknown[0]}"
            + did_you_mean(unknown[0], vars(config.method))
        )
    method = {"name": config.algorithm.name, **options, "search": dict(search or {})}
    section = {"methods": [method], "shared": dict(shared or {}), "trials": 1}
    plan = plan_of({**config.dump(), "study": section}, "objective")
    (contender,) = plan.contenders.values()
    return _Objective(contender, Path(output or default_folder(config)).absolute())


class _Objective:
    """One method's trials in one folder."""

    def __init__(self, contender: Contender, folder: Path) -> None:
        self._contender, self._folder = contender, folder

    def __call__(self, trial: Trial) -> float:
        contender, stop = self._contender, Event()
        selects = selecting(contender.config)
        wanted = StudyDirection.MINIMIZE if selects.better == "lower" else StudyDirection.MAXIMIZE
        if trial.study.directions != [wanted]:
            raise ConfigError(
                f"direction: the one objective is {selects.title}, of which {selects.better} is better: "
                f'optuna.create_study(direction="{wanted.name.lower()}")'
            )
        for dimension in contender.space.values():
            suggest(trial, dimension)
        path = self._folder / contender.label / f"trial-{trial.number:03d}"
        tags = {"study": trial.study.study_name, "kind": "trial", "trial": str(trial.number)}
        tracked = {"run_name": f"{contender.label}-{path.name}", "tags": tags}
        config = contender.trial_config(trial.params)
        config = with_tracking(validate(merge(config.dump(), {"tracking": tracked})), self._folder.parent)

        def on_line(line: dict[str, Any]) -> None:
            value = line.get(f"val/{selects.key}")
            if value is not None and not stop.is_set() and judge(trial, line["round"], value, config.rounds):
                stop.set()

        summary = run_or_resume(config, path, progress=on_line, should_stop=stop.is_set).summary
        value: float = summary[f"val_{selects.key}"]
        if not summary["complete"] and not stop.is_set():
            raise KeyboardInterrupt(f"stopped; {path} holds the trial's rounds")
        outcome = "finished" if summary["complete"] else "pruned"
        text = f"{outcome}: validation {selects.title} {selects.text(value)}"
        present(trial, contender.label, path, self._folder / ARTIFACTS, text)
        if not summary["complete"]:
            raise TrialPruned
        return value
