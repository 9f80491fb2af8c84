"""Weights to begin with: a safetensors file in place of the common initialisation, checked name by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cluster.references import did_you_mean
from cluster.workload.models import ModelError

_MOST_NAMES = 3


def load_weights(
    model: nn.Module, path: str, *, key: str = "model.weights", fresh: Sequence[str] = ()
) -> None:
    """Fill a model with the tensors of a file, such as the ``model.safetensors`` of a run.

    Args:
        model: The plain module.
        path: A safetensors file with every parameter and buffer, by the names of ``state_dict``; floats of
            any width become those of the model.
        key: The key that names it.
        fresh: Name patterns of tensors that stay as they are.

    Raises:
        ModelError: It cannot be read, or a name is missing, unknown, or of another shape or kind; names it.
    """
    key = f"{key} = {path}"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{key}: there is no such file on this machine") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{key} is no whole safetensors file: {error}") from None
    own = model.state_dict()
    problems = {name: f"{name} is missing" for name in own.keys() - tensors.keys()}
    for name in tensors.keys() - own.keys():
        problems[name] = f"{name} is no tensor of the model{did_you_mean(name, own)}"
    for name in own.keys() & tensors.keys():
        wanted, found = own[name], tensors[name]
        if wanted.shape != found.shape:
            problems[name] = f"{name} is {list(found.shape)}, the model's is {list(wanted.shape)}"
        elif wanted.is_floating_point() != found.is_floating_point():
            problems[name] = f"{name} is {found.dtype}, the model's is {wanted.dtype}"
        elif not torch.isfinite(found).all():
            problems[name] = f"{name} holds values that are not finite"
    refuse(problems, key, type(model).__name__, fresh)
    kept = {name: tensor for name, tensor in tensors.items() if not _is_fresh(name, fresh)}
    model.load_state_dict(kept, strict=False)


def refuse(problems: Mapping[str, str], key: str, model: str, fresh: Sequence[str] = ()) -> None:
    """Refuse tensors that do not fit, unless they are drawn anew.

    Args:
        problems: What is wrong with each, by name.
        key: The key and where it leads to.
        model: The kind of model.
        fresh: Name patterns of those that are drawn anew.
    """
    wrong = sorted(text for name, text in problems.items() if not _is_fresh(name, fresh))
    if wrong:
        shown = "; ".join(wrong[:_MOST_NAMES])
        more = f"; and {len(wrong) - _MOST_NAMES} more" if len(wrong) > _MOST_NAMES else ""
        cure = "" if key.startswith("model.weights") else "; model.fresh names what is to be drawn anew"
        raise ModelError(f"{key} does not fit {model}: {shown}{more}{cure}")


def _is_fresh(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
