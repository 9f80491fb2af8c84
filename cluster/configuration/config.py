"""The configuration: one typed, frozen tree; YAML presets, files and dotted overrides resolve to it.

``resolve(source, overrides)`` is the one entry for the command line, Optuna and submitted jobs. No
environment variable changes a result. Every mistake is one line: the key, what was found, what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from algorithms import Aggregation, Algorithm, LocalOptimizer, ServerOptimizer, SparsitySchedule
from cluster.configuration import attacks
from cluster.configuration.aggregating import AggregationChoice, ByzantineSection
from cluster.configuration.axes import only_point
from cluster.configuration.choices import KINDS, ChoiceError, build_choice, fields, values_of
from cluster.configuration.device_sections import DevicesSection, ShiftSection
from cluster.configuration.earlier import earlier_keys
from cluster.configuration.fitting import problems_between
from cluster.configuration.foreign import references_in
from cluster.configuration.identity import digest_of
from cluster.configuration.mistakes import in_plain_words
from cluster.configuration.private import PrivacySection
from cluster.configuration.sections import (
    AdapterChoice,
    AlgorithmChoice,
    Choice,
    ClientEvaluationSection,
    DataSection,
    Gpus,
    Label,
    LocalSection,
    ModelChoice,
    ObjectiveChoice,
    PartitionSection,
    SamplerChoice,
    ScheduleChoice,
    Section,
    ServerChoice,
    SparsityScheduleChoice,
    StopSection,
    TrackingSection,
    WireSection,
)
from cluster.configuration.trees import ConfigError, apply_overrides, flatten, load_tree
from cluster.logins import problem


class _InOwnCode(Exception):
    """Carries what a user's own code raised out of the validation."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


#: Sections that keep what they are given; the others hold every key of their choice, as they did in 0.1.
_AS_GIVEN = ("algorithm", "server", "model")


class Config(Section):
    """One experiment."""

    rounds: int = Field(100, ge=1, description="planned rounds; schedules refer to it")
    stop_after: int | None = Field(None, ge=1, description="end the run after this round")
    stop: StopSection = StopSection()
    seed: int = Field(0, ge=0, description="seed of initialisation, cohorts and batch order")
    cohort: int = Field(10, ge=1, description="clients a round")
    evaluate_every: int = Field(1, ge=1, description="rounds between central evaluations")
    evaluate_on: Literal["test", "validation"] = Field(
        "test", description="test (and held-out) data, or validation alone: test data is then never read"
    )
    checkpoint_every: int = Field(10, ge=1, description="rounds between checkpoints")
    checkpoint_uri: str | None = Field(
        None, description="folder on shared storage (file://, s3://, gs:// ...) that keeps runs for resume"
    )
    max_update_norm: float | None = Field(
        None, gt=0.0, description="refuse updates farther from the global model"
    )
    execution: Literal["ray", "inline"] = Field("ray", description="on Ray actors, or in this process")
    address: str = Field("local", description="Ray cluster: local (private), auto, or host:port")
    detached: bool = Field(False, description="the driver outlives this process; see sparsyfed attach")
    actors: int | None = Field(None, ge=1, description="client actors; default one a core or GPU share")
    cpus_per_actor: float = Field(1.0, gt=0.0)
    gpus_per_actor: Gpus = Field(0.0, description="a share of one or whole GPUs; above 0 trains on CUDA")
    label: Label = Field(default_factory=dict, description="labels of the nodes that actors may run on")
    client_timeout_s: float = Field(
        300.0, gt=0.0, description="seconds beyond a client's expected ones until its actor counts as hung"
    )
    on_client_error: Literal["stop", "skip"] = Field(
        "stop", description="a client that fails ends the run, or is counted and named like a refused one"
    )
    threads: int = Field(1, ge=1, description="torch threads an actor; changes last bits")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32", description="arithmetic of training; tf32 on GPUs only"
    )
    cuda_graphs: bool = Field(True, description="replay training passes as CUDA graphs (GPUs only)")
    callbacks: tuple[str, ...] = Field(
        (), description="classes of your own, module:Class, that are told of every round"
    )
    algorithm: AlgorithmChoice = AlgorithmChoice()
    model: ModelChoice = ModelChoice()
    adapter: AdapterChoice | None = Field(
        None, description="what is trained beside a frozen base, such as lora; null: the whole model"
    )
    data: DataSection = DataSection()
    partition: PartitionSection = Field(default_factory=PartitionSection)
    objective: ObjectiveChoice = ObjectiveChoice()
    local: LocalSection = Field(default_factory=LocalSection)
    attack: attacks.AttackChoice = Field(default_factory=attacks.AttackChoice)
    evaluate_attack: attacks.EvaluationChoice = Field(default_factory=attacks.EvaluationChoice)
    evaluate_clients: ClientEvaluationSection = ClientEvaluationSection()
    server: ServerChoice = ServerChoice()
    devices: DevicesSection = DevicesSection()
    schedule: ScheduleChoice = Field(default_factory=ScheduleChoice)
    sampler: SamplerChoice = SamplerChoice()
    sparsity_schedule: SparsityScheduleChoice = SparsityScheduleChoice()
    aggregation: AggregationChoice = Field(default_factory=AggregationChoice)
    byzantine: ByzantineSection = ByzantineSection()
    privacy: PrivacySection = PrivacySection()
    shift: ShiftSection = ShiftSection()
    wire: WireSection = WireSection()
    tracking: TrackingSection = TrackingSection()
    _earlier: dict[str, Any] = PrivateAttr(default_factory=dict)  # an older version's, see read_stored
    _inert: bool = PrivateAttr(default=False)  # names code that is not to be imported

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Config:
        context = info.context or {}
        self._earlier = context.get("earlier") or {}
        self._inert = bool(context.get("inert") and self.references)
        problems = []
        for key, choice, build in self._choices():
            try:
                if not (self._inert and ":" in choice.name):
                    built = build()
                    if key not in _AS_GIVEN and is_dataclass(built):
                        choice.fill(values_of(built))
            except ChoiceError as error:
                if str(error) not in problems:  # evaluate_attack takes after attack
                    problems.append(str(error))
            except (ValueError, AssertionError) as error:
                raise _InOwnCode(error) from error  # pydantic would make it a mistake of the configuration
        problems += self.local.problems()
        if self.precision == "tf32" and not self.gpus_per_actor:
            problems.append(
                "precision: tf32 is arithmetic of GPUs; set gpus_per_actor above 0, or precision=float32"
            )
        if self.cohort > self.population:
            unseen = self.evaluate_clients.unseen
            less = f" and evaluate_clients.unseen {unseen}" if unseen else ""
            problems.append(
                f"cohort: {self.cohort} clients a round, but partition.clients is {self.partition.clients}"
                f"{less}; lower cohort or raise partition.clients"
            )
        problems += self.evaluate_clients.problems(self.population)
        for key, address in (("checkpoint_uri", self.checkpoint_uri), ("tracking.uri", self.tracking.uri)):
            problems += filter(None, [problem(key, address)])
        if self.evaluate_on == "validation" and not self.data.validation:
            problems.append("evaluate_on: validation, but no data is held out; set data.validation=0.1")
        problems = problems or problems_between(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _choices(self) -> Iterator[tuple[str, Choice, Callable[[], Any]]]:
        """Every choice that is built when the configuration is checked."""
        yield "algorithm", self.algorithm, lambda: self.method
        yield "server", self.server, self.build_server
        yield "aggregation", self.aggregation, lambda: self.rule
        yield "sampler", self.sampler, self.build_sampler
        yield "sparsity_schedule", self.sparsity_schedule, lambda: self.ramp
        yield "model", self.model, self.build_model
        if self.adapter is not None:
            yield "adapter", self.adapter, self.build_adapter
        yield "partition", self.partition, self.build_partitioner
        yield "schedule", self.schedule, self.build_schedule
        yield "objective", self.objective, self.build_objective
        yield "optimizer", self.local.optimizer, self.build_local_optimizer
        yield "attack", self.attack, self.build_attack
        yield "evaluate_attack", self.evaluate_attack, self.build_evaluation_attack
        for name, tier in self.devices.tiers.items():
            yield "availability", tier.availability, partial(self.build_availability, name)

    @property
    def references(self) -> dict[str, str]:
        """Code of a user's own that the experiment names, ``module:attribute`` by key."""
        return references_in(self.dump())

    @property
    def inert(self) -> bool:
        """Whether it names code that is not to be imported; see :func:`validate`."""
        return self._inert

    @cached_property
    def method(self) -> Algorithm:
        """The method with its hyperparameters."""
        method: Algorithm = self._build("algorithm")
        return method

    @property
    def weighting(self) -> str:
        """What an update weighs: its ``samples``, or all ``equal``."""
        equal = self.rule.keeps_updates or self.privacy.dp.asked
        return self.aggregation.weighting or ("equal" if equal else self.method.weighting)

    @cached_property
    def rule(self) -> Aggregation:
        """The rule by which updates are added up."""
        rule: Aggregation = self._build("aggregation")
        return rule

    @property
    def keeps_updates(self) -> bool:
        """Whether totals keep every update of a round."""
        colluding = self.byzantine.share > 0.0 and self.byzantine.kind == "little_is_enough"
        return self.method.keeps_updates or self.rule.keeps_updates or colluding

    def weight(self, samples: int) -> int:
        """What the update of a client with so many samples weighs."""
        return samples if self.weighting == "samples" else 1

    @property
    def population(self) -> int:
        """Number of clients that train: all but the unseen ones."""
        return self.partition.clients - self.evaluate_clients.unseen

    def build_server(self) -> ServerOptimizer:
        """The server optimizer with its hyperparameters."""
        optimizer: ServerOptimizer = self._build("server")
        return optimizer

    @cached_property
    def ramp(self) -> SparsitySchedule:
        """The sparsity schedule."""
        built: SparsitySchedule = self._build("sparsity_schedule")
        return built

    def build_sampler(self) -> Any:
        """Who is asked to train."""
        return self._build("sampler")

    def build_partitioner(self) -> Any:
        """How the training data is divided among clients, before any shift."""
        return self._build("partition")

    def build_schedule(self) -> Any:
        """When the server takes updates in."""
        return self._build("schedule")

    def build_model(self) -> Any:
        """The architecture of the network with its options."""
        return self._build("model")

    def build_adapter(self) -> Any:
        """What is trained beside a frozen base; None where the whole model is."""
        return None if self.adapter is None else self._build("adapter")

    def build_local_optimizer(self) -> LocalOptimizer:
        """The local optimizer with its hyperparameters."""
        choice = self.local.optimizer
        optimizer: LocalOptimizer = build_choice("optimizer", choice.name, choice.options, "local.optimizer")
        return optimizer

    def build_attack(self) -> Any:
        """How training batches are attacked."""
        return self._build("attack")

    def build_evaluation_attack(self) -> Any:
        """How the evaluated model is attacked."""
        return attacks.evaluation_attack(self)

    def build_availability(self, tier: str) -> Any:
        """When a tier's devices can be asked to train."""
        choice = self.devices.kinds[tier].availability
        return build_choice("availability", choice.name, choice.options, f"devices.tiers.{tier}.availability")

    @cached_property
    def shifted_partition(self) -> PartitionSection:
        """The partition after a shift: the keys of ``shift.partition``, and what else the new kind has.

        Raises:
            ChoiceError, ValidationError: One of them is wrong.
        """
        change = self.shift.partition
        name = str(change.get("name", self.partition.name))
        kept = {*KINDS["partition"].shared, *fields("partition", name)}
        before = {key: value for key, value in self.partition.model_dump().items() if key in kept}
        changed = PartitionSection.model_validate({**before, **change, "name": name})
        changed.fill(values_of(build_choice("partition", name, changed.options, "shift.partition")))
        return changed

    def build_objective(self) -> Any:
        """What is learned."""
        return self._build("objective")

    def values(self, section: Literal["algorithm", "server"]) -> dict[str, Any]:
        """Every hyperparameter by name; of code that is not to be imported those that the section gives."""
        if self.left_alone(section):
            return dict(getattr(self, section).options)
        return values_of(self.method if section == "algorithm" else self.build_server())

    def left_alone(self, section: str) -> bool:
        """Whether a section names code of a user's own that is only looked at here, and not imported."""
        choice = getattr(self, section)
        return self._inert and choice is not None and ":" in choice.name

    def _build(self, section: str) -> Any:
        if self.left_alone(section):
            raise ChoiceError(f"{section}.name: code that a run's folder names is imported by resume alone")
        choice = getattr(self, section)
        return build_choice(section, choice.name, choice.options)

    def learning_rate(self, round_number: int) -> float:
        """The rate of a round, from 1; see :meth:`LocalSection.rate`."""
        return self.local.rate(round_number, self.rounds)

    @property
    def partition_seed(self) -> int:
        """Seed of the partition and of the rows held out: the run's own where ``partition.seed`` says so."""
        return self.seed if self.partition.seed == "seed" else self.partition.seed

    def dump(self) -> dict[str, Any]:
        """Plain nested values, as written to ``config.yaml``."""
        return self.model_dump(mode="json") | ({"earlier": self._earlier} if self._earlier else {})

    def resolved(self) -> dict[str, Any]:
        """:meth:`dump` with every hyperparameter, so that whoever reads it needs no import to know them."""
        tree: dict[str, Any] = json.loads(json.dumps(self._filled()))
        return tree

    def flat(self) -> dict[str, Any]:
        """Dotted keys and values, the methods' and optimizers' defaults filled in."""
        return flatten({key: value for key, value in self._filled().items() if key != "earlier"})

    def _filled(self) -> dict[str, Any]:
        return {
            **self.dump(),
            "algorithm": {"name": self.algorithm.name, **self.values("algorithm")},
            "server": {"name": self.server.name, **self.values("server")},
        }

    def digest(self) -> str:
        """Short hash of everything that can change a result."""
        flat = self.flat()
        # Of a shift only what was typed ever stood in a configuration.
        earlier = {key: own for key, own in earlier_keys(flat).items() if not key.startswith("shift.")}
        return digest_of(earlier | self._earlier | flat)


def resolve(source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Load a preset, file or mapping, apply ``key=value`` overrides and validate.

    Args:
        source: Name of a preset, path of a YAML file, a mapping, or None for ``quickstart``. A grid has to be
            narrowed to one run by the overrides.
        overrides: Dotted overrides such as ``algorithm.beta=1.3``; values are YAML.

    Raises:
        ConfigError: Naming every wrong key with what was found, what is allowed and the nearest spelling.
    """
    tree = load_tree(source if isinstance(source, Mapping) else source or "quickstart")
    if "study" in tree:
        raise ConfigError(f"{source} is a study of several methods: sparsyfed tune {source}")
    try:
        if "grid" in tree:
            return validate(only_point(source, tree, overrides))
        return validate(apply_overrides(tree, overrides))
    except ChoiceError as error:
        raise ConfigError(str(error)) from None


def validate(tree: Mapping[str, Any], *, inert: bool = False) -> Config:
    """Build the typed tree; see :func:`resolve`.

    Args:
        tree: Nested values.
        inert: Only look at it: code of a user's own that it names is neither imported nor called, and
            nothing can be built of it.
    """
    tree = dict(tree)
    earlier = tree.pop("earlier", None)  # see cluster.configuration.trees.read_stored
    try:
        return Config.model_validate(tree, context={"inert": inert, "earlier": earlier})
    except _InOwnCode as raised:
        raise raised.error from None
    except ValidationError as error:
        raise ConfigError(in_plain_words(error, Config)) from None
