"""The sections of the configuration: every key with its type, range, default and meaning."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.configuration.choices import KINDS
from cluster.configuration.plain_yaml import as_text, as_value
from cluster.references import UserError, did_you_mean, in_home, is_file, is_folder


class Section(BaseModel):
    """Keys and values: frozen, and no other keys than the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, value: Any) -> Any:
        """Text as it was written where a field is text, else the numbers and bools that YAML means."""
        if not isinstance(value, Mapping):
            return value
        return {key: _readings(cls).get(key, as_value)(own) for key, own in value.items()}


@cache
def _readings(section: type[BaseModel]) -> dict[str, Any]:
    """How the values of each field are read; sections within read their own."""
    readings: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        leaves = set(_leaves(field.annotation))
        if leaves == {str}:
            readings[key] = as_text
        elif any(issubclass(leaf, BaseModel) for leaf in leaves):
            readings[key] = lambda value: value
    return readings


def _leaves(annotation: Any) -> Iterator[type]:
    """The types of the values that an annotation allows, of a mapping's values."""
    origin = get_origin(annotation)
    if origin is Literal:
        yield from {type(choice) for choice in get_args(annotation)}
    elif origin is Annotated or origin is dict:
        yield from _leaves(get_args(annotation)[0 if origin is Annotated else 1])
    elif origin is not None:
        for part in get_args(annotation):
            yield from _leaves(part)
    elif isinstance(annotation, type) and annotation is not NoneType:
        yield annotation


class PathError(UserError):
    """Nothing can lie at a path that is called so."""


def from_anywhere(value: str | None) -> str | None:
    """An absolute path: actors and a later resume run in other working directories."""
    return None if value is None else str(in_home(value, PathError).absolute())


def _share_or_whole(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("allowed is a share of one GPU (at most 1) or a whole number of them")
    return gpus


#: What a text's tokens can be without a tokenizer of one's own.
TOKENIZERS = ("bytes", "characters")

#: GPUs of one actor.
Gpus = Annotated[float, Field(ge=0.0), AfterValidator(_share_or_whole)]

#: Labels of a node: names and exact values.
Label = dict[str, Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]]


class Choice(Section):
    """A section discriminated by ``name``, whose other keys are declared by what the name stands for."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """Every key that what the name stands for declares."""
        return dict(self.__pydantic_extra__ or {})

    def fill(self, values: Mapping[str, Any]) -> None:
        """Take in every declared key, as it was checked."""
        assert self.__pydantic_extra__ is not None
        self.__pydantic_extra__.update(values)


class DataSection(Section):
    """Where the images, spoken clips, tables or texts come from."""

    name: str = Field(
        "digits",
        description="digits, diabetes, breast_cancer, tiny_text, fedht_simulation, a Hugging Face "
        "repository, or module:attribute of your own",
    )
    path: str | None = Field(None, description="local folder of parquet files instead of the hub")
    image_column: str | None = Field(None, description="column of the images or clips; inferred when unset")
    label_column: str | None = Field(None, description="column of the targets; inferred when unset")
    columns: tuple[str, ...] | None = Field(
        None, description="columns of numbers and categories; default all others where there are no images"
    )
    text_column: str | None = Field(None, description="column of the texts; inferred when unset")
    tokenizer: str | None = Field(
        None,
        description="what a text's tokens are: bytes (default), characters, a tokenizer.json or hub name",
    )
    length: int | None = Field(None, ge=1, description="tokens of a sample of text; default 64")
    group_column: str | None = Field(None, description="column that the natural partition groups by")
    image_size: int | None = Field(
        None, ge=1, description="pixels a side: images are resized by their shorter side, the centre is kept"
    )
    revision: str | None = Field(None, description="revision of the hub repository")
    data_dir: str | None = Field(None, description="folder of the hub repository that holds the files")
    train_split: str = Field("train", description="name of the training split; of the hub also train[:90%]")
    test_split: str = Field("test", description="name of the test split")
    features: Literal["logmel", "waveform8k"] | None = Field(
        None, description="what spoken clips become; default logmel"
    )
    exclude_classes: tuple[str, ...] = Field((), description="classes left out, such as _silence_")
    validation: float = Field(0.0, ge=0.0, lt=1.0, description="share of train held out before partitioning")
    cache: str | None = Field(None, description="folder of decoded data; default ~/.cache/sparsyfed")

    _absolute = field_validator("path", "cache")(from_anywhere)

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_from_anywhere(cls, value: str | None) -> str | None:
        if value is None or value in TOKENIZERS:
            return value
        if value.startswith(("/", ".", "~")) or is_file(value) or is_folder(value):
            return from_anywhere(value)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            raise ValueError(
                f"allowed are {', '.join(TOKENIZERS)}, a tokenizer.json or a folder with one, or a hub "
                f"repository 'owner/name'{did_you_mean(value, TOKENIZERS)}"
            )
        return value


class PartitionSection(Choice):
    """How the training data is divided among clients."""

    name: str = KINDS["partition"].default
    clients: int = Field(100, ge=1, description="number of clients")
    seed: Annotated[int, Field(ge=0)] | Literal["seed"] = Field(
        1337,
        description="seed of the partition, shared by all runs; `seed`: the run's own draws it too",
    )

    @property
    def skew(self) -> float | None:
        """``alpha`` where this kind of partition is drawn with one."""
        alpha: float | None = self.options.get("alpha")
        return alpha


class OptimizerChoice(Choice):
    """The local optimizer; other keys are its hyperparameters."""

    name: str = "sgd"


class AugmentSection(Section):
    """How images are changed at random in training, anew in every step."""

    crop: int = Field(
        0, ge=0, description="pixels of black around an image, out of which its own size is cut at random"
    )
    flip: bool = Field(False, description="mirror half of the images, left to right")


class LocalSection(Section):
    """Local training: SGD or AdamW, fresh each visit."""

    epochs: int = Field(1, ge=1, description="local epochs a round")
    batch_size: int = Field(16, ge=1)
    lr: float = Field(0.1, gt=0.0, description="learning rate of round 1")
    lr_final: float | None = Field(
        None, gt=0.0, description="learning rate at the schedule's end; exponential: falling on beyond it"
    )
    lr_horizon: int | None = Field(None, ge=1, description="round of lr_final; default rounds")
    lr_schedule: Literal["exponential", "constant", "cosine", "cosine_visit"] = Field(
        "exponential", description="from lr to lr_final over rounds, or (cosine_visit) inside every visit"
    )
    optimizer: OptimizerChoice = Field(default_factory=OptimizerChoice)
    clip_norm: float | None = Field(
        None, gt=0.0, description="largest norm of a step's gradient, decay and proximal term included"
    )
    weight_decay: float = Field(0.0, ge=0.0, description="L2 in the gradient; with adamw decoupled")
    proximal: float = Field(0.0, ge=0.0, description="mu of FedProx: mu/2 |w - w_t|^2 in the local loss")
    augment: AugmentSection = AugmentSection()

    def rate(self, round_number: int, rounds: int) -> float:
        """The rate of a round, from 1: lr0 where lr_final is unset or is reached inside every visit.

        Exponential: lr0 (lrT / lr0)^(t / T), falling on beyond T. Cosine, which stays at lrT:
        lrT + (lr0 - lrT) (1 + cos(pi t / T)) / 2.

        Args:
            round_number: The round t.
            rounds: T where lr_horizon is unset.
        """
        if self.lr_final is None or self.lr_schedule == "cosine_visit":
            return self.lr
        share = round_number / (self.lr_horizon or rounds)
        if self.lr_schedule == "cosine":
            share = min(1.0, share)
            return self.lr_final + (self.lr - self.lr_final) * (1.0 + math.cos(math.pi * share)) / 2.0
        return float(self.lr * (self.lr_final / self.lr) ** share)

    def problems(self) -> list[str]:
        """What is wrong with the schedule of the learning rate."""
        if self.lr_schedule.startswith("cosine") and self.lr_final is None:
            return [f"local.lr_final: none, and {self.lr_schedule} falls to it; set it"]
        if self.lr_schedule == "constant" and self.lr_final is not None:
            return [f"local.lr_final: {self.lr_final:g} with lr_schedule=constant; leave one of them out"]
        if self.lr_schedule == "cosine_visit" and self.lr_horizon is not None:
            return ["local.lr_horizon: counts rounds, and cosine_visit ends with every visit; leave it out"]
        return []


class ClientEvaluationSection(Section):
    """Per-client evaluation: on its own mix of classes or rows of its own, and of new clients."""

    every: int = Field(0, ge=0, description="rounds between them, the last round included; 0: never")
    clients: int | None = Field(None, ge=1, description="how many clients are judged; default all")
    after: int = Field(0, ge=0, description="how many of them after local training too; a test pass each")
    rows: Literal["classes", "own"] = Field(
        "classes",
        description="what clients are judged by: test data of their classes, or (own) data.validation, then "
        "held out of each client's rows",
    )
    groups: bool = Field(
        False, description="whether the worst group of data.group_column is looked for, on data.validation"
    )
    unseen: int = Field(0, ge=0, description="how many clients, the last ones, never train: new ones")
    shots: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5), description="samples of a class that a new client adapts to"
    )
    adapt_steps: int = Field(5, ge=1, description="local steps of a new client on them")

    def problems(self, clients: int) -> list[str]:
        """What is wrong with the section in a federation where so many clients train."""
        if clients < 1:
            return [f"evaluate_clients.unseen: {self.unseen}, so no client of partition.clients trains"]
        if self.unseen and not self.shots:
            return ["evaluate_clients.shots: [], and new clients adapt to some; set it to [1, 5]"]
        judged = self.clients or clients
        if judged > clients:
            return [f"evaluate_clients.clients: {judged}, but {clients} clients train"]
        if self.after > judged:
            return [f"evaluate_clients.after: {self.after}, but only {judged} clients are judged"]
        if not self.every and (self.clients or self.after or self.unseen or self.groups):
            return ["evaluate_clients.every: 0, so no client is judged; set it to a number of rounds"]
        return []


class StopSection(Section):
    """What ends a run before its planned rounds: a target or budget that is reached, or a plateau."""

    metric: str | None = Field(None, description="measure of a round that is watched; default what selects")
    target: float | None = Field(
        None, description="end once it is as good as this, in its stored unit; of a total: once it is spent"
    )
    patience: int | None = Field(None, ge=1, description="end after so many measurements without a new best")
    after: int = Field(0, ge=0, description="never end before this round")

    @property
    def asked(self) -> bool:
        """Whether anything ends a run."""
        return self.target is not None or self.patience is not None


class WireSection(Section):
    """Formats of the values on the wire; supports are always exact."""

    uplink: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    downlink: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    grid: Literal["exact", 64, 48, 32] = Field(
        "exact",
        description="what updates are added up on: exact, or words of so many bits, which then travel",
    )

    @property
    def bits(self) -> int | None:
        """Bits of a value of an update on a grid of words; None where floats travel."""
        return None if self.grid == "exact" else self.grid


# Classes have a method of that name, which no section has.
warnings.filterwarnings("ignore", 'Field name "register" in "TrackingSection"')


class TrackingSection(Section):
    """MLflow: where runs are kept for comparison."""

    enabled: bool = True
    uri: str | None = Field(None, description="tracking server or store; default sqlite in the output root")
    experiment: str | None = Field(None, description="default: data and partition, e.g. digits-lda0.5")
    run_name: str | None = Field(None, description="default: <method>-<sparsity>-s<seed>")
    also: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="sinks beside MLflow, each an extra: an event file, Weights & Biases"
    )
    models: bool = Field(True, description="log the final and the best model (seconds at the run's end)")
    register: str | None = Field(
        None, pattern=r"""^[^/:'"]+$""", description="name in MLflow's registry for the run's best model"
    )
    tags: dict[str, str] = Field(default_factory=dict)


class ScheduleChoice(Choice):
    """When the server takes updates in; other keys are the schedule's own."""

    name: str = KINDS["schedule"].default


class ModelChoice(Choice):
    """The model; other keys are the builder's options."""

    name: str = KINDS["model"].default
    weights: str | None = Field(
        None, description="safetensors file to begin with instead of the common initialisation"
    )

    _absolute = field_validator("weights")(from_anywhere)

    @model_validator(mode="before")
    @classmethod
    def _with_paths_from_anywhere(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("name") not in ("timm", "transformers"):
            return value
        paths = {key: value[key] for key in ("folder", "config") if isinstance(value.get(key), str)}
        return {**value, **{key: from_anywhere(as_text(path)) for key, path in paths.items()}}


class AdapterChoice(Choice):
    """What is trained beside a frozen base; other keys are its options."""

    name: str = KINDS["adapter"].default


class ObjectiveChoice(Choice):
    """What is learned; other keys are options of an objective of your own."""

    name: str = KINDS["objective"].default


class AlgorithmChoice(Choice):
    """The method; other keys are its hyperparameters."""

    name: str = KINDS["algorithm"].default


class ServerChoice(Choice):
    """The server optimizer; other keys are its hyperparameters."""

    name: str = KINDS["server"].default


class SparsityScheduleChoice(Choice):
    """What clients cut to in each round; other keys are the schedule's own."""

    name: str = KINDS["sparsity_schedule"].default


class SamplerChoice(Choice):
    """Who is asked to train; other keys are its options."""

    name: str = KINDS["sampler"].default
