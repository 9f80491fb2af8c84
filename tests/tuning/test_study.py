"""The study file: what every method is tuned on, and one clear line for each mistake."""

import pytest

from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError, load_tree, presets
from tests.tuning.studies import tiny_plan
from tuning.study import load_plan, plan_of

STUDY = """
extends: quickstart
rounds: 4
data: {validation: 0.2}
study:
  methods: [fedavg, sparsyfed, {name: flash, refresh_interval: 3, label: jmwst}]
  trials: 3
  shared: {local.lr: {low: 0.01, high: 1, log: true}}
"""


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY)
    return path


def test_every_method_gets_the_shared_keys_and_its_own(study_file):
    plan = load_plan(study_file)
    assert plan.name == "mine"
    spaces = {label: list(own.space) for label, own in plan.contenders.items()}
    assert spaces == {
        "fedavg": ["local.lr"],
        "sparsyfed": ["algorithm.beta", "local.lr"],
        "jmwst": ["algorithm.warmup_epochs", "local.lr"],
    }
    assert len({repr(own.space["local.lr"]) for own in plan.contenders.values()}) == 1
    assert plan.contenders["sparsyfed"].default == {"algorithm.beta": 1.25, "local.lr": 0.1}
    assert plan.budget == 3 * 4 * 10
    assert plan.final_seeds == [1, 2, 3, 4, 5]
    assert plan.reference == "sparsyfed"


def test_a_trial_is_judged_on_validation_data_and_a_final_run_on_test_data(study_file):
    own = load_plan(study_file).contenders["sparsyfed"]
    trial = own.trial_config({"algorithm.beta": 1.5, "local.lr": 0.3})
    assert (trial.evaluate_on, trial.seed, trial.local.lr) == ("validation", 0, 0.3)
    final = own.final_config({"algorithm.beta": 1.5, "local.lr": 0.3}, 4)
    assert (final.evaluate_on, final.seed, final.data.validation) == ("test", 4, 0.2)


def test_methods_share_everything_but_themselves(study_file):
    trees = [own.config.dump() for own in load_plan(study_file).contenders.values()]
    assert {tree.pop("algorithm")["name"] for tree in trees} == {"fedavg", "sparsyfed", "flash"}
    assert trees[0] == trees[1] == trees[2]


def test_what_is_written_is_the_same_study(study_file, tmp_path):
    plan = load_plan(study_file, ["study.sampler.name=random"])
    plan.write(tmp_path / "study.yaml")
    again = plan_of(load_tree(tmp_path / "study.yaml"), "other")
    assert again == plan
    again.check_continues(plan.dump(), tmp_path)


@pytest.mark.parametrize("name", [n for n, path in presets().items() if "study" in load_tree(path)])
def test_every_preset_is_a_study(name):
    plan = load_plan(name)
    assert {"sparsyfed", "fedavg", "topk", "zerofl", "flash", "feddst", "fixed_mask"} == {
        own.config.algorithm.name for own in plan.contenders.values()
    }
    assert len(plan.final_seeds) == 5
    with pytest.raises(ConfigError, match=f"sparsyfed tune {name}"):
        resolve(name)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("study.methods=[topkk]", "did you mean topk"),
        ("study.methods=[{name: topk, beta: 2}]", "algorithm.beta: topk has no such field"),
        ("study.methods=[topk, topk]", "two entries are called topk"),
        ("study.methods=[{name: topk, label: a/b}]", "label 'a/b'"),
        ("study.methods=[]", "study.methods"),
        ("study.trails=3", "did you mean study.trials"),
        ("study.trials=0", "study.trials"),
        ("study.sampler.name=tpee", "'tpe', 'random' or 'qmc'"),
        ("study.shared={local.lr: {low: 1, high: 0.1}}", "reversed"),
        ("study.objectives=[uplink_bytes]", "study.objectives"),
        ("study.reference=topk", "none of fedavg, sparsyfed, jmwst"),
        ("study.final_seeds=0", "at least one seed"),
        ("study.final_seeds=[0, 1]", "holds 0, the seed of the search"),
        ("study.final_seeds=[3, 3]", "different seeds"),
        ("study.pruner={name: hyperband, min_rounds: 9}", "9 is above rounds 4"),
        ("data.validation=0", "set data.validation=0.1"),
        ("stop_after=2", "set rounds instead"),
        ("execution=inline study.trials_at_once=2", "computes one trial at a time"),
        (
            "study.pruner.name=hyperband study.objectives=[accuracy,uplink_bytes]",
            "hyperband cannot prune a study of two objectives",
        ),
    ],
)
def test_a_bad_study_is_one_line(study_file, override, message):
    overrides = override.split(" study.") if " study." in override else [override]
    overrides = [overrides[0], *(f"study.{rest}" for rest in overrides[1:])]
    with pytest.raises(ConfigError) as raised:
        load_plan(study_file, overrides)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_experiments_are_no_studies():
    with pytest.raises(ConfigError, match="single experiment: sparsyfed run quickstart"):
        load_plan("quickstart")
    with pytest.raises(ConfigError, match="grid: sparsyfed run compare-digits"):
        load_plan("compare-digits")


def test_only_what_cannot_change_a_result_may_differ_when_a_study_goes_on(tmp_path):
    plan = tiny_plan(tmp_path, {"methods": ["topk"], "trials": 2})
    longer = tiny_plan(tmp_path, {"methods": ["topk"], "trials": 3, "trials_at_once": 1}, checkpoint_every=1)
    longer.check_continues(plan.dump(), tmp_path)
    other = tiny_plan(tmp_path, {"methods": ["topk"], "sampler": {"name": "qmc"}}, rounds=5)
    with pytest.raises(ConfigError, match=r"rounds was 3, now 5; study\.sampler\.name was 'tpe', now 'qmc'"):
        other.check_continues(plan.dump(), tmp_path)
