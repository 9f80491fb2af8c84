"""The ground that all rooms stand on: errors that a user can put right, and names of a user's own code.

``module:attribute`` names a method, model, data set, sampler ... of one's own. This file imports nothing of
the project.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import os
import stat
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

#: The project's own packages and modules; one of a user's own cannot have their names.
_TAKEN = ("algorithms", "cluster", "sparsyfed", "tuning")


class UserError(ValueError):
    """An error whose message says everything: shown as one line, without a traceback.

    Attributes:
        status: Exit status of a command that ends with it: 2 for a mistake that the user can put right, 1
            where the run itself failed.
        passes: The machine is at fault, not what was asked of it: the same again may well succeed.
    """

    status: ClassVar[int] = 2
    passes: ClassVar[bool] = False


class DataError(UserError):
    """An unusable data set; the message names the key or file, what was found and what is allowed."""


def root_of(error: BaseException) -> BaseException:
    """What went wrong on the actor, where Ray has wrapped it."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return error


def may_pass(error: Exception) -> bool:
    """Whether a run that failed is worth another try; what the same run would run into again is not."""
    root = root_of(error)
    return root.passes if isinstance(root, UserError) else True


def reason_of(error: BaseException) -> str:
    """Why a run failed, as one line of a list."""
    root = root_of(error)
    text = next(iter(str(root).strip().splitlines()), "")
    return (
        text if isinstance(root, UserError) and text else f"{type(root).__name__}: {text}".removesuffix(": ")
    )


def nearest(word: object, known: Iterable[object]) -> str | None:
    """The known spelling that resembles ``word`` most; None where nothing does."""
    close = difflib.get_close_matches(str(word), [str(each) for each in known], n=1, cutoff=0.5)
    return close[0] if close else None


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """A hint to end a message with; empty where nothing known resembles ``word``."""
    close = nearest(word, known)
    return f"; did you mean {close}?" if close else ""


def installed(package: str) -> bool:
    """Whether a package can be imported here; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; False also for what no file can be called."""
    return no_path(str(path)) is None and Path(path).is_file()


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder; False also for what no folder can be called."""
    return no_path(str(path)) is None and Path(path).is_dir()


#: Bytes of a file's name on every common file system.
_LONGEST_NAME = 255


def file_name(text: str, longest: int = 160) -> str:
    """``text`` as (the greater part of) a file's name: where it is too long, cut and told apart by a hash."""
    if len(text.encode()) <= longest:
        return text
    mark = hashlib.sha256(text.encode()).hexdigest()[:12]
    return text.encode()[: longest - len(mark) - 1].decode(errors="ignore") + f"-{mark}"


def no_path(text: str) -> str | None:
    """Why nothing can lie at a path that is called so; None where something can."""
    if "\0" in text:
        return "a path has no zero byte in it"
    longest = max((part for part in text.split("/")), key=lambda part: len(part.encode()))
    size = len(longest.encode())
    if size <= _LONGEST_NAME:
        return None
    return f"a name in a path has at most {_LONGEST_NAME} bytes, found {longest[:20]}... with {size:,}"


def in_home(path: str | Path, error: type[UserError]) -> Path:
    """``path`` with ``~`` or ``~user`` in front written out.

    Args:
        path: A path as a user writes it.
        error: Class to raise where no such home folder is known, or nothing can be called so.
    """
    if (reason := no_path(str(path))) is not None:
        raise error(reason)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(f"there is no home folder {Path(path).parts[0]}; give the whole path") from None


def default_cache() -> Path:
    """Folder of decoded data, in the user's home."""
    ensure_home()
    return Path.home() / ".cache" / "sparsyfed"


def ensure_home() -> None:
    """Give a user without a home one in the machine's temporary folder, for this process and what it starts.

    A container's user may have neither HOME nor an entry in passwd, and Ray and MLflow do not start then.

    Raises:
        UserError: Somebody else may write to what lies there.
    """
    try:
        Path.home()
        return
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"sparsyfed-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise UserError(f"there is no home folder, and {folder} is not this user's alone; set HOME to one")
    os.environ["HOME"] = str(folder)


def load_reference(key: str, reference: str, error: type[UserError]) -> Any:
    """Import what ``module:attribute`` names; the working directory is searched last.

    Args:
        key: Configuration key, for the message.
        reference: The dotted module, a colon, and the attribute.
        error: Class to raise when the module or the attribute is missing. A failure inside the user's module
            keeps its own traceback.
    """
    module_name, _, attribute = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        # Last, so that a file named like a library does not hide it.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module_name}.".startswith(f"{missing.name}."):
            raise
        raise error(
            f"{key} = {reference!r}: there is no module {missing.name!r} in {here} or on the Python path"
            + _clash(module_name)
        ) from missing
    except (ValueError, TypeError) as wrong:
        # An empty or relative name; what the module itself raises comes with frames of its own.
        if wrong.__traceback__ is not None and _raised_by_the_module(wrong):
            raise
        raise error(f"{key} = {reference!r}: expected module:attribute, such as my_module:thing") from None
    if not attribute or not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise error(
            f"{key} = {reference!r}: module {module_name!r} has no {attribute!r}"
            + did_you_mean(attribute, names)
            + _clash(module_name)
        )
    return getattr(module, attribute)


def _clash(module_name: str) -> str:
    """What to do about a module of one's own with the name of one of the project's packages."""
    package = module_name.partition(".")[0]
    if package not in _TAKEN:
        return ""
    own = any((Path.cwd() / each).exists() for each in (package, f"{package}.py"))
    return f"; {package} is a package of sparsyfed itself: rename your own" if own else ""


def _raised_by_the_module(error: BaseException) -> bool:
    """Whether the innermost frame is neither this file's nor the import machinery's."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    source = step.tb_frame.f_code.co_filename if step is not None else ""
    return source not in (__file__, importlib.__file__) and not source.startswith("<frozen importlib")
