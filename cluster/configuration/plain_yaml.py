"""YAML as a configuration wants it: text stays as written, nothing is lost, nothing explodes.

YAML 1.1 takes ``yes`` for a bool, ``2024-01-01`` for a date and ``1e-3`` for text. Here the field decides:
numbers and the words for true and false remember how they were written (:func:`as_text`,
:func:`as_value`). Keys are text. A key that stands twice is an error, and so are aliases that multiply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import yaml

#: More nodes than any experiment has; aliases of aliases reach it with a few hundred bytes.
_MOST_NODES = 100_000

_WORD = "tag:sparsyfed,word"
_TRUE = ("yes", "on", "true")


class YamlError(ValueError):
    """What is wrong, in one line, with the number of the line where that is known."""


class Word(str):
    """Another spelling of true or false, such as ``no``: text where text is wanted."""


class Float(float):
    """A number that remembers how it was written."""

    text: str


class Int(int):
    """A whole number that remembers how it was written."""

    text: str


def parse(content: bytes | str) -> Any:
    """The values of one YAML document; None where it holds nothing.

    Raises:
        YamlError: It is no YAML, or a key stands twice, or its aliases multiply.
    """
    try:
        loader = _Loader(content)
        try:
            node = loader.get_single_node()
            _measure(node, {})
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise YamlError(_in_one_line(error, content)) from None
    except (yaml.reader.ReaderError, UnicodeError) as error:
        reason = getattr(error, "reason", error)
        raise YamlError(f"not UTF-8 text ({reason}, byte {getattr(error, 'position', '?')})") from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None
    except RecursionError:
        raise YamlError("nested too deeply") from None


def parse_word(text: str) -> Any:
    """The value of one word of a command line, where comments, anchors and block style are plain text.

    Raises:
        YamlError: Its brackets hold no YAML.
    """
    text = text.strip()
    if "\n" in text or text.startswith(("{", "[", "!!")):
        return parse(text)
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError:
        return text
    plain = isinstance(node, yaml.ScalarNode) and not node.style and node.value == text
    quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"') and text[-1] == node.style
    return parse(text) if plain or quoted or not text else text


def as_text(value: Any) -> Any:
    """``value``, and what it holds, as text that was written so; None stays None."""
    if isinstance(value, (list, tuple)):
        return [as_text(item) for item in value]
    if isinstance(value, Mapping):
        return {key: as_text(item) for key, item in value.items()}
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (Float, Int)):
        return value.text
    return str(value) if isinstance(value, (int, float, str)) else value


def as_value(value: Any) -> Any:
    """``value``, and what it holds, as the bool or number that it means where no text is wanted."""
    if isinstance(value, list):
        return [as_value(item) for item in value]
    if isinstance(value, Mapping):
        return {key: as_value(item) for key, item in value.items()}
    if isinstance(value, Word):
        return value.lower() in _TRUE
    if isinstance(value, Float):
        return float(value)
    return int(value) if isinstance(value, Int) else value


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = dict(yaml.SafeLoader.yaml_constructors)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def construct_any_map(self, node: yaml.MappingNode) -> Any:
        found: dict[str, Any] = {}
        yield found
        found.update(self.construct_mapping(node))

    def construct_word(self, node: yaml.ScalarNode) -> Word:
        return Word(node.value)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        digits = node.value.replace("_", "").lower()
        base = {"0x": 16, "0o": 8, "0b": 2}.get(digits.lstrip("+-")[:2], 10)
        value = int(digits, base)
        if str(value) == node.value:
            return value
        kept = Int(value)
        kept.text = node.value
        return kept

    def construct_float(self, node: yaml.ScalarNode) -> float:
        digits = node.value.replace("_", "").lower()
        value = float(re.sub(r"\.(?=inf|nan)", "", digits))
        if repr(value) == node.value:
            return value
        kept = Float(value)
        kept.text = node.value
        return kept


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"true|false", "tf"),
    (_WORD, r"True|TRUE|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", "TFyYnNoO"),
    ("tag:yaml.org,2002:int", r"[-+]?(0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))
for _tag, _constructor in (
    (_WORD, _Loader.construct_word),
    ("tag:yaml.org,2002:map", _Loader.construct_any_map),
    ("tag:yaml.org,2002:int", _Loader.construct_int),
    ("tag:yaml.org,2002:float", _Loader.construct_float),
):
    _Loader.add_constructor(_tag, _constructor)


def _measure(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many nodes there are once aliases are written out; refuses too many, and keys that stand twice."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise YamlError(f"line {node.start_mark.line + 1}: an alias that stands for what it lies in")
        return known[id(node)]
    known[id(node)] = 0  # until it is known: itself inside itself
    children = list(node.value)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [value for _, value in node.value]
    size = 1 + sum(_measure(child, known) for child in children)
    if size > _MOST_NODES:
        raise YamlError(
            f"line {node.start_mark.line + 1}: {size:,} values, most of them by aliases (*name); "
            f"allowed are {_MOST_NODES:,}"
        )
    known[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise YamlError(f"line {line}: a key is a word, found a list or a mapping")
        if key.value in lines:
            raise YamlError(
                f"line {line}: {key.value} stands there twice, first in line {lines[key.value]}; "
                "put both into one, or delete one"
            )
        lines[key.value] = line


def _in_one_line(error: yaml.MarkedYAMLError, content: bytes | str) -> str:
    mark = error.problem_mark or error.context_mark
    what = " ".join(str(error.problem or error.context).split())
    if mark is None:
        return what
    if "another document" in what:
        what = "a second document (---) begins; expected one"
    lines = (content.decode(errors="replace") if isinstance(content, bytes) else content).splitlines()
    if "\t" in "".join(lines[mark.line : mark.line + 1])[: mark.column + 1]:
        what += "; indent with blanks, not with tabs"
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}"
