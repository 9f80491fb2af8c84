"""Groups: runs that differ only in their seed, named by what sets them apart from the other groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.compare.reading import ComparisonError, Run
from cluster.compare.versions import unmixed
from cluster.configuration.identity import relevant_of

#: Keys that name a group before all others do, in this order.
_FIRST = (
    "algorithm.name",
    "algorithm.sparsity",
    "data.name",
    "data.path",
    "partition.name",
    "partition.alpha",
    "model.name",
    "server.name",
)

#: What must be equal for two groups to compete for the best value.
_TASK = ("data.", "objective.", "partition.", "model.")

#: The round compared, as a key beside those of the configuration.
_LENGTH = "length"


@dataclass(frozen=True)
class Group:
    """Runs of one configuration on several seeds.

    Attributes:
        label: The shortest name that no other group has.
        family: The label without the sparsity: groups of one family differ in their sparsity alone.
        method: Name of its method.
        params: The keys in which groups differ, with its values; what does not apply is left out.
        contest: Groups with an equal contest compete: the same task at the same sparsity and length.
        runs: One run a seed, by seed; what some of them measured by an older rule than others is left out.
    """

    label: str
    family: str
    method: str
    params: dict[str, str]
    contest: tuple[str, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Grouped:
    """Groups, what all their runs share, and which runs do not count, each with its reason."""

    groups: tuple[Group, ...]
    shared: dict[str, str]
    left_out: tuple[tuple[Run, str], ...]


def group_runs(runs: Sequence[Run], *, after: int | None = None) -> Grouped:
    """Put runs that differ only in their seed together.

    Args:
        runs: Runs from any source.
        after: Compare the state after this round; by default that at each run's planned end.

    Raises:
        ComparisonError: No run counts.
    """
    counted, left_out = [], []
    for run in sorted(runs, key=lambda run: run.started):
        reason = _does_not_count(run, after)
        if reason:
            left_out.append((run, reason))
        else:
            counted.append(run if after is None else run.until(after))
    if not counted:
        raise ComparisonError(_nothing_counts(left_out))
    identities = [_identity(run, after) for run in counted]
    keys = sorted({key for identity in identities for key in identity})
    differing = [key for key in keys if len({identity.get(key) for identity in identities}) > 1]
    differing.sort(key=_rank)
    members: dict[tuple[str | None, ...], dict[str, Run]] = {}
    for run, identity in zip(counted, identities, strict=True):
        seeds = members.setdefault(tuple(identity.get(key) for key in differing), {})
        if run.seed in seeds:  # the newer one stands: a repetition is no further sample
            left_out.append((seeds[run.seed], f"repeated by {run.name}"))
        seeds[run.seed] = run
    ordered = sorted(members, key=lambda values: tuple(map(_sortable, values)))
    labels = _labels(differing, ordered, counted[0].params.get("algorithm.name", "run"))
    groups = tuple(
        _group(names, dict(zip(differing, values, strict=True)), members[values], after)
        for names, values in zip(labels, ordered, strict=True)
    )
    shared = {key: identities[0][key] for key in keys if key not in differing and key != _LENGTH}
    return Grouped(groups, shared, tuple(left_out))


def _does_not_count(run: Run, after: int | None) -> str:
    wanted = after if after is not None else run.planned
    if not run.series:
        return run.status if run.status.startswith("cannot") else f"{run.status} without a round".strip()
    if wanted is not None and run.reached < wanted and not (run.stopped and after is None):
        ended = f" ({run.status})" if run.status else ""
        return f"ended after round {run.reached} of {wanted}{ended}"
    return ""


def _nothing_counts(left_out: Sequence[tuple[Run, str]]) -> str:
    reasons = "; ".join(f"{run.name} {reason}" for run, reason in left_out[:3])
    more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    common = min((run.reached for run, _ in left_out if run.reached), default=0)
    hint = f". --round {common} compares them as they were after that round" if common else ""
    return f"no run is complete: {reasons}{more}{hint}"


def _identity(run: Run, after: int | None) -> dict[str, str]:
    """Everything that makes a run what it is but its seed."""
    own = {key: value for key, value in relevant_of(run.params).items() if key != "seed"}
    if after is None and run.planned is not None:
        own[_LENGTH] = run.length
    return own


def _group(
    names: tuple[str, str], values: dict[str, str | None], seeds: dict[str, Run], after: int | None
) -> Group:
    runs = unmixed([seeds[seed] for seed in sorted(seeds, key=_sortable)])
    params = runs[0].params
    task = tuple(f"{key}={value}" for key, value in sorted(params.items()) if key.startswith(_TASK))
    length = runs[0].length if after is None else str(after)
    contest = (params.get("algorithm.sparsity", "dense"), length, *task)
    own = {key: value for key, value in values.items() if value is not None and key != _LENGTH}
    return Group(*names, params.get("algorithm.name", names[0]), own, contest, runs)


def _labels(
    keys: Sequence[str], groups: Sequence[tuple[str | None, ...]], alone: str
) -> list[tuple[str, str]]:
    """Label and family from as few keys as tell the groups apart, the most telling first."""
    chosen: list[int] = []
    apart = 1
    for place in range(len(keys)):
        told = len({tuple(values[i] for i in (*chosen, place)) for values in groups})
        if told > apart:
            chosen.append(place)
            apart = told
    for in_words in (_short, _plain):
        labels = []
        for values in groups:
            named = {keys[i]: value for i in chosen if (value := values[i]) is not None}
            family = {key: value for key, value in named.items() if key != "algorithm.sparsity"}
            labels.append((in_words(named) or alone, in_words(family) or alone))
        if len({label for label, _ in labels}) == len(groups):
            break
    return labels


def _short(named: Mapping[str, str]) -> str:
    """As in ``topk 95 %, alpha 0.1``: values as far as they explain themselves, else with their key's end."""
    parts = []
    for key, value in named.items():
        section, _, last = key.rpartition(".")
        if key == _LENGTH:
            parts.append(f"{value} rounds")
        elif key == "algorithm.sparsity":
            share = f"{100 * float(value):g} %"
            parts.append(f"{parts.pop()} {share}" if parts else f"sparsity {share}")
        elif key in ("algorithm.name", "data.name", "data.path", "model.name"):
            parts.append(Path(value).name.rpartition(":")[2])
        elif last == "name" or section not in ("server", "wire"):
            parts.append(f"{section if last == 'name' else last} {value}")
        else:  # there is a local lr and a server's, an uplink and a downlink of the wire
            parts.append(f"{section} {last} {value}")
    return ", ".join(parts)


def _plain(named: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in named.items())


def _rank(key: str) -> tuple[int, bool, str]:
    """The order in which keys name a group."""
    place = _FIRST.index(key) if key in _FIRST else len(_FIRST)
    return (place, not key.startswith("algorithm."), key)


def _sortable(value: str | None) -> tuple[int, float, str]:
    """Numbers by size, before text; what does not apply comes first."""
    if value is None:
        return (0, 0.0, "")
    try:
        return (1, float(value), "")
    except ValueError:
        return (2, 0.0, value)
