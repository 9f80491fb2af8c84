"""The sections of the configuration: every key with its type, range, default and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Section(BaseModel):
    """Keys and values: frozen, and no other keys than the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Choice(Section):
    """A section discriminated by ``name``, whose other keys are declared by what the name stands for."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """Every key but ``name``."""
        return dict(self.__pydantic_extra__ or {})


class DataSection(Section):
    """Where the images come from."""

    name: str = Field(
        "digits", description="digits, a Hugging Face repository, or module:attribute of your own"
    )
    path: str | None = Field(None, description="local folder of parquet files instead of the hub")
    image_column: str | None = Field(None, description="column of the images; inferred when unset")
    label_column: str | None = Field(None, description="column of the labels; inferred when unset")
    group_column: str | None = Field(None, description="column that the natural partition groups by")
    revision: str | None = Field(None, description="revision of the hub repository")
    train_split: str = Field("train", description="name of the training split")
    test_split: str = Field("test", description="name of the test split")
    validation: float = Field(0.0, ge=0.0, lt=1.0, description="share of train held out before partitioning")
    cache: str | None = Field(None, description="folder of decoded data; default ~/.cache/sparsyfed")

    @field_validator("path", "cache")
    @classmethod
    def _from_anywhere(cls, value: str | None) -> str | None:
        # Actors and a later resume run in other working directories.
        return None if value is None else str(Path(value).expanduser().absolute())


class PartitionSection(Section):
    """How the training data is divided among clients."""

    name: Literal["lda", "iid", "dirichlet", "shards", "natural"] = "lda"
    clients: int = Field(100, ge=1, description="number of clients")
    alpha: float = Field(1.0, gt=0.0, description="concentration of lda and dirichlet")
    shards_per_client: int = Field(2, ge=1, description="shards of sorted labels a client gets (shards)")
    seed: int = Field(1337, ge=0, description="seed of the partition, shared by all methods and seeds")


class LocalSection(Section):
    """Local training: plain SGD, fresh each round."""

    epochs: int = Field(1, ge=1, description="local epochs a round")
    batch_size: int = Field(16, ge=1)
    lr: float = Field(0.1, gt=0.0, description="learning rate of round 1")
    lr_final: float | None = Field(None, gt=0.0, description="learning rate of the last round; exponential")
    lr_horizon: int | None = Field(None, ge=1, description="rounds until lr_final; default rounds")
    weight_decay: float = Field(0.0, ge=0.0)
    proximal: float = Field(0.0, ge=0.0, description="mu of FedProx: mu/2 |w - w_t|^2 in the local loss")


class TierSection(Section):
    """One kind of device."""

    share: float = Field(ge=0.0, le=1.0, description="share of the clients")
    sparsity: float = Field(ge=0.0, le=0.9999, description="target sparsity of the tier's clients")


class DevicesSection(Section):
    """The devices that clients are; without tiers they are all alike."""

    tiers: dict[str, TierSection] = Field(default_factory=dict, description="kinds of devices by name")


class WireSection(Section):
    """Formats of the values on the wire; supports are always exact."""

    uplink: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    downlink: Literal["float32", "float16", "bfloat16", "int8"] = "float32"


class TrackingSection(Section):
    """MLflow: where runs are kept for comparison."""

    enabled: bool = True
    uri: str | None = Field(None, description="tracking server or store; default sqlite in the output root")
    experiment: str | None = Field(None, description="default: data and partition, e.g. digits-lda0.5")
    run_name: str | None = Field(None, description="default: <method>-s<seed>")
    tags: dict[str, str] = Field(default_factory=dict)


class ModelChoice(Choice):
    """The model; other keys are the builder's options."""

    name: str = "small_cnn"


class AlgorithmChoice(Choice):
    """The method; other keys are its hyperparameters."""

    name: str = "sparsyfed"


class ServerChoice(Choice):
    """The server optimizer; other keys are its hyperparameters."""

    name: str = "fedavg"
