"""Declared hyperparameters: one place for default, range, scale, choices, meaning and source.

A method's fields are declared so, and those of everything else that a configuration chooses by name.
"""

from __future__ import annotations

import re
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
        above: The valid values are above it, and finite (numbers only).
        log: Search on a logarithmic scale.
        choices: The valid values (categorical only).
        search: ``(low, high)`` or the choices that a study searches; None when it is not tuned.
        meaning: One sentence.
        source: Paper and section.
        kind: ``float``, ``int``, ``bool``, ``str``, ``patterns`` (a tuple of name patterns), ``ints`` or
            ``Mapping`` (keys and values, or the name of a file of them).
        optional: Whether None is valid too.
    """

    name: str
    default: Any
    low: float | None
    high: float | None
    above: float | None
    log: bool
    choices: tuple[Any, ...] | None
    search: tuple[Any, ...] | None
    meaning: str
    source: str
    kind: str
    optional: bool


def hyperparameter(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    log: bool = False,
    choices: tuple[Any, ...] | None = None,
    search: tuple[Any, ...] | None = None,
    source: str = "",
) -> Any:
    """Declare a field of a method or of another choice; see :class:`Hyperparameter` for the arguments.

    Its type is that of the default; of None it is read from the annotation, such as ``float | None``.
    """
    metadata = {
        "low": low,
        "high": high,
        "above": above,
        "log": log,
        "choices": choices,
        "search": search,
        "meaning": meaning,
        "source": source,
    }
    return field(default=default, metadata=metadata)


def hyperparameters(declared: Any) -> tuple[Hyperparameter, ...]:
    """The hyperparameters a method or other choice (class or instance) declares, in order."""
    return tuple(_described(f) for f in fields(declared))


def _described(declared: Field[Any]) -> Hyperparameter:
    default = declared.default
    annotated = declared.type if isinstance(declared.type, str) else str(declared.type)
    words = re.findall(r"\w+", annotated)
    if isinstance(default, tuple):
        kind = "ints" if default and all(isinstance(item, int) for item in default) else "patterns"
    else:
        kind = type(default).__name__
    if default is None:
        kind = next((word for word in words if word in ("float", "int", "bool", "str", "Mapping")), "")
    if default is MISSING or "meaning" not in declared.metadata or not kind:
        raise TypeError(f"declare {declared.name} with hyperparameter(default, meaning, ...)")
    optional = default is None or "None" in words or "Optional" in words
    return Hyperparameter(
        name=declared.name, default=default, kind=kind, optional=optional, **declared.metadata
    )
