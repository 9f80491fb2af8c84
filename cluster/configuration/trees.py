"""Configurations before they are typed: presets and files as nested values, and overrides on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from algorithms import hyperparameters
from cluster import __version__
from cluster.configuration.choices import KINDS, method_named
from cluster.configuration.earlier import EARLIER, earlier_keys
from cluster.configuration.plain_yaml import YamlError, as_value, parse, parse_word
from cluster.logins import without_logins
from cluster.references import UserError, did_you_mean, in_home, is_file, is_folder

_BEGIN, _END = b"# sparsyfed ", b"...\n"


class ConfigError(UserError):
    """A configuration that cannot run; the message names each key, what was found and what is allowed."""


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``key=value`` overrides to a nested mapping and return the new one.

    Overriding a ``name`` drops the fields of the old choice; ``sparsity`` alone stays.
    """
    result: dict[str, Any] = copy.deepcopy(dict(tree))
    parsed = []
    for override in overrides:
        parsed.append(parse_override(override))
    # Names first: ``algorithm.beta=1.3 algorithm.name=sparsyfed`` means the same in either order.
    for key, value in sorted(parsed, key=lambda item: not item[0].endswith(".name")):
        result = merge(result, nested(key, value))
    return result


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of ``key=value``; the value is YAML."""
    key, separator, text = override.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"{override!r} is not an override; write key=value, such as algorithm.beta=1.3")
    try:
        return key.strip(), parse_word(text)
    except YamlError as error:
        raise ConfigError(f"{key}: {text!r} is not a YAML value ({error}); quote what is text") from None


def load_tree(source: str | Path | Mapping[str, Any], seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Nested values, of a preset or YAML file too, over what they ``extend``: a base, or several in order."""
    if isinstance(source, Mapping):
        return _over_bases(dict(source), Path("values"), ())
    path = find(source).resolve()
    if str(path) in seen:
        raise ConfigError(f"{path}: extends itself ({' -> '.join((*seen, str(path)))})")
    tree = read_yaml(path)
    if {"name", *KINDS["partition"].shared, *EARLIER["partition"]} <= set(tree.get("partition") or {}):
        tree = _as_it_counted(tree)  # nobody typed all of these: a folder's config.yaml up to 0.1
    return _over_bases(tree, path, (*seen, str(path)))


def _over_bases(tree: dict[str, Any], path: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    bases = tree.pop("extends", None) or []
    below: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ConfigError(
                f"{path}: extends: expected presets or files, found {base!r}; presets: {', '.join(presets())}"
            )
        beside = path.parent / base  # beside the file that names it, wherever the command is typed
        below = merge(below, load_tree(beside if is_file(beside) else base, seen))
    return merge(below, tree)


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of keys and values as it is, whatever it extends.

    Raises:
        ConfigError: It cannot be read, or is no such file; names the line.
    """
    try:
        tree = parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except YamlError as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {'list' if isinstance(tree, list) else 'single value'}"
        raise ConfigError(f"{path}: expected keys and values, found {found}")
    return tree


def read_stored(path: Path) -> dict[str, Any]:
    """The configuration in a run's or study's folder.

    Of an older version's, passwords are hidden and the keys of choices that were not made fall away.

    Raises:
        ConfigError: It cannot be read; names the line. Or it is not whole.
    """
    tree = read_yaml(path)
    content = path.read_bytes()
    if content.startswith(_BEGIN) and not content.endswith(_END):
        raise ConfigError(f"{path}: is cut short: restore it (what is missing would be taken for defaults)")
    return _as_it_counted(without_logins(tree))


def stored_text(tree: Mapping[str, Any]) -> bytes:
    """What a folder keeps of a configuration: between two marks, by which one that was cut short is known."""
    text = yaml.safe_dump(dict(tree), sort_keys=False)
    return _BEGIN + f"{__version__}\n{text}".encode() + _END


def presets() -> dict[str, Path]:
    """The shipped presets by name."""
    return {path.stem: path for path in sorted(_preset_folder().glob("*.yaml"))}


def find(source: str | Path) -> Path:
    """The file a preset's name or a path stands for."""
    path = in_home(source, ConfigError)
    if is_file(path):
        return path
    known = presets()
    if str(source) in known:
        return known[str(source)]
    if is_folder(path):
        raise ConfigError(f"{source} is a folder; expected a preset or a YAML file")
    raise ConfigError(
        f"{source}: neither a file nor a preset; presets: {', '.join(known)}{did_you_mean(source, known)}"
    )


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``; a section whose ``name`` changes keeps only what fits the new choice."""
    result = dict(base)
    for key, value in top.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            if "name" in value and value["name"] != below.get("name") and key in (*KINDS, "pruner"):
                below = _kept_on_a_new_choice(key, below, str(value["name"]))
            result[key] = merge(below, value)
        else:
            result[key] = value
    return result


def nested(key: str, value: Any) -> dict[str, Any]:
    """``nested("a.b", 1)`` is ``{"a": {"b": 1}}``."""
    head, _, rest = key.partition(".")
    return {head: nested(rest, value) if rest else value}


def _preset_folder() -> Path:
    installed = Path(str(files("cluster"))) / "experiments"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "ray_configs" / "experiments"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``flatten({"a": {"b": 1}})`` is ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _as_it_counted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What an older version stored, without the keys that had no meaning for what was chosen.

    Those that were typed nevertheless stand in ``earlier``: they entered the hash, by which the folder's
    checkpoints are known.
    """
    flat = flatten(tree)
    names = {"shift.partition.name": flat["partition.name"]} if "partition.name" in flat else {}
    fallen = earlier_keys(names | flat)
    typed = {
        key: as_value(flat[key])
        for key, default in fallen.items()
        if key in flat and (flat[key] != default or key.startswith("shift."))
    }
    return _without(tree, set(fallen)) | ({"earlier": typed} if typed else {})


def _without(tree: Mapping[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if prefix + key not in keys
    }


def _kept_on_a_new_choice(section: str, old: Mapping[str, Any], name: str) -> dict[str, Any]:
    kept = set(KINDS[section].shared) if section in KINDS else set()
    method = method_named(name) if section == "algorithm" else None
    if method is not None and any(field.name == "sparsity" for field in hyperparameters(method)):
        kept.add("sparsity")  # methods are compared at one; a dense one has no such field
    return {key: value for key, value in old.items() if key in kept}
