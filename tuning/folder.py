"""A study's folder: the resolved study, its storage, and a run's folder for every trial and final run."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cluster.configuration.foreign import refuse_foreign_code, whose
from cluster.configuration.trees import read_stored
from cluster.records.checkpoint import write_atomically
from cluster.records.run_folder import BusyError, RunFolderError
from tuning.dashboard import ARTIFACTS
from tuning.study import Plan, inert_dump, plan_of


@dataclass(frozen=True)
class StudyFolder:
    """Paths of one study. Trial 7 of ``topk`` lies in ``topk/trial-007``: found by its number alone."""

    path: Path

    @property
    def exists(self) -> bool:
        """Whether the folder holds a study."""
        return (self.path / "study.yaml").is_file()

    @property
    def report(self) -> Path:
        """Folder of tables and pictures."""
        return self.path / "report"

    @property
    def artifacts(self) -> Path:
        """Folder of the pictures that Optuna's dashboard shows."""
        return self.path / ARTIFACTS

    def trial(self, label: str, number: int) -> Path:
        """Run folder of a trial."""
        return self.path / label / f"trial-{number:03d}"

    def final(self, label: str, number: int, seed: int) -> Path:
        """Run folder of a trial's configuration on a fresh seed."""
        return self.path / label / f"trial-{number:03d}-seed-{seed}"

    def plan(self, *, trust: bool = False) -> Plan:
        """The study kept here.

        Args:
            trust: Import the code that it names, though somebody else made it.

        Raises:
            RunFolderError: There is none.
            ForeignCodeError: It is somebody else's and names code, which is not trusted.
        """
        if not self.exists:
            raise RunFolderError(f"{self.path} holds no study: study.yaml is missing")
        file = self.path / "study.yaml"
        tree = read_stored(file)
        if not trust:
            refuse_foreign_code(self.path, tree, whose(file), "sparsyfed tune --report")
        return plan_of(tree, self.path.name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other coordinators out; a killed one lets go of it.

        Raises:
            BusyError: Another process is tuning here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout:
            raise BusyError(f"{self.path} is being tuned by another process") from None

    def take(self, plan: Plan) -> str:
        """Keep ``plan`` here, or check that it goes on with the one kept; under the lock.

        Returns:
            The mark under which a storage knows this folder, wherever it is moved to.

        Raises:
            ConfigError: The folder holds another study.
            RunFolderError: It holds something else.
        """
        mark = self._mark
        if self.exists:
            before = read_stored(self.path / "study.yaml")
            plan.check_continues(inert_dump(before, self.path.name), self.path)
        elif any(entry.name != ".lock" for entry in self.path.iterdir()) and not mark.exists():
            raise RunFolderError(f"{self.path} exists and is no study; choose another --output")
        if not mark.exists():
            write_atomically(mark, uuid.uuid4().hex.encode())
        plan.write(self.path / "study.yaml")
        return self.mark()

    def mark(self) -> str:
        """The mark under which a storage knows this folder.

        Raises:
            RunFolderError: It is damaged.
        """
        text = self._mark.read_text(encoding="utf-8", errors="replace")
        if not re.fullmatch(r"[0-9a-f]{32}", text):
            raise RunFolderError(
                f"{self._mark} is damaged: restore it, or begin anew with another --output and study.name"
            )
        return text

    @property
    def _mark(self) -> Path:
        return self.path / "study-id"
