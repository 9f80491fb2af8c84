"""Delivery of a run to TensorBoard: an event file in its folder, ``events.out.tfevents.sparsyfed``.

A round is one record of the file, whole or, after a crash, torn and then cut off: what TensorBoard has is
what whole records say, and no round is there twice. Written again, a record has the same bytes, since its
time is that of its line; a reader that was ahead of a cut notices nothing.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.records.metric_names import numbers_in
from cluster.records.outbox import Delivery, Ending, Row

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

#: The name has to contain ``tfevents``; TensorBoard calls the run as its folder is called.
EVENT_FILE = "events.out.tfevents.sparsyfed"

_BEGIN, _END = "_hparams_/session_start_info", "_hparams_/session_end_info"

_HEADER, _FOOTER = 12, 4  # bytes: length and its checksum, checksum of the data


class TensorboardDelivery(Delivery):
    """Brings a run's event file up to date with its rounds."""

    def _open(self) -> None:
        """Cuts off a torn record, finds what is there, and begins a new file with its header."""
        self._path = self.folder / EVENT_FILE
        present: set[int] = set()  # rounds
        samples = 0
        self._ended: set[int] = set()  # rounds after which an end was written
        whole, content = 0, self._path.read_bytes() if self._path.exists() else b""
        for event, end in records(content):
            whole = end
            tags = {value.tag for value in event.summary.value}
            if _END in tags:
                self._ended.add(event.step)
            elif any(tag.startswith("system/") for tag in tags):
                samples += 1
            elif tags and _BEGIN not in tags:
                present.add(event.step)
        if whole < len(content):
            with self._path.open("r+b") as file:
                file.truncate(whole)
        cursor, self._offset = self.cursor, 0
        if whole == 0:
            self._append([self._event(0, cursor.created_ms, file_version="brain.Event:2"), self._begin()])
        cursor.last_round, cursor.rounds_delivered = max(present, default=None), len(present)
        cursor.samples_delivered = samples

    def _send(self, rows: Sequence[Row]) -> None:
        self._append([self._event(row.step, row.written_ms, summary=_scalars(row.numbers)) for row in rows])

    def _send_ending(self, ending: Ending, stop: Callable[[], bool]) -> bool:
        step = self.cursor.last_round or 0
        # What failed or was killed may be resumed and finish after the same round: a session ends once.
        if ending.status == "FINISHED" and step not in self._ended:
            self._append([self._end(ending, step)])
            self._ended.add(step)
        return True

    def _append(self, events: Sequence[Event]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        writer = RecordWriter(buffer)
        for event in events:
            writer.write(event.SerializeToString())
        with self._path.open("ab") as file:
            file.write(buffer.getvalue())

    @staticmethod
    def _event(step: int, written_ms: int, **fields: Any) -> Event:
        from tensorboard.compat.proto.event_pb2 import Event

        return Event(wall_time=written_ms / 1000, step=step, **fields)

    def _begin(self) -> Event:
        """The configuration, for the page of hyperparameters."""
        from google.protobuf.struct_pb2 import Value
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

        cursor = self.cursor
        start = SessionStartInfo(start_time_secs=cursor.created_ms / 1000, group_name=cursor.token)
        for key, text in cursor.params.items():
            start.hparams[key].CopyFrom(Value(string_value=text))
        summary = _hyperparameters(_BEGIN, HParamsPluginData(version=0, session_start_info=start))
        return self._event(0, cursor.created_ms, summary=summary)

    def _end(self, ending: Ending, step: int) -> Event:
        """The final figures, and for the same page that the run finished: one record, there or not."""
        from tensorboard.plugins.hparams import api_pb2
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=ending.end_ms / 1000)
        summary = _scalars(numbers_in(ending.summary))
        summary.MergeFrom(_hyperparameters(_END, HParamsPluginData(version=0, session_end_info=end)))
        return self._event(step, ending.end_ms, summary=summary)


def _scalars(numbers: Mapping[str, float]) -> Summary:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()])


def _hyperparameters(tag: str, data: HParamsPluginData) -> Summary:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))])


def records(content: bytes) -> Iterator[tuple[Event, int]]:
    """The whole records of an event file, each with the offset behind it; ends where one is torn."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    offset = 0
    while offset + _HEADER <= len(content):
        size, size_sum = struct.unpack_from("<QI", content, offset)
        end = offset + _HEADER + size + _FOOTER
        if end > len(content) or masked_crc32c(content[offset : offset + 8]) != size_sum:
            return
        data = content[offset + _HEADER : end - _FOOTER]
        if struct.unpack_from("<I", content, end - _FOOTER)[0] != masked_crc32c(data):
            return
        event = Event()
        event.ParseFromString(data)
        offset = end
        yield event, offset
