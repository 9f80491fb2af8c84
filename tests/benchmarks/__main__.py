"""Runs benchmarks by name: ``sparsyfed bench`` or ``python -m tests.benchmarks``; see ``--list``.

A benchmark is a module of this folder with ``figures(quick) -> list[Figure]``; it prints nothing by itself
but progress. Read ratios within one run: absolute times depend on who else uses the machine. ``--repeat 3``
measures all of it three times over, so that ``--output`` stores medians with their noise and ``--compare``
knows which differences are beyond that of both runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from cluster.references import UserError
from tests.benchmarks.report import Figure, comparison, machine, repeated, table, write

#: Name -> (module, what it measures, whether it is part of a run without names).
BENCHMARKS = {
    "round": ("bench_round", "round on Ray against bare loops at the same time, 8x8 and 28x28", True),
    "small": (
        "bench_round",
        "the same at 1 and 5 ms a step, without evaluation, cohorts of 10 and 100",
        True,
    ),
    "cohorts": ("bench_round", "the same with cohorts of 10, 100 and 1,000", True),
    "methods": ("bench_round", "the same by method", True),
    "sizes": ("bench_round", "the same by model size", True),
    "actors": ("bench_round", "the same by number of actors", True),
    "steps": ("bench_steps", "a local step by method against a dense one", True),
    "wire": ("bench_wire", "cut, encode, decode and fold of 11 million weights; 100 updates", True),
    "start": ("bench_start", "seconds until the first round of a cold run", True),
    "tree": ("bench_tree", "totals of up to 64 light actors on their way to the driver, and a model", False),
    "memory": ("bench_memory", "memory of driver and actors over many rounds", False),
    "long": ("bench_long", "2,000 rounds with MLflow: time, CPU, memory, files, late and early", False),
    "million": ("bench_million", "1,000 of 1,000,000 clients a round on Ray: CPU a client, memory", False),
    "compare": ("bench_compare", "reading 100 of 10,000 runs of one MLflow store", False),
    "gpu": ("gpu.command", "all that concerns CUDA in --minutes: checks, speed, the paper's run", False),
    "peers": ("bench_peers", "the same rounds in Flower's simulation, pfl-research and BlazeFL", False),
    "peers-cnn": ("bench_peers", "the same on BlazeFL's own benchmark, half of its samples", False),
}

_OF_GPU = ("minutes", "data", "resume", "device", "draw")


def main() -> int:
    """Run the named benchmarks; 2 for a wrong name or file."""
    parser = argparse.ArgumentParser(prog="sparsyfed bench", description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--began", type=float, help="when the minutes began, in seconds since 1970")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--draw", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if arguments.list:
        for name, (_, meaning, default) in BENCHMARKS.items():
            print(f"{name:<9} {meaning}{'' if default else ' (only when named)'}")
        return 0
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        print(f"error: no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    if arguments.compare is not None and not arguments.compare.is_file():
        print(f"error: --compare {arguments.compare}: no such file", file=sys.stderr)
        return 2
    if arguments.repeat < 1:
        print(f"error: --repeat {arguments.repeat}: expected a number from 1", file=sys.stderr)
        return 2
    of_gpu = [option for option in _OF_GPU if getattr(arguments, option) is not None]
    if "gpu" in arguments.names or of_gpu:
        others = arguments.quick or arguments.output or arguments.compare or arguments.repeat > 1
        if arguments.names != ["gpu"] or others:
            shown = ", ".join(f"--{option}" for option in _OF_GPU)
            print(f"error: sparsyfed bench gpu runs alone, with {shown} and no other option", file=sys.stderr)
            return 2
        return _gpu(arguments)
    names = arguments.names or [name for name, (_, _, default) in BENCHMARKS.items() if default]
    about = machine()
    print(f"{about['cores']} x {about['processor']}, torch {about['torch']}, commit {about['commit']}")
    found: list[Figure] = []
    for repetition in range(1, arguments.repeat + 1):  # of everything, as a machine's noise is slow
        if arguments.repeat > 1:
            print(f"\nrepetition {repetition} of {arguments.repeat}", flush=True)
        for name in names:
            module = importlib.import_module(f"tests.benchmarks.{BENCHMARKS[name][0]}")
            measured = module.figures(name, arguments.quick)
            print(f"\n{table(measured)}" if measured else "", flush=True)
            found += measured
            if arguments.output is not None:
                write(repeated(found), arguments.output)
    found = repeated(found)
    if arguments.repeat > 1:
        print(f"\nmedians\n\n{table(found)}")
    if arguments.compare is not None:
        print(f"\n{comparison(found, arguments.compare)}")
    return 0


def _gpu(arguments: argparse.Namespace) -> int:
    """The GPU's turn, or the picture of one."""
    from tests.benchmarks.gpu import command, report

    try:
        if arguments.draw is not None:
            if not arguments.draw.is_file():
                raise command.GpuBenchmarkError(f"--draw {arguments.draw}: no such file")
            print(report.draw(arguments.draw))
            return 0
        minutes = 10.0 if arguments.minutes is None else arguments.minutes
        if not minutes > 0:
            raise command.GpuBenchmarkError(f"--minutes {minutes:g}: expected a number above 0")
        runs = arguments.resume or Path("runs/gpu")
        device = arguments.device or "cuda"
        return command.run(command.Options(minutes, arguments.data, runs, device, arguments.began))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main())
