"""Grids: one file that stands for many runs, such as every method on every seed.

A grid is an experiment with a ``grid`` section, dotted keys with the values they take::

    extends: quickstart
    grid:
      algorithm: [{name: fedavg}, {name: topk}, {name: sparsyfed, beta: 1.5}]
      seed: [0, 1, 2]

Its runs are independent and lie side by side in one folder: a grid that is run again skips what is complete
and resumes what is not.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import RESULT_FREE, Config, validate
from cluster.execution import Result, resume, run
from cluster.run_folder import RunFolder
from cluster.trees import ConfigError, apply_overrides, load_tree, merge, nested

#: Columns of the table: header, how a run's cell is computed from its result and lines, format.
_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any], list[dict[str, Any]]], float | None], str], ...] = (
    ("accuracy %", lambda result, lines: 100 * result["accuracy"], ".1f"),
    ("best %", lambda result, lines: 100 * result["best_accuracy"], ".1f"),
    ("sparsity %", lambda result, lines: 100 * result["sparsity"], ".1f"),
    ("MB up", lambda result, lines: result["uplink_bytes"] / 1e6, ".2f"),
    ("MB down", lambda result, lines: result["downlink_bytes"] / 1e6, ".2f"),
    ("GFLOP", lambda result, lines: result["flops_sparse"] / 1e9, ".0f"),
    ("regrowth ‰", lambda result, lines: _mean(lines, "masks/regrowth_share", 1000), ".2f"),
    ("client regrowth ‰", lambda result, lines: _mean(lines, "masks/client_regrowth_share", 1000), ".2f"),
    ("consensus", lambda result, lines: _mean(lines, "masks/consensus"), ".3f"),
)


def expand(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Config] | None:
    """The runs of a grid by name, or None where ``source`` is a single experiment.

    Raises:
        ConfigError: A key or value of the grid is wrong, or two of its runs have one name.
    """
    tree = load_tree(source)
    grid = tree.pop("grid", None)
    if grid is None:
        return None
    if not isinstance(grid, Mapping) or not all(isinstance(v, list) and v for v in grid.values()):
        raise ConfigError(f"{source}: grid: expected dotted keys, each with a list of values; found {grid!r}")
    fixed = [o for o in overrides if any(_covers(key, o.partition("=")[0]) for key in grid)]
    if fixed:
        raise ConfigError(f"{source}: {', '.join(fixed)}: the grid itself varies {', '.join(grid)}")
    tree = apply_overrides(tree, overrides)
    runs: dict[str, Config] = {}
    for values in itertools.product(*grid.values()):
        point = tree
        for key, value in zip(grid, values, strict=True):
            point = merge(point, nested(key, value))
        name = "-".join(_short(key, value) for key, value in zip(grid, values, strict=True))
        if name in runs:
            raise ConfigError(f"{source}: grid: two runs are named {name}")
        runs[name] = validate(point)
    return runs


def run_grid(
    runs: Mapping[str, Config],
    output: Path,
    *,
    started: Callable[[str, Config], Callable[[dict[str, Any]], None]],
) -> dict[str, Result]:
    """Run what is not complete, one run after the other, each on the whole cluster.

    Args:
        runs: Configurations by name.
        output: Folder of all runs; each lies in a subfolder with its name.
        started: Called with each run that starts; returns what takes its lines.

    Raises:
        ConfigError: A folder holds a run of another configuration.
    """
    results = {}
    for name, config in runs.items():
        path = output / name
        if (path / "config.yaml").exists():
            folder = RunFolder.open(path)
            if folder.config().digest() != config.digest():
                raise ConfigError(f"{path} holds a run of another configuration; choose another --output")
            result = folder.result()
            if result is not None and result["complete"]:
                results[name] = Result(path, result)
                continue
            now = [f"{key}={json.dumps(config.dump()[key])}" for key in RESULT_FREE - {"tracking"}]
            results[name] = resume(path, now, progress=started(name, config))
        else:
            results[name] = run(config, path, progress=started(name, config))
        write_table(results, output)
        if results[name].summary["rounds"] < (config.stop_after or config.rounds):
            break  # stopped by Ctrl-C
    write_table(results, output)
    return results


def table(results: Mapping[str, Result]) -> list[list[str]]:
    """Header and one row a run, as text."""
    rows = [["run", *(header for header, _, _ in _COLUMNS)]]
    for name, result in results.items():
        lines = RunFolder(result.folder).rounds()
        cells = [compute(result.summary, lines) for _, compute, _ in _COLUMNS]
        texts = [
            "-" if cell is None else format(cell, form)
            for cell, (_, _, form) in zip(cells, _COLUMNS, strict=True)
        ]
        rows.append([name, *texts])
    return rows


def write_table(results: Mapping[str, Result], folder: Path) -> None:
    """Write ``table.csv`` and ``table.md``."""
    rows = table(results)
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    (folder / "table.md").write_text("\n".join(lines) + "\n")


def _covers(key: str, override: str) -> bool:
    """Whether an override sets what the grid key sets; ``algorithm.sparsity`` is the point's to inherit."""
    return override == key or (key.startswith(f"{override}.")) or override == f"{key}.name"


def _mean(lines: Sequence[dict[str, Any]], key: str, scale: float = 1.0) -> float | None:
    # Round 1 starts from a dense model: what masks do is measured from round 2 on.
    values = [line[key] for line in lines if line["round"] > 1 and line.get(key) is not None]
    return scale * float(np.mean(values)) if values else None


def _short(key: str, value: Any) -> str:
    """A value as part of a run's name: method names as they are, others behind their key's last part."""
    if isinstance(value, Mapping):
        named = {k: v for k, v in value.items() if k != "name"}
        text = "-".join([str(value.get("name", key)), *(f"{k}{v}" for k, v in named.items())])
    elif key.endswith(".name"):
        text = str(value)
    else:
        text = f"{key.rsplit('.', 1)[-1]}{value}"
    return re.sub(r"[^\w.\-]+", "_", text)
