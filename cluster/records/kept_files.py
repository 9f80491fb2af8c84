"""What clients keep between their visits, in files beside the checkpoints: what changed is written again.

``kept-000020.safetensors`` holds the states that changed since the checkpoint before round 20; a checkpoint
says in which file each client's state lies. A file of which less than half is in use is written anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from cluster.records.checkpoint import (
    CheckpointError,
    checksum,
    list_rounds,
    read_meta,
    sound,
    write_atomically,
)

#: By file: the clients whose states lie in it and are in use, the round each was kept in, how many it holds.
Index = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class KeptState:
    """What one client keeps.

    Attributes:
        round: The round in which it was kept.
        arrays: float32 arrays by name; never changed in place.
    """

    round: int
    arrays: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def save_kept(folder: Path, round_number: int, states: Mapping[int, KeptState]) -> Index:
    """Write what changed since the checkpoint before ``round_number``; returns where everything lies."""
    if not states:
        return {}
    earlier = [number for number in list_rounds(folder) if number < round_number]
    before: Index = read_meta(_checkpoint(folder, earlier[-1])).get("kept", {}) if earlier else {}
    index: Index = {}
    waiting = set(states)
    for name, file in before.items():
        current = [[c, r] for c, r in file["clients"] if c in states and states[c].round == r]
        if 2 * len(current) >= file["count"]:
            index[name] = {"clients": current, "count": file["count"]}
            waiting -= {client for client, _ in current}
    if waiting:
        tensors = {
            f"client.{client}.{name}": torch.from_numpy(np.ascontiguousarray(array))
            for client in sorted(waiting)
            for name, array in states[client].arrays.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        name = f"kept-{round_number:06d}.safetensors"
        write_atomically(folder / name, save(tensors, {"sha256": checksum(tensors, "")}))
        clients = [[client, states[client].round] for client in sorted(waiting)]
        index[name] = {"clients": clients, "count": len(clients)}
    return index


def load_kept(folder: Path, index: Index) -> dict[int, KeptState]:
    """Read the states that a checkpoint names.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    states: dict[int, KeptState] = {}
    for file, entry in index.items():
        path = folder / file
        with sound(path), safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if (stored.metadata() or {})["sha256"] != checksum(tensors, ""):
                raise CheckpointError("checksum differs")
        rounds = {int(client): int(number) for client, number in entry["clients"]}
        arrays: dict[int, dict[str, np.ndarray]] = {client: {} for client in rounds}
        for name, tensor in tensors.items():
            _, client, own = name.split(".", 2)
            if int(client) in arrays:
                arrays[int(client)][own] = tensor.numpy().copy()
        states |= {client: KeptState(number, arrays[client]) for client, number in rounds.items()}
    return states


def kept_files(folder: Path) -> set[str]:
    """Names of the files that the checkpoints of a folder name."""
    metas = (read_meta(_checkpoint(folder, number)) for number in list_rounds(folder))
    return {name for meta in metas for name in meta.get("kept", {})}


def drop_unused(folder: Path) -> None:
    """Remove the files that no checkpoint names any more."""
    found = {path.name for path in folder.glob("kept-*.safetensors")}
    for name in found - kept_files(folder) if found else ():
        (folder / name).unlink()


def _checkpoint(folder: Path, number: int) -> Path:
    return folder / f"round-{number:06d}.safetensors"
