"""Weights to begin with: a safetensors file in place of the common initialisation, checked name by name."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cluster.references import did_you_mean
from cluster.workload.models import ModelError

_MOST_NAMES = 3


def load_weights(model: nn.Module, path: str) -> None:
    """Fill a model with the tensors of a file, such as the ``model.safetensors`` of a run.

    Args:
        model: The plain module.
        path: A safetensors file with every parameter and buffer, by the names of ``state_dict``; floats of
            any width become those of the model.

    Raises:
        ModelError: It cannot be read, or a name is missing, unknown, or of another shape or kind; names it.
    """
    key = f"model.weights = {path}"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{key}: there is no such file on this machine") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{key} is no whole safetensors file: {error}") from None
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - tensors.keys()]
    problems += [
        f"{name} is no tensor of the model{did_you_mean(name, own)}" for name in tensors.keys() - own.keys()
    ]
    for name in own.keys() & tensors.keys():
        wanted, found = own[name], tensors[name]
        if wanted.shape != found.shape:
            problems.append(f"{name} is {list(found.shape)}, the model's is {list(wanted.shape)}")
        elif wanted.is_floating_point() != found.is_floating_point():
            problems.append(f"{name} is {found.dtype}, the model's is {wanted.dtype}")
        elif not torch.isfinite(found).all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        shown = "; ".join(sorted(problems)[:_MOST_NAMES])
        more = f"; and {len(problems) - _MOST_NAMES} more" if len(problems) > _MOST_NAMES else ""
        raise ModelError(f"{key} does not fit {type(model).__name__}: {shown}{more}")
    model.load_state_dict(tensors)
