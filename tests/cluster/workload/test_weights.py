"""Weights to begin with: what they do, and what is said of those that do not fit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import cluster
from cluster.records.checkpoint import CheckpointError
from cluster.workload.models import ModelError
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

MODEL = {"name": "small_cnn", "channels": [4, 6], "hidden": 16, "norm": "batch"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("trained") / "run"
    cluster.run(tiny_federation(cache, model=MODEL), folder)
    return folder / "model.safetensors"


def begun_with(cache, weights, **more):
    return tiny_federation(cache, model={**MODEL, "weights": str(weights)}, **more)


@pytest.mark.parametrize("name", ["fedavg", "sparsyfed"])
def test_a_run_begins_with_them(cache, tmp_path, trained, name):
    algorithm = {"name": name, **({"sparsity": 0.5} if name == "sparsyfed" else {})}
    run = run_inline(begun_with(cache, trained, algorithm=algorithm), tmp_path / "run")
    layout, tensors = run.driver.layout, load_file(trained)
    effective = run.driver.method.effective_weights(run.states[0].weights, layout)
    for entry, tensor in layout.split(effective).items():
        torch.testing.assert_close(tensor, tensors[entry], atol=1e-6, rtol=1e-5)
    started = run_inline(tiny_federation(cache, model=MODEL, algorithm=algorithm), tmp_path / "from nothing")
    assert run.lines[0]["train/loss"] < started.lines[0]["train/loss"]


def test_half_precision_becomes_the_models(cache, tmp_path, trained):
    halves = {n: t.half() if t.is_floating_point() else t for n, t in load_file(trained).items()}
    save_file(halves, tmp_path / "half.safetensors")
    run = run_inline(begun_with(cache, tmp_path / "half.safetensors"), tmp_path / "run")
    found = run.driver.layout.split(run.states[0].weights)
    assert all(torch.equal(tensor, halves[name].float()) for name, tensor in found.items())


def drop(tensors):
    tensors.popitem()


def add(tensors):
    tensors["extra"] = torch.zeros(2)


def reshape(tensors):
    tensors[next(iter(tensors))] = torch.zeros(3, 1)


def spoil(tensors):
    tensors.update({name: t * torch.nan for name, t in tensors.items() if t.is_floating_point()})


def to_integers(tensors):
    tensors.update({name: t.int() for name, t in tensors.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"is missing$"),
        (add, "extra is no tensor of the model"),
        (reshape, r"is \[3, 1\], the model's is \["),
        (spoil, "not finite.*more"),
        (to_integers, "is torch.int32, the model's is torch.float32"),
    ],
)
def test_what_does_not_fit_is_named(cache, tmp_path, trained, change, message):
    tensors = load_file(trained)
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=rf"model.weights = .*other.safetensors .*{message}"):
        cluster.run(begun_with(cache, tmp_path / "other.safetensors"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_file_and_no_safetensors_file(cache, tmp_path, trained):
    with pytest.raises(ModelError, match="there is no such file"):
        cluster.run(begun_with(cache, tmp_path / "absent"), tmp_path / "run")
    (tmp_path / "cut").write_bytes(trained.read_bytes()[:-10])
    with pytest.raises(ModelError, match="no whole safetensors file"):
        cluster.run(begun_with(cache, tmp_path / "cut"), tmp_path / "run")


def test_an_experiment_is_known_by_their_content_not_by_their_place(cache, tmp_path, trained):
    shutil.copy(trained, tmp_path / "copy.safetensors")
    here, there = (begun_with(cache, path).digest() for path in (trained, tmp_path / "copy.safetensors"))
    assert here == there != tiny_federation(cache, model=MODEL).digest()
    tensors = load_file(trained)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "copy.safetensors")
    assert begun_with(cache, tmp_path / "copy.safetensors").digest() != here


def test_a_run_is_not_resumed_on_others(cache, tmp_path, trained):
    shutil.copy(trained, tmp_path / "mine.safetensors")
    config = begun_with(cache, tmp_path / "mine.safetensors", rounds=3, stop_after=1)
    cluster.run(config, tmp_path / "run")
    tensors = load_file(trained)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match=r"or model\.weights"):
        cluster.resume(tmp_path / "run", ["stop_after=null"])
    shutil.copy(trained, tmp_path / "mine.safetensors")
    assert cluster.resume(tmp_path / "run", ["stop_after=null"]).ended


def test_the_option_stays_when_the_model_is_overridden(cache, trained):
    config = cluster.resolve("quickstart", [f"model.weights={trained}", "model.name=mlp"])
    assert config.model.weights == str(trained)


def test_a_finished_run_needs_the_file_no_more(cache, tmp_path, trained):
    shutil.copy(trained, tmp_path / "mine.safetensors")
    result = cluster.run(begun_with(cache, tmp_path / "mine.safetensors"), tmp_path / "run")
    (tmp_path / "mine.safetensors").unlink()
    tensors = result.model().state_dict()
    stored = load_file(result.folder / "model.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in stored.items())
