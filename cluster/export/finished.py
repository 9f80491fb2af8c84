"""A run that has ended, opened to be exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from cluster.configuration.config import Config
from cluster.configuration.foreign import refuse_foreign_code, whose
from cluster.configuration.trees import read_stored
from cluster.execution import Result
from cluster.federation import prepare_arguments
from cluster.records.run_folder import RunFolder
from cluster.references import UserError
from cluster.workload.datasets import Dataset, open_dataset
from cluster.workload.preparing import prepare


class ExportError(UserError):
    """A run cannot be exported; the message says why."""


def local_file(options: Mapping[str, Any]) -> str | None:
    """Which of a model's options names a file or folder of one machine, as ``model.key = path``; or None."""
    for key in ("weights", "folder", "config"):
        if isinstance(options.get(key), str):
            return f"model.{key} = {options[key]}"
    return None


@dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Attributes:
        folder: Its folder.
        config: Its configuration.
        result: Its result.
    """

    folder: RunFolder
    config: Config
    result: Result

    @classmethod
    def open(cls, path: Path, *, trust: bool = False) -> Finished:
        """Open a run's folder.

        Args:
            path: The folder.
            trust: Import the code that the folder of somebody else names.

        Raises:
            RunFolderError, ForeignCodeError: It holds no run, or one of somebody else that names code.
            ExportError: The run has not ended, went on beyond its result, or trained an adapter.
        """
        folder = RunFolder.open(path)
        if not trust:
            tree = read_stored(folder.config_file)
            refuse_foreign_code(path, tree, whose(folder.config_file), "sparsyfed export")
        config, summary, lines = folder.config(), folder.result(), folder.rounds()
        last = lines[-1]["round"] if lines else 0
        if summary is None or not Result(path, summary).ended or not folder.model_file.is_file():
            done = last if summary is None else summary["rounds"]
            without = " without result.json" * (summary is None and bool(lines))
            raise ExportError(
                f"{path} is not finished: {done} of {config.rounds} rounds{without}; sparsyfed resume {path}"
            )
        if last != summary["rounds"]:
            raise ExportError(
                f"{path}: its result is of round {summary['rounds']}, rounds.jsonl ends with round {last}; "
                f"sparsyfed resume {path}"
            )
        if config.adapter is not None:
            raise ExportError(
                f"{path} trained an adapter (adapter.name = {config.adapter.name}) on a base that is not its "
                "own; what is exported are whole models. Its adapter.safetensors is as PEFT stores one"
            )
        return cls(folder, config, Result(folder.path, summary))

    @cached_property
    def dataset(self) -> Dataset:
        """What it was trained on."""
        return open_dataset(prepare(**prepare_arguments(self.config)))

    @property
    def batch(self) -> str:
        """The shape of the model's inputs in words, such as [n, 1, 8, 8]."""
        return f"[{', '.join(map(str, ('n', *self.dataset.input_shape)))}]"

    @cached_property
    def line(self) -> dict[str, Any]:
        """The last round's line."""
        return self.folder.rounds()[-1]

    @cached_property
    def model(self) -> nn.Module:
        """The plain module with the final effective weights, in evaluation."""
        return self.result.model()
