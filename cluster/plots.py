"""Pictures of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def curves(lines: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Accuracy, sparsity, communication and masks over the rounds, as one PNG.

    Args:
        lines: The lines of ``rounds.jsonl``.
        path: Where the picture goes.
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

    draw(axes[0, 0], "test/accuracy", "test", 100)
    draw(axes[0, 0], "val/accuracy", "validation", 100)
    axes[0, 0].set(ylabel="accuracy (%)", ylim=(0, 100))
    draw(axes[0, 1], "sparsity/global", "global model", 100)
    draw(axes[0, 1], "sparsity/upload", "uploads (mean)", 100)
    axes[0, 1].set(ylabel="sparsity (%)")
    draw(axes[1, 0], "comm/uplink_bytes_total", "up", 1e-6)
    draw(axes[1, 0], "comm/downlink_bytes_total", "down", 1e-6)
    axes[1, 0].set(ylabel="communication so far (MB)", xlabel="round")
    draw(axes[1, 1], "masks/consensus", "consensus of the cohort", 100)
    draw(axes[1, 1], "masks/overlap", "overlap with the last mask (IoU)", 100)
    axes[1, 1].set(ylabel="agreement of masks (%)", xlabel="round", ylim=(0, 103))
    for place in axes.flat:
        place.grid(alpha=0.25)
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.spines[["top", "right"]].set_visible(False)
        if place.get_legend_handles_labels()[0]:
            place.legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
