"""``tuning.run`` is what ``sparsyfed tune`` does; ``tuning.objective`` judges and prunes as it does."""

import signal
import threading

import optuna
import pytest
from optuna.trial import TrialState

import cluster
import tuning
from cluster.configuration.trees import ConfigError
from cluster.records.run_folder import RunFolder
from tests.tiny_experiment import tiny_federation
from tests.tuning.studies import tiny_plan, tiny_tree
from tuning.storage import make_sampler, open_journal

pytestmark = pytest.mark.usefixtures("no_pictures")

STUDY = {"methods": ["topk", "zerofl"], "trials": 2, "final_seeds": 2, "sampler": {"name": "random"}}


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_a_study_from_values(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tree = tiny_tree(cache, STUDY)
    result = tuning.run({**tree, "study": {**STUDY, "name": "mine"}}, ["study.trials=3", "rounds=2"])
    assert result.folder == tmp_path / "runs" / "mine"
    assert (result.folder / "report" / "report.md").is_file()
    assert not result.stopped
    assert not result.failures
    assert [len(own.tried) for own in result.methods.values()] == [1, 3]
    assert result.best == {label: own.best.values for label, own in result.methods.items()}
    assert sorted(result.ranking) == ["topk", "zerofl"]
    first, second = (result.scores[label].mean for label in result.ranking)
    assert first >= second
    finals = result.methods[result.ranking[0]].finals.values()
    assert first == pytest.approx(sum(summary["accuracy"] for summary in finals) / 2)
    assert capsys.readouterr().out == ""


def test_values_that_are_no_study(tmp_path):
    with pytest.raises(ConfigError, match="study: missing; the values have rounds, seed"):
        tuning.run({"rounds": 3, "seed": 1})
    with pytest.raises(ConfigError, match=r"neither a file nor a preset.*did you mean study-digits"):
        tuning.run("study-digit")


def test_values_extend_presets_as_files_do():
    config = cluster.resolve({"extends": "quickstart", "rounds": 3}, ["seed=2"])
    assert config.dump() == cluster.resolve("quickstart", ["rounds=3", "seed=2"]).dump()
    with pytest.raises(ConfigError, match="quickstat: neither a file nor a preset"):
        cluster.resolve({"extends": "quickstat"})


# ------------------------------------------------------------------------------------ a loop of one's own


def config_of(tmp_path, **changes):
    return tiny_federation(
        tmp_path, **{"rounds": 3, "data": {"validation": 0.2}, "tracking": {"enabled": False}} | changes
    )


def test_a_trial_is_the_run_that_a_study_would_have_done(cache, tmp_path):
    """The same values, the same rounds, the same value; at first over the method's declared ranges."""
    config = config_of(cache, algorithm={"name": "zerofl"})
    objective = tuning.objective(config, output=tmp_path / "mine")
    plan = tiny_plan(cache, {**STUDY, "methods": ["zerofl"]})
    contender = plan.contenders["zerofl"]
    study = optuna.create_study(
        storage=open_journal(tmp_path), direction="maximize", sampler=make_sampler(plan.section.sampler, 0, 1)
    )
    study.enqueue_trial(contender.default)
    study.optimize(objective, n_trials=2)
    for trial in study.trials:
        assert trial.params.keys() == contender.space.keys()
        folder = RunFolder(tmp_path / "mine" / "zerofl" / f"trial-{trial.number:03d}")
        expected = cluster.run(contender.trial_config(trial.params), tmp_path / f"expected-{trial.number}")
        assert trial.value == expected.summary["val_accuracy"]
        assert folder.config().digest() == RunFolder(expected.folder).config().digest()
        values = {line["round"]: line["val/accuracy"] for line in folder.rounds()}
        assert trial.intermediate_values == values
        assert not any("test/accuracy" in line for line in folder.rounds())
    assert study.trials[0].params == contender.default


def test_what_is_fixed_searched_and_shared(tmp_path):
    config = config_of(tmp_path, algorithm={"name": "zerofl", "mask_ratio": 0.1})
    objective = tuning.objective(
        config,
        fixed=["upload"],
        search={"mask_ratio": {"low": 0.05, "high": 0.2}},
        shared={"local.lr": [0.05, 0.1, 0.2]},
    )
    space = objective._contender.space
    assert {key: each.describe() for key, each in space.items()} == {
        "algorithm.mask_ratio": "0.05 to 0.2",
        "local.lr": "0.05, 0.1, 0.2",
    }
    assert objective._contender.default["algorithm.mask_ratio"] == 0.1
    for changes, message in (
        ({"fixed": ["uplod"]}, "fixed: zerofl has no field uplod; did you mean upload?"),
        ({"search": {"mask_ration": [0.1, 0.2]}}, "did you mean mask_ratio"),
        ({"shared": {"rounds": [1, 2]}}, "study.shared.rounds: not a key that can be tuned"),
    ):
        with pytest.raises(ConfigError) as refused:
            tuning.objective(config, **changes)
        assert message in str(refused.value)
    with pytest.raises(ConfigError, match=r"data\.validation"):
        tuning.objective(tiny_federation(tmp_path))


class PruneAfter(optuna.pruners.BasePruner):
    """Prunes trials with a learning rate above 0.1 once they reported so many rounds."""

    def __init__(self, rounds):
        self.rounds = rounds

    def prune(self, study, trial):
        return trial.params["local.lr"] > 0.1 and trial.last_step >= self.rounds


@pytest.mark.parametrize(("after", "computed"), [(2, 3), (6, 6)])
def test_pruning_as_a_study_does_it(cache, tmp_path, after, computed):
    """After the round that was being computed when it was decided; a trial at its end is not pruned."""
    config = config_of(cache, rounds=6, algorithm={"name": "topk"}, local={"lr": 0.1})
    objective = tuning.objective(config, shared={"local.lr": [0.1, 0.2]}, output=tmp_path / "mine")
    study = optuna.create_study(direction="maximize", pruner=PruneAfter(after))
    for rate in (0.1, 0.2):
        study.enqueue_trial({"local.lr": rate})
    study.optimize(objective, n_trials=2)
    kept, hopeless = study.trials
    assert kept.state == TrialState.COMPLETE
    lines = RunFolder(tmp_path / "mine" / "topk" / "trial-001").rounds()
    assert lines[-1]["round"] == computed
    assert hopeless.state == (TrialState.PRUNED if computed < 6 else TrialState.COMPLETE)
    assert hopeless.user_attrs.get("pruned_at") == (after if computed < 6 else None)
    assert max(hopeless.intermediate_values) == (after if computed < 6 else 6)


def test_a_diverged_trial_is_caught_as_optuna_has_it(cache, tmp_path):
    config = config_of(cache, algorithm={"name": "fedavg"}, local={"lr": 0.1})
    objective = tuning.objective(config, shared={"local.lr": [0.1, 1e30]}, output=tmp_path / "mine")
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({"local.lr": 1e30})
    study.optimize(objective, n_trials=1, catch=cluster.DivergedError)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


def test_a_wrong_direction_is_refused(cache, tmp_path):
    objective = tuning.objective(config_of(cache, algorithm={"name": "topk"}), output=tmp_path / "mine")
    study = optuna.create_study()
    with pytest.raises(ConfigError, match=r'accuracy, of which higher is better: .*direction="maximize"'):
        study.optimize(objective, n_trials=1)
    assert not (tmp_path / "mine").exists()


def test_ctrl_c_ends_the_loop_after_the_round(cache, tmp_path, monkeypatch):
    objective = tuning.objective(config_of(cache, algorithm={"name": "topk"}), output=tmp_path / "mine")

    def interrupt(trial, round_number, value, last):
        if round_number == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr("tuning.own_loop.judge", interrupt)
    study = optuna.create_study(direction="maximize")
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        study.optimize(objective, n_trials=2)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]
