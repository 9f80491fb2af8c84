"""stdout and stderr that cannot end a command: what they cannot show or take is replaced or lost."""

from __future__ import annotations

import errno
import io
import os
import sys

#: The other end is gone for good: a pipe's reader, a terminal.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


def prepare(*, keep_going: bool) -> None:
    """Make stdout and stderr of this process fit for anything that is written to them.

    A character that the terminal's or the log's encoding does not have becomes a question mark, and a stream
    that was closed before the start goes nowhere.

    Args:
        keep_going: A stream whose other end goes away, or a full disk behind a log, does not end the command
            either; for commands that compute.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _replace(name, io.TextIOWrapper(_nowhere(number), encoding="utf-8"))
        elif type(stream) is io.TextIOWrapper:  # and no stand-in, such as a notebook's or a test's
            errors = "replace" if name == "stdout" else stream.errors
            if keep_going:
                encoding, buffering = stream.encoding, stream.line_buffering
                _replace(name, _Lasting(stream.detach(), encoding, errors, line_buffering=buffering))
            else:
                stream.reconfigure(errors=errors)


class _Lasting(io.TextIOWrapper):
    """A stream that loses what its file does not take."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if error.errno in _GONE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def _nowhere(number: int) -> io.BufferedWriter:
    """The file number on the null device, so that no other file gets it."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    return open(number, "wb", closefd=False)


def _replace(name: str, stream: io.TextIOWrapper) -> None:
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)
