"""The sections of attacks, in training and in evaluation, and what does not fit together in them.

Functions take a whole ``Config``, whose choices can be built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from algorithms import Attack
from cluster.configuration.choices import KINDS, build_choice, fields, values_of
from cluster.configuration.sections import Choice


class AttackChoice(Choice):
    """How every training batch is attacked; other keys are the attack's own."""

    name: str = KINDS["attack"].default


class EvaluationChoice(Choice):
    """Robustness: the global model under attack; epsilon and norm are by default those of training."""

    name: str = KINDS["evaluate_attack"].default
    every: int = Field(0, ge=0, description="rounds between them, the last round included; 0: never")
    restarts: int = Field(1, ge=1, description="attacks of each sample, of which the worst one counts")
    rows: int = Field(1000, ge=1, description="samples of each split at most, the same ones every time")


def evaluation_attack(config: Any) -> Attack:
    """How the evaluated model is attacked; in the ball of training's attack unless told otherwise."""
    choice, training = config.evaluate_attack, values_of(config.build_attack())
    common = {"epsilon", "norm"} & training.keys() & fields("evaluate_attack", choice.name).keys()
    options = {key: training[key] for key in common} | choice.options
    attack: Attack = build_choice("evaluate_attack", choice.name, options)
    return attack


def attack_problems(config: Any) -> Iterator[str]:
    """Keys of an evaluation under attack that never happens, or restarts that are all the same."""
    section, attack = config.evaluate_attack, config.build_evaluation_attack()
    if not section.every:
        defaults = {key: field.default for key, field in fields("evaluate_attack", section.name).items()}
        defaults |= {key: type(section).model_fields[key].default for key in ("restarts", "rows")}
        found = section.model_dump()
        # In which ball it is attacked stands there whenever training's attack says so.
        other = [key for key in defaults.keys() - {"epsilon", "norm"} if found[key] != defaults[key]]
        for key in sorted(other):
            yield (
                f"evaluate_attack.{key}: {found[key]}, but evaluate_attack.every is 0, so no model is "
                "attacked; set it to a number of rounds"
            )
    if section.restarts > 1 and not getattr(attack, "random_start", True):
        yield (
            f"evaluate_attack.restarts: {section.restarts} attacks without a random start are one; set "
            "evaluate_attack.random_start=true, or restarts=1"
        )


def weak_attack(config: Any) -> str | None:
    """What to know of an evaluation whose attack cannot get as far as it says."""
    if not config.evaluate_attack.every:
        return None
    reach, radius = config.build_evaluation_attack().reach
    if reach >= radius * (1.0 - 1e-9):
        return None
    return (
        f"evaluate_attack: its steps lead {reach:.3g} far at most, and epsilon is {radius:.3g}: what it "
        "finds robust may not be; raise evaluate_attack.steps or step"
    )
