"""What an error is to who typed the command: expected or not, its exit code, its words."""

from __future__ import annotations

from cluster.disk import in_one_line
from cluster.references import UserError, root_of

#: Dependencies that only some commands need, by the name they are imported under.
_OPTIONAL = {
    **{name: name for name in ("ray", "mlflow", "optuna", "datasets", "matplotlib", "pandas", "scipy")},
    "sklearn": "scikit-learn",
}


def status_of(error: BaseException) -> int | None:
    """Exit code of an expected error; None for any other."""
    root = root_of(error)
    if isinstance(root, UserError):
        return root.status
    if isinstance(root, OSError):
        return 2 if in_one_line(root) else None
    return 2 if _missing_package(root) else None


def _missing_package(error: BaseException) -> str | None:
    """The package that only some commands need and that is not installed here, where that is the error."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    return _OPTIONAL.get(package) if isinstance(error, ModuleNotFoundError) else None


def in_words(error: BaseException, command: str) -> str:
    """What the user is told of an expected error of a command."""
    if isinstance(error, OSError):
        return in_one_line(error) or str(error)
    if (package := _missing_package(error)) is None:
        return str(error)
    return f"{command} needs {package}, which is not installed here: pip install {package}"
