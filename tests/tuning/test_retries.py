"""What fails for no fault of the experiment is tried once more; what fails again is listed."""

import pytest
import yaml

from cluster import cli, grid
from cluster.disk import DiskError
from cluster.exchange import ActorLostError, ClientError
from cluster.records.run_folder import RunFolder, comparable
from cluster.references import UserError, may_pass, reason_of
from cluster.rounds.setbacks import DivergedError
from tests.tiny_experiment import tiny_federation
from tests.tuning.studies import finish, seen, tiny_plan, tiny_tree
from tuning import coordinator

pytestmark = pytest.mark.usefixtures("no_pictures")

STUDY = {
    "methods": ["fedavg", "sparsyfed"],
    "trials": 2,
    "final_seeds": 1,
    "sampler": {"name": "random"},
    "shared": {"local.lr": [0.05, 0.1, 0.2]},
}


class Breaking:
    """In place of ``run_or_resume``: some runs, by their folder, break from round 2 on so many times."""

    def __init__(self, monkeypatch, where, error, **times):
        self._original, self._error, self._times, self.begun = where.run_or_resume, error, times, []
        monkeypatch.setattr(where, "run_or_resume", self)

    def __call__(self, config, path, *, progress, should_stop):
        name = path.name if path.name in self._times else f"{path.parent.name}_{path.name.replace('-', '_')}"
        self.begun.append(name)
        left = self._times.get(name, 0)

        def on_line(line):
            progress(line)
            if left and line["round"] >= 2:
                self._times[name] -= 1
                raise self._error

        return self._original(config, path, progress=on_line, should_stop=should_stop)


@pytest.fixture
def grid_file(tmp_path):
    changes = {"rounds": 3, "checkpoint_every": 1, "tracking": {"enabled": False}}
    tree = tiny_federation(tmp_path, **changes).dump()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**tree, "grid": {"seed": [0, 1]}}))
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize(
    ("error", "passes", "reason"),
    [
        (OSError(5, "lost"), True, "OSError: [Errno 5] lost"),
        (RuntimeError("a\nb"), True, "RuntimeError: a"),
        (KeyError(), True, "KeyError"),
        (DiskError("x: No space left on device"), True, "x: No space left on device"),
        (ActorLostError("client 3 failed"), True, "client 3 failed"),
        (ClientError("client 3 failed\nTraceback"), False, "client 3 failed"),
        (DivergedError("every update was refused"), False, "every update was refused"),
        (UserError("rounds: found x"), False, "rounds: found x"),
    ],
)
def test_what_may_pass(error, passes, reason):
    assert may_pass(error) is passes
    assert reason_of(error) == reason
    wrapped = RuntimeError("by Ray")
    wrapped.cause = error
    assert may_pass(wrapped) is passes
    assert reason_of(wrapped) == reason


def test_a_cell_that_breaks_once_goes_on_from_its_checkpoint(grid_file, tmp_path, monkeypatch, capsys):
    assert cli.main(["run", str(grid_file), "--output", str(tmp_path / "whole")]) == 0
    runs = Breaking(monkeypatch, grid, OSError(5, "the disk went away"), seed0=1)
    assert cli.main(["run", str(grid_file), "--output", str(tmp_path / "out")]) == 0
    assert [name[-5:] for name in runs.begun] == ["seed0", "seed0", "seed1"]
    for seed in range(2):
        one, other = (RunFolder(tmp_path / kind / f"seed{seed}") for kind in ("whole", "out"))
        assert list(map(comparable, one.rounds())) == list(map(comparable, other.rounds()))
        assert one.model_file.read_bytes() == other.model_file.read_bytes()


def test_a_cell_that_breaks_twice_is_listed_and_the_rest_goes_on(grid_file, tmp_path, monkeypatch, capsys):
    command = ["run", str(grid_file), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        runs = Breaking(patch, grid, RuntimeError("a part broke"), seed0=9)
        assert cli.main(command) == 1
    assert [name[-5:] for name in runs.begun] == ["seed0", "seed0", "seed1"]
    said = capsys.readouterr()
    assert "error: seed0: RuntimeError: a part broke" in said.err
    assert "[2/2]" in said.out
    assert "the same command runs what failed again, and nothing else" in said.err
    assert cli.main(command) == 0


def test_what_the_same_run_would_run_into_again_is_not_tried_again(grid_file, tmp_path, monkeypatch, capsys):
    runs = Breaking(monkeypatch, grid, DivergedError("every update was refused"), seed0=9)
    assert cli.main(["run", str(grid_file), "--output", str(tmp_path / "out")]) == 1
    assert [name[-5:] for name in runs.begun] == ["seed0", "seed1"]
    assert "error: seed0: every update was refused" in capsys.readouterr().err


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    """What a study in which nothing breaks comes to."""
    patch = pytest.MonkeyPatch()
    for name in ("picture", "curves", "population"):
        patch.setattr(f"cluster.records.outputs.{name}", lambda *_, **__: None)
    yield seen(
        finish(tiny_plan(cache, STUDY, checkpoint_every=1), tmp_path_factory.mktemp("whole") / "study")
    )
    patch.undo()


def test_a_study_in_which_runs_break_once_is_that_in_which_none_does(
    cache, tmp_path, undisturbed, monkeypatch
):
    runs = Breaking(
        monkeypatch, coordinator, OSError(5, "x"), sparsyfed_trial_001=1, fedavg_trial_000_seed_4=1
    )
    plan = tiny_plan(cache, STUDY, checkpoint_every=1)
    assert seen(finish(plan, tmp_path / "study")) == undisturbed
    assert runs.begun.count("sparsyfed_trial_001") == 2
    assert runs.begun.count("sparsyfed_trial_000") == 1


def test_runs_of_a_study_that_break_twice_are_listed(cache, tmp_path, undisturbed, monkeypatch, capsys):
    """A trial is told as failed and never run again, as after a kill; a final run is what is left to do."""
    tree = tiny_tree(cache, STUDY, checkpoint_every=1)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    best = max(undisturbed["sparsyfed"], key=lambda trial: trial[3])[0]
    final = f"sparsyfed_trial_{best:03d}_seed_4"
    broken = {"fedavg_trial_001": 9, final: 9}
    with monkeypatch.context() as patch:
        runs = Breaking(patch, coordinator, OSError(5, "the disk went away"), **broken)
        assert cli.main(["tune", "tiny.yaml"]) == 1
    assert {name: runs.begun.count(name) for name in broken} == dict.fromkeys(broken, 2)
    said = capsys.readouterr()
    reason = "OSError: [Errno 5] the disk went away"
    assert f"error: fedavg-trial-001: {reason}" in said.err
    assert f"error: sparsyfed-final-s4: {reason}" in said.err
    assert "go on     sparsyfed tune tiny.yaml" in said.out
    assert f"fedavg, trial 1 failed: {reason}" in (tmp_path / "runs/tiny/report/budget.md").read_text()

    with monkeypatch.context() as patch:
        runs = Breaking(patch, coordinator, OSError())
        assert cli.main(["tune", "tiny.yaml"]) == 1  # the trial is still missing
    assert runs.begun == [final]
    said = capsys.readouterr()
    assert f"error: fedavg-trial-001: {reason}" in said.err
    assert "sparsyfed-final-s4" not in said.err
    assert "go on" not in said.out


def test_a_lost_trial_is_no_bad_one(cache, tmp_path, monkeypatch):
    """It counts as tried, and not as a configuration that is worth nothing; a diverged one does."""
    Breaking(monkeypatch, coordinator, OSError(5, "x"), fedavg_trial_001=9)
    result = finish(tiny_plan(cache, STUDY | {"methods": ["fedavg"], "trials": 3}), tmp_path / "study")[
        "fedavg"
    ]
    assert [trial.state for trial in result.tried] == ["finished", "failed", "finished"]
    assert [trial.lost for trial in result.tried] == [False, True, False]
    assert len(result.curve[1]) == 2
    values = [trial.value for trial in result.tried if trial.value is not None]
    assert result.curve[1] == pytest.approx([sum(values) / 2, max(values)])


def test_what_no_trial_can_do_ends_the_study_before_all_are_spent(cache, tmp_path, monkeypatch):
    """With one loss allowed in a row here; once it is mended, the study goes on."""
    monkeypatch.setattr(coordinator, "LOST_IN_A_ROW", 1)
    plan = tiny_plan(cache, STUDY, checkpoint_every=1)
    every = {f"{method}_trial_{number:03d}": 9 for method in STUDY["methods"] for number in range(2)}
    with monkeypatch.context() as patch:
        runs = Breaking(patch, coordinator, TypeError("their own mistake"), **every)
        with pytest.raises(TypeError, match="their own mistake"):
            finish(plan, tmp_path / "study")
    assert len(set(runs.begun)) == 2
    finished = finish(plan, tmp_path / "study")
    assert [trial.state for result in finished.values() for trial in result.tried].count("failed") == 1
