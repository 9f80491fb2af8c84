"""Folders that version 0.1 left, before the rooms of the rounds were built: read, compared, continued.

``tests/older`` holds what ``sparsyfed run quickstart execution=inline model.name=mlp model.hidden=[6] ...``
wrote: a finished run with phones, over-selection and a shift; two that were stopped, one of them buffered
with FedAdam; and a grid whose process was killed in its second run.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

import cluster
from cluster.cli import main
from cluster.compare import group_runs, read_folders
from cluster.records.resuming import ChangedError
from cluster.records.run_folder import RunFolder
from tests.same_bits import machine

pytestmark = pytest.mark.usefixtures("no_pictures")

OLDER = Path(__file__).parents[2] / "older"

#: What 0.1 itself made of them in the end, by machine.
MODELS = {
    "stopped": "e588865d5fd9c4f7cc284d3d54ce771891aa2c9fc4fc7775e99a7005de1b7d0d",
    "buffered": "ecb22682e1e2936920a502231490553a86b92174b3abc20a6ceb0f8e68a2f703",
    "grid/fedavg-seed0": "e128c23d3f896331c61a2e31304b22219cab6ed0de51a73fe0c4c039fcf8ca83",
    "grid/fedavg-seed1": "636f91150805492bddd9639dd12b0707169759e0bc8896c993761dea8224c328",
    "grid/topk-sparsity0.9-seed1": "523cd8099c772edaf49226818bd77f9c977bcd49246785fa2948c5fd0de04453",
}
MADE_ON = "torch 2.13.0, AVX512, GenuineIntel 6 167"

GRID = [
    "execution=inline",
    "tracking.enabled=false",
    "model.name=mlp",
    "model.hidden=[6]",
    "partition.clients=12",
    "cohort=4",
    "checkpoint_every=1",
    "local.batch_size=32",
    "method=[topk,fedavg]",
    "seed=[0,1]",
    "rounds=6",
]


@pytest.fixture
def older(tmp_path):
    shutil.copytree(OLDER, tmp_path / "older")
    return tmp_path / "older"


def assert_as_0_1_would(older, name):
    """The bits that 0.1 itself ended in, where they were made on a machine of this kind."""
    tensors = load_file(older / name / "model.safetensors")
    found = hashlib.sha256(save(tensors)).hexdigest()  # 0.1 wrote no metadata
    if machine() == MADE_ON:
        assert found == MODELS[name]


def test_compare_reads_them(older):
    runs = {run.name: run for run in read_folders([older])}
    assert sorted(runs) == [
        "buffered",
        "finished",
        "stopped",
        "topk-sparsity0.9-seed0",
        "topk-sparsity0.9-seed1",
    ]
    lines = [json.loads(line) for line in (older / "finished" / "rounds.jsonl").read_text().splitlines()]
    for metric in ("test/accuracy", "comm/uplink_bytes_total", "sparsity/global"):
        series = runs["finished"].series[metric]
        assert dict(zip(series.rounds, series.values, strict=True)) == {
            line["round"]: line[metric] for line in lines if line.get(metric) is not None
        }
    assert runs["stopped"].params["algorithm.beta"] == "1.25"
    assert len(group_runs(list(runs.values())).groups) == 4


@pytest.mark.parametrize("name", ["stopped", "buffered"])
def test_a_stopped_run_goes_on_knowingly_to_the_same_bits(older, name):
    before = (older / name / "rounds.jsonl").read_text().splitlines()
    with pytest.raises(ChangedError, match=r"since the checkpoint of round \d: sparsyfed's code"):
        cluster.resume(older / name, ["stop_after=null"])
    assert (older / name / "rounds.jsonl").read_text().splitlines() == before
    result = cluster.resume(older / name, ["stop_after=null"], anyway=True)
    assert result.ended
    after = (older / name / "rounds.jsonl").read_text().splitlines()
    assert after[: len(before) - 1] == before[:-1]
    # The checkpoint's own round is evaluated anew, on a machine of another kind to other last bits.
    stored, again = json.loads(before[-1]), json.loads(after[len(before) - 1])
    differing = {key for key in stored if stored[key] != again[key]}
    assert differing <= (set() if machine() == MADE_ON else {"test/loss"})
    assert again["test/loss"] == pytest.approx(stored["test/loss"], rel=1e-5)
    assert [json.loads(line)["round"] for line in after] == [1, 2, 3, 4, 5, 6]
    assert_as_0_1_would(older, name)
    # What the first rounds took was not measured: there is no total that leaves them out.
    assert json.loads(after[-1])["energy/joules"] > 0
    assert "energy/joules_total" not in json.loads(after[-1])
    assert RunFolder(older / name).result()["joules"] is None


def test_a_killed_grid_is_completed(older, capsys):
    grid = older / "grid"
    finished = (grid / "topk-sparsity0.9-seed0" / "model.safetensors").stat()
    assert main(["run", "compare-digits", *GRID, "--output", str(grid)]) == 1
    assert "topk-sparsity0.9-seed1" in capsys.readouterr().err  # its code has changed; all others were run
    assert main(["resume", str(grid / "topk-sparsity0.9-seed1"), "--anyway"]) == 0
    assert main(["run", "compare-digits", *GRID, "--output", str(grid)]) == 0
    again = (grid / "topk-sparsity0.9-seed0" / "model.safetensors").stat()
    assert (again.st_mtime_ns, again.st_ino) == (finished.st_mtime_ns, finished.st_ino)
    for name in MODELS:
        if name.startswith("grid/"):
            assert RunFolder(older / name).result()["rounds"] == 6
            assert_as_0_1_would(older, name)
    assert (grid / "table.md").read_text().count("topk") == 2
