"""The study file: an experiment with a ``study`` section, resolved to what every method is tuned on.

    extends: quickstart
    data: {validation: 0.2}
    study:
      methods: [topk, sparsyfed, {name: flash, stage1: sensitivity, label: flash-own}]
      trials: 20
      shared:
        local.lr: {low: 0.01, high: 1.0, log: true}

What a method's entry sets is fixed; its other fields are tuned over their declared ranges, or over those of
the entry's ``search``. Every mistake is one line, before anything starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.configuration.config import Config, validate
from cluster.configuration.foreign import sign
from cluster.configuration.identity import changes_results
from cluster.configuration.mistakes import in_plain_words
from cluster.configuration.sections import Choice, Section
from cluster.configuration.trees import (
    ConfigError,
    apply_overrides,
    flatten,
    load_tree,
    merge,
    stored_text,
)
from cluster.logins import place, problem
from cluster.measures import Measure
from cluster.records.checkpoint import write_atomically
from cluster.workload.objectives import selecting
from tuning.budget import rounds_within
from tuning.spaces import Space, own_space, shared_space, with_values

#: What of a study may differ when it is continued.
_CHANGEABLE = ("study.trials", "study.trials_at_once", "study.final_seeds", "study.reference")


class MethodEntry(Choice):
    """A method of the study; keys other than these are hyperparameters that stay fixed."""

    label: str | None = Field(None, description="name in tables and folders; default the method's")
    search: dict[str, Any] = Field(default_factory=dict, description="ranges instead of the declared ones")

    @property
    def shown(self) -> str:
        """The label."""
        return self.label or self.name.rpartition(":")[2]


class SamplerSection(Section):
    """Which configurations are tried."""

    name: Literal["tpe", "random", "qmc"] = Field("tpe", description="TPE, uniform or quasi-Monte Carlo")
    startup_trials: int = Field(10, ge=1, description="random trials before TPE models the rest")


class PrunerSection(Section):
    """Which trials are ended early."""

    name: Literal["none", "successive_halving", "hyperband"] = "none"
    min_rounds: int = Field(1, ge=1, description="rounds that every trial gets")
    reduction_factor: int = Field(3, ge=2, description="one trial in so many goes on at each rung")


class StudySection(Section):
    """The study's own keys."""

    name: str | None = Field(None, description="default: the study file's name")
    methods: list[MethodEntry] = Field(min_length=1, description="names, or name with fixed fields")
    trials: int = Field(20, ge=1, description="configurations a method is given, trial 0 its default")
    shared: dict[str, Any] = Field(default_factory=dict, description="ranges tuned for every method alike")
    final_seeds: int | list[int] = Field(5, description="fresh seeds of each method's best configuration")
    objectives: list[str] | None = Field(
        None, description="default what selects, such as [accuracy]; or that and uplink_bytes"
    )
    sampler: SamplerSection = SamplerSection()
    pruner: PrunerSection = PrunerSection()
    seed: int = Field(0, ge=0, description="seed of the sampler")
    reference: str | None = Field(None, description="method the others are compared with; default sparsyfed")
    storage: str | None = Field(None, description="database URL; default a journal file in the folder")
    trials_at_once: int | None = Field(None, ge=1, description="default: what the cluster has room for")

    @field_validator("methods", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [value]
        return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]

    @model_validator(mode="after")
    def _check(self) -> StudySection:
        problems = []
        labels = [entry.shown for entry in self.methods]
        for label in sorted(label for label in set(labels) if labels.count(label) > 1):
            problems.append(f"study.methods: two entries are called {label}; give one a label of its own")
        for label in labels:
            if not re.fullmatch(r"[\w.\-]{1,100}", label):
                problems.append(
                    f"study.methods: label {label!r}: use letters, digits, '.', '-' and '_', at most 100"
                )
        if self.reference is not None and self.reference not in labels:
            problems.append(f"study.reference: {self.reference!r} is none of {', '.join(labels)}")
        seeds = self.final_seeds
        if not seeds or (isinstance(seeds, int) and seeds < 1):
            problems.append(f"study.final_seeds: at least one seed, found {seeds!r}")
        if isinstance(seeds, list) and (len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds)):
            problems.append(f"study.final_seeds: different seeds from 0 up, found {seeds!r}")
        if self.two_objectives and self.pruner.name != "none":
            problems.append(
                f"study.pruner: {self.pruner.name} cannot prune a study of two objectives; set "
                "study.pruner.name=none or leave study.objectives out"
            )
        problems += filter(None, [problem("study.storage", self.storage)])
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def two_objectives(self) -> bool:
        """Whether few uplink bytes are searched for too."""
        return len(self.objectives or ()) > 1


@dataclass(frozen=True)
class Contender:
    """One method of a study.

    Attributes:
        label: Its name in tables and folders.
        config: Its experiment with the configuration of trial 0, the published default.
        space: What is tuned of it, by key.
    """

    label: str
    config: Config
    space: Space

    @property
    def default(self) -> dict[str, Any]:
        """Trial 0's values."""
        return {key: dimension.default for key, dimension in self.space.items()}

    def trial_config(self, values: dict[str, Any]) -> Config:
        """The experiment of a trial: these values, judged on validation data; test data is never read.

        What its method trains beside the rounds is taken off them; see :mod:`tuning.budget`.
        """
        return self._within_budget({**values, "evaluate_on": "validation"})

    def final_config(self, values: dict[str, Any], seed: int) -> Config:
        """The experiment that is reported: these values on a fresh seed, judged on test data."""
        return self._within_budget({**values, "seed": seed})

    def _within_budget(self, values: dict[str, Any]) -> Config:
        config = with_values(self.config, values)
        rounds = rounds_within(config)
        return config if rounds == config.rounds else with_values(config, {"rounds": rounds})


@dataclass(frozen=True)
class Plan:
    """A study, resolved.

    Attributes:
        name: Its name in the storage and in MLflow.
        base: The experiment that all methods share.
        section: The study's own keys.
        contenders: The methods by label.
    """

    name: str
    base: Config
    section: StudySection
    contenders: dict[str, Contender]

    @cached_property
    def final_seeds(self) -> list[int]:
        """Seeds of the final runs, shared by all methods; none of them is the search's."""
        seeds = self.section.final_seeds
        return seeds if isinstance(seeds, list) else [self.base.seed + 1 + turn for turn in range(seeds)]

    @property
    def reference(self) -> str:
        """The method that the others are compared with."""
        labels = list(self.contenders)
        return self.section.reference or ("sparsyfed" if "sparsyfed" in labels else labels[0])

    @property
    def selects(self) -> Measure:
        """What configurations are selected by."""
        return selecting(self.base)

    @property
    def pruned(self) -> bool:
        """Whether trials may be ended early, so that budgets are counted in client-rounds."""
        return self.section.pruner.name != "none"

    @property
    def whole_trial(self) -> int:
        """Client-rounds that a trial may take."""
        return self.base.rounds * self.base.cohort

    @property
    def budget(self) -> int:
        """Client-rounds that each method is given for its search."""
        return self.section.trials * self.whole_trial

    def on(self, **changes: Any) -> Plan:
        """The same study computed or tracked elsewhere: changed keys that cannot change a result."""

        def changed(config: Config) -> Config:
            return validate(merge(config.dump(), changes))

        contenders = {
            label: replace(own, config=changed(own.config)) for label, own in self.contenders.items()
        }
        return replace(self, base=changed(self.base), contenders=contenders)

    def dump(self) -> dict[str, Any]:
        """Plain nested values, as written to ``study.yaml``."""
        return {**self.base.dump(), "study": self.section.model_dump(mode="json")}

    def write(self, path: Path) -> None:
        """Keep the resolved study."""
        write_atomically(path, stored_text(self.dump()), mode=0o644)
        sign(path)

    def check_continues(self, before: Mapping[str, Any], path: Path) -> None:
        """Refuse to continue another study in its folder.

        Args:
            before: Nested values of the study there, see :func:`inert_dump`.
            path: The folder.

        Raises:
            ConfigError: Names the keys that differ and could change a result.
        """
        old, new = flatten(before), flatten(self.dump())
        for tree in (old, new):
            tree["study.storage"] = place(tree["study.storage"])
        keys = [
            key
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key not in _CHANGEABLE and changes_results(key)
        ]
        if keys:
            shown = "; ".join(f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys)
            raise ConfigError(
                f"{path} holds another study ({shown}); choose another --output. A study goes on with other "
                f"{', '.join(_CHANGEABLE)}, or where and how it is computed"
            )


def load_plan(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Plan:
    """Read a study's file, preset or nested values, apply ``key=value`` overrides and check all of it.

    Raises:
        ConfigError: Naming every wrong key with what was found and what is allowed.
    """
    tree = apply_overrides(load_tree(source), overrides)
    if not isinstance(tree.get("study"), dict):
        if isinstance(source, Mapping):
            raise ConfigError(
                f"study: missing; the values have {', '.join(map(str, tree)) or 'no key at all'}"
            )
        kind = "grid: sparsyfed run" if "grid" in tree else "single experiment: sparsyfed run"
        raise ConfigError(f"{source} has no section `study`, it is a {kind} {source}")
    return plan_of(tree, "study" if isinstance(source, Mapping) else Path(source).stem)


def inert_dump(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What :meth:`Plan.dump` makes of a stored study, without the code that it names."""
    section, base = _sections(tree, name)
    return {**validate(base, inert=True).dump(), "study": section.model_dump(mode="json")}


def _sections(tree: Mapping[str, Any], name: str) -> tuple[StudySection, dict[str, Any]]:
    """The ``study`` section, and the experiment around it."""
    base = dict(tree)
    try:
        section = StudySection.model_validate(base.pop("study", None))
    except ValidationError as error:
        raise ConfigError(in_plain_words(error, StudySection, "study.")) from None
    return section.model_copy(update={"name": section.name or name}), base


def plan_of(tree: Mapping[str, Any], name: str) -> Plan:
    """The plan of nested values with a ``study`` section; ``name`` is used where that has none."""
    section, tree = _sections(tree, name)
    base = validate(tree)
    _check_base(base, section)
    contenders = {}
    for entry in section.methods:
        where = f"study.methods: {entry.shown}"
        try:
            config = validate(merge(tree, {"algorithm": {"name": entry.name, **entry.options}}))
            rounds_within(config)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        method = type(config.method)
        fixed = [field for field in entry.options if field not in entry.search]
        space = own_space(where, method, config, fixed, entry.search) | shared_space(section.shared, config)
        contenders[entry.shown] = Contender(entry.shown, config, space)
    section = section.model_copy(update={"objectives": section.objectives or [selecting(base).key]})
    plan = Plan(section.name or name, base, section, contenders)
    if base.seed in plan.final_seeds:
        raise ConfigError(
            f"study.final_seeds: {plan.final_seeds} holds {base.seed}, the seed of the search; use fresh ones"
        )
    return plan


def _check_base(base: Config, section: StudySection) -> None:
    problems, key, asked = [], selecting(base).key, section.objectives
    if asked not in (None, [key], [key, "uplink_bytes"]):
        found = ", ".join(asked or ())
        problems.append(f"study.objectives: [{key}] or [{key}, uplink_bytes], found [{found}]")
    if not base.data.validation:
        problems.append(
            "data.validation: a study selects on data held out of the clients' training data, never on test "
            "data; set data.validation=0.1 or more"
        )
    if base.stop_after is not None:
        problems.append("stop_after: every trial of a study runs its planned rounds; set rounds instead")
    if base.stop.asked:
        problems.append("stop: every trial of a study runs its planned rounds; leave it out")
    if base.execution == "inline" and (section.trials_at_once or 1) > 1:
        problems.append(
            f"study.trials_at_once: execution=inline computes one trial at a time, found "
            f"{section.trials_at_once}; use execution=ray"
        )
    if section.pruner.min_rounds > base.rounds:
        problems.append(f"study.pruner.min_rounds: {section.pruner.min_rounds} is above rounds {base.rounds}")
    if problems:
        raise ConfigError("\n".join(problems))
