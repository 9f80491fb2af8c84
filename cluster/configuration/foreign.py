"""Code that a configuration names: which, and whether the one who resumes a run wrote its folder.

A run's ``config.yaml`` may name ``module:attribute``, which is imported and called when a run starts. Reading
a folder never does that. A folder that somebody else made is resumed only once its code is trusted.
"""

from __future__ import annotations

import os
import pwd
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.configuration.choices import KINDS
from cluster.disk import naming
from cluster.references import UserError


class ForeignCodeError(UserError):
    """A folder of somebody else names code; says whose, which, and how to run it nevertheless."""


def references_in(tree: Mapping[str, Any]) -> dict[str, str]:
    """``module:attribute`` by key, in an experiment, a grid or a study, none of it imported."""
    return {key: text for key, text in _names(tree, ()) if ":" in text}


def _names(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _names(below, (*path, *str(key).split(".")))
    elif isinstance(value, list):
        for place, below in enumerate(value):
            yield from _names(below, (*path, str(place)))
    elif isinstance(value, str) and _is_name([part for part in path if not part.isdigit()]):
        yield ".".join(path), value


def _is_name(path: list[str]) -> bool:
    # A grid lists names under ``algorithm``, ``algorithm.name`` or a label; a study's entries stand alone.
    if path[:1] == ["tracking"]:  # a tag may be called as it likes
        return False
    if path == ["callbacks"]:
        return True
    if path[-2:] == ["study", "methods"] or path[-3:] == ["study", "methods", "name"]:
        return True
    return path[-1] in KINDS or (path[-1] == "name" and len(path) > 1 and path[-2] in KINDS)


# ---------------------------------------------------------------------------------------- whose folder it is


def sign(file: Path) -> None:
    """Note beside a configuration that it was written here, so that it counts as one's own.

    What is noted is its inode and the time of its last change, which no copy, archive, download or editor
    can bring along.
    """
    with naming(file):
        _signature(file).write_text(_identity(file))


def whose(file: Path) -> str | None:
    """Whose a configuration is, in words; None where this user had it written in this very place."""
    found = file.stat()
    if found.st_uid != os.geteuid():
        return f"belongs to {_user(found.st_uid)}"
    if found.st_mode & 0o022:
        return f"has a {file.name} that others may write"
    try:
        own = _signature(file).stat().st_uid == os.geteuid() and _signature(file).read_text() == _identity(
            file
        )
    except OSError:
        own = False
    return None if own else f"was copied here, or its {file.name} was changed"


def refuse_foreign_code(
    place: object, tree: Mapping[str, Any], whose_it_is: str | None, command: str
) -> None:
    """Refuse a folder of somebody else that names code.

    Args:
        place: What the user called it.
        tree: Its configuration.
        whose_it_is: See :func:`whose`; None for one's own.
        command: What would run it: with ``--trust`` behind it, it does.

    Raises:
        ForeignCodeError: It does.
    """
    named = references_in(tree)
    if whose_it_is is None or not named:
        return
    shown = ", ".join(f"{key} = {reference}" for key, reference in named.items())
    raise ForeignCodeError(
        f"{place} {whose_it_is}, and would run the code that it names: {shown}. "
        f"Where you trust that: {command} {shlex.quote(str(place))} --trust"
    )


def _signature(file: Path) -> Path:
    return file.with_name(f".{file.name}.here")


def _identity(file: Path) -> str:
    # Of the open file: a network file system then asks its server instead of a cache.
    with open(file, "rb") as opened:
        found = os.fstat(opened.fileno())
    return f"{found.st_ino} {found.st_ctime_ns}\n"


def _user(number: int) -> str:
    try:
        return f"{pwd.getpwuid(number).pw_name} (uid {number})"
    except KeyError:
        return f"uid {number}"
