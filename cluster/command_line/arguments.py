"""What the command line accepts. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from cluster import __version__
from cluster.command_line.help_texts import describe_details, examples, run_details, tune_details
from cluster.references import is_file, no_path

if TYPE_CHECKING:
    from pydantic import BaseModel


def _path(text: str) -> str:
    """An option's path, refused before anything starts where nothing can lie there."""
    if (reason := no_path(text)) is not None:
        raise argparse.ArgumentTypeError(reason)
    return text


def _shard(text: str) -> tuple[int, int]:
    """Which shard of how many, counted from 1."""
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise argparse.ArgumentTypeError(
        f"expected K/N, shard K of N with K from 1 to N, such as 3/10, found {text!r} "
        "(number a job array from 1, such as --array=1-10)"
    )


class _Parser(argparse.ArgumentParser):
    """Parser whose help ends with what is only looked up when somebody asks for it."""

    def __init__(self, *args: Any, details: Callable[[], str] | None = None, **options: Any) -> None:
        options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **options)
        self.details = details

    def format_help(self) -> str:
        if self.details is not None:
            self.epilog = self.details()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n{self.format_usage()}")


def parse(
    argv: Sequence[str] | None = None, study_section: Callable[[], type[BaseModel]] | None = None
) -> argparse.Namespace:
    """Read a command line; help, version and mistakes end the process (status 0, 0 and 2).

    Args:
        argv: Arguments without the program's name; by default the process's.
        study_section: Looks up the section whose keys the help of ``tune`` lists.

    Returns:
        ``command``, its options and ``parser``, for mistakes found later. Where keys can be overridden also
        ``overrides``, and where the experiment is named ``source``, None when it is not.
    """
    arguments, extra = _command_parser(study_section).parse_known_args(argv)
    _take_in_late_words(arguments, extra)
    if "words" in arguments:
        _sort_words(arguments)
    return arguments


def _command_parser(study_section: Callable[[], type[BaseModel]] | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sparsyfed",
        description="Train one sparse model over many devices, each with private data, on a Ray cluster.",
        epilog=examples(
            "sparsyfed run                                  the quickstart: SparsyFed on handwritten digits",
            "sparsyfed run algorithm.name=topk rounds=10    the same experiment with another method",
            "sparsyfed tune study-digits                    every method tuned alike, then a table",
            "sparsyfed describe sparsyfed                   what a method does and its hyperparameters",
            "sparsyfed describe partition dirichlet         a partition, its keys and their ranges",
            "sparsyfed describe partition.alpha=0.1         what would run, on what, how large",
            "sparsyfed compare runs/mine                    table and plots of many runs",
            "sparsyfed ui                                   every run side by side",
        ),
    )
    parser.add_argument("--version", action="version", version=f"sparsyfed {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, summary: str, text: str, **options: Any) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=summary, description=inspect.cleandoc(text), **options)
        own.set_defaults(command=name, parser=own)
        return own

    run = command(
        "run",
        "run an experiment",
        """
        Run an experiment: a preset or a YAML file, with any of its keys overridden.

        Its folder then holds config.yaml, rounds.jsonl (one object a round, written as it happens),
        result.json, model.safetensors, its card README.md, pictures and checkpoints. Ctrl-C ends it after the
        round in progress, and `sparsyfed resume` continues it to the same result.""",
        details=run_details,
    )
    run.add_argument("words", nargs="*", metavar="PRESET|FILE|key=value", help="default preset: quickstart")
    run.add_argument(
        "--output", type=_path, metavar="DIR", help="the run's folder, new or empty; default: one in runs/"
    )
    run.add_argument(
        "--shard",
        type=_shard,
        metavar="K/N",
        help="of a grid, play every N-th run from the K-th on; all shards share one --output",
    )
    run.add_argument("--profile", action="store_true", help="show at the end where the rounds' time went")

    tune = command(
        "tune",
        "tune every method under one protocol",
        """
        Tune every method of a study under one protocol and compare them fairly: the same number of trials
        with as much local training for each, trial 0 its published default, configurations selected on
        validation data that no client holds. The best of each method then runs on fresh seeds and is judged
        on test data, with intervals and paired tests. Test data is not read before every search has ended.

        Trials run side by side on the Ray cluster. A study that was interrupted, by Ctrl-C or a crash, goes
        on when the same command is given again: no trial is lost and none is run twice.""",
        details=lambda: tune_details(study_section),
    )
    tune.add_argument("words", nargs="*", metavar="PRESET|FILE|key=value")
    tune.add_argument(
        "--output", type=_path, metavar="DIR", help="the study's folder; default: runs/<study's name>"
    )
    tune.add_argument(
        "--report", type=_path, metavar="STUDY", help="only write the report of this study anew"
    )
    _add_trust(tune)

    resume = command(
        "resume",
        "continue an interrupted run",
        """
        Continue an interrupted run from its last checkpoint, into the same folder and the same MLflow run.
        The result is that of a run which was never interrupted. Keys that cannot change a result (where and
        how it is computed) may be overridden; any other is refused by name.""",
        epilog=examples(
            "sparsyfed resume runs/digits-lda0.5-sparsyfed-s0-20260101-120000",
            "sparsyfed resume DIR stop_after=null    go on to the planned end",
            "sparsyfed resume DIR actors=4           on more actors",
            "sparsyfed resume s3://bucket/runs/NAME  on another machine, from checkpoint_uri=s3://bucket/runs",
        ),
    )
    resume.add_argument(
        "folder", type=_path, metavar="DIR|URI", help="the run's folder, or its copy on shared storage"
    )
    resume.add_argument("words", nargs="*", metavar="key=value")
    resume.add_argument(
        "--output", type=_path, metavar="DIR", help="folder to rebuild from a URI; default: runs/NAME"
    )
    resume.add_argument(
        "--anyway", action="store_true", help="go on though data, partition, code or torch have changed"
    )
    _add_trust(resume)
    _add_remote(command)

    sync = command(
        "sync",
        "deliver to MLflow what it missed",
        """
        Deliver to MLflow, and to what else tracking.also names, what it missed of a run while its server was
        away: rounds, final values, pictures. Nothing is sent twice; it may be repeated.""",
        epilog=examples(
            "sparsyfed sync runs/digits-lda0.5-sparsyfed-s0-20260101-120000",
            "for run in runs/*/; do sparsyfed sync $run; done",
        ),
    )
    sync.add_argument("folder", type=_path, metavar="DIR", help="the run's folder")
    sync.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds (default 600)")

    compare = command(
        "compare",
        "table and plots of several runs",
        """
        Compare runs: a table (mean and 95 % interval over seeds; which are worse than the best, where seeds
        tell) and plots, as one HTML report and as PNG, PDF, CSV, Markdown and LaTeX. Runs that differ only
        in their seed are one group. A comparison of an MLflow experiment is kept in it.""",
        epilog=examples(
            "sparsyfed compare                              every run in runs/",
            "sparsyfed compare runs/compare-digits runs/x   run folders, or folders of them",
            "sparsyfed compare digits-lda0.5                an experiment of the MLflow store in runs/",
            "sparsyfed compare digits-lda0.5 --filter \"params.seed != '3'\" --store http://tracker:5000",
            "sparsyfed compare runs/mine --round 20         as they were after round 20, complete or not",
            "sparsyfed compare runs/mine --watch            again with every round, while they go on",
        ),
    )
    compare.add_argument(
        "sources", type=_path, nargs="*", metavar="DIR|EXPERIMENT", help="default: the folder of --root"
    )
    compare.add_argument(
        "--filter", metavar="RULE", help="MLflow's filter string, such as \"tags.method = 'topk'\""
    )
    compare.add_argument("--store", metavar="URI", help="the experiment's store; default mlflow.db in --root")
    compare.add_argument(
        "--root", type=_path, default="runs", metavar="DIR", help="folder of runs (default %(default)s)"
    )
    compare.add_argument(
        "--output", type=_path, default="comparison", metavar="DIR", help="default %(default)s, overwritten"
    )
    compare.add_argument("--round", type=int, metavar="N", help="compare after this round, not at the end")
    compare.add_argument(
        "--target",
        type=float,
        metavar="VALUE",
        help="accuracy in percent, or whatever selects, whose cost in MB, simulated h and kJ is shown",
    )
    compare.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="AMOUNT",
        help="such as 50MB, 2h (simulated) or 5kJ: shows how good runs were once it was spent; repeatable",
    )
    compare.add_argument(
        "--watch", action="store_true", help="show it again with every round of runs that go on"
    )
    compare.add_argument("--no-log", action="store_true", help="do not keep the comparison in MLflow")

    _add_export(command)

    ui = command(
        "ui",
        "open MLflow on the runs",
        """
        Serve MLflow's pages for a folder of runs until Ctrl-C; prints the address, and that of the page with
        the last runs side by side, which it opens where there is a screen.""",
        epilog=examples(
            "sparsyfed ui                        the runs in runs/",
            "sparsyfed ui --root /data/runs      runs made with --output /data/runs/...",
            "sparsyfed ui --host 0.0.0.0 --port 8080",
        ),
    )
    ui.add_argument(
        "--root", type=_path, default="runs", metavar="DIR", help="folder that holds the runs (default runs)"
    )
    ui.add_argument("--store", metavar="URI", help="another tracking store: sqlite:///..., a file or http://")
    ui.add_argument("--host", default="127.0.0.1", help="interface to listen on (default %(default)s)")
    ui.add_argument("--port", type=int, default=5000, help="port, or the next free one (default %(default)s)")

    describe = command(
        "describe",
        "show what there is to choose, a method, a run, or what an experiment would run",
        """
        Show what there is to choose in a section (partition, sampler, server ...), one choice with its fields
        and ranges, a method with its paper and hyperparameters, or what an experiment would run: its
        resolved configuration, the model's layers, who holds which data, memory and bytes a round. Of a
        run's folder the same is shown, without the code that it names; of a grid or study its runs.""",
        details=describe_details,
    )
    describe.add_argument("words", nargs="*", metavar="SECTION [NAME]|METHOD|PRESET|FILE|DIR|key=value")
    describe.add_argument(
        "--picture", type=_path, metavar="FILE", help="draw the partition (.png, .svg or .pdf)"
    )
    describe.add_argument(
        "--probe", action="store_true", help="play two rounds: hours, GB sent and on disk of all runs"
    )

    _add_bench(command)
    return parser


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust", action="store_true", help="run the code that a folder of somebody else names"
    )


def _add_bench(command: Callable[..., argparse.ArgumentParser]) -> None:
    bench = command(
        "bench",
        "measure speed and memory",
        """
        Run the benchmarks of the repository: rounds by phase against bare PyTorch loops that do the same
        steps at the same time, steps by method, wire, memory, start-up, and other simulators where they are
        installed. They need a checkout (pip install -e .). Without names: all but the long ones.""",
        epilog=examples(
            "sparsyfed bench --list",
            "sparsyfed bench round steps --repeat 3 --output before.json",
            "sparsyfed bench round steps --repeat 3 --compare before.json    as ratios to the stored run",
            "sparsyfed bench gpu --minutes 10 --data FOLDER --resume RUNS",
        ),
    )
    bench.add_argument("names", nargs="*", metavar="NAME", help="benchmarks; see --list")
    bench.add_argument("--list", action="store_true", help="show the benchmarks and what they measure")
    bench.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    bench.add_argument("--output", type=_path, metavar="FILE", help="write the figures as JSON")
    bench.add_argument("--compare", metavar="FILE", help="show ratios to figures stored with --output")
    bench.add_argument(
        "--repeat", type=int, metavar="N", help="measure N times, so that noise is known (default 1)"
    )
    gpu = bench.add_argument_group(
        "the GPU's turn, sparsyfed bench gpu",
        "Checks of everything CUDA, then speed, then the paper's CIFAR-10 runs beside their authors' curves, "
        "all within the minutes. It needs no Ray, and the same command again goes on where it ended.",
    )
    gpu.add_argument("--minutes", type=float, metavar="N", help="end before so many are over (default 10)")
    gpu.add_argument("--data", metavar="FOLDER", help="CIFAR-10's parquet files, any number of them a split")
    gpu.add_argument("--resume", metavar="RUNS", help="folder of results and runs (default runs/gpu)")
    gpu.add_argument(
        "--device", choices=("cuda", "cpu"), help="cpu rehearses everything, tiny (default cuda)"
    )
    gpu.add_argument("--draw", metavar="FILE", help="draw the picture of results, RUNS/gpu.json, beside them")


def _add_export(command: Callable[..., argparse.ArgumentParser]) -> None:
    export = command(
        "export",
        "make a folder of a finished run for use elsewhere",
        """
        Make a folder of a finished run's model for use elsewhere. hub: weights, their description and the
        model's card, as `hf upload` takes them; `cluster.load_model` loads it. onnx: model.onnx for other
        runtimes, compared with torch where onnxruntime is installed (extra `onnx`). flower: an app of Flower
        that computes the same rounds to the same bits, of methods whose rounds are synchronous and whose
        clients keep nothing. Nothing is sent anywhere.""",
        epilog=examples(
            "sparsyfed export runs/mine --to hub       then: hf upload OWNER/NAME runs/mine/hub",
            "sparsyfed export runs/mine --to onnx --output model",
            "sparsyfed export runs/mine --to flower    then: flwr run runs/mine/flower",
        ),
    )
    export.add_argument("folder", type=_path, metavar="DIR", help="the run's folder")
    export.add_argument("--to", required=True, choices=("hub", "onnx", "flower"), help="what to make of it")
    export.add_argument(
        "--output",
        type=_path,
        metavar="DIR",
        help="new or empty folder; default: one of that name in the run's",
    )
    _add_trust(export)


def _add_remote(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands for runs on a cluster."""
    texts = {
        "status": (
            "list the runs on a cluster",
            """
            List the runs whose drivers are on a cluster: state, rounds done, accuracy, time and folder.""",
        ),
        "attach": (
            "follow a run on a cluster",
            """
            Show the live progress of a run on a cluster. Ctrl-C leaves, and the run goes on.""",
        ),
        "stop": (
            "end a run on a cluster after its round",
            """
            End a run on a cluster after the round in progress, with a checkpoint, and wait until it has
            ended. `sparsyfed resume` continues it to the same result.""",
        ),
    }
    for name, (summary, text) in texts.items():
        rows = [("", "of the cluster on this machine"), (" --address 10.0.0.5:6379", "of another")]
        if name != "status":
            rows.append((" digits-lda0.5-sparsyfed-s0", "a run, by how its name begins"))
        shown = [f"{f'sparsyfed {name}{words}':<46} {meaning}" for words, meaning in rows]
        own = command(name, summary, text, epilog=examples(*shown))
        if name != "status":
            own.add_argument("name", nargs="?", metavar="RUN", help="the run's name or its beginning")
        own.add_argument("--address", default="auto", help="Ray cluster: auto or host:port (default auto)")


def _take_in_late_words(arguments: argparse.Namespace, extra: Sequence[str]) -> None:
    """argparse gives up on words behind an option (``run quickstart --output x rounds=2``); take them in."""
    for word in extra:
        if word.startswith("-"):
            key = word.lstrip("-").partition("=")[0].replace("-", "_")
            arguments.parser.error(
                f"there is no option {word}"
                + (f"; keys of an experiment are written {key}=VALUE" if "words" in arguments else "")
            )
        if "words" not in arguments:
            arguments.parser.error(f"one argument too many: {word}")
        arguments.words.append(word)


def _sort_words(arguments: argparse.Namespace) -> None:
    words = arguments.words
    sources = [word for word in words if "=" not in word or is_file(word)]
    arguments.overrides = [word for word in words if word not in sources]
    arguments.source = sources[0] if sources else None
    example = "overrides are written key=value, such as stop_after=5"
    arguments.sources = sources
    if len(sources) > 1 and not (arguments.command == "describe" and len(sources) == 2):
        arguments.parser.error(f"{' and '.join(sources)} are two experiments; {example}")
    if sources and arguments.command == "resume":
        arguments.parser.error(f"{sources[0]!r} is one argument too many; {example}")
