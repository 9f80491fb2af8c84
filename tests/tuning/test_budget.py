"""What a method trains beside its rounds is taken off them, worked by hand and in a real study."""

import math

import pytest

import cluster
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from tests.tuning.studies import finish, tiny_plan
from tuning.budget import rounds_within
from tuning.folder import StudyFolder
from tuning.report import budget_table
from tuning.search import Cost
from tuning.study import load_plan

pytestmark = pytest.mark.usefixtures("no_pictures")


def rounds(*overrides, epochs=1):
    """Rounds of 20 with cohorts of 10 of 100 clients."""
    base = ["rounds=20", "cohort=10", "partition.clients=100", f"local.epochs={epochs}"]
    return rounds_within(resolve("quickstart", [*base, *overrides]))


@pytest.mark.parametrize("method", ["fedavg", "topk", "zerofl", "feddst", "fixed_mask", "sparsyfed", "flash"])
def test_a_method_without_a_stage_has_all_rounds(method):
    assert rounds(f"algorithm.name={method}") == 20


@pytest.mark.parametrize(
    ("override", "epochs", "expected"),
    [
        ("algorithm.warmup_epochs=5", 1, 16),  # 10 clients x 5, and 15 rounds more make 200
        ("algorithm.warmup_epochs=6", 1, 15),
        ("algorithm.warmup_epochs=5", 3, 19),  # 50 + 18 x 30 = 590 of 600: another round would make 620
        ("algorithm.warmup_epochs=1", 3, 20),  # less than its rounds: no round more
        ("algorithm.stage1=sensitivity", 1, 15),  # a stage of 5 clients x 10 epochs
        ("algorithm.stage1=sensitivity algorithm.init_fraction=0.19", 1, 1),  # 190, and one round
    ],
)
def test_rounds_that_a_stage_or_a_warm_up_leaves(override, epochs, expected):
    assert rounds("algorithm.name=flash", *override.split(), epochs=epochs) == expected


def test_a_stage_that_leaves_no_round_is_refused():
    with pytest.raises(
        ConfigError, match="up to round 1 is 210 local epochs of clients, more than the 200 of"
    ):
        rounds("algorithm.name=flash", "algorithm.stage1=sensitivity", "algorithm.init_fraction=0.2")


def test_it_is_refused_before_a_study_starts():
    entry = "study.methods=[topk, {name: flash, stage1: sensitivity, init_epochs: 500}]"
    with pytest.raises(ConfigError, match=r"study\.methods: flash: flash: what it trains up to round 1"):
        load_plan("study-digits", [entry])


def test_in_a_study_every_trial_trains_as_much(cache, tmp_path):
    # 6 rounds of 4 clients: a warm-up of 3 epochs is two rounds more, a stage of 3 clients x 2 epochs 1.5.
    methods = ["topk", {"name": "flash", "warmup_epochs": 3},
               {"name": "flash", "label": "stage", "stage1": "sensitivity", "init_fraction": 0.5,
                "init_epochs": 2, "warmup_epochs": 0}]  # fmt: skip
    plan = tiny_plan(cache, {"methods": methods, "trials": 1, "final_seeds": 1}, rounds=6)
    path = tmp_path / "study"
    results = finish(plan, path)
    folder, spent = StudyFolder(path), {}
    for label, result in results.items():
        (trial,) = result.tried
        paths = [folder.trial(label, 0), folder.final(label, 0, 4)]
        configs = [RunFolder(each).config() for each in paths]
        lines = RunFolder(paths[0]).rounds()
        assert trial.rounds == configs[0].rounds == configs[1].rounds == lines[-1]["round"]
        assert trial.steps == sum(line["clients/steps"] for line in lines)
        assert trial.flops == pytest.approx(lines[-1]["flops/sparse_total"])
        spent[label] = (trial.rounds, trial.client_rounds)
    assert spent == {"topk": (6, 24), "flash": (4, 24), "stage": (4, 22)}
    table = budget_table(plan, results)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert (rows["stage"]["client-rounds"], rows["stage"]["unused"]) == ("22", "2")
    assert rows["flash"]["local steps"] == f"{results['flash'].tried[0].steps:,}"
    assert [note for note in table.notes if "rounds of 6," in note] == [
        "flash: its best configuration has 4 rounds of 6, for this.",
        "stage: its best configuration has 4 rounds of 6, for this.",
    ]


def test_local_steps_by_hand(cache, tmp_path):
    # Each visit takes ceil(n / 8) steps an epoch.
    config = tiny_plan(cache, {"methods": ["topk"]}, rounds=1).contenders["topk"].trial_config({})
    cluster.run(config.model_copy(update={"cohort": 6}), tmp_path / "run")
    (line,) = RunFolder(tmp_path / "run").rounds()
    sizes = Federation.of(config).partition.sizes.tolist()
    assert line["clients/steps"] == sum(math.ceil(size / 8) for size in sizes)
    assert Cost.of(tmp_path / "run").steps == line["clients/steps"]


def test_a_trial_that_never_began_cost_nothing(tmp_path):
    assert Cost.of(tmp_path / "nothing") == Cost(0, 0, 0, 0.0)
