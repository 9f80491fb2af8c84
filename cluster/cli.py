"""The command line: ``sparsyfed run | tune | compare | ...``; ``python -m cluster`` is the same.

torch, Ray and MLflow are imported by the commands that need them, so that help, version and wrong arguments
answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import __version__
from cluster.command_line import terminal
from cluster.command_line.arguments import parse
from cluster.command_line.failures import in_words, status_of
from cluster.references import root_of

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from cluster.command_line.many_runs import Batch
    from cluster.command_line.progress import RunDisplay
    from cluster.configuration.config import Config
    from cluster.execution import Result
    from cluster.grid import Grid


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; by default the process's.

    Returns:
        The exit status: 0 done, 1 the run failed, 2 a mistake that the message says how to put right,
        130 stopped by Ctrl-C.
    """
    terminal.prepare(keep_going=False)  # help and complaints too
    arguments = parse(argv, _study_section)
    terminal.prepare(keep_going=arguments.command in ("run", "resume", "tune"))
    try:
        return _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # ``sparsyfed ... | head`` ended; without this, Python complains once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        status = status_of(error)
        if status is None:
            raise
        _complain(in_words(root_of(error), arguments.command))
        return status


# ------------------------------------------------------------------------------------------- the commands


def _run(arguments: argparse.Namespace) -> int:
    source, overrides = arguments.source, arguments.overrides
    console = _console()
    with _busy(console, "loading"):
        from cluster import execution, grid
        from cluster.command_line.progress import announce
        from cluster.configuration.config import resolve
        from cluster.records.outputs import default_folder

        found = grid.expand(source or "quickstart", overrides)
        if found is None:
            config = resolve(source, overrides)
    if found is not None:
        if arguments.profile:
            arguments.parser.error(f"{source} is a grid of several runs; --profile shows one")
        own = found.shard(*arguments.shard) if arguments.shard else found
        return _run_grid(console, own, Path(arguments.output or Path("runs") / Path(source).stem))
    if arguments.shard:
        arguments.parser.error(f"{source or 'quickstart'} is one run; --shard deals the runs of a grid")
    folder = Path(arguments.output) if arguments.output else default_folder(config)
    announce(console, config, folder, f"sparsyfed {__version__}: {source or 'quickstart'}")
    status = _follow(
        console, config, folder, 0, lambda display: execution.run(config, folder, progress=display.on_line)
    )
    if arguments.profile:
        from cluster.command_line import profile
        from cluster.records.run_folder import RunFolder

        console.print(profile.table(RunFolder(folder).rounds()))
    return status


def _run_grid(console: Console, grid: Grid, folder: Path) -> int:
    """Every run of a grid, then their table; 1 where one failed, 130 where they were stopped."""
    from cluster.command_line.figures import shown
    from cluster.command_line.grid_progress import GridDisplay, conclude_grid
    from cluster.execution import complete
    from cluster.grid import run_grid

    before = sum(complete(config, folder / name) is not None for name, config in grid.runs.items())
    runs = f"{len(grid.runs)} runs" if grid.whole is None else f"{len(grid.runs)} of {len(grid.whole)} runs"
    console.print(f"{runs}, {before} complete before, in {shown(folder)}", style="bold")
    with GridDisplay(console, grid, before) as display:
        outcome = run_grid(grid, folder, started=display.started, ended=display.ended)
    conclude_grid(console, outcome)
    console.print(
        f"folder    {shown(folder)} (table.md, table.csv)\ncompare   sparsyfed ui --root {shown(folder)}"
    )
    for name, error in outcome.failures.items():
        root = root_of(error)
        reason = in_words(root, "run") if status_of(error) else f"{type(root).__name__}: {root}"
        print(f"error: {name}: {reason}", file=sys.stderr)
    if outcome.failures:
        print("the same command runs what failed again, and nothing else", file=sys.stderr)
        return 1
    ended = len(outcome.results) == len(grid.runs) and all(r.ended for r in outcome.results.values())
    return 0 if ended else 130


def _study_section() -> type[BaseModel]:
    from tuning.study import StudySection

    return StudySection


def _tune(arguments: argparse.Namespace) -> int:
    source, overrides = arguments.source, arguments.overrides
    if arguments.report is not None and (source or overrides or arguments.output):
        arguments.parser.error("--report takes a study's folder or name, and nothing beside it")
    if arguments.report is None and source is None:
        arguments.parser.error("which study? Give a preset, such as study-digits, or a file of your own")
    console = _console()
    with _busy(console, "loading"):
        from tuning import command
    if arguments.report is not None:
        return command.report(console, arguments.report, trust=arguments.trust)
    title = f"sparsyfed {__version__}: study {source}"
    return command.tune(console, source, overrides, arguments.output, title)


def _resume(arguments: argparse.Namespace) -> int:
    overrides = arguments.overrides
    console = _console()
    with _busy(console, "loading"):
        from cluster import execution
        from cluster.command_line.progress import announce
        from cluster.configuration.config import validate
        from cluster.configuration.trees import apply_overrides
        from cluster.records.resuming import standing

        opened = execution.open_run(arguments.folder, arguments.output, trust=arguments.trust)
        folder = opened.path
        config = validate(apply_overrides(opened.config().dump(), overrides))
        lines = standing(opened, opened.config()).lines
    done = lines[-1]["round"] if lines else 0
    announce(console, config, folder, f"sparsyfed {__version__}: resuming after round {done}")
    return _follow(
        console,
        config,
        folder,
        done,
        # Whose code it runs was found out when the folder was opened.
        lambda display: execution.resume(
            folder, overrides, trust=True, anyway=arguments.anyway, progress=display.on_line
        ),
    )


def _follow(
    console: Console,
    config: Config,
    folder: Path,
    done: int,
    work: Callable[[RunDisplay], Result],
) -> int:
    """Show a run while it works and what it left; shared by ``run`` and ``resume``."""
    from cluster.command_line.figures import shown
    from cluster.command_line.progress import RunDisplay, conclude
    from cluster.records.run_folder import RunFolder
    from cluster.rounds.conduct import RunGoesOn
    from cluster.rounds.ledger import ReplayError
    from cluster.rounds.setbacks import DivergedError

    try:
        with RunDisplay(console, config, done) as display:
            result = work(display)
    except (Exception, KeyboardInterrupt) as error:
        # Resuming is no cure for a mistake, nor for what the same rounds would run into again.
        hopeless = status_of(error) == 2 or isinstance(
            root_of(error), (DivergedError, ReplayError, RunGoesOn)
        )
        if not hopeless and RunFolder(folder).begun:
            print(f"what was computed is kept: sparsyfed resume {shown(folder)}", file=sys.stderr)
        raise
    conclude(console, result)
    return 0 if result.ended else 130


def _sync(arguments: argparse.Namespace) -> int:
    from cluster.records import tracking
    from cluster.records.outbox import TITLES

    console, folder, status = _console(), Path(arguments.folder), 0
    for sink in tracking.sinks_of(folder):
        title = TITLES[sink]
        try:
            with _busy(console, f"delivering to {title}"):
                report = tracking.sync(folder, sink, deadline_s=arguments.timeout)
        except tracking.TrackingError as error:  # the other sinks are not to wait for this one
            _complain(str(error))
            status = error.status
            continue
        if not report.complete:
            _complain(f"{report.rounds_in_total} rounds are in {title}, not yet everything: {report.problem}")
            status = status or 1
            continue
        of = f" of run {report.run_id}" if report.run_id else ""
        print(f"{title} has all {report.rounds_in_total} rounds{of}; {report.rounds} are new")
    return status


def _ui(arguments: argparse.Namespace) -> int:
    from cluster.records import tracking

    uri = _store(arguments)
    print("starting MLflow ...", flush=True)
    return tracking.serve_ui(uri, arguments.host, arguments.port)


def _store(arguments: argparse.Namespace) -> str:
    """The tracking store that --store or --root names."""
    from cluster.records import tracking

    uri: str = arguments.store or tracking.sqlite_uri(Path(arguments.root).absolute() / "mlflow.db")
    if "://" not in uri and not tracking.is_sqlite(uri):
        uri = tracking.sqlite_uri(Path(uri).absolute())
    if tracking.is_sqlite(uri) and not tracking.sqlite_file(uri).is_file():
        raise tracking.TrackingError(
            f"there is no store yet at {tracking.sqlite_file(uri)}; `sparsyfed run` makes one in runs/. "
            "Name another with --root FOLDER (the one that holds the runs) or --store URI"
        )
    return uri


def _compare(arguments: argparse.Namespace) -> int:
    sources = arguments.sources
    console = _console()
    if arguments.watch:
        _watch(console, arguments)
    with _busy(console, "comparing"):
        from cluster import compare
        from cluster.command_line.figures import shown

        tracked = arguments.store or arguments.filter or (sources and not Path(sources[0]).is_dir())
        if tracked and len(sources) != 1:
            arguments.parser.error("name one MLflow experiment, or one or more folders of runs")
        if tracked:
            uri, (experiment,) = _store(arguments), sources
            runs = compare.read_experiment(uri, experiment, arguments.filter or "")
            source = f"MLflow experiment {experiment}" + (f", {arguments.filter}" if arguments.filter else "")
        else:
            folders = [Path(each) for each in sources or [arguments.root]]
            runs, source = compare.read_folders(folders), f"runs in {', '.join(map(str, folders))}"
        comparison = compare.Comparison.of(
            runs,
            source,
            after=arguments.round,
            target=compare.target_of(runs, arguments.target),
            budgets=compare.budgets_of(arguments.budget),
        )
        folder = Path(arguments.output)
        report = compare.write(comparison, folder)
        if tracked and not arguments.no_log:
            compare.log_to_mlflow(comparison, folder, uri, experiment)
    compare.print_comparison(console, comparison)
    console.print(f"report    {shown(report)}\nfolder    {shown(folder)} (tables, figures/*.png and *.pdf)")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from cluster.command_line.exporting import export

    return export(_console(), arguments)


def _watch(console: Console, arguments: argparse.Namespace) -> None:
    """Show the comparison anew with every round of its runs, until they have ended or Ctrl-C."""
    with _busy(console, "reading"):
        from cluster import compare

    sources = arguments.sources or [arguments.root]
    if arguments.store or arguments.filter or arguments.round or not all(Path(s).is_dir() for s in sources):
        arguments.parser.error("--watch takes folders of runs, and neither --store, --filter nor --round")
    folders, named = [Path(each) for each in sources], f"runs in {', '.join(sources)}"
    for each in compare.watch(folders, named, arguments.target):
        console.clear()  # nothing where stdout is no terminal
        if isinstance(each, str):
            console.print(each)
        else:
            compare.print_comparison(console, each)
            console.print(each.source, style="dim")


def _study_batches(source: str, overrides: Sequence[str]) -> tuple[str, list[Batch]]:
    from tuning.command import batches

    return batches(source, overrides)


def _describe(arguments: argparse.Namespace) -> int:
    console = _console()
    with _busy(console, "loading"):
        from cluster.command_line import describe_command

        show = describe_command.asked(arguments, _study_batches)
    show(console)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from cluster.command_line import bench

    return bench.run(arguments)


def _remote(arguments: argparse.Namespace) -> int:
    console = _console()
    with _busy(console, "connecting"):
        from cluster.command_line import remote_commands
    if arguments.command == "status":
        return remote_commands.status(console, arguments.address)
    command = remote_commands.stop if arguments.command == "stop" else remote_commands.attach
    return command(console, arguments.address, arguments.name)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "tune": _tune,
    "resume": _resume,
    "sync": _sync,
    "compare": _compare,
    "ui": _ui,
    "export": _export,
    "describe": _describe,
    "bench": _bench,
    "status": _remote,
    "stop": _remote,
    "attach": _remote,
}


# ------------------------------------------------------------------------------------ errors and terminal


def _complain(message: str) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False)
    console.print("error:", style="bold red", end=" ")
    console.print(message, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    # Into a pipe or file: wide enough for every table, whatever the terminal behind it.
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)


@contextmanager
def _busy(console: Console, text: str) -> Iterator[None]:
    """A spinner on a terminal while nothing else can be shown; nothing elsewhere."""
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield
