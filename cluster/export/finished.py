"""A run that has ended, opened to be exported."""

from __future__ import annotations

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
            ExportError: The run has not ended, or trained an adapter.
        """
        folder = RunFolder.open(path)
        if not trust:
            tree = read_stored(folder.config_file)
            refuse_foreign_code(path, tree, whose(folder.config_file), "sparsyfed export")
        config, summary = folder.config(), folder.result()
        result = Result(folder.path, summary or {"rounds": len(folder.rounds()), "complete": False})
        if not result.ended or not folder.model_file.is_file():
            raise ExportError(
                f"{path} is not finished: {result.summary['rounds']} of {config.rounds} rounds; "
                f"sparsyfed resume {path}"
            )
        if config.adapter is not None:
            raise ExportError(
                f"{path} trained an adapter (adapter.name = {config.adapter.name}) on a base that is not its "
                "own; what is exported are whole models. Its adapter.safetensors is as PEFT stores one"
            )
        return cls(folder, config, result)

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
