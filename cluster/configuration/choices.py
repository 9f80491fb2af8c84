"""Choices by name: what ``algorithm.name``, ``server.name`` and ``module:attribute`` stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from algorithms import Algorithm, Hyperparameter, hyperparameters, registry
from cluster.references import UserError, did_you_mean, load_reference


class ChoiceError(UserError):
    """An unknown name or field, or a value outside its declaration; says what is allowed."""


def build_choice(
    section: str, name: str, options: Mapping[str, Any], known: Mapping[str, type], base: type
) -> Any:
    """Build the declared dataclass that a section's name stands for, every option checked.

    Args:
        section: Key of the section, for messages.
        name: A name in ``known``, or ``module:attribute``.
        options: Field values.
        known: Classes by name.
        base: What a class of one's own derives from.

    Raises:
        ChoiceError: One line for each unknown name or field, wrong type and value out of range.
    """
    if ":" in name:
        chosen = own_class(f"{section}.name", name, base)
    elif name in known:
        chosen = known[name]
    else:
        raise ChoiceError(
            f"{section}.name: {name!r} is unknown; allowed are {', '.join(known)}, "
            f"or module:attribute of your own{did_you_mean(name, known)}"
        )
    declared = {parameter.name: parameter for parameter in hyperparameters(chosen)}
    problems, values = [], {}
    for key, value in options.items():
        if key not in declared:
            fields = ", ".join(declared) or "none"
            problems.append(
                f"{section}.{key}: {name} has no such field; its fields: {fields}"
                + did_you_mean(key, declared)
            )
            continue
        try:
            values[key] = checked(declared[key], value)
        except ChoiceError as error:
            problems.append(f"{section}.{key}: {error}")
    if problems:
        raise ChoiceError("\n".join(problems))
    try:
        return chosen(**values)
    except ValueError as error:
        raise ChoiceError(f"{section}: {error}") from error


def own_class(key: str, reference: str, base: type) -> Any:
    """The class that ``module:attribute`` names.

    Raises:
        ChoiceError: It is none, does not derive from ``base``, or has a field without a declaration.
    """
    found = load_reference(key, reference, ChoiceError)
    if not (isinstance(found, type) and issubclass(found, base)):
        kind = f"a class of its own, {found!r}" if isinstance(found, type) else f"{type(found).__name__}"
        raise ChoiceError(f"{key} = {reference!r}: expected a subclass of {base.__name__}, found {kind}")
    try:
        hyperparameters(found)
    except TypeError as error:
        raise ChoiceError(f"{key} = {reference!r}: {error}") from None
    return found


def method_named(name: str) -> type[Algorithm] | None:
    """The method that ``algorithm.name`` stands for; None where no method is called so."""
    if ":" not in name:
        return registry().get(name)
    found: type[Algorithm] = own_class("algorithm.name", name, Algorithm)
    return found


def checked(parameter: Hyperparameter, value: Any) -> Any:
    """``value`` as the declared type.

    Raises:
        ChoiceError: It is of another type, not among the choices or outside the range.
    """
    if parameter.kind == "patterns":
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise ChoiceError(f"expected a list of name patterns, found {value!r}")
        return tuple(items)
    if parameter.kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value).__name__ != parameter.kind:
        raise ChoiceError(f"expected {parameter.kind}, found {value!r}")
    if parameter.choices is not None and value not in parameter.choices:
        raise ChoiceError(
            f"{value!r} is none of {', '.join(map(str, parameter.choices))}"
            + did_you_mean(value, parameter.choices)
        )
    low, high = parameter.low, parameter.high
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        allowed = f"{'-inf' if low is None else low} to {'inf' if high is None else high}"
        raise ChoiceError(f"{value!r} is out of range; allowed: {allowed}")
    return value
