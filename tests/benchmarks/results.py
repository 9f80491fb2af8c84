"""Rows of finished runs as CSV, and the tables of docs/results.md drawn from them.

    python -m tests.benchmarks.results docs/results/laptop.csv --rounds 20     # its tables, as Markdown
    python -m tests.benchmarks.results --collect runs/paper-laptop --rounds 10 20 --preset paper-laptop
    python -m tests.benchmarks.results --collect runs/mine --label "topk, lr 0.1"

A row is one run after one round. Megabytes and FLOPs are sums up to it, over all clients; ``client_cut``
(weights that a client received or trained and its final cut took) and ``regrowth`` (weights that are 0 in one
global model and not in the next) are means from round 2 on.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cluster.compare.reading import find_folders
from cluster.configuration.config import Config
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.statistics import mean_interval


@dataclass(frozen=True)
class Row:
    """One run after one round; None where it was not measured.

    Attributes:
        preset: The experiment that the run is of.
        method: Its method, with what sets it apart from the preset's.
        seed: Its seed.
        width: Width of a ResNet; None for other models.
        round: After which round.
        accuracy: Central test accuracy, percent.
        sparsity: Of the global model's prunable weights, percent.
        mb_up: Megabytes that clients sent.
        mb_down: Megabytes that they were sent.
        gflop_dense: Training GFLOPs as if all were dense.
        gflop_sparse: Ideal sparse training GFLOPs.
        client_cut: Weights a client and round.
        regrowth: Weights a round.
        config: Hash of the run's configuration.
        code: Hash of the code that computed it.
        perplexity: Central test perplexity of language models.
        bits: Bits a token of the same, a byte where tokens are bytes.
        rmse: Central test RMSE of regressions.
        robust: Test accuracy under attack, percent.
        robust_gap: By how much it is better on training data, in percentage points.
        clients: Mean accuracy of clients after local training, percent.
        worst: The same of the worst tenth.
        entropy_mb: What of mb_up random masks of the layers' densities need.
        unseen: Mean accuracy of clients that never trained, on the global model, percent.
        one_shot: The same once each has adapted it to one row of each class.
        five_shot: The same with five.
        up_bits: Bits that a client sent for each weight of the model, a round.
        memory_mb: Megabytes that training takes on a client, and what it keeps between its visits.
        consensus: Agreement of a cohort's masks, the mean from round 2 on.
        kj: Kilojoules of the devices so far.
        simulated_h: Hours on their clock so far.
        epsilon: What the models up to it tell of one client, where they are private.
    """

    preset: str
    method: str
    seed: int
    width: int | None
    round: int
    accuracy: float | None
    sparsity: float
    mb_up: float
    mb_down: float
    gflop_dense: float
    gflop_sparse: float
    client_cut: float | None
    regrowth: float | None
    config: str
    code: str
    perplexity: float | None = None
    bits: float | None = None
    rmse: float | None = None
    robust: float | None = None
    robust_gap: float | None = None
    clients: float | None = None
    worst: float | None = None
    entropy_mb: float | None = None
    unseen: float | None = None
    one_shot: float | None = None
    five_shot: float | None = None
    up_bits: float | None = None
    memory_mb: float | None = None
    consensus: float | None = None
    kj: float | None = None
    simulated_h: float | None = None
    epsilon: float | None = None


NAMES = tuple(field.name for field in fields(Row))
#: Columns of files whose runs have them.
_OPTIONAL = (
    *("perplexity", "bits", "rmse", "robust", "robust_gap", "clients", "worst", "entropy_mb"),
    *("unseen", "one_shot", "five_shot", "up_bits", "memory_mb", "consensus", "epsilon", "kj", "simulated_h"),
)
_WORDS, _WHOLE = ("preset", "method", "config", "code"), ("seed", "width", "round")


def _sum(form: str) -> Callable[[float], str]:
    """How a sum is written; two digits of what is less than one."""
    return lambda value: f"{value:.2g}" if 0 < value < 1 else form.format(value)


#: Column of the printed table -> which figure, and how it is written.
_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "accuracy %": ("accuracy", "{:.1f}".format),
    "perplexity": ("perplexity", "{:.2f}".format),
    "bits": ("bits", "{:.3f}".format),
    "RMSE": ("rmse", "{:.2f}".format),
    "robust %": ("robust", "{:.1f}".format),
    "gap": ("robust_gap", "{:.1f}".format),
    "clients %": ("clients", "{:.1f}".format),
    "worst tenth %": ("worst", "{:.1f}".format),
    "new clients %": ("unseen", "{:.1f}".format),
    "one shot %": ("one_shot", "{:.1f}".format),
    "five shots %": ("five_shot", "{:.1f}".format),
    "MB of entropy": ("entropy_mb", "{:.1f}".format),
    "sparsity %": ("sparsity", "{:.1f}".format),
    "MB up": ("mb_up", _sum("{:,.1f}")),
    "MB down": ("mb_down", _sum("{:,.1f}")),
    "GFLOP dense": ("gflop_dense", _sum("{:,.0f}")),
    "GFLOP sparse": ("gflop_sparse", _sum("{:,.0f}")),
    "client cut": ("client_cut", "{:,.0f}".format),
    "regrowth": ("regrowth", "{:,.0f}".format),
    "bits up": ("up_bits", "{:.2f}".format),
    "client MB": ("memory_mb", "{:,.1f}".format),
    "consensus": ("consensus", "{:.2f}".format),
    "kJ": ("kj", "{:.2f}".format),
    "hours": ("simulated_h", "{:.2f}".format),
    "epsilon": ("epsilon", "{:.3g}".format),
}


# ------------------------------------------------------------------------------------------------- rows


def rows_of(
    folders: Iterable[Path],
    *,
    rounds: Sequence[int] = (),
    preset: str = "",
    label: str | None = None,
    more: Sequence[str] = (),
) -> list[Row]:
    """Rows of the finished runs among and below ``folders``.

    Args:
        folders: Run folders, or folders of them.
        rounds: After which rounds; by default each run's last.
        preset: What their experiment is called; by default the name of the folder above a run's.
        label: What their method is called; by default its name.
        more: Which of the figures that few tables show: up_bits, memory_mb, consensus, kj, simulated_h.
    """
    rows = []
    for path in find_folders(folders):
        folder = RunFolder.open(path)
        config, result, lines = folder.config(), folder.result(), folder.rounds()
        if result is None:
            print(f"left out: {path} is not finished", file=sys.stderr)
            continue
        for number in rounds or (lines[-1]["round"],):
            until = [line for line in lines if line["round"] <= number]
            if not until or until[-1]["round"] != number:
                print(f"left out: {path} has no round {number}", file=sys.stderr)
                continue
            figures = _figures(until) | {name: _MORE[name](config, until) for name in more}
            rows.append(
                Row(
                    preset=preset or path.parent.name,
                    method=label or config.algorithm.name,
                    seed=config.seed,
                    width=config.model.options.get("width", 64) if config.model.name == "resnet18" else None,
                    round=number,
                    config=result["config_hash"],
                    code=result["code_hash"],
                    **figures,
                )
            )
    return sorted(rows, key=lambda row: (row.preset, row.width or 0, row.round, row.method, row.seed))


def _figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a row, of a run's lines up to it."""
    last = lines[-1]

    def percent(key: str) -> float | None:
        return None if last.get(key) is None else 100 * last[key]

    def mean(of: Callable[[Mapping[str, Any]], float | None]) -> float | None:
        values = [value for line in lines if line["round"] > 1 and (value := of(line)) is not None]
        return float(np.mean(values)) if values else None

    return {
        "accuracy": percent("test/accuracy"),
        "perplexity": last.get("test/perplexity"),
        "bits": last.get("test/bits_per_token"),
        "rmse": last.get("test/rmse"),
        "robust": percent("test/robust_accuracy"),
        "robust_gap": percent("robust_gap"),
        "clients": percent("clients/accuracy_mean_after"),
        "worst": percent("clients/accuracy_worst_decile_after"),
        "unseen": percent("unseen/accuracy_mean"),
        "one_shot": percent("unseen/accuracy_mean_1_shot"),
        "five_shot": percent("unseen/accuracy_mean_5_shot"),
        "entropy_mb": sum(line["method/entropy_bytes"] * line["clients/trained"] for line in lines) / 1e6
        if "method/entropy_bytes" in last
        else None,
        "sparsity": 100 * last["sparsity/global"],
        "mb_up": last["comm/uplink_bytes_total"] / 1e6,
        "mb_down": last["comm/downlink_bytes_total"] / 1e6,
        "gflop_dense": last["flops/dense_total"] / 1e9,
        "gflop_sparse": last["flops/sparse_total"] / 1e9,
        "epsilon": last.get("privacy/epsilon"),
        "client_cut": mean(lambda line: line.get("masks/client_cut")),
        "regrowth": mean(lambda line: line.get("masks/regrowth")),
    }


def _up_bits(_: Config, lines: Sequence[Mapping[str, Any]]) -> float:
    return 32 * lines[-1]["comm/uplink_bytes_total"] / sum(line["comm/dense_bytes"] for line in lines)


def _memory_mb(config: Config, _: Sequence[Mapping[str, Any]]) -> float:
    federation = Federation.of(config)
    return (federation.training_bytes + federation.kept_bytes) / 1e6


def _consensus(_: Config, lines: Sequence[Mapping[str, Any]]) -> float | None:
    values = [line["masks/consensus"] for line in lines if line["round"] > 1 and "masks/consensus" in line]
    return float(np.mean(values)) if values else None


#: What `--more` collects.
_MORE: dict[str, Callable[[Config, Sequence[Mapping[str, Any]]], float | None]] = {
    "up_bits": _up_bits,
    "memory_mb": _memory_mb,
    "consensus": _consensus,
    "kj": lambda _, lines: lines[-1]["energy/joules_total"] / 1e3,
    "simulated_h": lambda _, lines: lines[-1]["time/simulated_s"] / 3600,
}


def as_csv(rows: Iterable[Row]) -> str:
    """The rows as they are kept; six digits of a figure."""
    buffer, rows = io.StringIO(), list(rows)
    empty = {name for name in _OPTIONAL if all(getattr(row, name) is None for row in rows)}
    names = [name for name in NAMES if name not in empty]
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = [(name, getattr(row, name)) for name in names]
        writer.writerow({name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in cells})
    return buffer.getvalue()


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: It is no such file; the message says where it is wrong.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader.fieldnames or ())
        if found != [name for name in NAMES if name not in _OPTIONAL or name in found]:
            raise ValueError(f"{path}: the first line has to be {','.join(NAMES)}")
        rows = []
        for cells in reader:
            try:
                rows.append(Row(**{name: _cell(name, cells[name]) for name in found}))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def _cell(name: str, text: str) -> Any:
    if name in _WORDS:
        return text
    if text == "":
        return None
    return int(text) if name in _WHOLE else float(text)


# ------------------------------------------------------------------------------------------------ tables


def tables(rows: Sequence[Row]) -> str:
    """A Markdown table for each preset, width and round, in the rows' order.

    A cell is the mean over seeds; of accuracy and RMSE with half of its 95 % interval, if there are several.
    """
    parts = []
    for key in dict.fromkeys((row.preset, row.width, row.round) for row in rows):
        mine = [row for row in rows if (row.preset, row.width, row.round) == key]
        preset, width, number = key
        seeds = sorted({row.seed for row in mine})
        named = [f"`{preset}`", *([f"width {width}"] if width else []), f"round {number}"]
        named.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
        shown = [c for c, (name, _) in _COLUMNS.items() if any(getattr(r, name) is not None for r in mine)]
        lines = [f"| method | {' | '.join(shown)} |", f"|---|{'---:|' * len(shown)}"]
        for method in dict.fromkeys(row.method for row in mine):
            of = [row for row in mine if row.method == method]
            cells = [_written(_COLUMNS[c][0], of, _COLUMNS[c][1]) for c in shown]
            runs = "" if len(of) == len(seeds) else f" ({len(of)} of {len(seeds)} seeds)"
            lines.append(f"| {method}{runs} | {' | '.join(cells)} |")
        codes = ", ".join(dict.fromkeys(row.code for row in mine))
        parts.append(f"{', '.join(named)}; code {codes}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _written(name: str, rows: Sequence[Row], form: Callable[[float], str]) -> str:
    values = [value for row in rows if (value := getattr(row, name)) is not None]
    if not values:
        return ""
    mean, low, _ = mean_interval(values)
    spread = name in ("accuracy", "rmse") and len(values) > 1
    return f"{form(mean)} ± {form(mean - low)}" if spread else form(mean)


# ----------------------------------------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", type=Path, help="print the tables of these rows")
    source.add_argument("--collect", nargs="+", type=Path, metavar="FOLDER", help="print the rows of runs")
    result.add_argument(
        "--rounds",
        nargs="+",
        type=int,
        default=[],
        help="after which rounds; by default all rows of a file, the last round of a run",
    )
    result.add_argument("--preset", default="", help="what the runs' experiment is called")
    result.add_argument("--label", help="what the runs' method is called")
    result.add_argument("--more", nargs="+", choices=_MORE, default=[], help="collect these figures too")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print tables or rows; 2 for a file that holds no rows."""
    options = parser().parse_args(arguments)
    if options.collect:
        found = rows_of(
            options.collect,
            rounds=options.rounds,
            preset=options.preset,
            label=options.label,
            more=options.more,
        )
        print(as_csv(found), end="")
        return 0
    try:
        rows = read(options.file)
        print(tables([row for row in rows if not options.rounds or row.round in options.rounds]))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
