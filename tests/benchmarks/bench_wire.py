"""Encode and decode times and bytes of wire messages: ``python -m tests.benchmarks.bench_wire``.

Random supports over P prunable weights; ``support/H2`` is the support's bytes over the bound P H2(d) / 8.
"""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import Any

import numpy as np

from cluster.wire import Shape, decode, dense_bytes, describe, encode


def _fastest(function: partial[Any], repeats: int) -> float:
    """Milliseconds of the fastest of ``repeats`` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    """Print one line for each size, density and value format."""
    print(f"{'P':>10} {'density':>8} {'values':>9} {'held':>9} {'layout':>9}", end="")
    print(f" {'encode ms':>10} {'decode ms':>10} {'bytes':>11} {'of dense':>9} {'support/H2':>11}")
    cases = [
        (density, "float32", "none") for density in (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0)
    ]
    cases += [(0.05, name, "none") for name in ("float16", "bfloat16", "int8")]
    cases += [(0.05, "float32", "superset"), (0.05, "float32", "shared")]
    for prunable in (200_000, 11_000_000):
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
            }[held_kind]
            options = {"held": held, "value_format": value_format}
            repeats = 3 if prunable > 1_000_000 else 50
            data = encode(values, support, shape, **options)
            encode_ms = _fastest(partial(encode, values, support, shape, **options), repeats)
            decode_ms = _fastest(partial(decode, data, shape, held=held, out=out), repeats)
            about = describe(data)
            share = about["kept"] / prunable
            ratio = "-"
            if 0 < share < 1:
                entropy = -prunable * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
                ratio = f"{about['support_bytes'] / entropy:.3f}"
            print(
                f"{prunable:>10} {density:>8} {value_format:>9} {held_kind:>9} {about['layout']:>9}", end=""
            )
            print(f" {encode_ms:>10.2f} {decode_ms:>10.2f} {len(data):>11}", end="")
            print(f" {len(data) / dense_bytes(shape):>9.4f} {ratio:>11}", flush=True)


if __name__ == "__main__":
    main()
