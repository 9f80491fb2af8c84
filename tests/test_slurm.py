"""The Slurm script: what it says where it cannot run, what its cluster is told, when a run is the same."""

import os
import re
import shutil
import subprocess
import sys

import pytest

import cluster
from tests import slurm
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize(
    ("platform", "programs", "user", "reason"),
    [
        ("darwin", slurm.PROGRAMS, 0, "Slurm's daemons need Linux; this is darwin"),
        (
            "linux",
            ["munged", "unshare"],
            0,
            "not found: slurmctld, slurmd, sbatch, .*; apt-get install slurm-wlm",
        ),
        ("linux", slurm.PROGRAMS, 1000, "slurmd starts jobs as their users, which takes root"),
        ("linux", slurm.PROGRAMS, 0, "no namespace of processes: not permitted"),
    ],
)
def test_where_there_is_no_slurm_it_says_why_and_exits_2(
    monkeypatch, capsys, platform, programs, user, reason
):
    refused = subprocess.CompletedProcess([], 1, stdout="", stderr="not permitted\n")
    monkeypatch.setattr(sys, "argv", ["tests.slurm"])
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(shutil, "which", lambda name, path: name if name in programs else None)
    monkeypatch.setattr(subprocess, "run", lambda *given, **how: refused)
    assert slurm.main() == 2
    assert re.search(f"python -m tests.slurm: {reason}", capsys.readouterr().err)


def test_its_cluster_lies_in_one_folder_and_has_two_cpus(tmp_path):
    text = slurm.configuration(tmp_path, "here", 7001, 7002)
    keys = dict(line.split("=", 1) for line in text.splitlines())
    assert len(keys) == len(text.splitlines())
    assert (keys["SlurmctldPort"], keys["SlurmdPort"]) == ("7001", "7002")
    assert keys["NodeName"].split() == ["here", "NodeAddr=127.0.0.1", "CPUs=2", "State=UNKNOWN"]
    paths = [value for value in keys.values() if "/" in value and value.partition("/")[0] not in PLUGINS]
    assert len(paths) == 5
    assert all(str(tmp_path) in value for value in paths)


PLUGINS = ("proctrack", "task", "jobacct_gather", "switch", "select")


def test_a_run_is_the_same_when_it_is_complete_and_ends_in_the_same_bits(tmp_path):
    runs = {
        name: cluster.run(tiny_federation(tmp_path, seed=seed, **keys), tmp_path / name).folder
        for name, seed, keys in (
            ("one", 3, {}),
            ("same", 3, {}),
            ("other", 4, {}),
            ("half", 3, {"stop_after": 1}),
        )
    }
    assert slurm.difference(runs["same"], runs["one"]) is None
    assert slurm.difference(runs["other"], runs["one"]) == "other rounds"
    assert slurm.difference(runs["half"], runs["one"]) == "not complete"
    shutil.copy(runs["other"] / "model.safetensors", runs["same"])
    assert slurm.difference(runs["same"], runs["one"]) == "another model"
    (runs["same"] / "result.json").unlink()
    assert slurm.difference(runs["same"], runs["one"]) == "no result"
