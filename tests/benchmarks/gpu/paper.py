"""The third part: the paper's CIFAR-10 experiment, for as long as there is time, going on where it ended.

LDA 1 and 95 % sparsity: SparsyFed, then dense, then Top-K, each in a run folder of its own. They run inline
in one process: a second would have to hand over 223 MB of partial total each round, which takes as long as
the round. Arithmetic is float32 or, where faster, TF32, which PyTorch uses by default in convolutions;
bfloat16 is another experiment.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import cluster
from cluster.configuration.config import Config, resolve, validate
from cluster.execution import complete, run_or_resume
from cluster.federation import prepare_arguments
from cluster.records.checkpoint import (
    latest,
    list_rounds,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from cluster.records.run_folder import RunFolder
from cluster.rounds.ledger import ReplayError
from cluster.workload.datasets import DataError, open_dataset
from cluster.workload.preparing import prepare
from tests.benchmarks.gpu.report import METHODS, key_of_run
from tests.benchmarks.gpu.speed import RESNET, key_of
from tests.benchmarks.gpu.worker import Context, Found, Item, LeftOut

#: Seconds that a run needs after its last round: evaluation, checkpoint, model file.
ENDING_S = {"cuda": 6.0, "cpu": 10.0}

#: A rehearsal is another, tiny experiment.
REHEARSAL = (
    "model.name=small_cnn",
    "model.norm=group",
    "model.channels=[4,8]",
    "model.hidden=16",
    "model.groups=2",
    "cohort=2",
    "local.lr=0.1",
    "algorithm.plain_layers=[]",
)


def items(runs: Path, data: Path | None, settings: dict[str, Any]) -> list[Item]:
    """One run a method; ``settings`` are the fastest honest ones by method, see :func:`fastest`."""
    if data is None:
        return []
    return [
        Item(
            key_of_run(method),
            "paper",
            f"{__name__}:play",
            {"runs": str(runs), "data": str(data), "method": method, **settings[method]},
            seconds=20.0,
            ends_early=True,
        )
        for method in METHODS
    ]


def fastest(results: dict[str, Any], method: str) -> dict[str, Any]:
    """Precision and graphs of the most steps a second measured; float32 as graphs where none were."""
    rates = {
        (precision, graphs): results[key]["found"]["steps/s"]
        for precision in ("float32", "tf32")
        for graphs in (True, False)
        if results.get(key := key_of(RESNET, method, precision, graphs), {}).get("state") == "done"
    }
    precision, graphs = max(rates, key=rates.__getitem__, default=("float32", True))
    return {"precision": precision, "graphs": graphs}


def config_of(method: str, data: Path, device: str, precision: str, graphs: bool) -> Config:
    """The configuration of a method's run."""
    overrides = [
        f"algorithm.name={method}",
        "partition.alpha=1",
        "data.name=cifar10",
        f"data.path={data}",
        "evaluate_every=10",
        "evaluate_clients.every=0",
        "checkpoint_every=10",
        "execution=inline",
        "tracking.enabled=false",
    ]
    if method != "fedavg":
        overrides.append("algorithm.sparsity=0.95")
    if device == "cuda":
        overrides += ["gpus_per_actor=1", f"precision={precision}", f"cuda_graphs={str(graphs).lower()}"]
    else:
        overrides += [each for each in REHEARSAL if method == "sparsyfed" or "plain_layers" not in each]
    return resolve("paper-cifar10", overrides)


def decode(context: Context, data: str) -> Found:
    """Decode the data set, which takes a minute of one core, while the first parts measure."""
    began = time.monotonic()
    config = config_of("fedavg", Path(data), context.device, "float32", True)
    folder = prepare(**prepare_arguments(config))
    return {"folder": str(folder), "seconds": time.monotonic() - began}


def play(context: Context, runs: str, data: str, method: str, precision: str, graphs: bool) -> Found:
    """Play rounds of a method's run until its end or until time is over."""
    name = f"cifar10-lda1-{method}" if context.device == "cuda" else f"rehearsal-{method}"
    folder = Path(runs) / name
    before: list[dict[str, Any]] = []
    if (folder / "config.yaml").exists():  # what was begun goes on as it was begun
        kept, before = RunFolder.open(folder).config(), RunFolder.open(folder).rounds()
        precision, graphs = kept.precision, kept.cuda_graphs
    config = config_of(method, Path(data), context.device, precision, graphs)
    _same_data(config, Path(runs) / "data.sha256")
    if before:
        _move(RunFolder.open(folder), config)
        if complete(config, folder) is not None:
            return _found(before, config, [])
    ends, played = [time.monotonic()], []
    told = 0.0

    def on_line(line: dict[str, Any]) -> None:
        nonlocal told
        ends.append(time.monotonic())
        played.append(line)
        if ends[-1] - told > 5:
            told = ends[-1]
            context.tell(_found(before + played, config, played))

    def over() -> bool:
        longest = max((after - earlier for earlier, after in pairwise(ends[1:])), default=0.0)
        return time.monotonic() + 1.5 * longest + ENDING_S[context.device] > context.until

    if over():
        raise LeftOut("too little time for a round")
    cut = ""
    try:
        run_or_resume(config, folder, progress=on_line, should_stop=over)
    except ReplayError as error:
        # A run that was killed plays some rounds again; with kernels that sum in any order they differ.
        cut = f"rounds played again after a kill differ ({error}); the lines of before were dropped"
        _forget_after_checkpoint(RunFolder.open(folder))
        before, played = RunFolder.open(folder).rounds(), []
        ends[:] = [time.monotonic()]
        run_or_resume(config, folder, progress=on_line, should_stop=over)
    found = _found(RunFolder.open(folder).rounds(), config, played)
    return found | ({"note": cut} if cut else {})


def _same_data(config: Config, path: Path) -> None:
    """Refuse to go on with other data than the runs were begun with, wherever it lies now.

    Raises:
        DataError: Other images or labels, or the same in another order.
    """
    dataset = open_dataset(prepare(**prepare_arguments(config)))
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        digest.update(repr(split.inputs.shape).encode())
        digest.update(np.ascontiguousarray(split.inputs))
        digest.update(split.targets)
    found = digest.hexdigest()
    if path.exists() and path.read_text().strip() != found:
        raise DataError(
            f"{path.parent} holds runs on other data than {config.data.path}; choose another --resume"
        )
    write_atomically(path, f"{found}\n".encode())


def _move(folder: RunFolder, config: Config) -> None:
    """Have a run that was begun where the data lay elsewhere go on with it here: its path is a setting."""
    tree = folder.config().dump()
    tree["data"]["path"] = config.data.path
    newest = latest(folder.checkpoints)
    if newest is None or validate(tree).digest() != config.digest():
        return  # another configuration: resuming says how
    checkpoint = load_checkpoint(newest)
    digest = f"{config.digest()}-{checkpoint.digest.partition('-')[2]}"
    save_checkpoint(folder.checkpoints, replace(checkpoint, digest=digest), best_round=None)
    folder.write_config(config)


def _forget_after_checkpoint(folder: RunFolder) -> None:
    last = (list_rounds(folder.checkpoints) or [0])[-1]
    lines = folder.rounds_file.read_text().splitlines(keepends=True)
    kept = [text for text, line in zip(lines, folder.rounds(), strict=False) if line["round"] <= last]
    write_atomically(folder.rounds_file, "".join(kept).encode())


def _found(lines: Sequence[dict[str, Any]], config: Config, played: Sequence[dict[str, Any]]) -> Found:
    """The curve so far, and seconds a round of those just played, evaluations included."""
    found: Found = {
        "rounds": lines[-1]["round"] if lines else 0,
        "of": config.rounds,
        "precision": config.precision,
        "graphs": config.cuda_graphs and config.gpus_per_actor > 0,
        "model": config.model.name,
        "accuracy": [[line["round"], line["test/accuracy"]] for line in lines if line.get("test/accuracy")],
        "sparsity": lines[-1]["sparsity/global"] if lines else None,
        "version": cluster.__version__,
    }
    steady = played[1:]  # the first round of a process records graphs and fills caches
    if len(steady) > 1:
        spent = steady[-1]["timestamp"] - steady[0]["timestamp"]
        found["seconds a round"] = spent / (steady[-1]["round"] - steady[0]["round"])
        found["phases"] = {
            key.removeprefix("time/"): sum(line.get(key) or 0.0 for line in steady) / len(steady)
            for key in sorted(set().union(*steady))
            if key.startswith("time/") and key.endswith("_s") and "simulated" not in key
        }
    return found
