"""Whole studies, tiny and inline: the protocol is kept, and what goes wrong is counted."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

import cluster
from cluster import cli
from cluster.actors import ray_session
from cluster.actors.ray_session import ClusterError
from cluster.records.run_folder import BusyError, RunFolder, RunFolderError
from tests.tuning.studies import finish, seen, tiny_plan, tiny_tree
from tuning.command import report
from tuning.coordinator import Coordinator, shares
from tuning.folder import StudyFolder

pytestmark = pytest.mark.usefixtures("no_pictures")

STUDY = {
    "methods": ["topk", "zerofl", {"name": "sparsyfed", "label": "ours"}],
    "trials": 3,
    "final_seeds": 2,
    "sampler": {"name": "random"},
    "reference": "ours",
}


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """A finished study: its folder, plan and results."""
    path = tmp_path_factory.mktemp("whole") / "study"
    plan = tiny_plan(cache, STUDY)
    return StudyFolder(path), plan, finish(plan, path)


def test_every_method_saw_its_default_and_the_asked_number(whole):
    folder, plan, results = whole
    tried = {label: [trial.values for trial in result.tried] for label, result in results.items()}
    assert tried["topk"] == [{}]
    for label in ("zerofl", "ours"):
        assert len(tried[label]) == 3
        assert tried[label][0] == plan.contenders[label].default
        assert len({str(values) for values in tried[label]}) == 3
    for label, result in results.items():
        for trial in result.tried:
            run = RunFolder(folder.trial(label, trial.number))
            flat = run.config().flat()
            assert {key: flat[key] for key in trial.values} == trial.values
            assert trial.value == run.rounds()[-1]["val/accuracy"]
            assert not list(run.checkpoints.glob("*.safetensors"))


def test_budgets_are_equal_to_the_round(whole):
    _, plan, results = whole
    assert plan.budget == 3 * 3 * 4
    assert results["zerofl"].client_rounds == results["ours"].client_rounds == plan.budget
    assert results["topk"].client_rounds == 3 * 4
    assert all(trial.rounds == 3 for result in results.values() for trial in result.tried)


def test_the_best_configuration_runs_on_fresh_seeds_shared_by_all(whole):
    folder, plan, results = whole
    assert plan.final_seeds == [4, 5]  # the search has seed 3
    partitions = set()
    for label, result in results.items():
        assert result.best.value == max(trial.value for trial in result.tried)
        assert list(result.finals) == [4, 5]
        for seed, summary in result.finals.items():
            run = RunFolder(folder.final(label, result.best.number, seed))
            assert summary["accuracy"] == run.rounds()[-1]["test/accuracy"]
            assert run.config().seed == seed
            partitions.add(summary["partition_hash"])
    assert len(partitions) == 1


def test_a_finished_study_runs_nothing_again(whole, monkeypatch):
    folder, plan, results = whole
    monkeypatch.setattr(Coordinator, "_follow", lambda *_: pytest.fail("something was run"))
    assert seen(finish(plan, folder.path)) == seen(results)


def test_the_report_is_written_anew(whole, monkeypatch):
    folder, _, _ = whole
    page = folder.report / "report.md"
    text = page.read_text()
    shutil.rmtree(folder.report)
    monkeypatch.chdir(folder.path.parent)
    assert report(Console(quiet=True), str(folder.path)) == 0
    assert page.read_text() == text
    assert "reference" in text
    with pytest.raises(RunFolderError, match="holds no study"):
        report(Console(quiet=True), "nothing")


def test_a_longer_study_goes_on_where_the_shorter_ended(whole, cache, tmp_path):
    folder, _, results = whole
    shutil.copytree(folder.path, tmp_path / "study")
    longer = finish(tiny_plan(cache, STUDY | {"trials": 4}), tmp_path / "study")
    assert [len(result.tried) for result in longer.values()] == [1, 4, 4]
    assert seen(longer)["ours"][:3] == seen(results)["ours"]


def test_two_coordinators_do_not_share_a_study(whole):
    folder, plan, _ = whole
    with folder.locked(), pytest.raises(BusyError, match="being tuned by another process"):
        finish(plan, folder.path)


def test_test_data_is_not_read_before_every_search_has_ended(tmp_path, monkeypatch):
    plan = tiny_plan(tmp_path, STUDY | {"final_seeds": 1})
    load, opened = np.load, []

    def seen_load(path, **options):
        opened.append(Path(path).name)
        return load(path, **options)

    monkeypatch.setattr(np, "load", seen_load)
    cluster.run(plan.contenders["topk"].final_config({}, 1), tmp_path / "judged")
    assert "test-images.npy" in opened  # whoever reads it is caught
    opened.clear()
    original, searched = Coordinator._final_runs, []

    def final_runs(self, results):
        searched.extend(trial for result in results.values() for trial in result.tried)
        assert "train-images.npy" in opened
        assert not [name for name in opened if name.startswith("test")]
        return original(self, results)

    monkeypatch.setattr(Coordinator, "_final_runs", final_runs)
    finish(plan, tmp_path / "study")
    assert [trial.state for trial in searched] == ["finished"] * 7
    for path in (tmp_path / "study").glob("*/trial-00?/rounds.jsonl"):
        assert all("test/accuracy" not in line for line in RunFolder(path.parent).rounds())


def test_a_diverged_trial_is_told_as_failed_with_its_reason(cache, tmp_path):
    study = {"methods": ["fedavg"], "trials": 4, "final_seeds": 1, "shared": {"local.lr": [0.2, 1e30]}}
    result = finish(tiny_plan(cache, study | {"sampler": {"name": "random"}}), tmp_path / "study")["fedavg"]
    failed = [trial for trial in result.tried if trial.state == "failed"]
    assert failed
    assert {trial.values["local.lr"] for trial in failed} == {1e30}
    assert all("every update was refused in 3 rounds" in trial.reason for trial in failed)
    assert all(trial.client_rounds == 12 for trial in failed)
    assert len(result.tried) == 4
    assert result.best.values == {"local.lr": 0.2}
    assert "failed: every update was refused" in (tmp_path / "study" / "report" / "budget.md").read_text()


def test_pruning_saves_rounds(cache, tmp_path):
    pruner = {"name": "successive_halving", "reduction_factor": 4}
    study = {"methods": ["sparsyfed"], "trials": 4, "final_seeds": 1, "pruner": pruner}
    study |= {"shared": {"local.lr": {"low": 0.001, "high": 1.0, "log": True}}}
    data = {"name": "digits", "validation": 0.2}  # accuracies that differ after one round
    plan = tiny_plan(cache, study, rounds=6, data=data, model={"name": "mlp", "hidden": [16]})
    result = finish(plan, tmp_path / "study")["sparsyfed"]
    pruned = [trial for trial in result.tried if trial.state == "pruned"]
    assert pruned
    for trial in pruned:
        decided = RunFolder(StudyFolder(tmp_path / "study").trial("sparsyfed", trial.number)).rounds()
        assert trial.rounds < 6
        # The next round was being computed when the decision came.
        assert trial.value == decided[trial.rounds - 2]["val/accuracy"]
        assert trial.client_rounds == 4 * trial.rounds
    assert len(result.tried) > 4  # what was saved went into more trials
    assert plan.budget - 6 * 4 < result.client_rounds <= plan.budget
    assert result.best.state == "finished"


def test_two_objectives_leave_a_front(cache, tmp_path):
    study = {"methods": ["zerofl"], "trials": 3, "final_seeds": 1, "objectives": ["accuracy", "uplink_bytes"]}
    result = finish(tiny_plan(cache, study), tmp_path / "study")["zerofl"]
    sent = [trial.uplink_bytes for trial in result.front()]
    assert sent == sorted(sent)
    assert result.best in result.front()
    assert "Two objectives" in (tmp_path / "study" / "report" / "report.md").read_text()


def test_copies_on_shared_storage_do_not_meet(cache, tmp_path):
    study = {"methods": ["topk", "sparsyfed"], "trials": 1, "final_seeds": 1}
    shared = tmp_path / "shared"
    finish(tiny_plan(cache, study, checkpoint_uri=f"file://{shared}"), tmp_path / "mine")
    copies = {str(path.parent.relative_to(shared)) for path in shared.rglob("result.json")}
    runs = ("trial-000", "trial-000-seed-4")
    assert copies == {f"mine/{label}/{run}" for label in ("topk", "sparsyfed") for run in runs}


def test_code_of_any_method_travels_to_the_cluster(cache, tmp_path, monkeypatch):
    def connection(address, **arguments):
        raise ClusterError(str(arguments.get("runtime_env")))

    monkeypatch.setattr(ray_session, "connection", connection)
    place = {"execution": "ray", "data": {"name": "digits", "validation": 0.2}}
    both = ["topk", "tests.example_method:RandomK"]
    for number, (methods, address, environment) in enumerate(
        [(both, "auto", {"working_dir": os.getcwd()}), (both, "local", None), (["topk"], "auto", None)]
    ):
        plan = tiny_plan(cache, {"methods": methods, "trials": 1}, address=address, **place)
        with pytest.raises(ClusterError) as found:
            finish(plan, tmp_path / str(number))
        assert str(found.value) == str(environment)


def test_a_study_in_mlflow(cache, tmp_path):
    study = {"methods": ["topk", "sparsyfed"], "trials": 1, "final_seeds": 1}
    plan = tiny_plan(cache, study, tracking={"enabled": True, "experiment": "x"})
    finish(plan, tmp_path / "study")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    (parent,) = [run for run in runs if run.data.tags["kind"] == "study"]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    names = {"topk-trial-000", "sparsyfed-trial-000", "topk-final-s4", "sparsyfed-final-s4"}
    assert {run.info.run_name for run in children} == names
    assert sorted(run.data.tags["kind"] for run in children) == ["final", "final", "trial", "trial"]
    assert {run.data.tags["study"] for run in runs} == {"tiny"}
    assert len({frozenset(run.data.params) for run in children}) == 1  # comparable side by side
    values = {run.data.tags["method"]: run.data.params["algorithm.beta"] for run in children}
    assert values == {"topk": "-", "sparsyfed": "1.25"}
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"report.md", "accuracy.csv", "accuracy.tex", "budget.png"} <= files
    assert parent.data.metrics["tuned/topk/test_accuracy"] > 0
    assert parent.info.status == "FINISHED"


def test_the_command(cache, tmp_path, monkeypatch, capsys):
    import yaml

    monkeypatch.chdir(tmp_path)
    tree = tiny_tree(cache, {"methods": ["topk", "fedavg"], "trials": 2})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["tune", "mine.yaml", "study.final_seeds=1", "rounds=1"]) == 0
    shown = capsys.readouterr().out
    assert "nothing to tune: one configuration" in shown
    assert "topk-trial-000" in shown
    assert "fedavg-final-s4" in shown
    assert (tmp_path / "runs" / "mine" / "report" / "report.md").is_file()
    assert cli.main(["tune", "mine.yaml", "rounds=2"]) == 2
    assert "rounds was 1, now 2" in capsys.readouterr().err
    assert cli.main(["tune", "--report", "mine"]) == 0
    assert cli.main(["run", "mine.yaml"]) == 2
    assert "sparsyfed tune mine.yaml" in capsys.readouterr().err
    assert cli.main(["tune", "mine.yaml", "study.storage=postgresql://h/d", "--output", "other"]) == 2
    assert "is not installed" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    with pytest.raises(SystemExit):
        cli.main(["tune"])


@pytest.mark.parametrize(
    ("free", "changes", "expected"),
    [
        (2, {}, (2, 1)),  # a method a place
        (9, {}, (3, 3)),
        (24, {}, (6, 4)),  # a client an actor, and what is left takes more trials
        (1, {}, (1, 1)),
        (8, {"actors": 2}, (4, 2)),
        (8, {"study": STUDY | {"trials_at_once": 2}}, (2, 4)),
    ],
)
def test_the_cluster_is_shared_among_trials(tmp_path, free, changes, expected):
    study = changes.pop("study", STUDY)
    assert shares(tiny_plan(tmp_path, study, execution="ray", **changes), free) == expected
