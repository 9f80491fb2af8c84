"""An app of Flower: complete, and its two halves give the product's bits when they speak to each other.

``python -m tests.export_flower`` runs the same apps in Flower itself, in an environment of its own.
"""

import importlib
import sys
import tomllib

import pytest

import cluster
from cluster.configuration.identity import code_digest
from cluster.configuration.sections import TrackingSection
from cluster.export import flower
from cluster.export.finished import ExportError, Finished
from cluster.records.run_folder import RunFolder, RunFolderError, comparable
from cluster.references import installed
from cluster.rounds.conduct import conduct
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

SCALARS = (bool, int, float, str, bytes)


@pytest.fixture
def app(tmp_path, monkeypatch):
    """Imports a module of the app in ``tmp_path / "app"``."""

    def module(name):
        monkeypatch.syspath_prepend(tmp_path / "app")  # once it is there
        return importlib.import_module(f"sparsyfed_app.{name}")

    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "sparsyfed_app"]:
        del sys.modules[name]


def through_a_config_record(content):
    """What arrives of a message: only what Flower's record takes."""
    for value in content.values():
        values = value if isinstance(value, list) else [value]
        assert len({type(one) for one in values}) == 1
        assert type(values[0]) in SCALARS
    return dict(content)


def run_on_nodes(rounds, folder, ask, count=2):
    """The app's rounds without Flower's network, in a folder that may have begun."""
    conduct(
        folder.path,
        lambda _, federation: rounds.NodesEngine(federation, ask, count),
        lambda line: None,
        lambda: False,
    )


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("fedavg", {}),
        (
            "topk",
            {
                "devices": {
                    "profile": "phones",
                    "tiers": {"mid": {"jitter": 0.4}},
                    "cells": 2,
                    "cell_uplink": 2e6,
                },
                "schedule": {"over_selection": 1.5, "deadline": 20},
            },
        ),
        ("sparsyfed", {"wire": {"uplink": "int8", "downlink": "float16"}, "shift": {"round": 2}}),
    ],
)
def test_nodes_end_in_the_products_bits(cache, tmp_path, app, method, overrides):
    data, local = {"name": "digits"}, {"batch_size": 64}
    config = tiny_federation(cache, algorithm={"name": method}, cohort=3, data=data, local=local, **overrides)
    run = cluster.run(config, tmp_path / "run")
    flower.write(Finished.open(run.folder), tmp_path / "app")
    rounds = app("rounds")
    nodes = [rounds.Node(rounds.experiment()) for _ in range(2)]
    asked = []

    def ask(questions):
        asked.append([question["clients"] for question in questions])
        answers = [
            node.play(through_a_config_record(question))
            for node, question in zip(nodes, questions, strict=False)
        ]
        return [through_a_config_record(answer) for answer in answers]

    folder = RunFolder.create(tmp_path / "flower", rounds.experiment())
    run_on_nodes(rounds, folder, ask)
    assert folder.model_file.read_bytes() == (run.folder / "model.safetensors").read_bytes()
    expected = RunFolder(run.folder).rounds()
    assert [comparable(line) for line in folder.rounds()] == [comparable(line) for line in expected]
    assert len(asked) == 2
    assert all(len(shares) == 2 for shares in asked)  # both nodes played


def test_a_run_that_lost_a_node_goes_on_to_the_same_bits(finished, tmp_path, app):
    flower.write(finished, tmp_path / "app")
    rounds = app("rounds")
    node, folder = rounds.Node(finished.config), RunFolder.create(tmp_path / "run", rounds.experiment())

    def losing(questions):
        if '"round": 2' in questions[0]["instructions"]:
            raise rounds.NodeError("no answer from node 7")
        return [node.play(question) for question in questions]

    with pytest.raises(rounds.NodeError, match="no answer from node 7"):
        run_on_nodes(rounds, folder, losing)
    assert not folder.model_file.exists()
    run_on_nodes(rounds, folder, lambda questions: [node.play(question) for question in questions], count=1)
    assert folder.model_file.read_bytes() == finished.folder.model_file.read_bytes()


def test_the_app_is_complete(finished, tmp_path, app):
    said = flower.write(finished, tmp_path / "app")
    assert said == f"run       flwr run {tmp_path / 'app'} --stream"
    assert sorted(str(path.relative_to(tmp_path / "app")) for path in (tmp_path / "app").rglob("*.*")) == [
        "README.md", "pyproject.toml", "sparsyfed_app/__init__.py", "sparsyfed_app/client_app.py",
        "sparsyfed_app/experiment.yaml", "sparsyfed_app/rounds.py", "sparsyfed_app/server_app.py",
    ]  # fmt: skip
    told = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    settings = told["tool"]["flwr"]["app"]
    assert settings["config"] == {"output": "runs/flower", "nodes": 2}
    assert told["project"]["dependencies"] == [f"flwr=={flower.FLOWER}"]
    for reference in settings["components"].values():
        module, _, attribute = reference.partition(":")
        file = tmp_path / "app" / f"{module.replace('.', '/')}.py"
        compile(source := file.read_text(), str(file), "exec")
        assert f"\n{attribute} = " in source
    experiment = app("rounds").experiment()
    assert experiment.digest() == finished.config.digest()
    assert (experiment.execution, experiment.tracking.enabled) == ("inline", False)
    assert str(finished.config.data.cache) not in (tmp_path / "app/sparsyfed_app/experiment.yaml").read_text()
    assert "topk-0.8-s3" in (tmp_path / "app" / "README.md").read_text()


@pytest.mark.skipif(not installed("flwr"), reason="flwr is not installed: python -m tests.export_flower")
def test_the_apps_import_where_flower_is(finished, tmp_path, app):
    flower.write(finished, tmp_path / "app")
    assert type(app("server_app").app).__name__ == "ServerApp"
    assert type(app("client_app").app).__name__ == "ClientApp"


def test_a_node_with_other_code_says_so(finished, tmp_path, app):
    flower.write(finished, tmp_path / "app")
    rounds = app("rounds")
    node = rounds.Node(finished.config)
    with pytest.raises(rounds.NodeError, match=r"this node has sparsyfed's code \w{12}, the server other; "):
        node.play({"code": "other"})


def test_a_node_with_another_experiment_says_so(finished, cache, tmp_path, app):
    flower.write(finished, tmp_path / "app")
    rounds = app("rounds")
    other = tiny_federation(cache, data={"name": "digits"}, seed=4)
    node = rounds.Node(other)
    asked = {"code": code_digest(), "experiment": finished.config.digest()}
    with pytest.raises(rounds.NodeError, match=rf"experiment {other.digest()}, the server \w+; "):
        node.play(asked)


def test_another_experiments_folder_is_not_resumed(finished, cache, tmp_path, app):
    flower.write(finished, tmp_path / "app")
    rounds = app("rounds")
    other = tiny_federation(cache, data={"name": "digits"}, seed=4)
    RunFolder.create(tmp_path / "other", other)
    with pytest.raises(rounds.NodeError, match=rf"a run of another experiment \({other.digest()}, "):
        rounds.folder_of_the_run(tmp_path / "other")
    began = rounds.folder_of_the_run(tmp_path / "new")
    assert rounds.folder_of_the_run(tmp_path / "new") == RunFolder(began.path)
    (tmp_path / "new" / "config.yaml").unlink()
    with pytest.raises(RunFolderError, match="new exists and is not empty"):
        rounds.folder_of_the_run(tmp_path / "new")


def test_where_runs_are_tracked_does_not_travel(cache):
    tracking = {"uri": "http://mine:5000", "tags": {"user": "me"}, "experiment": "mine", "run_name": "mine"}
    config = tiny_federation(cache, tracking=tracking)
    portable = flower.portable(config)
    assert portable.tracking == TrackingSection(enabled=False)
    assert portable.digest() == config.digest()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"algorithm": {"name": "scaffold"}}, "clients of scaffold keep c between visits"),
        ({"algorithm": {"name": "feddst"}}, "server and clients of feddst hold a mask between rounds"),
        ({"algorithm": {"name": "ssfl"}}, "ssfl begins with a stage of its own before round 1"),
        ({"algorithm": {"name": "heterofl"}}, "heterofl sends clients parts of the model"),
        (
            {"algorithm": {"name": "topk"}, "schedule": {"name": "buffered", "buffer": 2, "concurrency": 3}},
            "schedule.name = buffered: who arrives when",
        ),
        (
            {"algorithm": {"name": "tests.example_method:RandomK"}},
            "algorithm.name = tests.example_method:RandomK is code of your own",
        ),
        ({"wire": {"grid": 32}}, "wire.grid = 32: its words count in the round's units"),
        ({"privacy": {"secure": {"masks": "billed"}}}, "privacy.secure: the keys of a secure round"),
        (
            {"model": {"name": "mlp", "weights": "/mine.safetensors"}},
            "model.weights = /mine.safetensors",
        ),
        ({"model": {"name": "timm", "folder": "/mine"}}, "model.folder = /mine lies on this machine"),
        ({"data": {}}, "data.name = tests.tiny_experiment:tiny_images is code of your own"),
    ],
)
def test_what_nodes_cannot_play_is_refused_with_the_reason(cache, finished, tmp_path, overrides, reason):
    config = tiny_federation(cache, **{"data": {"name": "digits"}, **overrides})
    asked = Finished(finished.folder, config, finished.result)
    with pytest.raises(ExportError, match=f"run cannot be an app of Flower: {reason}"):
        flower.write(asked, tmp_path / "app")
    assert not (tmp_path / "app").exists()
