"""A run's folder: config.yaml, rounds.jsonl, result.json, model.safetensors, README.md, checkpoints/."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cluster.configuration.config import Config, validate
from cluster.configuration.foreign import sign, whose
from cluster.configuration.trees import read_stored, stored_text
from cluster.disk import naming
from cluster.records.checkpoint import write_atomically
from cluster.references import UserError

#: Keys of a round's line that depend on the machine: a round computed again may differ in them alone.
_MACHINE_KEYS = ("time/", "timestamp")

#: A configuration that was still being written.
_UNFINISHED = re.compile(r"\.config\.yaml\.\d+\.tmp")


class RunFolderError(UserError):
    """The folder is no run, or is taken; the message says what to do."""


class BusyError(RunFolderError):
    """Another process is running in the folder."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run.

    Attributes:
        path: The folder.
        found: It was there, empty, before the run: a link, a mount, or a folder of the user's.
    """

    path: Path
    found: bool = False

    @classmethod
    def create(cls, path: Path, config: Config) -> RunFolder:
        """Make the folder of a new run.

        Raises:
            RunFolderError: It exists and is not empty.
        """
        check_free(path)
        folder = cls(path, found=path.exists())
        try:
            folder.checkpoints.mkdir(parents=True)
            folder.write_config(config)
        except OSError:  # a full disk is not to leave half a run, which could be neither run nor resumed
            folder.discard()
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run.

        Raises:
            RunFolderError: There is none.
        """
        if not (path / "config.yaml").is_file():
            raise RunFolderError(f"{path} holds no run: config.yaml is missing")
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def rounds_file(self) -> Path:
        """One JSON object a round, written as it happens."""
        return self.path / "rounds.jsonl"

    @property
    def model_file(self) -> Path:
        """Effective weights that load into the plain module."""
        return self.path / "model.safetensors"

    @property
    def card_file(self) -> Path:
        """What the model is and how good, as model hubs show it."""
        return self.path / "README.md"

    @property
    def adapter_file(self) -> Path:
        """What was trained beside a frozen base, where there is an adapter."""
        return self.path / "adapter.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running in this folder.

        Raises:
            BusyError: Another process is running it.
        """
        with self._held(self.checkpoints / ".lock"):
            yield

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other grids, shards of one too, from beginning this run or going on with it.

        The lock lies beside the folder, which need not exist yet. A process that dies, even killed, leaves it
        free; so does one on another node, where the file system's locks reach that far.

        Raises:
            BusyError: Another process has it.
        """
        lock = self.path.parent / ".locks" / self.path.name
        lock.parent.mkdir(parents=True, exist_ok=True)
        with self._held(lock):
            yield

    @contextmanager
    def _held(self, file: Path) -> Iterator[None]:
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(f"{self.path} is being run by another process") from None
        try:
            yield
        finally:
            lock.release()

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    def config(self, *, inert: bool = False) -> Config:
        """The run's configuration.

        Args:
            inert: Only look at it, without the code that it names; see ``cluster.configuration.foreign``.
        """
        return validate(read_stored(self.config_file), inert=inert)

    def write_config(self, config: Config) -> None:
        """Keep the resolved configuration, and that this user wrote it here."""
        file, text = self.config_file, stored_text(config.resolved())
        if file.is_file() and file.read_bytes() == text and whose(file) is None:
            return
        write_atomically(file, text, mode=0o644)
        sign(file)

    def rounds(self) -> list[dict[str, Any]]:
        """The stored lines, without a last one that is still being written or was torn by a crash.

        Raises:
            RunFolderError: A line in the middle is damaged.
        """
        if not self.rounds_file.exists():
            return []
        whole, _, _ = self.rounds_file.read_bytes().rpartition(b"\n")
        lines = []
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
                line["round"] + 0
            except (ValueError, TypeError, KeyError):
                raise RunFolderError(
                    f"{self.rounds_file}: line {number} is damaged; `sparsyfed resume {self.path}` computes "
                    "it again where a checkpoint is old enough, else restore the file"
                ) from None
            lines.append(line)
        return lines

    def append_round(self, line: dict[str, Any]) -> None:
        """Append one round's line."""
        with naming(self.rounds_file), open(self.rounds_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def sync_rounds(self) -> None:
        """Have the lines on the disk, so that they survive the machine."""
        with naming(self.rounds_file), open(self.rounds_file, "a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def result(self) -> dict[str, Any] | None:
        """The final result, or None while the run is not complete.

        Raises:
            RunFolderError: The file is damaged.
        """
        path = self.path / "result.json"
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_bytes())
            return {"complete": found["complete"], **found}
        except (ValueError, KeyError, TypeError):
            raise RunFolderError(
                f"{path} is damaged; delete it, and `sparsyfed resume {self.path}` writes it anew"
            ) from None

    def write_result(self, result: dict[str, Any]) -> None:
        """Keep the final result."""
        write_atomically(self.path / "result.json", (json.dumps(result, indent=2) + "\n").encode())

    @property
    def begun(self) -> bool:
        """Whether anything was computed that resuming would go on from."""
        lines = self.rounds_file.exists() and b"\n" in self.rounds_file.read_bytes()
        return lines or any(self.checkpoints.glob("*.safetensors"))

    def clear_half_made(self) -> None:
        """Remove what a process left that was killed while it made the folder, and nothing else."""
        if not self.path.is_dir() or self.config_file.exists():
            return
        found = [path for path in self.path.rglob("*") if path != self.checkpoints]
        if all(path.parent == self.path and _UNFINISHED.fullmatch(path.name) for path in found):
            for path in found:
                path.unlink()
            with suppress(FileNotFoundError):
                self.checkpoints.rmdir()

    def discard(self) -> None:
        """Remove what this run made, where nothing was computed; never hides what went wrong before."""
        with suppress(OSError):
            if self.begun:
                return
            if not self.found:
                shutil.rmtree(self.path)
                return
            for path in self.path.iterdir():  # the folder was empty
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def check_free(path: Path) -> None:
    """Refuse a place for a new run that something else takes.

    Raises:
        RunFolderError: Says what is there.
    """
    if path.is_dir() and any(path.iterdir()):
        resume = f"go on with it: sparsyfed resume {path}, or " if (path / "config.yaml").is_file() else ""
        raise RunFolderError(f"{path} exists and is not empty; {resume}choose another --output")
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file; choose another --output")


def comparable(line: dict[str, Any]) -> dict[str, Any]:
    """What of a round's line must be equal when the round is computed again."""
    kept = {
        key: value
        for key, value in line.items()
        if "simulated" in key or not key.startswith(_MACHINE_KEYS)  # simulated time is no machine's
    }
    if "clients/refused_list" in kept:  # whom, not in which words: seconds and addresses are the machine's
        kept["clients/refused_list"] = [client for client, _ in kept["clients/refused_list"]]
    return kept


def finite(value: float | None) -> float | None:
    """``value``, or None where it is not finite: JSON knows no NaN."""
    return value if value is None or math.isfinite(value) else None
