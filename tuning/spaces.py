"""Search spaces: declared ranges as Optuna distributions, each with the value that trial 0 starts from.

A parameter is named by its dotted key, ``algorithm.beta`` or ``local.lr``, in the study file, in Optuna and
in MLflow alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from algorithms import Hyperparameter, hyperparameters
from cluster.configuration.choices import ChoiceError, checked
from cluster.configuration.config import Config, validate
from cluster.configuration.trees import ConfigError, merge, nested
from cluster.references import did_you_mean

#: Share of a range next to its end that counts as being on its boundary.
_EDGE = 0.01

#: Sections whose keys may be tuned for all methods alike.
SHARED_SECTIONS = ("local", "server")


@dataclass(frozen=True)
class Dimension:
    """One tuned key.

    Attributes:
        key: Dotted key of the configuration.
        distribution: What is searched.
        default: The value of trial 0.
        low: Smallest valid value where the search could be extended downwards, else None.
        high: The same upwards.
    """

    key: str
    distribution: BaseDistribution
    default: Any
    low: float | None = None
    high: float | None = None

    def boundary(self, value: Any) -> str | None:
        """Which end of its range a value lies on, and whether the range could be extended; None within it."""
        space = self.distribution
        if not isinstance(space, FloatDistribution | IntDistribution):
            return None
        scale = math.log if space.log else float
        margin = _EDGE * (scale(space.high) - scale(space.low))
        for end, limit, name in ((space.low, self.low, "lower"), (space.high, self.high, "upper")):
            if abs(scale(value) - scale(end)) <= margin:
                valid = limit is not None and math.isclose(limit, end)
                return f"{name} end {end:g}" + (", the limit of what is valid" if valid else "")
        return None

    def describe(self) -> str:
        """The range in a few characters, such as ``0.01 to 1 (log)``."""
        space = self.distribution
        if isinstance(space, CategoricalDistribution):
            return ", ".join(map(str, space.choices))
        assert isinstance(space, FloatDistribution | IntDistribution)
        return f"{space.low:g} to {space.high:g}" + (" (log)" if space.log else "")


Space = dict[str, Dimension]


def own_space(
    where: str, method: type, config: Config, fixed: Sequence[str], searches: Mapping[str, Any]
) -> Space:
    """What is tuned of one method: its declared ranges, or those that the study file gives instead.

    Args:
        where: Place in the study file, for messages.
        method: The method's class.
        config: Its configuration in trial 0.
        fixed: Fields that the study file sets, and does not give a range: they are not tuned.
        searches: Ranges or choices by field that replace the declared ones.

    Raises:
        ConfigError: A field is unknown, or a range is reversed, invalid or leaves out trial 0's value.
    """
    declared = {parameter.name: parameter for parameter in hyperparameters(method)}
    for field in searches:
        if field not in declared:
            raise ConfigError(
                f"{where}.search.{field}: no such field; its fields: {', '.join(declared) or 'none'}"
                + did_you_mean(field, declared)
            )
    values = vars(config.method)
    space: Space = {}
    for field, parameter in declared.items():
        key, value = f"algorithm.{field}", values[field]
        if field in searches:
            asked = f"{where}.search.{field}"
            distribution = _parse(asked, searches[field], parameter.kind)
            _check_valid(asked, parameter, distribution)
            _check_contains(asked, distribution, value, f"{field}: {_ends(distribution)[0]}")
        elif field in fixed or parameter.search is None:
            continue
        else:
            distribution = _declared(parameter, value)
        space[key] = Dimension(key, distribution, value, parameter.low, parameter.high)
    return space


def shared_space(shared: Mapping[str, Any], config: Config) -> Space:
    """What is tuned for every method alike: keys of ``local`` and ``server``.

    Raises:
        ConfigError: A key is unknown or not of these sections, or its range is wrong.
    """
    flat = config.flat()
    tunable = [
        key
        for key, value in flat.items()
        if key.split(".")[0] in SHARED_SECTIONS and not key.endswith(".name") and value is not None
    ]
    space: Space = {}
    for key, asked in shared.items():
        where = f"study.shared.{key}"
        if key not in tunable:
            raise ConfigError(
                f"{where}: not a key that can be tuned for all methods; known here: {', '.join(tunable)}"
                + did_you_mean(key, tunable)
            )
        value = flat[key]
        distribution = _parse(where, asked, type(value).__name__)
        _check_contains(where, distribution, value, f"`{key}` of the base experiment")
        for end in _ends(distribution):
            try:
                validate(merge(config.dump(), nested(key, end)))
            except ConfigError as error:
                raise ConfigError(f"{where}: {end!r} is not valid: {error}") from None
        space[key] = Dimension(key, distribution, value)
    return space


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """``config`` with a trial's values.

    Raises:
        ConfigError: The values are valid one by one, but not together.
    """
    tree = config.dump()
    for key, value in values.items():
        tree = merge(tree, nested(key, value))
    return validate(tree)


def _declared(parameter: Hyperparameter, default: Any) -> BaseDistribution:
    """The declared range, widened to the published default where that lies outside (0 for "off")."""
    assert parameter.search is not None
    if parameter.kind not in ("float", "int"):
        return CategoricalDistribution(list(parameter.search))
    low, high = min(*parameter.search, default), max(*parameter.search, default)
    log = parameter.log and low > 0
    return (FloatDistribution if parameter.kind == "float" else IntDistribution)(low, high, log=log)


def _parse(where: str, asked: Any, kind: str) -> BaseDistribution:
    """``{low, high, log}`` or a list of choices as a distribution of a key of the given type."""
    if isinstance(asked, list) and len(asked) > 1:
        return CategoricalDistribution(asked)
    shape = "{low: 0.01, high: 1, log: true} or a list of at least two choices"
    if not isinstance(asked, Mapping) or not {"low", "high"} <= asked.keys() <= {"low", "high", "log"}:
        raise ConfigError(f"{where}: expected {shape}, found {asked!r}")
    if kind not in ("float", "int"):
        raise ConfigError(f"{where}: takes a list of choices, found {dict(asked)!r}")
    low, high, log = asked["low"], asked["high"], asked.get("log", False)
    numbers = (int,) if kind == "int" else (int, float)
    if not all(isinstance(end, numbers) and not isinstance(end, bool) for end in (low, high)):
        raise ConfigError(f"{where}: low and high are {kind}s, found {low!r} and {high!r}")
    if not low < high:
        raise ConfigError(f"{where}: the range is reversed or empty, low {low!r} is not below high {high!r}")
    if not isinstance(log, bool) or (log and low <= 0):
        raise ConfigError(
            f"{where}: log is true or false, and true only above 0; found log {log!r}, low {low!r}"
        )
    if kind == "int":
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _check_valid(where: str, parameter: Hyperparameter, distribution: BaseDistribution) -> None:
    for end in _ends(distribution):
        try:
            checked(parameter, end)
        except ChoiceError as error:
            raise ConfigError(f"{where}: {error}") from None


def _check_contains(where: str, distribution: BaseDistribution, value: Any, fix: str) -> None:
    if isinstance(distribution, CategoricalDistribution):
        inside = value in distribution.choices
    else:
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        inside = distribution.low <= value <= distribution.high
    if not inside:
        raise ConfigError(f"{where}: leaves out {value!r}, which trial 0 starts from; widen it or set {fix}")


def _ends(distribution: BaseDistribution) -> Sequence[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return (distribution.low, distribution.high)
