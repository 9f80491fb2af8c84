"""Errors of files and folders, told in one line: which path, what is wrong with it, what helps.

Stands on the ground beside ``references`` and imports nothing else of the project.
"""

from __future__ import annotations

import errno
import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.references import UserError

#: What a path can do to anybody, and what helps.
_CURES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "your quota there is used up: make room",
    errno.EFBIG: "files may not grow that large here: see ulimit -f",
    errno.EMFILE: "allow more of them: ulimit -n 4096",
    errno.ENFILE: "the machine has no more of them: end what holds them",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that is yours, or have it opened to you",
    errno.EPERM: "choose a place that is yours, or have it opened to you",
    errno.ENOENT: "correct the path, or make what is missing",
    errno.EEXIST: "choose another name, or move away what is there",
    errno.ENOTDIR: "a file stands where a folder is needed: choose another path",
    errno.EISDIR: "a folder stands where a file is needed: choose another path",
    errno.ELOOP: "its links lead in a circle",
    errno.EIO: "the disk or its connection fails: see dmesg",
    errno.ESTALE: "the file system was mounted anew: open the folder again",
}

_OURS = tuple(str(Path(__file__).parents[1] / room) + os.sep for room in ("algorithms", "cluster", "tuning"))
_LIBRARIES = ("<", *(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")))


class DiskError(UserError):
    """A file or folder failed in the middle of a run; what was computed until then is kept."""

    status, passes = 1, True


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors of writes, which name no file, name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def told_by_path() -> Iterator[None]:
    """Turn an error of a path into a :class:`DiskError`; one of a user's own code keeps its traceback.

    Raises:
        DiskError: Names path and cause. It arrives whole from a Ray actor, which a traceback does not.
    """
    try:
        yield
    except OSError as error:
        told = in_one_line(error)
        if told is not None:
            raise DiskError(told) from error
        if not hasattr(error, "__notes__"):
            error.add_note("".join(traceback.format_exception(error)))  # a traceback stays behind on an actor
        raise


def in_one_line(error: OSError) -> str | None:
    """Path, cause and cure; None where the error is of no path, or came about in a user's own code."""
    if error.errno not in _CURES or hasattr(error, "__notes__") or _in_own_code(error):
        return None
    if error.filename is None and error.errno not in (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EIO):
        return None
    named = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{named}{os.strerror(error.errno)}; {_CURES[error.errno]}"


def _in_own_code(error: BaseException) -> bool:
    files = (frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return any(not file.startswith((*_OURS, *_LIBRARIES)) for file in files)
