"""Checkpoints and rounds of a run on shared storage, for the day its machine is lost.

``checkpoint_uri`` names a folder on any file system that fsspec knows (a mounted folder, s3://, gs://, ...);
each run keeps a copy of what ``resume`` needs in a folder of its own there, named as the run's folder. The
runs of a grid or a study lie in a folder there that is named as the grid's or study's.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml

from cluster.configuration.plain_yaml import YamlError, parse
from cluster.configuration.trees import stored_text
from cluster.logins import LoginError, hidden, without_logins, written_out
from cluster.records.checkpoint import list_rounds
from cluster.records.kept_files import kept_files
from cluster.records.run_folder import RunFolder, check_free
from cluster.records.sqlite_store import is_sqlite, sqlite_file, sqlite_uri
from cluster.references import UserError

#: Small files that are written anew with every checkpoint, lines before the checkpoint that covers them.
_SMALL = ("config.yaml", "tracking.json", "rounds.jsonl")

#: What a finished run leaves.
_FINAL = ("result.json", "model.safetensors", "adapter.safetensors", "README.md")

_logger = logging.getLogger("sparsyfed.shared_storage")


class StorageError(UserError):
    """Shared storage cannot be used, or holds no such run; the message says what to do."""


class SharedStorage:
    """One run's copy on shared storage.

    Args:
        uri: The run's own folder there.

    Raises:
        StorageError: No such file system is known here.
    """

    def __init__(self, uri: str) -> None:
        import fsspec

        self._uri = uri.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(written_out("checkpoint_uri", self._uri))
        except LoginError:
            raise
        except (ImportError, ValueError) as error:
            raise StorageError(f"checkpoint_uri: {uri}: {hidden(str(error), uri)}") from None
        except Exception as error:  # whatever else a file system raises: no login, no such host
            raise StorageError(f"checkpoint_uri: {uri}: {self._named(error)}") from None

    @classmethod
    def of_run(cls, checkpoint_uri: str, path: Path) -> SharedStorage:
        """The copy of the run in folder ``path``."""
        return cls(f"{checkpoint_uri.rstrip('/')}/{path.absolute().name}")

    def check(self, *, new: bool) -> None:
        """Find out before a run starts whether its copy can be written.

        Args:
            new: The run has not begun: a copy that is there is another run's.

        Raises:
            StorageError: It cannot, or it is taken.
        """
        try:
            taken = new and self._files.exists(f"{self._root}/config.yaml")
            self._write("writable", b"")
            self._files.rm_file(f"{self._root}/writable")
        except Exception as error:
            raise StorageError(
                f"checkpoint_uri: {self._uri} cannot be written: {self._named(error)}"
            ) from None
        if taken:
            raise StorageError(
                f"checkpoint_uri: {self._uri} holds a run already; go on with it "
                f"(sparsyfed resume {self._uri}), or choose another --output: the copy has its name"
            )

    def push(self, folder: RunFolder, *, finished: bool = False) -> bool:
        """Bring the copy up to date; False where the storage is away, which the next push makes good.

        Args:
            folder: The run's folder.
            finished: The run has ended; its result and model are copied too.
        """
        try:
            for name in (*_SMALL, *(_FINAL if finished else ())):
                if (folder.path / name).is_file():
                    self._write(name, (folder.path / name).read_bytes())
            kept, there = _checkpoints(folder), self._names("checkpoints")
            for name in sorted(kept - there):
                self._write(f"checkpoints/{name}", (folder.checkpoints / name).read_bytes())
            for name in there - kept:
                self._files.rm_file(f"{self._root}/checkpoints/{name}")
        except Exception as error:  # whatever a file system raises
            _logger.warning("%s is not up to date: %s", self._uri, self._named(error))
            return False
        return True

    def config(self) -> dict[str, Any]:
        """The copy's configuration as it stands there; empty where there is no run."""
        try:
            if "config.yaml" not in self._names(""):
                return {}
            found = parse(self._read("config.yaml"))
        except YamlError as error:
            raise StorageError(f"{self._uri}/config.yaml: not a YAML file: {error}") from None
        except Exception as error:  # whatever a file system raises
            raise StorageError(f"{self._uri} cannot be read: {self._named(error)}") from None
        return found if isinstance(found, dict) else {}

    def fetch(self, path: Path) -> RunFolder:
        """Rebuild a run's folder from its copy.

        Args:
            path: The folder to make, new or empty.

        Raises:
            StorageError: There is no run, or the folder is taken.
        """
        check_free(path)
        try:
            here = self._names("")
            if "config.yaml" not in here:
                runs = f"; it holds {', '.join(sorted(here))}" if here else ""
                raise StorageError(f"{self._uri} holds no run{runs}")
            (path / "checkpoints").mkdir(parents=True)
            for name in sorted(self._names("checkpoints")):
                (path / "checkpoints" / name).write_bytes(self._read(f"checkpoints/{name}"))
            for name in reversed(_SMALL):  # config.yaml makes it a run, when everything else is there
                if name in here:
                    (path / name).write_bytes(_here(name, self._read(name), path))
        except StorageError:
            raise
        except Exception as error:
            raise StorageError(f"{self._uri} cannot be read: {self._named(error)}") from None
        return RunFolder.open(path)

    def _named(self, error: Exception) -> str:
        return f"{type(error).__name__}: {hidden(str(error), self._uri)}"

    def _names(self, folder: str) -> set[str]:
        place = f"{self._root}/{folder}".rstrip("/")
        self._files.invalidate_cache()
        if not self._files.isdir(place):
            return set()
        return {Path(found).name for found in self._files.ls(place, detail=False)}

    def _read(self, name: str) -> bytes:
        content: bytes = self._files.cat_file(f"{self._root}/{name}")
        return content

    def _write(self, name: str, content: bytes) -> None:
        """Under another name first: where a file system renames atomically, nobody sees half a file."""
        place = f"{self._root}/{name}"
        self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(f"{place}.part", content)
        self._files.mv(f"{place}.part", place)


def below(checkpoint_uri: str | None, *names: str) -> str | None:
    """The ``checkpoint_uri`` of runs kept together, so that they do not meet others of their names."""
    return None if checkpoint_uri is None else "/".join([checkpoint_uri.rstrip("/"), *names])


def is_uri(place: str | Path) -> bool:
    """Whether a run is named by a URI, not by a folder."""
    return "://" in str(place)


def _checkpoints(folder: RunFolder) -> set[str]:
    """Names of the checkpoints and, sorted before them, of what clients keep."""
    rounds = {f"round-{number:06d}.safetensors" for number in list_rounds(folder.checkpoints)}
    return rounds | kept_files(folder.checkpoints)


def _here(name: str, content: bytes, path: Path) -> bytes:
    """A tracking store that was a file of the lost machine becomes one beside the run's new folder."""
    if name != "config.yaml":
        return content
    parse(content)  # refuses what would explode
    tree = without_logins(yaml.safe_load(content))
    uri = (tree.get("tracking") or {}).get("uri") or ""
    if is_sqlite(uri) and not sqlite_file(uri).parent.is_dir():
        tree["tracking"]["uri"] = sqlite_uri(path.absolute().parent / "mlflow.db")
    return stored_text(tree)
