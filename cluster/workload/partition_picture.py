"""A picture of which client has which classes."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluster.workload.partition import Partition

#: Columns of a picture; more clients than that are drawn as so many, evenly spaced.
CLIENTS_DRAWN = 1000


def picture(
    partition: Partition, labels: np.ndarray, classes: Sequence[str], path: Path, title: str | None = None
) -> None:
    """Draw who holds what: a heat map of each client's class shares under its number of samples.

    A heat map stays readable from 2 to 100 classes and from 10 to 1,000 clients, where bars and bubbles do
    not. One hue, darker for more and white for none, survives colour blindness and grey printing; its scale
    is a square root, so that small shares are seen beside whole ones.

    Args:
        partition: The partition; of more than 1,000 clients so many are drawn, evenly spaced.
        labels: int64 [N], labels of the full training split.
        classes: Names of the classes.
        path: Picture to write; the suffix (.png, .svg, .pdf) decides its format.
        title: Heading; by default the numbers of clients, samples and classes a client.
    """
    # Not pyplot: its global state and its choice of a window system have no place in a library.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap, PowerNorm
    from matplotlib.figure import Figure

    step = -(-partition.clients // CLIENTS_DRAWN)
    drawn = np.arange(0, partition.clients, step)
    histogram = partition.class_histogram(labels, len(classes), drawn)
    sizes = partition.sizes[drawn]
    shares = histogram / np.maximum(sizes, 1)[:, None]
    height = float(np.clip(0.26 * len(classes), 2.4, 8.0))
    figure = Figure(figsize=(9.0, height + 2.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=[0.8, height])
    held = np.median((histogram > 0).sum(axis=1))
    samples = int(partition.sizes.sum())
    counts = f"{partition.clients:,} clients, {samples:,} samples, classes a client: {held:g} (median)"
    bars.set_title(title or counts, parse_math=False)
    edges = (np.arange(drawn.size + 1) - 0.5) * step
    bars.stairs(sizes, edges, fill=True, color="0.35")
    bars.set_ylabel("samples")
    bars.set_ylim(0, sizes.max() * 1.15)
    image = cells.imshow(
        np.ma.masked_equal(shares.T, 0.0),
        aspect="auto",
        interpolation="nearest",
        extent=(edges[0], edges[-1], len(classes) - 0.5, -0.5),
        # The palest blues are left out: a small share must not look like none.
        cmap=ListedColormap(colormaps["Blues"](np.linspace(0.18, 1.0, 256))),
        norm=PowerNorm(0.5, vmin=0.0, vmax=shares.max()),
    )
    cells.set_xlabel("client" if step == 1 else f"client (one in {step:,} is drawn)")
    cells.set_ylabel("class")
    cells.locator_params(axis="x", integer=True)
    if len(classes) <= 30:
        shown = [" ".join(str(name).split())[:24] for name in classes]
        cells.set_yticks(range(len(classes)), labels=shown, parse_math=False)
    for axes in (bars, cells):
        axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, ax=[bars, cells], label="share of the client's samples", pad=0.01)
    with warnings.catch_warnings():
        # A letter that the font lacks, such as an emoji, is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path)
