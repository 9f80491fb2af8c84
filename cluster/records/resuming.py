"""What an interrupted run goes on from: its lines, the last checkpoint they cover, what may not change."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.configuration.config import Config
from cluster.configuration.identity import code_digest
from cluster.federation import Federation
from cluster.records.checkpoint import Checkpoint, CheckpointError, list_rounds, load_checkpoint, read_meta
from cluster.records.run_folder import RunFolder, RunFolderError
from cluster.references import UserError

#: Version of the rules by which rounds are computed and measured; see ``outdated``.
RULES = 2

_logger = logging.getLogger("sparsyfed.resuming")

#: What a checkpoint keeps of the driver and cannot be without.
_NEEDED = ("totals", "held", "simulated_s", "flight", "refused_rounds", "waiting")

#: What a run stands on, in words; a change of any could change its result.
_WORDS = {"data": "the data", "partition": "the partition", "code": "sparsyfed's code", "torch": "torch"}


class ChangedError(UserError):
    """What a run stands on is not what it was when its checkpoint was made; says what, and how to go on."""


@dataclass(frozen=True)
class Standing:
    """Where an interrupted run stands.

    Attributes:
        lines: The lines from the first round on, as far as none is missing, doubled, reordered or damaged.
        size: Bytes of rounds.jsonl that hold them.
        problem: What is wrong with the line behind them; None where the file ends there, or in a torn line.
        checkpoint: The last checkpoint whose rounds are all among the lines; None to begin anew.
    """

    lines: list[dict[str, Any]]
    size: int
    problem: str | None
    checkpoint: Path | None


def stands_on(federation: Federation) -> dict[str, str]:
    """Fingerprints of what a run's result depends on beside its configuration; kept in every checkpoint."""
    return {
        "data": federation.dataset.fingerprint,
        "partition": federation.partition.digest(),
        "code": code_digest(),
        "torch": torch.__version__,
    }


def standing(folder: RunFolder, config: Config) -> Standing:
    """Find out where a run can go on; changes nothing.

    Raises:
        RunFolderError: There are checkpoints, and the lines cover none of them; says which line is wrong.
        CheckpointError: The checkpoint is damaged, of another version, or of another configuration.
    """
    first_round = config.method.first_round
    lines, size, problem = _sound_lines(folder.rounds_file, first_round)
    last = first_round + len(lines) - 1
    rounds = list_rounds(folder.checkpoints)
    for number in reversed(rounds):
        path = folder.checkpoints / f"round-{number:06d}.safetensors"
        # A round's line is written once its evaluation is in; until then its checkpoint keeps it.
        if number <= last or (number == last + 1 and read_meta(path)["driver"].get("waiting") is not None):
            _check_configuration(path, config)
            return Standing(lines, size, problem, path)
    if rounds:
        wrong = problem or f"it ends after round {last}"
        raise RunFolderError(
            f"{folder.rounds_file}: {wrong}, and no checkpoint is that old (there is round "
            f"{', '.join(map(str, rounds))}). Restore the file; or delete {folder.checkpoints} to compute "
            "all rounds again"
        )
    return Standing(lines, size, problem, None)


def load_resumable(path: Path, config: Config) -> Checkpoint:
    """Read the checkpoint that a run continues from.

    Raises:
        CheckpointError: It is damaged, of another version, or made by rules that no longer hold.
    """
    stored = load_checkpoint(path)
    missing = [key for key in _NEEDED if key not in stored.driver]
    if missing:
        raise CheckpointError(
            f"{path} was made by another version of sparsyfed and lacks {', '.join(missing)}: finish the "
            "run with that version, or start it anew"
        )
    for reason in outdated(config, int(stored.driver.get("rules", 1))):
        raise CheckpointError(
            f"{path} was made by an older version, {reason}: start the run anew, or finish it with "
            "sparsyfed 0.1"
        )
    return stored


def check_ground(found: Standing, federation: Federation, *, anyway: bool) -> bool:
    """Refuse to go on with a checkpoint on another ground than it was made on; changes nothing.

    Args:
        found: Where the run stands.
        federation: Its data and partition as they are now.
        anyway: Go on though the data, the partition, the code or torch have changed.

    Returns:
        Whether they have.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ChangedError: They have, and ``anyway`` is not set.
    """
    path = found.checkpoint
    if path is None:
        return False
    stored = load_checkpoint(path)
    before, now = stored.stands_on, stands_on(federation)  # 0.1 kept none
    changed = [
        f"{words} ({before[key][:12]}, now {now[key][:12]})"
        for key, words in _WORDS.items()
        if key in before and before[key] != now[key]
    ]
    if changed and not anyway:
        raise ChangedError(
            f"{path.parent.parent}: changed since the checkpoint of round {stored.state.round}: "
            f"{', '.join(changed)}. The rounds to come would be another run's. Put it back as it was; or go "
            "on knowingly with --anyway (in a script anyway=True)"
        )
    return bool(changed)


def take_up(folder: RunFolder, found: Standing) -> None:
    """Cut rounds.jsonl to its sound lines, for who writes; more than a torn line is kept aside."""
    file = folder.rounds_file
    if not file.exists() or file.stat().st_size == found.size:
        return
    content = file.read_bytes()
    if b"\n" in content[found.size :]:
        before = file.with_name(f"{file.name}.before-resume")
        before.write_bytes(content)
        if found.problem is not None:
            _logger.warning("%s: %s; what was there is kept as %s", file, found.problem, before.name)
    os.truncate(file, found.size)


def forget_later_rounds(folder: RunFolder, found: Standing) -> None:
    """Cut rounds.jsonl to what the checkpoint stands on: later rounds come out otherwise on other ground."""
    assert found.checkpoint is not None
    meta = read_meta(found.checkpoint)
    last = meta["round"] - (meta["driver"].get("waiting") is not None)
    kept = [line for line in found.lines if line["round"] <= last]
    size = len(b"".join(folder.rounds_file.read_bytes().splitlines(keepends=True)[: len(kept)]))
    take_up(folder, Standing(kept, size, None, found.checkpoint))


def _check_configuration(path: Path, config: Config) -> None:
    made_of = read_meta(path)["digest"].split("-")[0]
    if made_of != config.digest():
        raise CheckpointError(
            f"{path} belongs to another configuration (hash {made_of}) than config.yaml ({config.digest()}): "
            "restore that file, which was changed or cut short"
            + (", or model.weights, if it is they that changed" if config.model.weights else "")
        )


def _sound_lines(file: Path, first_round: int) -> tuple[list[dict[str, Any]], int, str | None]:
    """The lines that follow one another from the first on, their bytes, and what is wrong with the next."""
    lines: list[dict[str, Any]] = []
    size = 0
    for number, text in enumerate(file.read_bytes().splitlines(keepends=True) if file.exists() else [], 1):
        if not text.endswith(b"\n"):
            break  # torn by a crash
        due = first_round + len(lines)
        try:
            line = json.loads(text)
            found = line["round"]
        except (ValueError, TypeError, KeyError):
            return lines, size, f"line {number} is damaged (round {due} is due there)"
        if found != due:
            return lines, size, f"line {number} is round {found} where round {due} is due"
        lines.append(line)
        size += len(text)
    return lines, size, None


def outdated(config: Config, rules: int) -> Iterator[str]:
    """Why a checkpoint made under older ``rules`` cannot be continued; nothing where that is no matter."""
    if rules >= RULES:
        return
    local, last = config.local, config.stop_after or config.rounds
    if local.lr_final is not None and local.lr_horizon is not None and local.lr_horizon < last:
        yield "which held the learning rate from local.lr_horizon on"
    if config.algorithm.name == "zerofl":
        yield "whose zerofl rounded the weights of a layer where SWAT takes the ceiling"
    schedule = config.schedule
    if config.devices.flops == "sparse" and (schedule.options.get("deadline") or schedule.name == "buffered"):
        yield "which counted sparse FLOPs, and so who is late, by another rule"
