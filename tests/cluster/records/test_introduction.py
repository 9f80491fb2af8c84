"""How a run introduces itself in MLflow, as words and in a real store."""

from pathlib import Path

import pytest

import cluster
from cluster.configuration.config import resolve
from cluster.records import tracking, tracking_store
from cluster.records.introduction import description, final_scalars, group_name, run_name

SUMMARY = {
    "rounds": 3,
    "accuracy": 0.75,
    "best_accuracy": 0.8,
    "sparsity": 0.9,
    "uplink_bytes": 1_500_000,
    "downlink_bytes": 500_000,
    "flops_sparse": 2.5e9,
    "seconds": 12.0,
    "seed": 7,
    "complete": True,
}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["algorithm.name=sparsyfed", "seed=2"], "sparsyfed-0.9-s2"),
        (["algorithm.name=fedavg"], "fedavg-s0"),
        (["algorithm.name=topk", "algorithm.sparsity=0.995"], "topk-0.995-s0"),
        (["algorithm.name=tests.example_method:RandomK"], "RandomK-0.9-s0"),
    ],
)
def test_a_runs_name_tells_method_sparsity_and_seed(overrides, name):
    assert run_name(resolve("quickstart", overrides)) == name


def test_a_group_is_all_but_the_seed():
    config = resolve("quickstart")
    assert group_name(config).startswith("sparsyfed-0.9 ")
    for same in ("seed=5", "actors=3", "stop_after=4"):
        assert group_name(resolve("quickstart", [same])) == group_name(config)
    for other in ("local.lr=0.2", "partition.alpha=1", "algorithm.beta=1.3"):
        assert group_name(resolve("quickstart", [other])) != group_name(config)


def test_a_description_reads_as_sentences():
    config = resolve(
        "quickstart", ["algorithm.name=topk", "seed=3", "local.lr_final=0.01", "server.name=fedyogi"]
    )
    assert description(config, Path("/runs/mine")).split("  \n") == [
        "**topk**, seed 3: sparsity 0.9",
        "digits, lda 0.5 over 30 clients, 10 a round; small_cnn",
        "30 rounds of 5 local epochs, batch 16, lr 0.1 to 0.01; server fedyogi",
        "judged by accuracy: share of the samples whose largest logit is that of their class "
        "(higher is better)",
        "`sparsyfed resume /runs/mine`",
    ]
    dense = resolve("quickstart", ["algorithm.name=fedavg", "local.epochs=1", "data.path=/data/cifar10"])
    words = description(dense, Path("runs/x")).split("  \n")
    assert words[0] == "**fedavg**, seed 0"
    assert words[1].startswith("cifar10, ")
    assert words[2] == "30 rounds of 1 local epoch, batch 16, lr 0.1"


def test_final_scalars_in_units_that_people_read():
    lines = [
        {"round": 1, "masks/regrowth_share": 0.9, "masks/consensus": 0.1},
        {"round": 2, "masks/regrowth_share": 0.25, "masks/consensus": None},
        {
            "round": 3,
            "masks/regrowth_share": 0.75,
            "masks/consensus": None,
            "clients/accuracy_mean": 0.7,
            "time/simulated_s": 60.0,
        },
    ]
    assert final_scalars(SUMMARY, lines) == {
        "final/rounds": 3.0,
        "final/accuracy": 0.75,
        "final/best_accuracy": 0.8,
        "final/sparsity": 0.9,
        "final/uplink_mb": 1.5,
        "final/downlink_mb": 0.5,
        "final/total_mb": 2.0,
        "final/gflop": 2.5,
        "final/seconds": 12.0,
        "final/regrowth_share": 0.5,  # of rounds 2 and 3
        "final/clients_accuracy_mean": 0.7,
        "final/simulated_s": 60.0,
    }
    assert "final/regrowth_share" not in final_scalars(SUMMARY, lines[:1])


@pytest.mark.usefixtures("no_pictures")
def test_a_run_is_introduced_in_the_store(tmp_path):
    small = ["execution=inline", "rounds=2", "cohort=2", "partition.clients=6", "local.epochs=1"]
    config = resolve("quickstart", [*small, "model.name=mlp", "model.hidden=[8]"])
    result = cluster.run(config, tmp_path / "one")
    report = tracking.sync(tmp_path / "one")  # in case that the machine was too slow to deliver in time
    client = tracking_store.connect(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(report.run_id)
    assert run.info.run_name == "sparsyfed-0.9-s0"
    assert run.data.tags["group"] == group_name(config)
    assert run.data.tags["mlflow.note.content"] == description(config, tmp_path / "one")
    assert run.data.tags["mlflow.source.name"] == "sparsyfed"
    assert run.data.tags["mlflow.source.type"] == "LOCAL"
    assert min(key for key in run.data.params if key.startswith("algorithm")) == "algorithm"
    assert run.data.params["algorithm"] == "sparsyfed-0.9"
    # What MLflow's page of compared runs draws first, and that it opens the experiment on its charts.
    assert next(iter(run.data.metrics)) == "test/accuracy"
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert run.data.metrics["final/accuracy"] == run.data.metrics["test/accuracy"]
    assert run.data.metrics["final/uplink_mb"] == pytest.approx(result.summary["uplink_bytes"] / 1e6)
