"""A folder that ``hf upload`` takes as it is: weights, what they are weights of, and the model's card.

Nothing here talks to a hub.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import nn

from cluster import __version__
from cluster.export.finished import ExportError, Finished, local_file
from cluster.records.model_card import card
from cluster.records.model_file import model_bytes, model_metadata
from cluster.records.run_folder import check_free
from cluster.workload import models
from cluster.workload.weights import load_weights

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
#: What a model is told beside its options.
_BESIDE = ("name", "input_shape", "classes", "tokens", "seed")

_USE = """\
With sparsyfed installed:

```python
import cluster
from huggingface_hub import snapshot_download

model = cluster.load_model(snapshot_download("OWNER/NAME"))
```

`model` is a plain torch module in evaluation. {inputs}
"""

_INPUTS = {
    "pixels": "It takes float32 images {shape} of values x / 127.5 - 1 for pixels x of 0 to 255.",
    "numbers": "It takes float32 inputs {shape}, scaled as the training data were.",
    "tokens": "It takes int64 tokens {shape}.",
}


def write(finished: Finished, output: Path) -> str:
    """Write the folder; says how it is uploaded.

    Args:
        finished: The run.
        output: A new or empty folder.

    Raises:
        ExportError: The model begins with a folder of this machine, which a description cannot name.
    """
    config, dataset = finished.config, finished.dataset
    options = dict(config.model.options)
    if (local := local_file(options)) is not None:
        raise ExportError(
            f"{finished.folder.path}: {local} lies on this machine, and a hub's folder cannot name it; its "
            "own library exports it, from the run's model.safetensors"
        )
    described = {
        "library": "sparsyfed",
        "version": __version__,
        "model": {"name": config.model.name, "options": options},
        "input_shape": list(dataset.input_shape),
        "inputs": _kind(dataset.train.inputs.dtype),
        "outputs": config.build_objective().count(dataset),
        "labels": list(dataset.classes),
        "tokens": len(dataset.vocabulary),
    }
    use = _USE.format(inputs=_INPUTS[described["inputs"]].format(shape=finished.batch))
    text = card(config, dataset, finished.result.summary, finished.line, use)
    tensors = load_file(finished.folder.model_file)
    check_free(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / _WEIGHTS).write_bytes(model_bytes(tensors, model_metadata(config, finished.line)))
    (output / _CONFIG).write_text(json.dumps(described, indent=2, default=list) + "\n", encoding="utf-8")
    (output / "README.md").write_text(text, encoding="utf-8")
    return f"upload    hf upload OWNER/NAME {shlex.quote(str(output))}"


def load_model(folder: str | Path, *, trust: bool = False) -> nn.Module:
    """The plain module of an exported folder, in evaluation.

    Args:
        folder: What ``sparsyfed export --to hub`` wrote, perhaps downloaded from a hub.
        trust: Import the code that the folder names, where the model is of one's own.

    Raises:
        ModelError, ChoiceError: The folder holds no such model, names code and is not trusted, or has the
            model begin with a file.
    """
    folder = Path(folder)
    try:
        told: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        name, options, outputs = told["model"]["name"], told["model"]["options"], told["outputs"]
        shape, tokens = told["input_shape"], told["tokens"]
    except FileNotFoundError:
        raise models.ModelError(
            f"{folder} holds no {_CONFIG}; expected a folder of `export --to hub`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise models.ModelError(
            f"{folder / _CONFIG} is none of sparsyfed's: {type(error).__name__}: {error}"
        ) from None
    if (wrong := _wrong(name, options, shape, outputs, tokens)) is not None:
        raise models.ModelError(f"{folder / _CONFIG} describes no model: {wrong}")
    if ":" in name and not trust:
        raise models.ModelError(
            f"{folder / _CONFIG} names code, model.name = {name}; load_model(..., trust=True) runs it"
        )
    model = models.build(name, input_shape=tuple(shape), classes=outputs, tokens=tokens, seed=0, **options)
    load_weights(model, str(folder / _WEIGHTS), key=_WEIGHTS)
    return model.eval()


def _wrong(name: Any, options: Any, shape: Any, outputs: Any, tokens: Any) -> str | None:
    """What of a description no model can be built of; None where all of it can."""
    if not isinstance(name, str):
        return f"model.name is a text, found {name!r}"
    if not isinstance(options, dict):
        return f"model.options are keys and values, found {options!r}"
    if taken := [key for key in _BESIDE if key in options]:
        return f"model.options.{taken[0]} is no option of a model"
    if (local := local_file(options)) is not None:
        return f"{local} is a file, and a model's folder names none; its own library loads such a model"
    if not (isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)):
        return f"input_shape is a list of whole numbers, found {shape!r}"
    for key, number, least in (("outputs", outputs, 1), ("tokens", tokens, 0)):
        if type(number) is not int or number < least:
            return f"{key} is a whole number of at least {least}, found {number!r}"
    return None


def _kind(stored: np.dtype[Any]) -> str:
    """What a model's inputs are made of; see :mod:`cluster.workload.inputs`."""
    if stored == np.uint8:
        return "pixels"
    return "numbers" if stored.kind == "f" else "tokens"
