"""Cut, encode, decode and fold of updates, and the bytes of messages.

Random supports over P prunable weights; ``support/H2`` is the support's bytes over the bound P H2(d) / 8.
Seconds of the thread, fastest of a few, so that a busy machine matters little.
"""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from algorithms import Grid, ParameterLayout, Total
from algorithms.core.masks import cut_to_top_k, target_count
from cluster.transport.wire import Message, Shape, decode, dense_bytes, describe, encode
from cluster.workload import models
from tests.benchmarks.report import Figure


def _fastest(function: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the fastest of ``repeats`` calls."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return 1e3 * min(times)


def figures(name: str, quick: bool) -> list[Figure]:
    """The path of an update of ResNet-18, then messages of each density and value format."""
    torch.set_num_threads(1)
    return _updates(name, 10 if quick else 100) + _messages(name, quick)


def _updates(name: str, count: int) -> list[Figure]:
    """What one update of 11 million weights at 95 % costs, and adding up ``count`` of them."""
    model = models.build("resnet18", input_shape=(3, 32, 32), classes=10, seed=0)
    layout = ParameterLayout.of(model)
    shape, keep = Shape.of(layout), target_count(layout.prunable_size, 0.95)
    weights = layout.flatten(model)
    copies = iter([weights.clone() for _ in range(3)])
    cut_ms = _fastest(lambda: cut_to_top_k(next(copies)[: layout.prunable_size], keep), 3)
    support = cut_to_top_k(weights[: layout.prunable_size], keep).numpy()
    values = weights.numpy()
    message = encode(values, support, shape)
    received = decode(message, shape)
    grid = Grid.for_round(values, 64 * count)
    total = Total.zero(grid, layout)
    out = np.empty(shape.size, np.float32)

    def fold(one: Message, client: int = 0) -> None:
        total.fold(client, one.values, one.support, 64, layout, one.positions)

    fold(received)
    encode_ms = _fastest(lambda: encode(values, support, shape), 5)
    decode_ms = _fastest(lambda: decode(message, shape, out=out), 5)
    fold_ms = _fastest(lambda: fold(received), 5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.thread_time()
    total = Total.zero(grid, layout)
    for client in range(count):
        fold(decode(message, shape, out=out), client)
    total.mean()
    seconds = time.thread_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    case = "one update of resnet18 at 95 %"
    return [
        Figure(name, case, "cut ms", cut_ms),
        Figure(name, case, "encode ms", encode_ms),
        Figure(name, case, "decode ms", decode_ms),
        Figure(name, case, "fold ms", fold_ms),
        Figure(name, case, "cut + encode ms", cut_ms + encode_ms, 200.0),
        Figure(name, case, "encode + decode + fold ms", encode_ms + decode_ms + fold_ms, 150.0),
        Figure(f"{name}: aggregation", f"{count} updates", "decode + fold + mean s", seconds, 5.0),
        Figure(f"{name}: aggregation", f"{count} updates", "peak memory added MiB", grown, 1024.0),
    ]


def _messages(name: str, quick: bool) -> list[Figure]:
    cases = [(density, "float32", "none") for density in (0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0)]
    cases += [(0.05, form, "none") for form in ("float16", "bfloat16", "int8")]
    cases += [(0.05, "float32", "superset"), (0.05, "float32", "shared")]
    cases += [(density, "float32", "known") for density in (0.05, 0.1, 0.3, 0.5)]
    found = []
    for prunable in (200_000,) if quick else (200_000, 11_000_000):
        generator = np.random.default_rng(0)
        rest, layer_count = prunable // 1000, 60
        edges = np.linspace(0, prunable, layer_count + 1).astype(int).tolist()
        layers = (*itertools.pairwise(edges), (prunable, prunable + rest))
        shape = Shape(prunable, prunable + rest, prunable + 2 * rest, layers)
        values = generator.standard_normal(shape.size).astype(np.float32)
        out = np.empty(shape.size, np.float32)
        for density, value_format, held_kind in cases:
            support = generator.random(prunable) < density
            held = {
                "none": None,
                "superset": support | (generator.random(prunable) < 0.02),
                "shared": support,
                "known": None,
            }[held_kind]
            known = values[: shape.trained].copy() if held_kind == "known" else None
            options: dict[str, Any] = {"held": held, "known": known, "value_format": value_format}
            repeats = 3 if prunable > 1_000_000 else 20
            data = encode(values, support, shape, **options)
            write_one = partial(encode, values, support, shape, **options)
            read_one = partial(decode, data, shape, held=held, known=known, out=out)
            about = describe(data)
            kind = "values known" if known is not None else value_format
            kind += "" if held is None else f", {held_kind} held"
            case, title = f"{prunable:,} at {density:g} {kind}: {about['layout']}", f"{name}: messages"
            found += [
                Figure(title, case, "encode ms", _fastest(write_one, repeats)),
                Figure(title, case, "decode ms", _fastest(read_one, repeats)),
                Figure(title, case, "bytes", len(data)),
                Figure(title, case, "of dense", len(data) / dense_bytes(shape)),
            ]
            share = about["kept"] / prunable
            if 0 < share < 1:
                entropy = -prunable * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
                found.append(Figure(title, case, "support/H2", about["support_bytes"] / entropy))
    return found
