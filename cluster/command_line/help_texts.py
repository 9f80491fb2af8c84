"""What ``--help`` ends with. What is declared elsewhere is looked up only when somebody asks."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel


def examples(*lines: str) -> str:
    """Command lines as the end of a help shows them."""
    return "\n  ".join(["examples:", *lines])


def run_details() -> str:
    """What the help of ``run`` ends with: examples, what there is to choose, every key."""
    shown = examples(
        "sparsyfed run",
        "sparsyfed run quickstart algorithm.beta=1.3 seed=1",
        "sparsyfed run my_experiment.yaml rounds=50 --output runs/mine",
        "sparsyfed run paper-methods seed=[0,1] runs_at_once=4    a grid: many runs in one folder",
        "sparsyfed run paper-methods --shard 3/10                 a tenth of it, the others elsewhere",
        "sparsyfed run algorithm.name=topk algorithm.sparsity=0.99 execution=inline",
    )
    return f"{shown}\n\n{_choices_text()}\n\n{_keys_text()}"


def tune_details(study_section: Callable[[], type[BaseModel]] | None) -> str:
    """What the help of ``tune`` ends with: examples, what a study looks like, its keys."""
    shown = examples(
        "sparsyfed tune study-digits",
        "sparsyfed tune my_study.yaml study.trials=30 study.final_seeds=10",
        "sparsyfed tune study-digits study.methods=[topk,sparsyfed] --output runs/two",
        "sparsyfed tune study-digits study.pruner.name=hyperband    budgets in client-rounds",
        "sparsyfed tune --report runs/study-digits",
        "sparsyfed describe study-digits --probe                    how long all of it will take",
    )
    text = """a study is an experiment with a section `study`:
  extends: quickstart
  data: {validation: 0.2}
  study:
    methods: [topk, sparsyfed, {name: flash, stage1: magnitude}]   what an entry sets is not tuned
    trials: 20
    shared: {local.lr: {low: 0.01, high: 1, log: true}}            tuned for all methods, or for none"""
    keys = (
        [] if study_section is None else [_rows_text("keys of the study", _keys(study_section(), "study."))]
    )
    return "\n\n".join([shown, text, *keys])


def describe_details() -> str:
    """What the help of ``describe`` ends with: examples and what there is to choose."""
    shown = examples(
        "sparsyfed describe topk                           a method",
        "sparsyfed describe partition                      how data can be divided",
        "sparsyfed describe partition dirichlet            one of these ways, its fields and their ranges",
        "sparsyfed describe                                the quickstart",
        "sparsyfed describe partition.alpha=0.1 --picture alpha0.1.png",
        "sparsyfed describe my_experiment.yaml model.name=resnet18",
        "sparsyfed describe paper-methods                  a grid or study: how many runs",
        "sparsyfed describe compare-digits --probe         and their hours, by two rounds of each kind",
    )
    return f"{shown}\n\n{_choices_text()}"


def _choices_text() -> str:
    """Every preset, method, model, server optimizer and partition with its first line, for ``--help``."""
    from cluster.command_line.describe_choice import first_line
    from cluster.configuration.choices import KINDS, built_in
    from cluster.configuration.profiles import PROFILES
    from cluster.configuration.trees import presets

    comments = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in presets().items()}
    groups: tuple[tuple[str, Mapping[str, str]], ...] = (
        ("presets", {n: c.lstrip("# ") if c.startswith("#") else "" for n, c in comments.items()}),
        *(
            (f"{section}.name", {name: first_line(choice) for name, choice in known.items()})
            for section in KINDS
            if (known := built_in(section))
        ),
        ("devices.profile", dict.fromkeys(PROFILES, "")),
    )
    parts = []
    for title, items in groups:
        if any(items.values()):
            width = max(16, *map(len, items))
            parts.append(
                "\n".join(
                    [f"{title}:", *(f"  {name:<{width}} {text}".rstrip() for name, text in items.items())]
                )
            )
        else:
            parts.append(f"{title}:  {', '.join(items)}")
    return "\n\n".join(parts)


def _keys_text() -> str:
    """Every key of the configuration with its default and meaning, for ``--help``."""
    from cluster.configuration.config import Config

    own = "  the keys of what a name stands for: sparsyfed describe partition, describe partition lda ..."
    return f"{_rows_text('keys', _keys(Config, ''))}\n{own}"


def _rows_text(title: str, keys: Sequence[tuple[str, str, str]]) -> str:
    rows = [(f"{key}={default}", meaning) for key, default, meaning in keys]
    width = max(len(key) for key, _ in rows)
    return "\n".join(
        [f"{title} and their defaults:", *(f"  {key:<{width}}  {meaning}".rstrip() for key, meaning in rows)]
    )


def _keys(section: type[BaseModel], prefix: str) -> list[tuple[str, str, str]]:
    import yaml
    from pydantic import BaseModel

    rows = []
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += _keys(kind, f"{prefix}{key}.")
            continue
        each = get_args(kind)[1] if get_origin(kind) is dict else None
        if isinstance(each, type) and issubclass(each, BaseModel):
            rows += _keys(each, f"{prefix}{key}.<name>.")
            continue
        meaning = field.description or ""
        if options := _literals(kind):
            meaning = ", ".join(map(str, options)) + (f": {meaning}" if meaning else "")
        default = "..."
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            default = yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
        rows.append((prefix + key, default, meaning))
    return rows


def _literals(kind: Any) -> tuple[str, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return get_args(kind) if isinstance(kind, types.UnionType) and all(map(_literals, get_args(kind))) else ()
