"""``sparsyfed describe``: what an experiment would run and how large, and what a run is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from algorithms import Grid
from algorithms.core.masks import cut_to_top_k, target_count
from cluster import seeding
from cluster.command_line.describe_secure import secure_text
from cluster.command_line.figures import shown
from cluster.command_line.progress import local_actors, place
from cluster.configuration.config import Config
from cluster.federation import Federation
from cluster.flops import count_activations, held_shares
from cluster.guarantee import noise_of, planned_events, spent
from cluster.records.run_folder import RunFolder
from cluster.references import is_file, is_folder
from cluster.simulation.clock import Device
from cluster.simulation.devices import Devices
from cluster.transport import wire
from cluster.transport.downlink import Parcel, Sender
from cluster.transport.uplink import Uplink
from cluster.workload.inputs import to_input
from cluster.workload.partition_picture import CLIENTS_DRAWN, picture

#: Widest terminal rendering of the partition that is still a picture and not a wall.
_CLASSES_DRAWN = 20
_MEGA = 1e6
#: What Ray adds to a process that has imported torch, measured (Ray 2.60, Linux).
_RAY_BYTES = 120 * 10**6


def describe_config(console: Console, config: Config, picture_file: Path | None = None) -> None:
    """Print what ``config`` would run.

    Args:
        console: Where to print.
        config: The experiment. Of an inert one, what needs the code that it names is left out.
        picture_file: Where to draw the partition; None for nowhere.

    Raises:
        DataError, PartitionError, ModelError: What ``sparsyfed run`` would say.
    """
    before = psutil.Process().memory_info().rss
    unknown = config.references if config.inert else {}
    federation = None
    if "data.name" not in unknown:
        federation = Federation.divided(config) if unknown else Federation.of(config)
    digest = "" if unknown else f"digest {config.digest()}, which everything that changes a result enters"
    _heading(console, "configuration", digest)
    # Innermost sections on one line: short, and still the YAML that ``run`` reads.
    text = yaml.safe_dump(
        config.resolved(), default_flow_style=None, sort_keys=False, width=console.width - 2
    )
    console.print(text.rstrip(), soft_wrap=True)
    left_out = []
    parts: tuple[tuple[str, str, Callable[[Federation], None]], ...] = (
        ("model", "data model adapter", lambda known: _model(console, known)),
        ("data", "data", lambda known: _partition(console, known, picture_file)),
        ("bytes", "data model adapter algorithm aggregation", lambda known: _bytes(console, known)),
        ("privacy", "data model adapter algorithm", lambda known: _privacy(console, known)),
        ("devices", "data model adapter algorithm", lambda known: _devices(console, known)),
        ("memory", "data model adapter algorithm", lambda known: _memory(console, known, before)),
    )
    for title, needs, show in parts:
        if federation is None or any(f"{section}.name" in unknown for section in needs.split()):
            left_out.append(title)
        else:
            show(federation)
    if unknown:
        _heading(console, "not imported", "the code that this folder names")
        for key, reference in unknown.items():
            console.print(f"{key} = {reference}")
        if left_out:
            console.print(f"left out, as they need it: {', '.join(left_out)}")


def run_named(name: str) -> RunFolder | None:
    """The run's folder that ``name`` stands for, by its path or its ``config.yaml``'s; None for all else."""
    path = Path(name)
    if path.name == "config.yaml" and is_file(path):
        beside = ("checkpoints", "rounds.jsonl", "result.json")
        path = path.parent if any((path.parent / each).exists() for each in beside) else path
    return RunFolder.open(path) if is_folder(path) else None


def describe_run(console: Console, folder: RunFolder, picture_file: Path | None = None) -> None:
    """Print what the run in a folder is, without importing or calling anything that the folder names."""
    config, lines = folder.config(inert=True), folder.rounds()
    done = lines[-1]["round"] if lines else 0
    console.print(Text(f"{shown(folder.path)}: {done} of {config.rounds} rounds", "bold"))
    describe_config(console, config, picture_file)


def _model(console: Console, federation: Federation) -> None:
    layout, flops = federation.layout, federation.flops
    config = federation.config
    unknown = config.inert and ":" in config.algorithm.name
    sparsity = config.algorithm.options.get("sparsity") if unknown else config.method.sparsity
    prunable = layout.prunable_size
    _heading(console, "model", f"{federation.config.model.name}: {layout.trained_size:,} trained parameters")
    table = _table("prunable layer", "shape", "weights", "share", "forward kFLOP a sample")
    for entry, forward in zip(layout.prunable, flops.forward, strict=True):
        shape = "x".join(map(str, entry.shape))
        name = entry.name.removesuffix(".weight")
        table.add_row(name, shape, f"{entry.size:,}", f"{entry.size / prunable:.1%}", f"{forward / 1e3:,.0f}")
    table.add_section()
    table.add_row("|P|, all of them", "", f"{prunable:,}", "100.0%", f"{flops.forward.sum() / 1e3:,.0f}")
    console.print(table)
    if sparsity is not None:
        keep = target_count(prunable, sparsity)
        console.print(f"top K       {keep:,} of |P| are kept at sparsity {sparsity:g}")
    console.print(
        f"not pruned  {layout.trained_size - prunable:,} other parameters (biases, norms, embeddings), "
        f"{layout.size - layout.trained_size:,} buffer values"
    )
    if tables := [f"{entry.name} ({entry.size:,})" for entry in layout.other if len(entry.shape) > 1]:
        console.print(f"            among them {', '.join(tables)}")
    if federation.trained.adapted is not None:
        adapted, size = federation.trained.adapted, federation.trained.base_bytes
        console.print(
            f"frozen      {federation.trained.frozen_size:,} parameters, "
            f"a message of {size / _MEGA:,.3f} MB to each client before its first model"
        )
        console.print(
            f"adapters    beside {len(adapted.layers)} layers; trained in full: {adapted.head or 'nothing'}"
        )
        if not unknown and (lost := federation.trained.lost_to_a_cut(config, layout)) is not None:
            console.print(f"note        {lost}")
    console.print(f"training    {flops.dense(1) / 1e6:,.2f} MFLOP a sample and step (dense)")


def _partition(console: Console, federation: Federation, file: Path | None) -> None:
    dataset, divided, section = federation.dataset, federation.partition, federation.config.partition
    sizes, labels, classes = divided.sizes, federation.labels, federation.classes
    drawn = np.arange(min(divided.clients, CLIENTS_DRAWN))
    histogram = divided.class_histogram(labels, len(classes), drawn)
    alpha = "" if section.skew is None else f", alpha {section.skew:g}"
    image = "x".join(map(str, dataset.input_shape))
    kind, known = "images" if len(dataset.input_shape) == 3 else "inputs", federation.objective.by_class
    targets = federation.objective.count(dataset)
    counted = f"{len(classes)} classes" if known else f"{targets} target{'s' * (targets > 1)}"
    if dataset.vocabulary:
        kind, words = "samples of tokens", f"a vocabulary of {len(dataset.vocabulary):,}"
        counted = f"{words}, {counted}" if known else words
    _heading(console, "data", f"{dataset.name}, {kind} {image}, {counted}")
    if section.name == "sampled":
        given = "every client draws its own from the rest, with replacement"
    else:
        given = f"given to nobody {len(labels) - len(federation.validation) - int(sizes.sum()):,}"
    held = np.count_nonzero(histogram, axis=1)
    mixture = "(min / median / max)"
    if known:
        some = f"; classes of the first {drawn.size:,}" if drawn.size < divided.clients else ""
        mixture = (
            f"and {held.min()} / {np.median(held):.0f} / {held.max()} classes (min / median / max{some})"
        )
    for key, text in (
        ("samples", f"train {len(labels):,}, of them held out for validation {len(federation.validation):,} "
                    f"and {given}; test {len(dataset.test.targets):,}"),
        ("partition", f"{section.name}{alpha}, seed {section.seed}: {divided.clients:,} clients"),
        ("a client", f"{sizes.min():,} / {np.median(sizes):,.0f} / {sizes.max():,} samples {mixture}"),
    ):  # fmt: skip
        console.print(f"{key:<11} {text}")
    if known and len(classes) <= _CLASSES_DRAWN:
        console.print(_heat_map(console, histogram, classes, divided.clients), no_wrap=True, crop=True)
    if file is None:
        return
    title = f"{dataset.name}, {section.name}{alpha}, {divided.clients} clients"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(divided, labels, classes, file, title=title)
    console.print(f"picture     {shown(file)}", soft_wrap=True)


def _heat_map(console: Console, histogram: np.ndarray, classes: tuple[str, ...], clients: int) -> Text:
    """One column a client, one row a class; darker is a larger share of the client's samples."""
    shades = " ░▒▓█" if console.encoding.startswith("utf") else " .:*#"
    label = min(12, max(map(len, classes)))
    drawn = min(len(histogram), console.width - label - 2)
    shares = histogram[:drawn] / np.maximum(histogram[:drawn].sum(axis=1, keepdims=True), 1)
    # Any sample at all is visible; half of a client's samples or more is the darkest shade.
    levels = np.ceil(np.minimum(shares / 0.5, 1.0) * (len(shades) - 1)).astype(int)
    text = Text()
    for index, name in enumerate(classes):
        text.append(f"{name[:label]:>{label}} ", "dim")
        text.append("".join(shades[level] for level in levels[:, index]) + "\n")
    which = f"clients 0 to {drawn - 1} of {clients}" if drawn < clients else f"{drawn} clients"
    text.append(
        f"{'':{label}} {which}; rows are classes, {shades[-1]} is half of a client's samples or more", "dim"
    )
    return text


def _bytes(console: Console, federation: Federation) -> None:
    """Messages of the real encoder, on the initial weights."""
    config, layout = federation.config, federation.layout
    method, shape, down = config.method, wire.Shape.of(layout, "up"), wire.Shape.of(layout, "down")
    initial = federation.initial_weights
    state = method.initial_state(initial, layout, seeding.generator(config.seed, "server"))
    weights = state.weights.numpy()
    support = weights[: shape.prunable] != 0 if state.mask is None else state.mask.numpy()
    first = len(wire.encode(layout.sent_down(weights), support, down, value_format=config.wire.downlink))
    cut = initial.clone()
    kept = cut_to_top_k(cut[: shape.prunable], target_count(shape.prunable, method.sparsity)).numpy()
    bits, sent = config.wire.bits, cut.numpy()[: shape.size]
    if bits is not None:
        sent = Grid.for_round(sent, config.cohort, bits).words(sent, 1)[0]
    target = len(wire.encode(sent, kept, shape, value_format=config.wire.uplink, bits=bits))
    dense = wire.dense_bytes(replace(shape, size=layout.model_size))
    _heading(console, "bytes", "whole messages of the real encoder; a run measures its own")
    table = _table("message", "a client", f"{config.cohort} clients", "dense is")
    if layout.carried:
        names = ", ".join(f"{entry.name} ({entry.size:,} floats)" for entry in layout.carried)
        console.print(f"{config.algorithm.name} carries beside the model: {names}")
    if federation.kept_bytes:
        console.print(
            f"a client keeps {federation.kept_bytes / _MEGA:,.3f} MB between its visits, which never travel; "
            f"in the driver's memory at most {federation.kept_bytes * len(federation.sizes) / _MEGA:,.1f} MB"
        )
    if config.rule.keeps_updates:
        console.print(
            f"aggregation.name={config.aggregation.name}: every client weighs the same; the driver holds all "
            f"updates of a round, at most {federation.updates_bytes / _MEGA:,.1f} MB"
        )
    if config.privacy.secure.asked:
        console.print(secure_text(federation, state), soft_wrap=True)
    base = [("the frozen base, once", federation.trained.base_bytes)] if federation.trained.base_bytes else []
    for name, size in (
        *base,
        ("dense float32 model", dense),
        (f"upload of the top K, {f'{bits} bits a value' if bits else config.wire.uplink}", target),
        (f"download in round 1, {config.wire.downlink}", first),
    ):
        mega = size / _MEGA
        table.add_row(name, f"{mega:.3f} MB", f"{mega * config.cohort:,.2f} MB", f"{dense / size:.1f}x")
    console.print(table)
    if any(federation.part_of(name) is not None for name in config.devices.kinds):
        _parts(console, federation, Sender(layout, config.wire.downlink).parcel(state))
        return
    console.print(
        "A download holds the union of the cohort's supports: as small as an upload where the masks agree.",
        style="dim",
    )


def _parts(console: Console, federation: Federation, parcel: Parcel) -> None:
    """What a client of each tier is sent, and what its part of the model costs it."""
    config, method, layout = federation.config, federation.config.method, federation.layout
    uplink = Uplink(
        layout, config.wire.uplink, differences=False, max_update_norm=None, parts=method.confined
    )
    table = _table("tier's part", "weights", "download", "upload", "MFLOP a sample", "training MB")
    for name in config.devices.kinds:
        support = federation.part_of(name)
        held = support if method.confined else None
        down, received = parcel.full_bytes, parcel.exact
        if support is not None:
            known = method.submodel_known
            part = parcel.parts[parcel.part(support, known=known, confined=method.confined)]
            down, received = part.nbytes, part.weights
        up = f"{len(uplink.encode(received, None, held).message) / _MEGA:.3f} MB" if method.confined else ""
        shares = np.ones(len(layout.prunable)) if held is None else held_shares(held, layout)
        table.add_row(
            name,
            f"{1.0 if support is None else support[: layout.prunable_size].mean():.1%}",
            f"{down / _MEGA:.3f} MB",
            up,
            f"{federation.flops.of_part(shares).dense(1) / 1e6:,.2f}",
            f"{federation.tier_bytes(name) / _MEGA:,.1f}",
        )
    console.print(table)


def _privacy(console: Console, federation: Federation) -> None:
    """How much noise goes where, and what all rounds will have told of one client."""
    config, dp = federation.config, federation.config.privacy.dp
    if not dp.asked:
        return
    noise, clients = noise_of(config), config.population
    events = planned_events(config, noise)
    asked = min(1.0, config.cohort / clients)
    empty = math.prod(
        (1.0 - asked * (1.0 - tier.dropout)) ** (tier.share * clients)
        for tier in config.devices.kinds.values()
    )
    _heading(console, "privacy", f"of a whole client, by {config.cohort} coins of {clients:,}")
    for key, text in (
        ("clip", f"{dp.clip:g}{', following the median norm' * dp.adaptive}"),
        ("noise", f"{noise:g} x clip on the sum of updates: on the mask that all share, else on all"),
        ("epsilon", f"{spent(config, events):.3g} after {sum(event.count for event in events)} rounds, "
                    f"at delta {dp.delta:g}, by {dp.accountant}"
                    + ("" if dp.epsilon is None else f"; the run ends within {dp.epsilon:g}")),
        ("nobody", f"a round in {1 / empty:,.3g} has no update and leaves the model as it is"
                   if empty > 1e-300 else "every round has an update"),
    ):  # fmt: skip
        console.print(f"{key:<11} {text}")


def _devices(console: Console, federation: Federation) -> None:
    """What each tier is like, and what time and energy a visit with a dense model takes its median device."""
    config, devices = federation.config, Devices(federation.config)
    dense = wire.dense_bytes(wire.Shape.of(federation.layout))
    flops = federation.flops.dense(int(np.median(federation.sizes)) * config.local.epochs)
    profile = config.devices.profile or ("own tiers" if config.devices.tiers else "uniform")
    cells, uplink = config.devices.cells, config.devices.cell_uplink
    shared = "" if uplink is None else f"; {cells:,} cells of {uplink / _MEGA:,.1f} Mbit/s up"
    takes = f"training takes {federation.training_bytes / _MEGA:,.1f} MB"
    _heading(console, "devices", f"{profile}; {takes}{shared}")
    table = _table(
        "tier", "clients", "GFLOP/s", "Mbit/s up", "down", "dropout", "available", "dense visit", "takes"
    )
    counts = np.bincount(devices.tiers, minlength=len(devices.kinds))
    for (name, tier), count in zip(config.devices.kinds.items(), counts, strict=True):
        device = Device.of(tier)
        table.add_row(
            name,
            f"{count:,}",
            f"{tier.compute / 1e9:,.1f}",
            f"{tier.uplink / _MEGA:,.1f}",
            f"{tier.downlink / _MEGA:,.1f}",
            f"{tier.dropout:.0%}",
            tier.availability.name,
            f"{device.duration(dense, flops, dense):,.2f} s",
            f"{device.energy(dense, flops, dense):,.3g} J",
        )
    console.print(table)


def _memory(console: Console, federation: Federation, process: int) -> None:
    """An estimate from the arrays that an actor holds (``Trainer`` and ``Total``)."""
    config, layout, dataset = federation.config, federation.layout, federation.dataset
    method = config.method
    vectors = 4 * (2 * layout.size + layout.trained_size * (2 if method.reparameterised else 1))
    total = 16 * layout.size + (12 if method.masked else 4) * layout.prunable_size
    image = int(np.prod(dataset.input_shape))
    client = int(federation.sizes.max()) * (4 * image + 8)
    example = to_input(dataset.train.inputs[:1], torch.device("cpu"))
    activations = 4 * config.local.batch_size * count_activations(federation.model, example)
    mapped = sum(file.stat().st_size for file in dataset.folder.glob("*.npy"))
    ray = _RAY_BYTES if config.execution == "ray" else 0
    actors, actor = local_actors(config), process + ray + vectors + total + client + activations
    broadcast = 4 * layout.size * (1 if config.wire.downlink == "float32" else 2)
    mapped += 0 if federation.trained.base is None else federation.trained.base.nbytes
    _heading(console, "memory", "an estimate: libraries' workspaces and the allocator come on top")
    table = _table("what", "MB", "from")
    kinds = "w_t, theta, w and gradient" if method.reparameterised else "w_t, w and gradient"
    for name, size, origin in (
        ("Python, torch, libraries", process, "this process before it opened the data"),
        ("Ray", ray, "measured once, not here"),
        ("model vectors", vectors, f"{kinds}, float32"),
        ("partial total", total, "two float64[size], int32 votes" + (", int64 counts" * method.masked)),
        ("largest client's data", client, f"{federation.sizes.max()} samples as float32"),
        ("activations", activations, f"outputs of all layers, a batch of {config.local.batch_size}"),
    ):
        table.add_row(name, f"{size / _MEGA:,.2f}", origin)
    table.add_section()
    table.add_row("an actor", f"{actor / _MEGA:,.0f}", "the sum of these")
    table.add_row(
        "shared on a node", f"{(broadcast + mapped) / _MEGA:,.1f}", "broadcast, and data mapped from disk"
    )
    if config.address == "local":
        # The driver holds about what an actor does, without activations: state, mean, checkpoint.
        whole = (actors + (config.execution == "ray")) * actor + broadcast + mapped
        table.add_row("all of it", f"{whole / _MEGA:,.0f}", f"{actors} actors and the driver, here")
    console.print(table)
    free = psutil.virtual_memory().available / _MEGA
    console.print(f"would run on {place(config)}")
    console.print(f"this machine has {psutil.cpu_count()} cores and {free:,.0f} MB of memory free")


def _heading(console: Console, title: str, text: str) -> None:
    console.print()
    console.print(Text(title, "bold") + Text(f"  {text}", "dim"))


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(first)
    for head in others:
        table.add_column(head, justify="left" if head in ("from", "shape") else "right")
    return table
