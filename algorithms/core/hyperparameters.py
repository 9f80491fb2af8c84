"""Declared hyperparameters: one place for default, range, scale, choices, meaning and source."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Hyperparameter:
    """What is known of one hyperparameter, from its declaration.

    Attributes:
        name: Field name, as in ``algorithm.<name>``.
        default: Published default.
        low: Smallest valid value (numbers only).
        high: Largest valid value (numbers only).
        log: Search on a logarithmic scale.
        choices: The valid values (categorical only).
        search: ``(low, high)`` or the choices that a study searches; None when it is not tuned.
        meaning: One sentence.
        source: Paper and section.
        kind: ``float``, ``int``, ``bool``, ``str`` or ``patterns`` (a tuple of name patterns).
    """

    name: str
    default: Any
    low: float | None
    high: float | None
    log: bool
    choices: tuple[Any, ...] | None
    search: tuple[Any, ...] | None
    meaning: str
    source: str
    kind: str


def hyperparameter(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    choices: tuple[Any, ...] | None = None,
    search: tuple[Any, ...] | None = None,
    source: str = "",
) -> Any:
    """Declare a field of a method or server optimizer; see :class:`Hyperparameter` for the arguments."""
    metadata = {
        "low": low,
        "high": high,
        "log": log,
        "choices": choices,
        "search": search,
        "meaning": meaning,
        "source": source,
    }
    return field(default=default, metadata=metadata)


def hyperparameters(declared: Any) -> tuple[Hyperparameter, ...]:
    """The hyperparameters a method or server optimizer (class or instance) declares, in order."""
    return tuple(_described(f) for f in fields(declared))


def _described(declared: Field[Any]) -> Hyperparameter:
    if declared.default is MISSING or "meaning" not in declared.metadata:
        raise TypeError(f"declare {declared.name} with hyperparameter(default, meaning, ...)")
    default = declared.default
    kind = "patterns" if isinstance(default, tuple) else type(default).__name__
    return Hyperparameter(name=declared.name, default=default, kind=kind, **declared.metadata)
