"""What a trained model says of itself: the header of its file, and its card as model hubs read it."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load, save

import cluster
from cluster.configuration.config import resolve
from cluster.records.model_card import card, task_of
from cluster.records.model_file import model_bytes
from cluster.workload.datasets import open_dataset
from cluster.workload.preparing import prepare
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    config = tiny_federation(
        cache, data={"validation": 0.2}, algorithm={"name": "topk", "sparsity": 0.8}, stop_after=1
    )
    return cluster.run(config, tmp_path_factory.mktemp("card") / "run")


@pytest.fixture
def digits(cache):
    return open_dataset(prepare(name="digits", cache_dir=cache))


def test_a_model_files_bytes_follow_from_its_content():
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.int64)}
    said = {name: f"of {name} \u00e4" for name in ("format", "method", "data", "metrics", "b", "a")}
    files = {model_bytes(tensors, said) for _ in range(20)}
    assert len(files) == 1
    assert len({save(tensors, said) for _ in range(20)}) > 1  # what the library itself writes
    (content,) = files
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load(content).items())
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"] == said


def test_a_runs_model_file_says_what_it_is(run):
    line = run.rounds.iloc[-1]
    with safe_open(run.folder / "model.safetensors", "pt") as file:
        said = file.metadata()
    assert sorted(said) == ["data", "format", "method", "metrics"]
    assert (said["format"], said["method"]) == ("pt", "topk")
    assert said["data"] == "tests.tiny_experiment.tiny_images-dirichlet1"
    keys = ("test/accuracy", "test/loss", "val/accuracy", "val/loss")
    assert json.loads(said["metrics"]) == {"round": 1, **{key: line[key] for key in keys}}


def test_the_hubs_own_reader_takes_a_runs_card(run):
    text = (run.folder / "README.md").read_text()
    found = ModelCard(text, ignore_metadata_errors=False).data
    assert found.model_name == "topk-0.8-s3"
    line = run.rounds.iloc[-1]
    assert {(one.dataset_split, one.metric_type, one.metric_value) for one in found.eval_results} == {
        (split, metric, line[f"{key}/{metric}"])
        for split, key in (("test", "test"), ("validation", "val"))
        for metric in ("accuracy", "loss")
    }
    assert {(one.task_type, one.dataset_type) for one in found.eval_results} == {
        ("image-classification", "tiny_images")
    }
    assert found.tags == ["federated-learning", "sparsyfed", "topk"]
    assert found.pipeline_tag == "image-classification"
    assert found.datasets is None
    assert "after 1 of 2 rounds" in text
    assert str(run.folder.parent) not in text


def test_a_data_set_of_the_hub_is_linked_and_one_of_a_folder_is_not(run, digits, tmp_path):
    hub = ["data.name=uoft-cs/cifar10", "data.revision=abc", "data.test_split=holdout"]
    local = [*hub[:1], f"data.path={tmp_path}/mine", "data.image_column=img"]
    line = run.rounds.reset_index().iloc[-1].to_dict()
    for overrides, linked, kind in ((hub, ["uoft-cs/cifar10"], "uoft-cs/cifar10"), (local, None, "mine")):
        text = card(resolve("quickstart", overrides), digits, run.summary, line, "use")
        found = ModelCard(text).data
        assert found.datasets == linked
        assert {one.dataset_type for one in found.eval_results} == {kind}
        assert str(tmp_path) not in text
    (test, *_) = ModelCard(card(resolve("quickstart", hub), digits, run.summary, line, "")).data.eval_results
    assert (test.dataset_split, test.dataset_revision) == ("holdout", "abc")


@pytest.mark.parametrize(
    ("name", "objective", "task"),
    [
        ("digits", "classification", "image-classification"),
        ("breast_cancer", "classification", "tabular-classification"),
        ("diabetes", "regression", "tabular-regression"),
        ("tiny_text", "language_model", "text-generation"),
    ],
)
def test_a_task_has_the_hubs_name(cache, name, objective, task):
    config = resolve("quickstart", [f"objective.name={objective}", f"data.name={name}", "partition.name=iid"])
    text = {"takes_text": True, "targets": "tokens"} if name == "tiny_text" else {}
    assert task_of(config, open_dataset(prepare(name=name, cache_dir=cache, **text))) == task
