"""Where a run's time went: the phases of its rounds, from the seconds that every line carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

#: Phases in order: what happens, who does it, the key that holds its seconds.
PHASES = (
    ("broadcast", "driver", "time/prepare_s", "draw the cohort, encode the model"),
    ("place", "driver", "time/broadcast_s", "put the round in the store, hand out the first clients"),
    ("train", "actors", "time/clients_train_s", "local steps, the method's cut, measurements"),
    ("encode", "actors", "time/clients_encode_s", "updates to bytes"),
    ("decode", "actors", "time/clients_decode_s", "bytes to updates"),
    ("fold", "actors", "time/clients_fold_s", "updates into the actor's total"),
    ("evaluate", "actors", "time/clients_evaluate_s", "the last round's model on test and validation"),
    ("merge", "driver", "time/merge_s", "the actors' totals into one"),
    ("step", "driver", "time/step_s", "mean, server optimizer, mask"),
    ("log", "hidden", "time/log_s", "measure and store the last round, while actors train"),
    ("checkpoint", "hidden", "time/checkpoint_s", "write the state, while actors train"),
)


@dataclass(frozen=True)
class Phase:
    """One phase over a run.

    Attributes:
        name: Its name.
        where: ``driver`` (the round waits for it), ``actors`` (seconds of all actors together) or ``hidden``
            (on the driver, while the actors train).
        median_s: Median seconds a round.
        total_s: Seconds of the whole run.
        share: Of the run's rounds; for ``actors`` of the seconds that they all had.
        meaning: What happens in it.
    """

    name: str
    where: str
    median_s: float
    total_s: float
    share: float
    meaning: str


def phases(lines: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """Every phase that the lines have seconds of, in the order of a round."""
    rounds = sum(line["time/round_s"] for line in lines)
    actor_seconds = sum(line["time/round_s"] * line.get("time/actors", 1) for line in lines)
    found = []
    for name, where, key, meaning in PHASES:
        seconds = [line.get(key, 0.0) for line in lines]
        if not any(key in line for line in lines):
            continue
        whole = actor_seconds if where == "actors" else rounds
        found.append(
            Phase(name, where, median(seconds), sum(seconds), sum(seconds) / whole if whole else 0.0, meaning)
        )
    return found


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """The phases as a table that ends with the round and how busy the actors were."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for head in ("phase", "where", "ms a round", "seconds", "share", ""):
        shown.add_column(head, justify="right" if head in ("ms a round", "seconds", "share") else "left")
    found = phases(lines)
    for one in found:
        shown.add_row(
            one.name,
            one.where,
            f"{1e3 * one.median_s:,.1f}",
            f"{one.total_s:,.2f}",
            f"{one.share:.1%}",
            one.meaning,
        )
    seconds = [line["time/round_s"] for line in lines]
    actors = max(line.get("time/actors", 1) for line in lines)
    busy = sum(one.share for one in found if one.where == "actors")
    shown.add_section()
    shown.add_row(
        "round",
        "",
        f"{1e3 * median(seconds):,.1f}",
        f"{sum(seconds):,.2f}",
        "100.0%",
        f"{len(lines)} rounds; {actors} actor{'s' * (actors != 1)}, busy {busy:.1%} of the time",
    )
    return shown
