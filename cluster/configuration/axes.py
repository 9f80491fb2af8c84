"""The axes of a grid: what varies, and how it is narrowed from the command line.

An axis is a dotted key with the values it takes, or a heading with labelled pieces of configuration, where
values alone would not do::

    grid:
      method:
        topk: {algorithm: {name: topk}}
        zerofl: {algorithm: {name: zerofl, mask_ratio_applies_to: both}}
      algorithm.sparsity: [0.9, 0.95]
      seed: [0, 1, 2]

A key that a choice does not have does not vary it: FedAvg, which is dense, runs once and not once a sparsity,
and an iid partition once whatever the alphas.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.configuration.choices import KINDS, fields, takes
from cluster.configuration.choices import names as names_of
from cluster.configuration.trees import ConfigError, apply_overrides, merge, nested, parse_override
from cluster.references import did_you_mean, file_name, nearest

Tree = dict[str, Any]


def points(source: object, tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Tree]:
    """The runs of a grid: their configurations, not yet validated, by name.

    Args:
        source: What the grid is called in messages.
        tree: The experiment with its section ``grid``.
        overrides: ``key=value``. One that names an axis narrows it: to these values, or to the pieces with
            these labels. One of a choice's own key, such as a hyperparameter, holds for every method (model,
            partition ...) of the grid that has it.

    Raises:
        ConfigError: An axis or override is wrong, or two different runs have one name.
    """
    tree = {key: value for key, value in tree.items() if key != "runs_at_once"}  # how, and not what, to run
    axes = _checked(source, tree.pop("grid"))
    fixed, of_choices = [], {}
    for override in overrides:
        key, value = parse_override(override)
        if key in axes:
            axes[key] = _narrowed(source, key, axes[key], value)
            continue
        for axis, values in axes.items():
            setting = [
                name
                for name, piece in _pieces(axis, values)
                if any(leaf == key or leaf.startswith(f"{key}.") for leaf in _leaves(piece))
            ]
            if setting:
                raise ConfigError(
                    f"{source}: {override}: the grid itself varies {axis}; write {axis}=... to choose, or "
                    f"write a grid of your own: here {key} is set by {', '.join(setting)}"
                )
        if _section_of(key):
            # Not on the base: a piece with another choice would drop it again, in silence.
            of_choices[key] = override
        else:
            fixed.append(override)
    tree = apply_overrides(tree, fixed)
    found: dict[str, Tree] = {}
    unknown = {axis for axis in axes if _section_of(axis)}
    unused = set(of_choices)
    for chosen in itertools.product(*(_pieces(axis, values) for axis, values in axes.items())):
        point, names = tree, []
        for axis, (_, piece) in zip(axes, chosen, strict=True):
            if not _section_of(axis):
                point = merge(point, piece)
        for axis, (name, piece) in zip(axes, chosen, strict=True):
            if _section_of(axis):
                if not _has(point, axis):
                    continue
                unknown.discard(axis)
                point = merge(point, piece)
            names.append(name)
        had = {key for key in of_choices if _has(point, key)}
        unused -= had
        point = apply_overrides(point, [of_choices[key] for key in sorted(had)])
        name = file_name("-".join(names)) or "run"
        if found.setdefault(name, point) != point:
            raise ConfigError(f"{source}: grid: two runs are named {name}")
    for key in sorted(unknown | unused):
        section = _section_of(key)
        known = [f"{section}.{field}" for name in names_of(section) for field in fields(section, name)]
        if key in known and key not in unused:
            continue
        near = nearest(key, known)
        hint = f"; did you mean {near}?" if near and near != key else ""
        what = "method" if section == "algorithm" else section
        where = f"{of_choices[key]}: no {what} of this grid" if key in unused else f"grid.{key}: no {what}"
        raise ConfigError(
            f"{source}: {where} has this {'hyperparameter' if what == 'method' else 'key'}{hint}"
        )
    return found


def only_point(source: object, tree: Mapping[str, Any], overrides: Sequence[str]) -> Tree:
    """The one run of a grid that was narrowed to it.

    Raises:
        ConfigError: There are several; says how to narrow it.
    """
    found = points(source, tree, overrides)
    if len(found) > 1:
        axes = ", ".join(f"{axis}=..." for axis in tree["grid"])
        raise ConfigError(
            f"{source} is a grid of {len(found)} runs: sparsyfed run {source}; or narrow it to one by {axes}"
        )
    return next(iter(found.values()))


def _checked(source: object, grid: Any) -> dict[str, Any]:
    if not isinstance(grid, Mapping):
        raise ConfigError(f"{source}: grid: expected axes, found {grid!r}")
    for axis, values in grid.items():
        if isinstance(values, Mapping) and values and all(isinstance(v, Mapping) for v in values.values()):
            continue
        if not isinstance(values, list) or not values:
            raise ConfigError(
                f"{source}: grid.{axis}: expected a list of values of the key {axis}, or labels with pieces "
                f"of configuration; found {values!r}"
            )
    return dict(grid)


def _narrowed(source: object, axis: str, values: Any, wanted: Any) -> Any:
    """The values or pieces that an override leaves of an axis."""
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if isinstance(values, Mapping):
        for label in wanted:
            if label not in values:
                hint = did_you_mean(label, values)
                raise ConfigError(f"{source}: {axis}={label}: it has {', '.join(values)}{hint}")
        return {label: values[label] for label in wanted}
    sections = {_short(axis, value): value for value in values if isinstance(value, Mapping)}
    return [sections.get(value, value) if isinstance(value, str) else value for value in wanted]


def _pieces(axis: str, values: Any) -> list[tuple[str, Tree]]:
    """Every value of an axis as a part of a run's name and a piece of configuration."""
    if isinstance(values, Mapping):
        return [(_plain(str(label)), piece) for label, piece in values.items()]
    return [(_short(axis, value), nested(axis, value)) for value in values]


def _section_of(key: str) -> str:
    """The section with a choice that a dotted key is a field of; empty for every other key."""
    section, _, field = key.partition(".")
    kind = KINDS.get(section)
    return section if kind and kind.default and field not in ("", "name", *kind.shared) else ""


def _has(point: Mapping[str, Any], key: str) -> bool:
    """Whether what a point chooses has a field of this name; what chooses nothing known is refused later."""
    section, _, field = key.partition(".")
    given = point.get(section, {})
    name = str(given.get("name", KINDS[section].default)) if isinstance(given, Mapping) else ""
    return takes(section, name, field)


def _leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys that a piece of configuration sets."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix


def _short(axis: str, value: Any) -> str:
    """A value as part of a run's name: method names as they are, others behind their key's last part."""
    if isinstance(value, Mapping):
        named = {k: v for k, v in value.items() if k != "name"}
        text = "-".join([str(value.get("name", axis)), *(f"{k}{v}" for k, v in named.items())])
    elif axis.endswith(".name"):
        text = str(value)
    else:
        text = f"{axis.rsplit('.', 1)[-1]}{value}"
    return _plain(text)


def _plain(text: str) -> str:
    return re.sub(r"[^\w.\-]+", "_", text)
