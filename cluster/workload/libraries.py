"""Models of timm and transformers, of a configuration or a local folder; nothing is ever downloaded.

The extras ``timm`` and ``transformers`` bring the libraries, which are imported when a model of theirs is
built. A model's layers keep the library's names and initialisation; attention is computed by plain products,
whose gradients are added up in one order everywhere.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.core.hyperparameters import hyperparameter
from cluster.configuration.trees import ConfigError, read_yaml
from cluster.references import did_you_mean
from cluster.workload.architecture import Architecture
from cluster.workload.models import ModelError
from cluster.workload.weights import load_weights, refuse

_WEIGHTS = "model.safetensors"
#: What a stored configuration of transformers says beside the fields of its class.
_BESIDE = ("architectures", "model_type", "transformers_version", "_name_or_path", "torch_dtype", "dtype")


@dataclass(frozen=True, kw_only=True)
class _OfLibrary(Architecture):
    """What both have: a configuration, perhaps with weights beside it."""

    config: Mapping[str, Any] | str | None = hyperparameter(
        None, "the library's own options of the model, on top of the folder's; or a YAML or JSON file of them"
    )
    folder: str | None = hyperparameter(
        None, f"local folder with config.json and {_WEIGHTS}, as the library saves a model, to begin with"
    )
    fresh: tuple[str, ...] = hyperparameter(
        (), "name patterns of tensors that are drawn and not taken from the folder, such as [head.*]"
    )

    def _options(self) -> dict[str, Any]:
        """The options of the folder, of a file, and those given on top."""
        options: dict[str, Any] = {}
        if self.folder is not None:
            if not list(Path(self.folder).glob("*.safetensors")):
                raise ModelError(
                    f"model.folder = {self.folder} holds no {_WEIGHTS}; a model without weights needs no "
                    "folder: give model.config"
                )
            options = _stored(Path(self.folder) / "config.json", "model.folder")
        elif self.fresh:
            raise ModelError("model.fresh: names tensors of model.folder, and there is none; leave it out")
        if isinstance(self.config, str):
            return options | _stored(Path(self.config), "model.config")
        return options | dict(self.config or {})

    def _named(self, found: Any) -> str:
        """The architecture, which the stored options may name."""
        name = getattr(self, "architecture") or found  # noqa: B009
        if not isinstance(name, str):
            raise ModelError("model.architecture: none; name one, or a model.folder whose config.json does")
        return name


@dataclass(frozen=True, kw_only=True)
class Timm(_OfLibrary):
    """A model of images of timm, by its name (extra `timm`)."""

    architecture: str | None = hyperparameter(
        None, "name in timm, such as tiny_vit_5m_224; default the folder's"
    )

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """See :class:`Architecture`."""
        options = self._options()
        name = self._named(options.pop("architecture", None))
        if "model_args" in options or "pretrained_cfg" in options:  # as timm saves a model
            for beside in ("num_classes", "num_features", "global_pool", "pretrained_cfg"):
                options.pop(beside, None)
            options |= options.pop("model_args", {})
        _refuse_files("model.config", options)
        timm = _library("timm")
        if len(input_shape) != 3:
            raise ModelError(f"model.name = 'timm' takes images, samples have shape {list(input_shape)}")
        if not timm.is_model(name):
            raise ModelError(
                f"model.architecture = {name!r} is no model of timm {timm.__version__}"
                f"{did_you_mean(name, timm.list_models())}"
            )
        with _plain_attention(), _as_a_model_error(name, options):
            model: nn.Module = timm.create_model(
                name, num_classes=classes, in_chans=input_shape[0], **options
            )
        if self.folder is not None:
            load_weights(model, str(Path(self.folder) / _WEIGHTS), key="model.folder", fresh=self.fresh)
        return model


@dataclass(frozen=True, kw_only=True)
class Transformers(_OfLibrary):
    """A model of transformers with logits, by its class or type (extra `transformers`).

    Of a type, images get its classifier and texts its causal language model. Vocabulary, number of labels,
    size and channels of images, and padding (the token that fills texts up) are the data's where `config`
    does not say them; a folder keeps its vocabulary, and where that lacks the boundary of the data's texts,
    its own token for that stands in. `Conv1D`, as GPT-2 calls its linear layers, becomes a linear layer with
    the weight transposed.
    """

    architecture: str | None = hyperparameter(
        None, "class such as GPT2LMHeadModel, or type such as vit; default the folder's class"
    )

    def build(self, input_shape: tuple[int, ...], classes: int, vocabulary: int = 0) -> nn.Module:
        """See :class:`Architecture`."""
        options = self._options()
        _refuse_files("model.config", options)
        library = _library("transformers")
        stored = {key: options.pop(key) for key in _BESIDE if key in options}
        name = self._named((stored.get("architectures") or [stored.get("model_type")])[0])
        kind = _class_of(library, name, len(input_shape) == 3)
        foretells = kind in library.MODEL_FOR_CAUSAL_LM_MAPPING.values()
        of_data = _of_data(input_shape, classes, vocabulary, foretells)
        usual = kind.config_class()
        if self.folder is not None:
            of_data.pop("vocab_size", None)
            of_data.pop("pad_token_id", None)
        of_data = {key: value for key, value in of_data.items() if hasattr(usual, key)}
        for key in options:
            if not hasattr(usual, key):
                raise ModelError(
                    f"model.config.{key}: {type(usual).__name__} has no such field"
                    f"{did_you_mean(key, usual.to_dict())}"
                )
        with _quiet(library), _as_a_model_error(name, options):
            config = kind.config_class(**{**of_data, **options})
            if hasattr(config, "use_cache"):
                config.use_cache = False
            padding, stands_in = getattr(config, "pad_token_id", None), None
            known = (classes if foretells else vocabulary) if len(input_shape) == 1 else 0
            if self.folder is not None and known and hasattr(config, "vocab_size"):
                padding, stands_in = known - 1, self._stand_in(config, known, foretells)
                if not foretells:
                    config.pad_token_id = padding if stands_in is None else stands_in
            model = self._filled(kind, config)
        _replace_conv1d(model)
        # A subclass keeps the names of the tensors, so that the library can load what a run has saved.
        model.__class__ = type(kind.__name__, (_Logits, kind), {})
        model.masked = padding if len(input_shape) == 1 and not foretells else None
        model.boundary = None if stands_in is None else (known - 1, stands_in)
        model.foretold = classes if foretells else None
        return model

    def _stand_in(self, config: Any, known: int, foretells: bool) -> int | None:
        """The folder's token for the boundary of texts; None where its vocabulary has the boundary itself.

        Args:
            config: The folder's configuration.
            known: Tokens of the data, the last one the boundary.
            foretells: Whether tokens are foretold, so that it begins texts; else it fills them up.
        """
        if config.vocab_size >= known:
            return None
        if config.vocab_size < known - 1:
            raise ModelError(
                f"model.folder = {self.folder} knows {config.vocab_size} tokens, and data.tokenizer gives "
                f"{known - 1}; name the folder's own tokenizer"
            )
        order = ("bos", "eos", "pad") if foretells else ("pad", "eos", "bos")
        own = [getattr(config, f"{name}_token_id", None) for name in order]
        found = next((token for token in own if isinstance(token, int) and token >= 0), None)
        if found is None:
            raise ModelError(
                f"model.folder = {self.folder} names no token for where texts "
                f"{'begin' if foretells else 'end'}; set model.config.{order[0]}_token_id"
            )
        return found

    def _filled(self, kind: Any, config: Any) -> Any:
        """The model with the library's initialisation, or the folder's weights, checked name by name."""
        how = {"attn_implementation": "eager", "dtype": torch.float32}
        if self.folder is None:
            return kind._from_config(config, **how)
        model, report = kind.from_pretrained(
            self.folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **how,
        )
        problems = {name: f"{name} is missing" for name in report["missing_keys"]}
        problems |= {name: f"{name} is no tensor of the model" for name in report["unexpected_keys"]}
        for name, found, wanted in report["mismatched_keys"]:
            problems[name] = f"{name} is {list(found)}, the model's is {list(wanted)}"
        refuse(problems, f"model.folder = {self.folder}", kind.__name__, self.fresh)
        return model


class _Logits:
    """Takes a batch of inputs as it is and returns its logits; padding is seen by nobody.

    Attributes:
        masked: The token that fills texts up; None where attention is to see all.
        boundary: The data's boundary and what the model knows in its place; None where it knows it.
        foretold: How many tokens are foretold: no text holds the boundary or what only the model knows.
    """

    masked: int | None
    boundary: tuple[int, int] | None
    foretold: int | None

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, ...] to logits [B, ...]."""
        given = {self.main_input_name: inputs}  # type: ignore[attr-defined]
        if self.masked is not None:
            given["attention_mask"] = (inputs != self.masked).long()
        if self.boundary is not None:
            given[self.main_input_name] = torch.where(inputs == self.boundary[0], self.boundary[1], inputs)  # type: ignore[attr-defined]
        logits: Tensor = super().forward(**given, return_dict=True).logits  # type: ignore[misc]
        if self.foretold is not None and logits.shape[-1] != self.foretold:
            least = torch.finfo(logits.dtype).min
            logits = nn.functional.pad(logits, (0, self.foretold - logits.shape[-1]), value=least)
        return logits


def _of_data(input_shape: tuple[int, ...], classes: int, vocabulary: int, foretells: bool) -> dict[str, Any]:
    """What the data says of a configuration."""
    if len(input_shape) == 3:
        channels, height, width = input_shape
        return {
            "num_labels": classes,
            "num_channels": channels,
            "image_size": height if height == width else (height, width),
        }
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if foretells:
        return {"vocab_size": classes, **tokens}
    padding = {"vocab_size": vocabulary, "pad_token_id": vocabulary - 1} if vocabulary else {}
    return {"num_labels": classes, **tokens, **padding}


def _class_of(library: Any, name: str, images: bool) -> Any:
    """The class that an architecture names: itself, or of a type the one that fits the samples."""
    kind = getattr(library, name, None)
    if isinstance(kind, type) and issubclass(kind, library.PreTrainedModel):
        return kind
    if name not in library.CONFIG_MAPPING:
        raise ModelError(
            f"model.architecture = {name!r} is neither a model class nor a type of transformers "
            f"{library.__version__}{did_you_mean(name, [*library.CONFIG_MAPPING, *dir(library)])}"
        )
    task = "IMAGE_CLASSIFICATION" if images else "CAUSAL_LM"
    fitting = getattr(library, f"MODEL_FOR_{task}_MAPPING").get(library.CONFIG_MAPPING[name], None)
    if fitting is None:
        raise ModelError(
            f"model.architecture = {name!r} has no model for {'images' if images else 'the next token'} in "
            "transformers; name a class of it"
        )
    return fitting


def _replace_conv1d(model: nn.Module) -> None:
    """Make every ``Conv1D`` of transformers, a linear layer on transposed weights, the linear layer it is."""
    kind = importlib.import_module("transformers.pytorch_utils").Conv1D
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                layer = nn.Linear(child.nx, child.nf, device="meta")
                layer.weight = nn.Parameter(child.weight.detach().t().contiguous())
                layer.bias = child.bias
                setattr(parent, name, layer)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, "torchvision"):
            raise
        raise ModelError(
            f"model.name = {name!r} needs the package {error.name}, which is not installed here; install it "
            f"(pip install 'sparsyfed[{name}]')"
        ) from None
    except RuntimeError as error:  # torchvision's, of operators that its build does not find in torch's
        raise ModelError(
            f"model.name = {name!r}: {name} cannot be imported ({error}); install a torchvision of the same "
            "build as torch, for CPUs from the index of torch's CPU wheels"
        ) from error


def _stored(path: Path, key: str) -> dict[str, Any]:
    try:
        return read_yaml(path)  # JSON is YAML
    except ConfigError as error:
        raise ModelError(f"{key}: {error}") from None


def _refuse_files(key: str, options: Mapping[str, Any]) -> None:
    """Refuse options, at any depth, by which timm reads or downloads a file: unpickling runs code."""
    for name, value in options.items():
        if name == "checkpoint_path" or str(name).startswith("pretrained"):
            raise ModelError(
                f"{key}.{name}: has timm read weights of a file that may run code; leave it out. A model "
                "begins with model.folder or model.weights, of safetensors"
            )
        if isinstance(value, Mapping):
            _refuse_files(f"{key}.{name}", value)


@contextlib.contextmanager
def _as_a_model_error(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """One line for whatever a library raises about a configuration."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"model.architecture = {name!r} cannot be built with {dict(options)}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Have timm build attention of plain products: fused kernels of GPUs add gradients up in any order."""
    layers = importlib.import_module("timm.layers")
    before = layers.use_fused_attn(), layers.use_fused_attn(experimental=True)
    layers.set_fused_attn(False)
    try:
        yield
    finally:
        layers.set_fused_attn(*before)


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Have transformers report errors alone: what matters here is refused by name."""
    before = library.logging.get_verbosity()
    library.logging.set_verbosity_error()
    try:
        yield
    finally:
        library.logging.set_verbosity(before)
