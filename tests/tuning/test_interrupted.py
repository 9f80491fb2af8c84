"""A study that is killed or stopped goes on: nothing lost, nothing run twice, the same in the end."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import yaml
from rich.console import Console

from cluster.actors.ray_session import ClusterError
from cluster.records.run_folder import RunFolder
from tests.tuning.studies import finish, seen, tiny_plan, tiny_tree
from tuning import coordinator
from tuning.folder import StudyFolder
from tuning.running import run_study
from tuning.storage import open_journal
from tuning.study import plan_of

STUDY = {
    "methods": ["topk", "sparsyfed"],
    "trials": 4,
    "final_seeds": 1,
    "sampler": {"name": "tpe", "startup_trials": 2},
    "shared": {"local.lr": {"low": 0.05, "high": 1.0, "log": True}},
}


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    """What a study without interruption comes to."""
    patch = pytest.MonkeyPatch()
    for name in ("picture", "curves"):
        patch.setattr(f"cluster.records.outputs.{name}", lambda *_, **__: None)
    yield seen(finish(tiny_plan(cache, STUDY), tmp_path_factory.mktemp("whole") / "study"))
    patch.undo()


def finals(path):
    return sorted(folder.name for folder in path.glob("*/trial-*-seed-*"))


def test_the_coordinator_killed_in_mid_study(cache, tmp_path, undisturbed):
    tree = tiny_tree(cache, {**STUDY, "name": "tiny"}, checkpoint_every=1)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "cluster", "tune", "study.yaml", "--output", "study"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    begun = tmp_path / "study" / "sparsyfed" / "trial-001" / "rounds.jsonl"
    while not begun.exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    left = optuna.load_study(study_name="tiny/sparsyfed", storage=open_journal(tmp_path / "study"))
    assert [trial.state.name for trial in left.trials] == ["COMPLETE", "RUNNING"]
    before = {path: path.read_text() for path in (tmp_path / "study").glob("*/trial-000/rounds.jsonl")}

    results = finish(plan_of(tree, "tiny"), tmp_path / "study")
    assert seen(results) == undisturbed
    assert {path: path.read_text() for path in before} == before  # a finished trial is not run again
    for label in STUDY["methods"]:
        trials = optuna.load_study(
            study_name=f"tiny/{label}", storage=open_journal(tmp_path / "study")
        ).trials
        assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    lines = RunFolder(begun.parent).rounds()
    assert [line["round"] for line in lines] == [1, 2, 3]


def test_a_stopped_study_goes_on(cache, tmp_path, undisturbed, no_pictures, monkeypatch):
    plan, folder = tiny_plan(cache, STUDY), StudyFolder(tmp_path / "study")
    judge, count, stopped = coordinator.Coordinator._judge, [], []

    def stop_in_the_third_trial(self, job, line):
        judge(self, job, line)
        count.append(job)
        if len(set(count)) == 3 and not stopped:
            stopped.append(job)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            while not self._stopped():  # the trial must not end before the signal is seen
                time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(coordinator.Coordinator, "_judge", stop_in_the_third_trial)
        result = run_study(plan, folder, Console(quiet=True))
    assert result.stopped
    results = result.methods
    assert sum(result.count("finished") for result in results.values()) == 2
    assert sum(result.count("running") for result in results.values()) == 1
    assert not finals(folder.path)
    assert seen(finish(plan, folder.path)) == undisturbed
    assert len(finals(folder.path)) == 2


def test_a_trial_is_begun_anew_where_the_cluster_lost_its_driver(
    cache, tmp_path, undisturbed, no_pictures, monkeypatch
):
    original, lost = coordinator.run_or_resume, []

    def losing(config, path, **options):
        if len(lost) < 3:
            lost.append(path)
            raise ClusterError("the driver died")
        return original(config, path, **options)

    monkeypatch.setattr(coordinator, "run_or_resume", losing)
    assert seen(finish(tiny_plan(cache, STUDY), tmp_path / "study")) == undisturbed
    monkeypatch.setattr(coordinator, "run_or_resume", lambda *_, **__: losing_always())
    with pytest.raises(ClusterError, match="again and again"):
        finish(tiny_plan(cache, STUDY), tmp_path / "other")


def losing_always():
    raise ClusterError("again and again")


def test_trials_side_by_side_on_ray_equal_those_one_by_one(cache, tmp_path, undisturbed, start_ray):
    start_ray(2)
    beside, follow = [], coordinator.Coordinator._follow

    def watched(self, job):
        beside.append(len(self._running))
        follow(self, job)

    patch = pytest.MonkeyPatch()
    patch.setattr(coordinator.Coordinator, "_follow", watched)
    try:
        plan = tiny_plan(cache, {**STUDY, "trials": 2}, execution="ray")
        results = finish(plan, tmp_path / "study")
    finally:
        patch.undo()
    # A method has one trial at a time: what it is given depends on its own trials alone.
    assert seen(results) == {label: trials[:2] for label, trials in undisturbed.items()}
    assert max(beside) == 2
