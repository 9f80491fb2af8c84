"""Delivery of a run to Weights & Biases, or into an offline folder that ``wandb sync`` delivers.

wandb writes all that it is given into transaction logs below the run's folder, a log for each time that it
was opened, and confirms nothing before a log is closed. What it has is therefore read from the logs (online:
what its server said when the run was taken up again) and the rest is logged into one more.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.records.metric_names import numbers_in
from cluster.records.outbox import Delivery, Ending, Row
from cluster.records.sqlite_store import TrackingError

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

#: Longest wait for the server of one call in seconds; as MLflow's.
_PATIENCE_S = 20.0

# The log's form: a header, blocks, and in them records of which a long one is in several parts.
_FILE_HEADER, _BLOCK, _RECORD_HEADER = 7, 32768, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


class WandbDelivery(Delivery):
    """Brings Weights & Biases up to date with a run's folder."""

    watches = False  # wandb does so itself

    _run: Run | None = None

    def _open(self) -> None:
        cursor, tags = self.cursor, self.cursor.tags
        if cursor.delivered:  # nothing is to be told twice
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._close(1)  # of a call that failed: what waits in its log is to be on the disk before it is read
        settings = wandb.Settings(
            console="off", init_timeout=_PATIENCE_S, finish_timeout=_PATIENCE_S, finish_timeout_raises=True
        )
        self._run = run = wandb.init(
            dir=self.folder,
            id=cursor.token,
            resume="allow",
            reinit="create_new",
            project=os.environ.get("WANDB_PROJECT") or re.sub(r"[/\\#?%:]", "_", cursor.experiment)[:128],
            name=cursor.run_name,
            group=tags.get("group"),
            job_type=tags.get("kind"),
            notes=tags.get("mlflow.note.content"),
            tags=[tags[key][:64] for key in ("method", "study") if key in tags],
            config={key: _plain(text) for key, text in cursor.params.items()},
            settings=settings,
        )
        cursor.run_id, self._offset = cursor.token, 0
        if run.resumed and not run.offline:
            cursor.last_round = run.starting_step - 1
        else:
            held = logged_rounds(self.folder / "wandb", cursor.token)
            cursor.last_round, cursor.rounds_delivered = max(held, default=None), len(held)

    def _send(self, rows: Sequence[Row]) -> None:
        assert self._run is not None
        for row in rows:
            values = {**row.numbers, "_timestamp": row.written_ms / 1000}
            self._run.log(values, step=row.step, commit=True)

    def _send_ending(self, ending: Ending, stop: Callable[[], bool]) -> bool:
        if self._run is None:  # this end was delivered
            return True
        self._run.summary.update(numbers_in(ending.summary))
        for name in ending.artifacts:
            if stop():
                return False
            if (path := self.folder / name).is_file() and path.is_relative_to(self.folder):
                self._run.save(str(path), base_path=str(self.folder), policy="now")
        self._close(0 if ending.status == "FINISHED" else 1)
        return True

    def release(self) -> None:
        """Closes the log and lets another process deliver this run."""
        try:
            self._close(1)
        finally:
            super().release()

    def _close(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=exit_code)


def check_login() -> None:
    """Refuses to go online without a key, which wandb would ask for in the middle of a run.

    Raises:
        TrackingError: There is none.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise TrackingError(
            "tracking.also: wandb has no key; give it one (wandb login), or set WANDB_MODE=offline and "
            "deliver later (wandb sync RUN/wandb/offline-run-*)"
        )


def logged_rounds(folder: Path, run_id: str) -> set[int]:
    """The rounds that a run's logs in wandb's folder have; another project's run lies there too."""
    from wandb.proto.wandb_internal_pb2 import Record

    rounds = set()
    for path in folder.glob(f"*run-*/run-{run_id}.wandb"):
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                rounds.add(record.history.step.num)
    return rounds


def log_records(content: bytes) -> Iterator[bytes]:
    """The whole records of a transaction log, which has the form of LevelDB's; ends where one is torn."""
    offset, parts = _FILE_HEADER, b""
    while True:
        if _BLOCK - offset % _BLOCK < _RECORD_HEADER:
            offset += _BLOCK - offset % _BLOCK  # the rest of a block that is too short for a header
        if offset + _RECORD_HEADER > len(content):
            return
        checksum, size, kind = struct.unpack_from("<IHB", content, offset)
        data = content[offset + _RECORD_HEADER : offset + _RECORD_HEADER + size]
        if len(data) < size or zlib.crc32(bytes([kind]) + data) != checksum:
            return
        parts = data if kind in (_WHOLE, _FIRST) else parts + data
        offset += _RECORD_HEADER + size
        if kind in (_WHOLE, _LAST):
            yield parts


def _plain(text: str) -> Any:
    """A parameter's value as it was before it became text."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
