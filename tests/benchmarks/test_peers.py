"""What all simulators are asked to do, and how they are found and read; none of them is started."""

import sys

import numpy as np
import pytest
import torch

from cluster.workload import models
from tests.benchmarks import bench_peers
from tests.benchmarks.peers import workload as shared
from tests.benchmarks.peers.workload import workload


def environment(folder, name, answer):
    """A made-up interpreter that answers whether it has a GIL."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{answer}\n")
    python.chmod(0o755)


def test_a_client_holds_two_shards_of_one_class_each():
    load = workload("shards", 10)
    arrays = load.arrays()
    labels = arrays["train_labels"].reshape(100, 2, 5)
    assert (labels == labels[:, :, :1]).all()
    assert np.bincount(arrays["train_labels"]).tolist() == [100] * 10
    assert arrays["train_groups"].tolist() == np.repeat(np.arange(100), 10).tolist()
    assert len(np.unique(labels[:, :, 0], axis=0)) > 10  # not ten kinds of clients
    assert arrays["train_images"].shape == (1000, 32, 32, 3)
    assert arrays["test_images"].shape == (200, 32, 32, 3)


def test_a_client_of_the_small_workload_holds_all_classes():
    load = workload("small", 64)
    arrays = load.arrays()
    for client in (0, 57, 99):
        mine = arrays["train_labels"][load.rows(client)]
        assert sorted(np.bincount(mine, minlength=10).tolist()) == [6] * 6 + [7] * 4
    assert shared.small_64().keys() == arrays.keys()
    with pytest.raises(AttributeError):
        _ = shared.small_many


def test_an_epoch_has_every_sample_of_its_client_once():
    load = workload("small", 20)
    batches = list(load.batches(3, torch.Generator().manual_seed(0)))
    assert [len(images) for images, _ in batches] == [16, 4]
    seen = torch.cat([images for images, _ in batches]).flatten(1)
    mine = load.tensors("train")[0][load.rows(3)].flatten(1)
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, mine.tolist()))


def test_models_are_the_product_s_small_cnn_and_the_tutorial_s():
    ours = models.build("small_cnn", input_shape=(1, 8, 8), classes=10, seed=0)
    shapes = [sorted(tuple(p.shape) for p in model.parameters()) for model in (ours, shared.small_cnn())]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in shared.lenet().parameters()) == 62_006
    assert shared.lenet()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_all_begin_with_the_same_weights():
    name = "tests.benchmarks.peers.workload:lenet"
    ours = models.build(name, input_shape=(3, 32, 32), classes=10, seed=7, seed_of_torch=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = shared.lenet()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_missing_peers_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSYFED_PEERS", str(tmp_path))
    environment(tmp_path, "flower", "exit 1")
    assert bench_peers._peers() == {}
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in told] == ["flower", "pfl", "blazefl"]
    assert all("README.md" in line for line in told)


@pytest.mark.parametrize(
    ("answer", "threads"), [("False", "blazefl threads"), ("True", "blazefl threads, with the GIL")]
)
def test_threads_that_share_a_lock_are_called_so(tmp_path, monkeypatch, answer, threads):
    monkeypatch.setenv("SPARSYFED_PEERS", str(tmp_path))
    environment(tmp_path, "blazefl", f"echo {answer}")
    assert [*bench_peers._peers()] == ["blazefl processes", threads]


def test_a_peer_is_asked_for_the_warm_rounds_too_and_they_are_left_out():
    scale = bench_peers.Scale("small", 64, rounds=2, turns=1)
    told = (
        "import sys; assert sys.argv[1:4] == ['small', '64', '4']; "
        "print('some line\\nseconds 9 8 1.5 2.5\\ntest 0.25 2')"
    )
    assert bench_peers._run_peer([sys.executable, "-c", told], scale) == ([1.5, 2.5], 0.25, 2.0)


def test_a_peer_that_fails_is_shown_with_what_it_said():
    scale = bench_peers.Scale("small", 64, rounds=2, turns=1)
    with pytest.raises(RuntimeError, match="no such thing"):
        bench_peers._run_peer([sys.executable, "-c", "raise SystemExit('no such thing')"], scale)
