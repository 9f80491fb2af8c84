"""Whether the sections of a configuration fit together: a sentence for each that does not.

Each function takes a whole ``Config``, whose choices can be built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from algorithms import registry
from algorithms.core.widths import UnitMethod
from cluster.configuration.aggregating import aggregation_problems, grid_problems
from cluster.configuration.attacks import attack_problems
from cluster.configuration.choices import ChoiceError, build_choice
from cluster.configuration.private import privacy_problems
from cluster.measures import MEASURES, Measure, declared, of_objective
from cluster.references import did_you_mean


def problems_between(config: Any) -> list[str]:
    """All of them; what needs code that is not to be imported is left out."""
    alone = config.left_alone
    problems = [*ending_problems(config), *shift_problems(config), *own_problems(config)]
    problems += grid_problems(config)
    if not problems and not any(map(alone, ("objective", "partition"))):
        problems += class_problems(config)
    if not alone("objective"):
        problems += stop_problems(config)
    if not any(map(alone, ("attack", "evaluate_attack"))):
        problems += attack_problems(config)
    if not alone("algorithm"):
        problems += [*device_problems(config), *sparsity_problems(config), *adapter_problems(config)]
        problems += config.method.problems(config)
        if not any(map(alone, ("aggregation", "objective"))):
            problems += aggregation_problems(config)
            problems += privacy_problems(config)
        if not alone("schedule"):
            problems += config.build_schedule().problems(config)
    return problems


def ending_problems(config: Any) -> Iterator[str]:
    """An end beyond the planned one, a run that outlives no process, or a model to keep that is not made."""
    if config.stop_after is not None and config.stop_after > config.rounds:
        yield f"stop_after: {config.stop_after} is beyond rounds: {config.rounds}"
    if config.detached and (config.address == "local" or config.execution == "inline"):
        yield (
            f"detached: needs a cluster that outlives this process, found address: {config.address}, "
            f"execution: {config.execution}; set address=auto or host:port and execution=ray"
        )
    if config.tracking.register and not config.tracking.models:
        yield "tracking.register: the best model, and tracking.models=false makes none; leave one of them out"


def sparsity_problems(config: Any) -> Iterator[str]:
    """A schedule of the sparsity for a method that follows none."""
    if config.sparsity_schedule.name != "constant" and not config.method.follows_sparsity:
        able = ", ".join(name for name, known in registry().items() if known.follows_sparsity)
        yield (
            f"sparsity_schedule.name: {config.algorithm.name} does not cut to a sparsity of each round; "
            f"schedules work with {able}"
        )


def device_problems(config: Any) -> Iterator[str]:
    """Tiers whose shares or sparsities do not fit together, or not the method; half of what cells need."""
    kinds, cells, uplink = config.devices.kinds, config.devices.cells, config.devices.cell_uplink
    if cells is not None and uplink is None:
        yield f"devices.cells: {cells}, but how much their clients share is not said; set devices.cell_uplink"
    if cells is None and uplink is not None:
        yield f"devices.cell_uplink: {uplink:g} bit/s, but there are no cells; set devices.cells"
    if abs(sum(tier.share for tier in kinds.values()) - 1.0) > 1e-6:
        shares = ", ".join(f"{name} {tier.share:g}" for name, tier in kinds.items())
        yield f"devices.tiers: shares must sum to 1, found {shares}"
    method = config.method
    if all(tier.sparsity is None for tier in kinds.values()):
        return
    if not method.unequal_sparsity:
        able = ", ".join(name for name, known in registry().items() if known.unequal_sparsity)
        yield (
            f"devices.tiers: {config.algorithm.name} has one sparsity for all clients; "
            f"tiers with a sparsity work with {able}"
        )
        return
    densest = min(method.sparsity if tier.sparsity is None else tier.sparsity for tier in kinds.values())
    if method.sparsity != densest:
        yield (
            f"algorithm.sparsity: {method.sparsity:g} is not the densest tier's budget; with these "
            f"devices.tiers set algorithm.sparsity={densest:g}"
        )


def shift_problems(config: Any) -> Iterator[str]:
    """A shift without a round, beyond the last one, or of a partition that cannot be."""
    shift = config.shift
    if shift.round is None:
        yield from (
            f"shift.{key}: needs shift.round, the first round on the new data"
            for key in ("every", "partition", "classes")
            if getattr(shift, key)
        )
        return
    if shift.round > config.rounds:
        yield f"shift.round: {shift.round} is beyond rounds: {config.rounds}"
    if not config.left_alone("partition"):
        try:
            config.shifted_partition  # noqa: B018
        except ValidationError as error:
            for problem in error.errors():
                key, found = ".".join(map(str, problem["loc"])), problem["input"]
                yield f"shift.partition.{key}: {problem['msg']}, found {found!r}"
        except ChoiceError as error:
            yield str(error)
    if "clients" in shift.partition:
        yield "shift.partition.clients: a shift keeps the clients; change partition.clients instead"


def own_problems(config: Any) -> Iterator[str]:
    """Clients that are judged by rows of their own, where none can be held out for them."""
    section = config.evaluate_clients
    if section.rows == "own" and not config.data.validation:
        yield "evaluate_clients.rows: own, but none are held out; set data.validation=0.2"
    if section.groups and not config.data.validation:
        yield "evaluate_clients.groups: true, but no data is held out to judge by; set data.validation=0.2"
    key = "rows" if section.rows == "own" else "unseen" if section.unseen else None
    if key and config.shift.round is not None:
        yield f"evaluate_clients.{key}: rows change hands at a shift; leave it or shift out"
    if key and config.partition.name == "sampled":
        yield f"evaluate_clients.{key}: clients of partition.name=sampled share rows; choose another kind"


def class_problems(config: Any) -> Iterator[str]:
    """What needs the classes of the samples, where the objective has none."""
    if config.build_objective().by_class:
        return
    have = f"needs the classes of the samples, and objective.name={config.objective.name} has none"
    partitioners = {"partition": (config.partition.name, config.build_partitioner())}
    if config.shift.partition:
        shifted = config.shifted_partition
        after = build_choice("partition", shifted.name, shifted.options)
        partitioners["shift.partition"] = (shifted.name, after)
    for key, (name, partitioner) in partitioners.items():
        if partitioner.by_class:
            yield f"{key}.name: {name} {have}; allowed are iid, natural, and sampled with alpha=null"
    if config.shift.classes is not None:
        yield f"shift.classes: {have}; leave it out"
    section = config.evaluate_clients
    if section.unseen:
        yield f"evaluate_clients.unseen: {have}, of which it takes shots; leave it out"
    elif section.every and section.rows == "classes":
        yield f"evaluate_clients.every: {have}, by which clients are judged; set evaluate_clients.rows=own"


def stop_problems(config: Any) -> Iterator[str]:
    """A rule that ends nothing, or that watches what is not measured."""
    stop, key = config.stop, config.stop.metric
    if not stop.asked:
        given = [name for name in ("metric", "after") if getattr(stop, name)]
        yield from (f"stop.{name}: ends nothing without stop.target or stop.patience" for name in given)
        return
    if stop.target is not None and stop.patience is not None:
        yield f"stop.target: {stop.target:g} beside stop.patience={stop.patience}; leave one of them out"
    metrics = config.build_objective().measures
    measure = metrics[0] if key is None else declared(key, metrics)
    if measure is None or (key is not None and key.endswith(("/layers", "_list"))):
        known = [each.key for each in (*of_objective(metrics), *MEASURES)]
        hint = did_you_mean(key, known) or "; docs/measures.md has all"
        yield f"stop.metric: {key!r} is no number of a round{hint}"
        return
    if stop.patience is not None and (measure.better is None or measure.grows):
        yield f"stop.patience: neither more nor less of {key} is better; watch another stop.metric"
    section, _, option = measure.when.partition(".")
    if section in ("evaluate_attack", "evaluate_clients") and not getattr(getattr(config, section), option):
        yield f"stop.metric: {key} is not measured; set {measure.when}"
    if section == "privacy" and not config.privacy.dp.asked:
        yield f"stop.metric: {key} is not measured; set privacy.dp.clip"
    if key is not None and key.startswith("test/") and config.evaluate_on == "validation":
        yield f"stop.metric: {key} is not measured with evaluate_on=validation"
    if key is not None and key.startswith("val/") and not config.data.validation:
        yield f"stop.metric: {key} is not measured without data held out; set data.validation=0.1"


def stop_measure(config: Any, key: str) -> Measure:
    """The measure of a round that ``stop`` watches, under its own key."""
    found = declared(key, config.build_objective().measures)
    assert found is not None  # stop_problems refuses it
    return replace(found, key=key)


def adapter_problems(config: Any) -> Iterator[str]:
    """An adapter half of which is 0 at first, for a method that trains no zeros; or for slices of a model."""
    if config.adapter is None or config.left_alone("adapter"):
        return
    if isinstance(config.method, UnitMethod):
        name = config.algorithm.name
        yield f"adapter: {name} cuts hidden layers to slices, and those of a base stay whole; leave out one"
    if config.build_adapter().begins_at_zero and not config.method.trains_zeros:
        yield (
            f"adapter.b_init: 0, and {config.algorithm.name} trains no weight that is 0: adapters would stay "
            "without effect; set adapter.b_init=0.01"
        )
