"""Checkpoints: one atomic file a checkpoint, tensors and plain JSON, no pickle, every byte checked."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from algorithms import ServerState
from cluster import __version__
from cluster.references import UserError

_NAME = re.compile(r"round-(\d{6})\.safetensors")


#: Of what a checkpoint holds beside its tensors; one of a later number is refused.
_FORMAT = 2


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another run; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from.

    Attributes:
        state: The server's state after ``state.round`` rounds.
        driver: The driver's own bookkeeping, plain JSON values.
        digest: Hash of configuration and code that made it.
        bases: Older weights that clients in flight started from, by version.
        masks: Supports of earlier global models by round, packed bits, uint8[ceil(prunable / 8)].
        stands_on: Fingerprints of what else the result depends on; see ``cluster.records.resuming``.
        kept: Where the states of clients lie; see ``cluster.records.kept_files``.
    """

    state: ServerState
    driver: dict[str, Any]
    digest: str
    bases: Mapping[int, Tensor] = field(default_factory=dict)
    masks: Mapping[int, Tensor] = field(default_factory=dict)
    stands_on: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, best_round: int | None) -> Path:
    """Write a checkpoint atomically and drop all but the last two and the best.

    Args:
        folder: The run's ``checkpoints`` folder.
        checkpoint: What to keep.
        best_round: Round whose checkpoint is the best so far, if one is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = checkpoint.state
    tensors: dict[str, Tensor] = {"weights": state.weights}
    if state.mask is not None:
        tensors["mask"] = state.mask
    tensors |= {f"moment.{index}": moment for index, moment in enumerate(state.moments)}
    tensors |= {f"array.{name}": array for name, array in state.arrays.items()}
    tensors |= {f"base.{version}": weights for version, weights in checkpoint.bases.items()}
    tensors |= {f"support.{number}": support for number, support in checkpoint.masks.items()}
    meta = {
        "round": state.round,
        "mask_version": state.mask_version,
        "driver": checkpoint.driver,
        "digest": checkpoint.digest,
        "format": _FORMAT,
        "version": __version__,
        "stands_on": dict(checkpoint.stands_on),
    }
    if checkpoint.kept:
        meta["kept"] = dict(checkpoint.kept)
    path = folder / f"round-{state.round:06d}.safetensors"
    text = json.dumps(meta)
    data = save(
        # Clones: a method's array may be a view of the weights, and safetensors refuses shared memory.
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
        {"meta": text, "sha256": checksum(tensors, text)},
    )
    for left_by_a_crash in folder.glob(".*.tmp"):
        left_by_a_crash.unlink()
    write_atomically(path, data)
    # Later ones are of rounds whose lines were lost, and are computed again.
    keep = {*[number for number in list_rounds(folder) if number <= state.round][-2:], best_round}
    for round_number in list_rounds(folder):
        if round_number not in keep:
            (folder / f"round-{round_number:06d}.safetensors").unlink()
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: The file is damaged, or of another version; names it and the way on.
    """
    with sound(path), safe_open(path, framework="pt") as stored:
        metadata = stored.metadata() or {}
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
        if metadata["sha256"] != checksum(tensors, metadata["meta"]):
            raise CheckpointError("checksum differs")
    meta = _meta(path, metadata["meta"])
    state = ServerState(
        round=meta["round"],
        weights=tensors["weights"],
        mask=tensors.get("mask"),
        mask_version=meta["mask_version"],
        moments=tuple(tensors[name] for name in sorted(tensors) if name.startswith("moment.")),
        arrays={n.removeprefix("array."): t for n, t in tensors.items() if n.startswith("array.")},
    )
    bases = {int(n.removeprefix("base.")): t for n, t in tensors.items() if n.startswith("base.")}
    masks = {int(n.removeprefix("support.")): t for n, t in tensors.items() if n.startswith("support.")}
    stands_on, kept = meta.get("stands_on", {}), meta.get("kept", {})
    return Checkpoint(state, meta["driver"], meta["digest"], bases, masks, stands_on, kept)


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside its tensors, which are not read: their checksum is not looked at.

    Raises:
        CheckpointError: See :func:`load_checkpoint`.
    """
    with sound(path), safe_open(path, framework="pt") as stored:
        text = (stored.metadata() or {})["meta"]
    return _meta(path, text)


@contextmanager
def sound(path: Path) -> Iterator[None]:
    """Name a file that cannot be read, and what to do: nothing is lost of one that is only out of reach."""
    try:
        with open(path, "rb"):
            pass
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint; {_way_on(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); see that it can") from None
    except (SafetensorError, CheckpointError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({error}); {_way_on(path)}") from None


def _way_on(path: Path) -> str:
    others = [r for r in list_rounds(path.parent) if path.name != f"round-{r:06d}.safetensors"]
    return f"delete it to resume from round {others[-1]}" if others else "no other checkpoint is left"


def _meta(path: Path, text: str) -> dict[str, Any]:
    with sound(path):
        meta: dict[str, Any] = json.loads(text)
    made_by = f"sparsyfed {meta['version']}" if "version" in meta else "an older version of sparsyfed"
    fix = "finish the run with that version, or start it anew"
    if meta.get("format", 1) > _FORMAT:
        raise CheckpointError(f"{path} was made by {made_by}, which is newer than this one: {fix}")
    missing = [key for key in ("round", "mask_version", "driver", "digest") if key not in meta]
    if missing:
        raise CheckpointError(f"{path} was made by {made_by} and lacks {', '.join(missing)}: {fix}")
    return meta


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``, or None."""
    rounds = list_rounds(folder)
    return folder / f"round-{rounds[-1]:06d}.safetensors" if rounds else None


def list_rounds(folder: Path) -> list[int]:
    """Rounds that have a checkpoint, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write ``data`` so that ``path`` holds either the old content or all of the new, also after a crash.

    Args:
        path: The file.
        data: Its new content.
        mode: Its permissions, less what the umask takes away.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        with suppress(OSError):  # a full disk is not to keep half a file
            temporary.unlink(missing_ok=True)
        raise


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Hash of names, types, shapes and bytes, and of a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
