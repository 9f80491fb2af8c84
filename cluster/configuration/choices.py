"""Choices by name: what ``*.name`` stands for, section by section, and which other keys it brings along.

A choice is a frozen dataclass that derives from its section's base class; its fields are declared with
``hyperparameter(default, meaning, ...)``, and the first line of its docstring says what it is. A built-in
name is a short spelling of ``module:attribute``, so that nothing is imported before it is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from algorithms import (
    AGGREGATIONS,
    LOCAL_OPTIMIZERS,
    SERVER_OPTIMIZERS,
    Algorithm,
    Hyperparameter,
    hyperparameters,
    registry,
)
from algorithms.core.hooks import mistaken_hooks
from cluster.references import UserError, load_reference, nearest


class ChoiceError(UserError):
    """An unknown name or field, or a value outside its declaration; says what is allowed."""


@dataclass(frozen=True)
class Kind:
    """What there is to choose in one section.

    Attributes:
        meaning: What is chosen.
        base: The class that every choice derives from, ``module:attribute``. Where it has a method ``of``,
            plain functions are choices too.
        names: The built-in choices by name, ``module:attribute``.
        default: The name where none is given; empty where keys do not depend on it, or it stands repeatedly.
        shared: Keys of the section whatever is chosen; they stay when the name is overridden.
    """

    meaning: str
    base: str
    names: Mapping[str, str]
    default: str = ""
    shared: tuple[str, ...] = ()


_OBJECTIVES = "cluster.workload.objectives"
_PARTITIONERS = "cluster.workload.partitioners"
_SAMPLERS = "cluster.simulation.samplers"
_SCHEDULES = "cluster.rounds.schedules"
_SPARSITY = "algorithms.core.sparsity_schedules"
_NETWORKS = "cluster.workload.networks"
_AVAILABILITY = "cluster.simulation.availability"
_ATTACKS = "algorithms.core.attacks"

#: Every section that has a ``name``.
KINDS: dict[str, Kind] = {
    "algorithm": Kind("the method", "algorithms:Algorithm", {}, "sparsyfed"),
    "server": Kind("what the server does with the clients' mean", "algorithms:ServerOptimizer", {}, "fedavg"),
    "aggregation": Kind(
        "how the server adds updates up; all but mean look at each of them, and clients then weigh the same",
        "algorithms:Aggregation",
        {},
        "mean",
        ("weighting",),
    ),
    "partition": Kind(
        "how the training data is divided among clients",
        f"{_PARTITIONERS}:Partitioner",
        {
            "lda": f"{_PARTITIONERS}:Lda",
            "iid": f"{_PARTITIONERS}:Iid",
            "dirichlet": f"{_PARTITIONERS}:Dirichlet",
            "shards": f"{_PARTITIONERS}:Shards",
            "natural": f"{_PARTITIONERS}:Natural",
            "sampled": f"{_PARTITIONERS}:Sampled",
        },
        "lda",
        ("clients", "seed"),
    ),
    "objective": Kind(
        "what is learned",
        f"{_OBJECTIVES}:Objective",
        {
            "classification": f"{_OBJECTIVES}:Classification",
            "sequence_classification": "cluster.workload.sequence_classification:SequenceClassification",
            "multilabel": "cluster.workload.multilabel:Multilabel",
            "regression": f"{_OBJECTIVES}:Regression",
            "language_model": "cluster.workload.language_model:LanguageModel",
        },
        "classification",
    ),
    "sparsity_schedule": Kind(
        "what clients cut to in each round, on the way to their target sparsity",
        f"{_SPARSITY}:SparsitySchedule",
        {
            "constant": f"{_SPARSITY}:SparsitySchedule",
            "cosine": f"{_SPARSITY}:Cosine",
            "cubic": f"{_SPARSITY}:Cubic",
        },
        "constant",
    ),
    "sampler": Kind(
        "which clients are asked to train",
        f"{_SAMPLERS}:Sampler",
        {
            "uniform": f"{_SAMPLERS}:Uniform",
            "availability": f"{_SAMPLERS}:ByAvailability",
            "size": f"{_SAMPLERS}:BySize",
            "stratified": f"{_SAMPLERS}:Stratified",
            "poisson": f"{_SAMPLERS}:Poisson",
        },
        "uniform",
    ),
    "availability": Kind(
        "when a tier's devices can be asked to train",
        f"{_AVAILABILITY}:Availability",
        {
            "always": f"{_AVAILABILITY}:Always",
            "diurnal": f"{_AVAILABILITY}:Diurnal",
            "trace": f"{_AVAILABILITY}:Trace",
        },
    ),
    "model": Kind(
        "the network",
        "cluster.workload.architecture:Architecture",
        {
            "small_cnn": f"{_NETWORKS}:SmallCNN",
            "resnet18": f"{_NETWORKS}:ResNet18",
            "mlp": f"{_NETWORKS}:MLP",
            "linear": f"{_NETWORKS}:Linear",
            "transformer": "cluster.workload.transformer:Transformer",
            "transformer_classifier": "cluster.workload.transformer:TransformerClassifier",
            "vit": "cluster.workload.transformer:VisionTransformer",
            "timm": "cluster.workload.libraries:Timm",
            "transformers": "cluster.workload.libraries:Transformers",
        },
        "small_cnn",
        ("weights",),
    ),
    "adapter": Kind(
        "what is trained instead of the whole model; null (the default): nothing, the whole model is",
        "cluster.workload.adapters:Adapter",
        {"lora": "cluster.workload.lora:Lora"},
        "lora",
    ),
    "data": Kind(
        "the data set: digits, diabetes, breast_cancer, tiny_text, fedht_simulation, a hub repository "
        "owner/name, or module:attribute of your own",
        "",
        {},
        shared=("validation", "cache"),
    ),
    "optimizer": Kind("what a client does with a gradient", "algorithms:LocalOptimizer", {}),
    "attack": Kind(
        "how every training batch is attacked before a gradient is taken of it",
        "algorithms:Attack",
        {"none": f"{_ATTACKS}:Attack", "fgsm": f"{_ATTACKS}:Fgsm", "pgd": f"{_ATTACKS}:Pgd"},
        "none",
    ),
    "evaluate_attack": Kind(
        "how the model is attacked where its robustness is measured",
        "algorithms:Attack",
        {"fgsm": f"{_ATTACKS}:Fgsm", "pgd": f"{_ATTACKS}:EvaluationPgd"},
        "pgd",
        ("every", "restarts", "rows"),
    ),
    "schedule": Kind(
        "when the server takes updates in",
        f"{_SCHEDULES}:Timing",
        {"synchronous": f"{_SCHEDULES}:Synchronous", "buffered": f"{_SCHEDULES}:Buffered"},
        "synchronous",
    ),
}

# ------------------------------------------------------------------------------------------- what there is


def built_in(section: str) -> dict[str, Any]:
    """The built-in choices of a section by name."""
    if section == "algorithm":
        return dict(registry())
    if section == "server":
        return dict(SERVER_OPTIMIZERS)
    if section == "optimizer":
        return dict(LOCAL_OPTIMIZERS)
    if section == "aggregation":
        return dict(AGGREGATIONS)
    return {
        name: load_reference(f"{section}.name", reference, ChoiceError)
        for name, reference in KINDS[section].names.items()
    }


def names(section: str) -> list[str]:
    """Names of the built-in choices of a section; none is imported for it."""
    return list(KINDS[section].names or built_in(section))


def choice_named(section: str, name: str, key: str | None = None) -> Any:
    """The class (or, where the section takes one, the function) that a name stands for.

    Args:
        section: The section.
        name: A built-in name, or ``module:attribute``.
        key: What the name is called in messages; by default the section's.

    Raises:
        ChoiceError: It is unknown, no choice of this section, or has a field without a declaration.
    """
    key = key or f"{section}.name"
    if ":" in name:
        return _own(section, name, key)
    known = names(section)
    if name not in known:
        near = nearest(name, known)
        raise ChoiceError(
            f"{key}: {name!r} is unknown; allowed are {', '.join(known)}, or module:attribute of your own"
            + (f"; did you mean {near}?" if near else f"; see sparsyfed describe {section}")
        )
    if reference := KINDS[section].names.get(name):
        return load_reference(key, reference, ChoiceError)
    return built_in(section)[name]


def _own(section: str, reference: str, key: str) -> Any:
    found, base = load_reference(key, reference, ChoiceError), choice_base(section)
    if not (isinstance(found, type) and issubclass(found, base)):
        if hasattr(base, "of"):
            return found
        kind = f"a class of its own, {found!r}" if isinstance(found, type) else f"{type(found).__name__}"
        raise ChoiceError(f"{key} = {reference!r}: expected a subclass of {base.__name__}, found {kind}")
    if missing := getattr(found, "__abstractmethods__", None):
        raise ChoiceError(f"{key} = {reference!r}: it lacks {', '.join(sorted(missing))}")
    try:
        hyperparameters(found)
    except TypeError as error:
        raise ChoiceError(f"{key} = {reference!r}: {error}") from None
    if section == "algorithm" and (mistakes := "; ".join(mistaken_hooks(found))):
        raise ChoiceError(f"{key} = {reference!r}: {mistakes}")
    return found


def choice_base(section: str) -> Any:
    """The class that every choice of a section derives from."""
    return load_reference(section, KINDS[section].base, ChoiceError)


def kind_of(reference: str, key: str) -> str:
    """The section that a user's own ``module:attribute`` is a choice of, by the class it derives from.

    Raises:
        ChoiceError: It derives from none of their base classes.
    """
    found = load_reference(key, reference, ChoiceError)
    for section, kind in KINDS.items():
        if kind.base and isinstance(found, type) and issubclass(found, choice_base(section)):
            return section
    _own("algorithm", reference, key)  # says what is wrong
    return "algorithm"


def method_named(name: str) -> type[Algorithm] | None:
    """The method that ``algorithm.name`` stands for; None where no method is called so."""
    if ":" not in name and name not in names("algorithm"):
        return None
    found: type[Algorithm] = choice_named("algorithm", name)
    return found


def takes(section: str, name: str, field: str) -> bool:
    """Whether a choice has a field; a plain function may have any, an unknown name has none."""
    if ":" not in name and name not in names(section):
        return False
    chosen = choice_named(section, name)
    return not hasattr(chosen, "__dataclass_fields__") or field in fields(section, name)


def fields(section: str, name: str) -> dict[str, Hyperparameter]:
    """The declared fields of a choice by name; of a plain function none are known."""
    chosen = choice_named(section, name)
    declared = isinstance(chosen, type) and issubclass(chosen, choice_base(section))
    return {field.name: field for field in hyperparameters(chosen)} if declared else {}


# ------------------------------------------------------------------------------------------------ building


def build_choice(section: str, name: str, options: Mapping[str, Any], key: str | None = None) -> Any:
    """Build what a section's name stands for, every option checked.

    Args:
        section: The section.
        name: A built-in name, or ``module:attribute``.
        options: Field values.
        key: Where the section stands, for messages; by default at the top.

    Raises:
        ChoiceError: One line for each unknown name or field, wrong type and value out of range.
    """
    key = key or section
    chosen = choice_named(section, name, f"{key}.name")
    if not (isinstance(chosen, type) and issubclass(chosen, choice_base(section))):
        return choice_base(section).of(f"{key}.name", name, chosen, options)
    declared = {parameter.name: parameter for parameter in hyperparameters(chosen)}
    problems, values = [], {}
    for field, value in options.items():
        if field not in declared:
            problems.append(f"{key}.{field}: {name} has no such field; {_allowed(section, field, declared)}")
            continue
        try:
            values[field] = checked(declared[field], value)
        except ChoiceError as error:
            problems.append(f"{key}.{field}: {error}")
    if problems:
        raise ChoiceError("\n".join(problems))
    try:
        return chosen(**values)
    except ValueError as error:
        raise ChoiceError(f"{key}: {error}") from error


def _allowed(section: str, field: str, declared: Mapping[str, Any]) -> str:
    """Which fields there are instead, and to which other choices this one or the nearest one belongs."""
    shared = KINDS[section].shared
    text = f"its fields: {', '.join(declared) or 'none'}"
    if shared:
        text += f", and of every {section} {', '.join(shared)}"
    holders: dict[str, list[str]] = {}
    for name in names(section):
        for other in fields(section, name):
            holders.setdefault(other, []).append(name)
    near = field if field in holders else nearest(field, [*declared, *shared, *holders])
    if near is None:
        return f"{text}; see sparsyfed describe {section}"
    belongs = "" if near in declared or near in shared else f"{near} belongs to {', '.join(holders[near])}"
    if near == field:
        return f"{text}; {belongs}"
    return f"{text}; did you mean {near}?" + (f" {belongs}" if belongs else "")


def checked(parameter: Hyperparameter, value: Any) -> Any:
    """``value`` as the declared type.

    Raises:
        ChoiceError: It is of another type, not among the choices or outside the range.
    """
    if value is None and parameter.optional:
        return None
    if parameter.kind == "patterns":
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise ChoiceError(f"expected a list of name patterns, found {value!r}")
        return tuple(items)
    if parameter.kind == "Mapping":
        if not isinstance(value, (str, Mapping)):
            raise ChoiceError(f"expected keys and values, or a file of them, found {value!r}")
        return value
    if parameter.kind == "ints":
        if not isinstance(value, (list, tuple)) or not all(type(item) is int for item in value):
            raise ChoiceError(f"expected a list of whole numbers, found {value!r}")
        for item in value:
            _check_range(parameter, item)
        return tuple(value)
    if parameter.kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value).__name__ != parameter.kind:
        expected = f"{parameter.kind} or null" if parameter.optional else parameter.kind
        raise ChoiceError(f"expected {expected}, found {'null' if value is None else repr(value)}")
    if parameter.choices is not None and value not in parameter.choices:
        near = nearest(value, parameter.choices)
        raise ChoiceError(
            f"{value!r} is none of {', '.join(map(str, parameter.choices))}"
            + (f"; did you mean {near}?" if near else "")
        )
    _check_range(parameter, value)
    return value


def _check_range(parameter: Hyperparameter, value: Any) -> None:
    low, high, above = parameter.low, parameter.high, parameter.above
    if above is not None and not above < value < math.inf:
        raise ChoiceError(f"{value!r} is out of range; allowed: a finite number above {above:g}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        allowed = f"{'-inf' if low is None else low} to {'inf' if high is None else high}"
        raise ChoiceError(f"{value!r} is out of range; allowed: {allowed}")


def values_of(built: Any) -> dict[str, Any]:
    """The values of a built choice's declared fields."""
    return {field.name: getattr(built, field.name) for field in hyperparameters(built)}
