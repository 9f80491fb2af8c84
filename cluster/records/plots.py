"""Pictures of one run, its rounds and devices, and how every picture looks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cluster.federation import Federation
from cluster.measures import Measure
from cluster.simulation.devices import Devices
from cluster.transport import wire

#: Devices drawn of a larger population.
_DEVICES_DRAWN = 2000

#: Blue, vermillion, green, purple, orange, sky blue, black: those of Okabe and Ito, told apart by all.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def style(place: int) -> dict[str, Any]:
    """Colour and marker of the ``place``-th thing in a picture; the second time round they pair otherwise."""
    turn = place // len(COLOURS)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + turn) % len(MARKERS)]}


def finish(axes: Any) -> None:
    """Grid behind, no box around."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def curves(lines: Sequence[dict[str, Any]], path: Path, selects: Measure, *, title: str) -> None:
    """What selects, sparsity, communication and masks over the rounds, shifts of the data dotted, as one PNG.

    Args:
        lines: The lines of ``rounds.jsonl``.
        path: Where the picture goes.
        selects: What selects, such as accuracy.
        title: Its title.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2)

    def draw(place: Any, key: str, label: str, scale: float = 1.0) -> None:
        points = [(line["round"], line[key] * scale) for line in lines if line.get(key) is not None]
        if points:
            place.plot(*zip(*points, strict=True), label=label, linewidth=1.8)

    draw(axes[0, 0], f"test/{selects.key}", "test", selects.scale)
    draw(axes[0, 0], f"val/{selects.key}", "validation", selects.scale)
    axes[0, 0].set(ylabel=selects.label, **({"ylim": (0, 100)} if selects.unit == "share" else {}))
    draw(axes[0, 1], "sparsity/global", "global model", 100)
    draw(axes[0, 1], "sparsity/upload", "uploads (mean)", 100)
    axes[0, 1].set(ylabel="sparsity (%)")
    draw(axes[1, 0], "comm/uplink_bytes_total", "up", 1e-6)
    draw(axes[1, 0], "comm/downlink_bytes_total", "down", 1e-6)
    axes[1, 0].set(ylabel="communication so far (MB)", xlabel="round")
    draw(axes[1, 1], "masks/consensus", "consensus of the cohort", 100)
    draw(axes[1, 1], "masks/overlap", "overlap with the last mask (IoU)", 100)
    axes[1, 1].set(ylabel="agreement of masks (%)", xlabel="round", ylim=(0, 103))
    periods = [(line["round"], line.get("shift/period", 0)) for line in lines]
    shifts = [after[0] for before, after in pairwise(periods) if after[1] > before[1]]
    for place in axes.flat:
        for round_number in shifts:
            place.axvline(round_number, color="0.4", linestyle=":", linewidth=1.2)
        finish(place)
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        if place.get_legend_handles_labels()[0]:
            place.legend(frameon=False, fontsize=9)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=110)


def population(federation: Federation, path: Path) -> None:
    """The devices, as one PNG: compute against bandwidth, time of a dense visit, availability over a day.

    Args:
        federation: Whose devices; of more than 2,000 as many are drawn, evenly spaced.
        path: Where the picture goes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    config, devices = federation.config, Devices(federation.config)
    clients = np.arange(0, config.partition.clients, -(-config.partition.clients // _DEVICES_DRAWN))
    drawn, tiers = devices.of(clients), devices.tiers[clients]
    dense = wire.dense_bytes(wire.Shape.of(federation.layout))
    flops = federation.flops.dense(round(float(federation.sizes.mean())) * config.local.epochs)
    compute = np.array([device.compute for device in drawn]) / 1e9
    downlink = np.array([device.downlink for device in drawn]) / 1e6
    seconds = np.array([device.duration(dense, flops, dense) for device in drawn])
    hours = np.arange(0.0, 24.0, 0.5)
    awake = np.array([devices.available(clients, 3600.0 * hour) for hour in hours])

    figure = Figure(figsize=(12, 4), layout="constrained")
    kinds, visits, days = figure.subplots(1, 3)
    bins = np.geomspace(seconds.min() / 1.1, seconds.max() * 1.1, 31)
    for index, name in enumerate(config.devices.kinds):
        mine = tiers == index
        if not mine.any():
            continue
        colour = f"C{index}"
        label = f"{name} ({mine.mean():.0%})"
        kinds.scatter(compute[mine], downlink[mine], s=9, alpha=0.55, color=colour, label=label)
        visits.hist(seconds[mine], bins=bins, alpha=0.55, color=colour)
        days.plot(hours, 100 * awake[:, mine].mean(axis=1), color=colour, linewidth=1.8)
    kinds.set(xscale="log", yscale="log", xlabel="compute (GFLOP/s)", ylabel="downlink (Mbit/s)")
    for name in kinds.legend(frameon=False, fontsize=9).get_texts():
        name.set_parse_math(False)
    visits.set(xscale="log", xlabel="seconds of a visit with a dense model", ylabel="devices")
    days.set(xlabel="hour of the simulated day", ylabel="available (%)", xlim=(0, 24), ylim=(0, 103))
    days.set_xticks(range(0, 25, 6))
    for axis in (kinds.xaxis, kinds.yaxis, visits.xaxis):
        axis.set_major_formatter("{x:g}")
        low, high = axis.get_view_interval()
        axis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    for place in (kinds, visits, days):
        place.grid(alpha=0.25, which="both" if place is kinds else "major")
        place.spines[["top", "right"]].set_visible(False)
    shown = f" ({len(clients):,} drawn)" if len(clients) < config.partition.clients else ""
    kind = config.devices.profile or ("tiers of its own" if config.devices.tiers else "uniform")
    figure.suptitle(f"{config.partition.clients:,} devices{shown}: {kind}")
    figure.savefig(path, dpi=110)
