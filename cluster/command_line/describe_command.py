"""``sparsyfed describe``: which of all that can be described the words of the command line ask about."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from cluster.command_line import describe
from cluster.command_line.describe_choice import choice_asked, describe_choice
from cluster.command_line.many_runs import Batch, batches, describe_runs
from cluster.configuration.config import resolve
from cluster.configuration.trees import load_tree
from cluster.grid import expand

Show = Callable[[Console], None]


def asked(
    arguments: argparse.Namespace, study_batches: Callable[[str, Sequence[str]], tuple[str, list[Batch]]]
) -> Show:
    """What to print.

    Args:
        arguments: Of the command line.
        study_batches: Title and runs of a study and its overrides.

    Raises:
        ConfigError, ChoiceError: The words name nothing, or a key or value is wrong.
    """
    what, overrides, complain = arguments.source, arguments.overrides, arguments.parser.error
    picture = Path(arguments.picture) if arguments.picture else None
    choice = choice_asked(arguments.sources) if what else None
    run = describe.run_named(what) if what and choice is None else None
    if choice is not None and overrides:
        section, name = choice
        run_of_it = f" {section}.name={name}" if name else ""
        complain(
            f"{' '.join(arguments.sources)} is no experiment; to see a run of it: "
            f"sparsyfed describe{run_of_it} {' '.join(overrides)}"
        )
    if run is not None and overrides:
        complain(f"{what} is a run, whose keys are as they are; found {' '.join(overrides)}")
    if (choice or run) and arguments.probe:
        complain(f"--probe plays two rounds of an experiment, grid or study; {what} is none")
    if choice is not None:
        return lambda console: describe_choice(console, *choice)
    if run is not None:
        return lambda console: describe.describe_run(console, run, picture)
    many = _many(what, overrides, study_batches)
    if many is not None:
        if picture is not None:
            complain(f"--picture draws the partition of one run; {what} is {many[0]}")
        return partial(describe_runs, title=f"{what}: {many[0]}", parts=many[1], probe=arguments.probe)
    config = resolve(what, overrides)

    def show(console: Console) -> None:
        describe.describe_config(console, config, picture)
        if arguments.probe:
            console.print()
            describe_runs(console, "probe", [Batch(what or "quickstart", config, 1)], probe=True)

    return show


def _many(
    what: str | None,
    overrides: Sequence[str],
    study_batches: Callable[[str, Sequence[str]], tuple[str, list[Batch]]],
) -> tuple[str, list[Batch]] | None:
    """What a grid or study is, and its runs; None for a single experiment."""
    if what is None:
        return None
    if "study" in load_tree(what):
        return study_batches(what, overrides)
    grid = expand(what, overrides)
    return None if grid is None or len(grid.runs) == 1 else ("a grid", batches(grid.runs))
