"""The file of a trained model: tensors by name, and in its header what made them and how good they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save
from torch import Tensor

from cluster.configuration.config import Config
from cluster.records.introduction import benchmark_name


def model_bytes(tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content.

    Args:
        tensors: The model's, by name.
        said: Its ``__metadata__``. The library writes these in an order that changes from process to process;
            here they are in the order of their names.
    """
    written = save(dict(tensors), dict(said))
    end = 8 + int.from_bytes(written[:8], "little")
    header = json.loads(written[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the format asks
    return len(text).to_bytes(8, "little") + text + written[end:]


def model_metadata(config: Config, line: Mapping[str, Any]) -> dict[str, str]:
    """What a model file says of itself: nothing that depends on the machine, or on when it was made.

    Args:
        config: The run's configuration.
        line: The last round's line with its evaluation.
    """
    return {
        "format": "pt",  # without it transformers refuses the file
        "method": config.algorithm.name,
        "data": benchmark_name(config),
        "metrics": json.dumps({"round": line["round"], **evaluated(config, line)}),
    }


def evaluated(config: Config, line: Mapping[str, Any]) -> dict[str, float]:
    """What a round's line says of the whole model on each split, by key, such as ``test/<metric>``."""
    keys = [
        f"{split}/{measure.key}" for split in ("test", "val") for measure in config.build_objective().measures
    ]
    return {key: line[key] for key in keys if line.get(key) is not None}
