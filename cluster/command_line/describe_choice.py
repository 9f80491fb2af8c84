"""``sparsyfed describe SECTION [NAME]``: what there is to choose, from its declarations alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from algorithms import Algorithm, Hyperparameter, hyperparameters
from cluster.configuration.choices import (
    KINDS,
    ChoiceError,
    built_in,
    choice_base,
    choice_named,
    kind_of,
    names,
)
from cluster.configuration.config import Config
from cluster.configuration.device_sections import AvailabilityChoice
from cluster.configuration.sections import AdapterChoice, OptimizerChoice
from cluster.configuration.trees import presets
from cluster.references import did_you_mean, is_file, is_folder


def choice_asked(words: Sequence[str]) -> tuple[str, str | None] | None:
    """Section and name of the choice that the words of a command line ask about; None for an experiment.

    Args:
        words: A section, or a section and a name in it, a method's name, or ``module:attribute``.

    Raises:
        ChoiceError: There are two words, and the first is no section; or one that means nothing.
    """
    first = words[0]
    if len(words) > 1:
        if first not in KINDS:
            raise ChoiceError(
                f"describe {' '.join(words)}: {first!r} is no section with choices; there are "
                f"{', '.join(KINDS)}{did_you_mean(first, KINDS)}"
            )
        return first, words[1] if KINDS[first].base else None  # data has the same keys whatever its name
    if is_file(first) or is_file(f"{first}/config.yaml"):
        return None
    if first in KINDS:
        return first, None
    if first in names("algorithm"):
        return "algorithm", first
    if ":" in first and not is_folder(first):
        return kind_of(first, "describe"), first
    if not is_folder(first) and first not in presets():
        known = [*KINDS, *names("algorithm"), *presets()]
        raise ChoiceError(
            f"describe {first}: neither a section ({', '.join(KINDS)}), a method "
            f"({', '.join(names('algorithm'))}), a preset, a file nor a folder{did_you_mean(first, known)}"
        )
    return None


def describe_choice(console: Console, section: str, name: str | None) -> None:
    """Print what a choice is and which fields it has; without a name, what there is to choose."""
    if name is None:
        _describe_section(console, section)
    else:
        _describe(console, section, name, choice_named(section, name, f"describe {section}"))


def first_line(described: Any) -> str:
    """What a choice says of itself, in a line."""
    first = inspect.cleandoc(described.__doc__ or "").partition("\n")[0].replace("``", "")
    return first.removeprefix(f"{getattr(described, 'name', '')}: ")


# --------------------------------------------------------------------------------------------- a section


def _describe_section(console: Console, section: str) -> None:
    kind = KINDS[section]
    console.print(Text(section, "bold") + Text(f"  {kind.meaning}", "dim"))
    known = built_in(section)
    if known:
        table = _table(f"{_path(section)}name")
        table.add_column("its fields and their defaults")
        table.add_column("what it is", ratio=1)
        for name, choice in known.items():
            fields = [f"{field.name}={_value(field.default)}" for field in hyperparameters(choice)]
            table.add_row(name, "\n".join(fields) or "-", first_line(choice))
        console.print(table)
    _print_shared(console, section)
    if kind.base:
        function = ", or a function" if hasattr(choice_base(section), "of") else ""
        console.print(
            f"or module:attribute of your own: a subclass of {kind.base.replace(':', '.')}{function}",
            soft_wrap=True,
        )
    if known:
        *_, last = known
        console.print(f"sparsyfed describe {section} {last}", style="bold")


def _print_shared(console: Console, section: str) -> None:
    """The keys of a section that every choice has."""
    inner = {"availability": AvailabilityChoice, "optimizer": OptimizerChoice, "adapter": AdapterChoice}
    model: Any = inner[section] if section in inner else Config.model_fields[section].annotation
    keys = {key: field for key, field in model.model_fields.items() if key != "name"}
    if not keys:
        return
    table = _table(_path(section))
    table.add_column("default")
    table.add_column("meaning, whatever is chosen", ratio=1)
    for key, field in keys.items():
        table.add_row(key, _value(field.get_default(call_default_factory=True)), field.description or "")
    console.print(table)


# ---------------------------------------------------------------------------------------------- a choice


def _describe(console: Console, section: str, name: str, choice: Any) -> None:
    console.print(Text(getattr(choice, "name", None) or name, "bold"))
    _, _, rest = inspect.cleandoc(choice.__doc__ or "").partition("\n")
    console.print(f"{first_line(choice)}\n{rest}".rstrip())
    method = choice if isinstance(choice, type) and issubclass(choice, Algorithm) else None
    if method is not None and method.paper:
        console.print(Text(f"paper  {method.paper}", "dim"))
    if method is not None and method.weighting == "equal":
        console.print("Every client's update weighs the same, unless aggregation.weighting=samples.")
    console.print(Text(f"file   {choice.__module__.replace('.', '/')}.py", "dim"))
    if method is not None and method.departures:
        console.print("\nBy default this differs from what its authors run:")
        for departure in method.departures:
            console.print(f"- {departure}")
    declared = hyperparameters(choice) if hasattr(choice, "__dataclass_fields__") else ()
    if declared:
        console.print(_fields(section, declared))
    else:
        console.print(f"\nIt has no {'hyperparameters' if method else 'fields'} of its own.")
    if KINDS[section].shared:
        _print_shared(console, section)
    typical = [p.name for p in declared if p.search] + [p.name for p in declared if p.default is not None]
    key = next(iter(typical), None)
    example = "" if key is None else f"{key}={_value(getattr(choice, key))}"
    console.print(_command(section, name, example), style="bold")


def _command(section: str, name: str, example: str) -> str:
    if section == "availability":
        options = f", {example.replace('=', ': ')}" if example else ""
        return (
            f"sparsyfed run devices.profile=phones 'devices.tiers.mid.availability={{name: {name}{options}}}'"
        )
    path = _path(section)
    return f"sparsyfed run {path}name={name}" + (f" {path}{example}" if example else "")


def _path(section: str) -> str:
    inner = {"availability": "availability of a tier: ", "optimizer": "local.optimizer."}
    return inner.get(section, f"{section}.")


def _fields(section: str, declared: tuple[Hyperparameter, ...]) -> Table:
    table = _table(_path(section))
    table.add_column("default")
    table.add_column("allowed")
    tuned = any(parameter.search is not None for parameter in declared)
    if tuned:
        table.add_column("tuned in")
    table.add_column("meaning", ratio=1)
    for parameter in declared:
        meaning = Text(parameter.meaning)
        if parameter.source:
            meaning.append(f" [{parameter.source}]", "dim")
        cells = [parameter.name, _value(parameter.default), _allowed(parameter)]
        table.add_row(*cells, *[_searched(parameter)] * tuned, meaning)
    return table


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(first, style="bold", overflow="fold", min_width=10)
    return table


def _allowed(parameter: Hyperparameter) -> str:
    null = ", null" if parameter.optional else ""
    if parameter.choices is not None:
        return "\n".join(map(str, parameter.choices))
    if parameter.kind == "bool":
        return "true, false"
    if parameter.above is not None:
        return f"above {_value(parameter.above)}{null}"
    if parameter.low is None and parameter.high is None:
        words = {
            "patterns": "name patterns",
            "str": "text",
            "ints": "whole numbers",
            "Mapping": "keys and values, or a file",
        }
        return words.get(parameter.kind, f"any {parameter.kind}") + null
    low = "" if parameter.low is None else _value(parameter.low)
    high = "" if parameter.high is None else _value(parameter.high)
    text = f"{low} to {high}" if high else f"from {low}"
    return text.strip() + (", log" if parameter.log else "") + null


def _searched(parameter: Hyperparameter) -> str:
    if parameter.search is None:
        return "-"
    joint = "\n" if parameter.choices or parameter.kind == "bool" else " to "
    return joint.join(map(_value, parameter.search))


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
