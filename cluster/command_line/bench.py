"""The benchmarks of a checkout, run in a process of their own."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from cluster.references import UserError


class NoRepositoryError(UserError):
    """A command needs files of the repository that an installed wheel does not have."""


def run(arguments: argparse.Namespace) -> int:
    """The benchmarks live beside the tests, in a process of their own."""
    root = Path(__file__).parents[2]
    if not (root / "tests" / "benchmarks" / "__main__.py").is_file():
        raise NoRepositoryError(
            f"bench runs tests/benchmarks of the repository, and {root} is no checkout; "
            "clone it and install it from there: pip install -e ."
        )
    words = list(arguments.names)
    for option in ("list", "quick"):
        words += [f"--{option}"] if getattr(arguments, option) else []
    for option in ("repeat", "minutes", "device"):
        value = getattr(arguments, option)
        words += [f"--{option}", str(value)] if value is not None else []
    if arguments.minutes is not None:  # they began with this process
        words += ["--began", str(psutil.Process().create_time())]
    for option in ("output", "compare", "data", "resume", "draw"):
        path = getattr(arguments, option)
        words += [f"--{option}", str(Path(path).absolute())] if path else []
    # A session of its own: Ctrl-C comes here alone, and every signal is handed on once.
    command = [sys.executable, "-m", "tests.benchmarks", *words]
    process = subprocess.Popen(command, cwd=root, start_new_session=True)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, _: process.send_signal(n)) for number in numbers}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
