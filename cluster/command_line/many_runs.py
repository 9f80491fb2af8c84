"""``sparsyfed describe GRID|STUDY``: how many runs that is, and by two rounds of each kind what they take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.actors.ray_session import connected
from cluster.configuration.config import Config, validate
from cluster.configuration.trees import merge
from cluster.execution import run
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder

#: Rounds of a probe: the first is unlike the others (a dense model goes down, libraries warm up).
_PROBED = 2

#: Keys that change neither how long a round takes nor how large its messages are, by how they begin.
_FREE = ("seed", "tracking.", "server.", "local.lr", "partition.alpha", "algorithm.", "checkpoint_uri")
_BUT = ("algorithm.name", "algorithm.sparsity")


@dataclass(frozen=True)
class Batch:
    """Runs that cost alike.

    Attributes:
        name: That of the first, which stands for them.
        config: The first's.
        runs: How many they are.
    """

    name: str
    config: Config
    runs: int

    @property
    def rounds(self) -> int:
        """Rounds of one of them, at most."""
        return self.config.stop_after or self.config.rounds


@dataclass(frozen=True)
class Cost:
    """What one run takes.

    Attributes:
        start_s: Seconds for all but its rounds from the first one on.
        round_s: Seconds of a later round.
        seconds: Of the whole run.
        uplink_bytes: Sent by clients.
        downlink_bytes: Sent to clients.
        disk_bytes: Of its folder.
    """

    start_s: float
    round_s: float
    seconds: float
    uplink_bytes: float
    downlink_bytes: float
    disk_bytes: float


def batches(runs: Mapping[str, Config]) -> list[Batch]:
    """A grid's runs, those together that differ in seeds and hyperparameters only."""
    found: dict[str, Batch] = {}
    for name, config in runs.items():
        flat = config.flat()
        key = str([(k, own) for k, own in flat.items() if k in _BUT or not k.startswith(_FREE)])
        known = found.setdefault(key, Batch(name, config, 0))
        found[key] = replace(known, runs=known.runs + 1)
    return list(found.values())


def describe_runs(console: Console, title: str, parts: Sequence[Batch], *, probe: bool) -> None:
    """Print how many runs there are, and with ``probe`` what they will take.

    Args:
        console: Where to print.
        title: What they are.
        parts: The runs.
        probe: Play two rounds of the first run of each part.

    Raises:
        DataError, PartitionError, ModelError, ClusterError, ...: What ``sparsyfed run`` would say.
    """
    runs, rounds = sum(part.runs for part in parts), sum(part.runs * part.rounds for part in parts)
    count = f"{runs:,} run{'s' * (runs > 1)}, {rounds:,} rounds, "
    count += f"{sum(part.runs * part.rounds * part.config.cohort for part in parts):,} visits of a client"
    console.print(Text(title, "bold") + Text(f"  {count}"))
    costs = _probed(console, parts) if probe else []
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    heads = ["runs", "rounds each"] + ["start s", "round s", "hours", "GB up", "GB down", "GB disk"] * probe
    table.add_column("runs like")
    for head in heads:
        table.add_column(head, justify="right")
    for place, part in enumerate(parts):
        cells = [f"{part.runs:,}", f"{part.rounds:,}"]
        if probe:
            cost = costs[place]
            cells += [f"{cost.start_s:.1f}", f"{cost.round_s:.3g}", *_amounts([(part.runs, cost)])]
        table.add_row(part.name, *cells)
    if probe and len(parts) > 1:
        table.add_section()
        whole = _amounts([(part.runs, cost) for part, cost in zip(parts, costs, strict=True)])
        table.add_row("all of them", f"{runs:,}", "", "", "", *whole)
    console.print(table)
    if probe:
        console.print(Text(_note(parts), "dim"))
    else:
        console.print(Text("hours, GB sent and on disk, by two rounds of each row: --probe", "dim"))


def _amounts(shares: Sequence[tuple[int, Cost]]) -> list[str]:
    """Hours and GB of so many runs of each cost."""
    hours = sum(runs * cost.seconds for runs, cost in shares) / 3600
    sizes = [
        sum(runs * size for (runs, _), size in zip(shares, own, strict=True)) / 1e9
        for own in (
            [cost.uplink_bytes for _, cost in shares],
            [cost.downlink_bytes for _, cost in shares],
            [cost.disk_bytes for _, cost in shares],
        )
    ]
    return [f"{value:.2g}" if value < 10 else f"{value:,.0f}" for value in (hours, *sizes)]


def _note(parts: Sequence[Batch]) -> str:
    every = max(part.config.evaluate_every for part in parts)
    left_out = [f"evaluations in between (every {every} rounds)"] * (every > 1)
    left_out += ["checkpoints but the last", "MLflow's store", "fetching and decoding data"]
    return (
        f"From {_PROBED} rounds of the first run of each row, on this machine as it is now; every later "
        f"round counts as long and as large as round {_PROBED}. Hours are those of one run after the other: "
        "where a cluster has room for several, they share it. Messages get smaller where masks come to "
        f"agree. Left out: {', '.join(left_out)}, and what is tried twice."
    )


def _probed(console: Console, parts: Sequence[Batch]) -> list[Cost]:
    costs = []
    with ExitStack() as connection:
        for place, part in enumerate(parts):
            federation = Federation.of(part.config)  # its data is decoded before the clock starts
            if place == 0:
                also = [each.config for each in parts]
                connection.enter_context(connected(part.config, federation.stored_floats, also))
            if console.is_terminal:
                with console.status(f"{part.name}: {_PROBED} rounds ({place + 1} of {len(parts)})"):
                    costs.append(cost_of(part))
            else:
                costs.append(cost_of(part))
    return costs


def cost_of(part: Batch) -> Cost:
    """What one run of ``part`` takes, from its first rounds, which are played."""
    changes = {
        "stop_after": min(_PROBED, part.rounds),
        "tracking": {"enabled": False},
        "checkpoint_uri": None,
        "detached": False,
        "callbacks": [],
    }
    with tempfile.TemporaryDirectory(prefix="sparsyfed-probe-") as folder:
        started = time.perf_counter()
        probe = RunFolder(run(validate(merge(part.config.dump(), changes)), Path(folder) / "probe").folder)
        seconds = time.perf_counter() - started
        lines, text = probe.rounds(), probe.rounds_file.read_bytes().splitlines()
        size = sum(path.stat().st_size for path in probe.path.rglob("*") if path.is_file())
    last, left = lines[-1], part.rounds - lines[-1]["round"]
    round_s = last["time/round_s"]
    return Cost(
        start_s=seconds - sum(line["time/round_s"] for line in lines if line["round"] > 0),
        round_s=round_s,
        seconds=seconds + left * round_s,
        uplink_bytes=last["comm/uplink_bytes_total"] + left * last["comm/uplink_bytes"],
        downlink_bytes=last["comm/downlink_bytes_total"] + left * last["comm/downlink_bytes"],
        disk_bytes=size + left * (len(text[-1]) + 1),
    )
