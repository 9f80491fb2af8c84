"""Folders of decoded arrays: there as a whole or not at all, and checked whenever a process asks for one.

`ensure` has a folder made and checks what it holds; `read_meta` opens it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock

from cluster.references import DataError

#: A file that changed less long ago is not remembered: within one tick of the file system's clock another
#: change would leave the same times.
_SETTLED_NS = 2_000_000_000
_BLOCK = 1 << 20


def digest(file: Path, cache: Path) -> str:
    """Hash of what a file holds (XXH3, 128 bits), remembered in ``cache`` while the file is not touched.

    It is remembered by inode, size and the times of the last change of content *and* of the inode: the
    latter is set by the kernel alone, so that neither ``cp -p`` nor ``touch -d`` bring it back.
    """
    state = os.stat(file)
    key = repr((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    note = cache / ".digests" / xxhash.xxh3_128_hexdigest(key.encode())
    with contextlib.suppress(OSError):
        known = note.read_text(encoding="ascii")
        if len(known) == 32:
            return known
    begun, hashed, buffer = time.time_ns(), xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    with open(file, "rb", buffering=0) as content:
        while count := content.readinto(buffer):
            hashed.update(buffer[:count])
    found = hashed.hexdigest()
    if state.st_ctime_ns < begun - _SETTLED_NS:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the reading, no more
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(found, encoding="ascii")
    return found


def new_array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A writable memory map of a new file whose room on the disk is taken: a full one would end the process.

    Raises:
        DataError: There is no room for it.
    """
    with _writing(path.parent.parent):
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not every file system can
                        raise
    return array


def save(path: Path, values: np.ndarray) -> None:
    """Write an array as a new file; see :func:`new_array`."""
    array = new_array(path, values.dtype.type, values.shape)
    array[...] = values
    array.flush()


def ensure(folder: Path, decode: Callable[[Path], dict[str, Any]]) -> None:
    """Have ``folder`` hold what ``decode`` writes; one that is there and undamaged is left as it is.

    Processes that ask at the same time wait for one of them.

    Args:
        folder: Folder in the cache, named after a fingerprint of what is decoded.
        decode: Writes arrays into the folder it is given and returns what belongs beside them, as JSON;
            ``outside`` in it maps files that ``folder``'s name does not stand for to their :func:`state`.

    Raises:
        DataError: The cache cannot be written; or what ``decode`` raises.
    """
    if _undamaged(folder):
        return
    cache = folder.parent
    with locked(folder):
        if _undamaged(folder):
            return
        partial = folder.with_name(f".{folder.name}.partial")
        with _writing(cache):
            # Under the lock a partial folder can only be what a killed process left.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        try:
            meta = decode(partial)
            with _writing(cache):
                _seal(partial, meta)
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(partial, folder)
                _sync(cache)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_meta(folder: Path) -> dict[str, Any]:
    """What ``decode`` returned, once every array is there and as long as it was.

    Raises:
        DataError: The folder is none that was completed, or was damaged since.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("digest") != _digest_of(meta):
            raise ValueError("meta.json was changed")
        for name, (size, _) in meta.pop("arrays").items():
            if os.path.getsize(folder / name) != size:
                raise ValueError(f"{name} has not the {size:,} bytes that it was written with")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise incomplete(folder, error) from error
    return dict(meta)


def incomplete(folder: Path, error: Exception) -> DataError:
    """The error of a folder that cannot be used."""
    return DataError(
        f"{folder} is not a complete prepared data set ({error}): delete it and prepare it again"
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder in the cache, which need not exist.

    Raises:
        DataError: The cache cannot be written.
    """
    with _writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _undamaged(folder: Path) -> bool:
    """Whether the folder holds the bytes that were written, and files beside its source are as they were."""
    with contextlib.suppress(DataError, OSError):
        read_meta(folder)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if any(state(Path(file)) != then for file, then in meta.get("outside", {}).items()):
            return False
        arrays = meta["arrays"].items()
        return all(digest(folder / name, folder.parent) == content for name, (_, content) in arrays)
    return False


def state(file: Path) -> list[int]:
    """What changes with a file's content: size and the times of the last change of content and inode."""
    found = os.stat(file)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _seal(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json with sizes and hashes of all arrays, and have all of it on the disk."""
    arrays = {}
    for file in sorted(folder.iterdir()):
        _sync(file)
        arrays[file.name] = [file.stat().st_size, digest(file, folder.parent)]
    sealed = {**meta, "arrays": arrays}
    (folder / "meta.json").write_text(json.dumps({**sealed, "digest": _digest_of(sealed)}), encoding="utf-8")
    _sync(folder / "meta.json")
    _sync(folder)


def _digest_of(meta: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(meta, sort_keys=True).encode())


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk before what follows."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data.cache = '{cache}' cannot hold decoded data sets ({error.strerror or error}): name a "
            f"folder that can be written and has room"
        ) from error
