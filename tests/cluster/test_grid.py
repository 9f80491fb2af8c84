"""A grid is many runs in one folder: named, skipped when complete, resumed when not, side by side on Ray."""

import os
import signal

import pytest

from cluster.cli import main
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError, load_tree, presets
from cluster.grid import expand, run_grid, table
from cluster.records.run_folder import RunFolder, comparable

pytestmark = pytest.mark.usefixtures("no_pictures")

BASE = """
extends: quickstart
rounds: 3
cohort: 2
execution: inline
partition: {clients: 4}
local: {epochs: 1}
model: {name: mlp, hidden: [8]}
tracking: {enabled: false}
"""

GRID = f"""{BASE}
grid:
  algorithm: [{{name: fedavg}}, {{name: topk}}, {{name: sparsyfed, beta: 1.5}}]
  seed: [0, 1]
"""

LABELLED = f"""{BASE}
grid:
  method:
    dense: {{algorithm: {{name: fedavg}}}}
    zerofl: {{algorithm: {{name: zerofl, mask_ratio: 0.1}}, local: {{lr: 0.05}}}}
    topk: {{algorithm: {{name: topk}}}}
  algorithm.sparsity: [0.8, 0.9]
"""


@pytest.fixture
def grid_file(tmp_path):
    return written(tmp_path, GRID)


def written(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def quiet(name, config):
    return lambda line: None


def lines(folder):
    return [comparable(line) for line in RunFolder(folder).rounds()]


# ------------------------------------------------------------------------------------------------- axes


def test_every_point_is_a_run_of_its_own_name(grid_file):
    runs = expand(grid_file, ["algorithm.sparsity=0.8"]).runs
    names = ["fedavg-seed0", "fedavg-seed1", "topk-seed0", "topk-seed1"]
    assert list(runs) == [*names, "sparsyfed-beta1.5-seed0", "sparsyfed-beta1.5-seed1"]
    assert runs["topk-seed1"].seed == 1
    assert runs["topk-seed1"].algorithm.options == {"sparsity": 0.8}
    assert runs["fedavg-seed0"].algorithm.options == {}  # a dense method has no sparsity to override


def test_a_single_experiment_is_no_grid():
    assert expand("quickstart") is None


def test_labels_name_pieces_and_a_method_is_varied_by_its_own_hyperparameters_only(tmp_path):
    runs = expand(written(tmp_path, LABELLED)).runs
    assert list(runs) == ["dense", *(f"{m}-sparsity{s}" for m in ("zerofl", "topk") for s in (0.8, 0.9))]
    assert runs["zerofl-sparsity0.8"].algorithm.options == {"sparsity": 0.8, "mask_ratio": 0.1}
    assert runs["zerofl-sparsity0.8"].local.lr == 0.05
    assert runs["topk-sparsity0.9"].local.lr == 0.1
    # The order of the axes is that of the names, and nothing else.
    turned = LABELLED.replace("  algorithm.sparsity: [0.8, 0.9]\n", "").replace(
        "grid:\n", "grid:\n  algorithm.sparsity: [0.8, 0.9]\n"
    )
    assert expand(written(tmp_path, turned)).runs["sparsity0.8-topk"] == runs["topk-sparsity0.8"]


def test_an_override_of_an_axis_narrows_it(tmp_path, grid_file):
    assert list(expand(grid_file, ["seed=7", "algorithm=topk"]).runs) == ["topk-seed7"]
    assert list(expand(grid_file, ["seed=[2,3]", "algorithm=[fedavg]"]).runs) == [
        "fedavg-seed2",
        "fedavg-seed3",
    ]
    path = written(tmp_path, LABELLED, "labelled.yaml")
    assert list(expand(path, ["method=[topk,dense]", "algorithm.sparsity=0.5"]).runs) == [
        "topk-sparsity0.5",
        "dense",
    ]


def test_a_grid_narrowed_to_one_run_is_an_experiment(tmp_path):
    path = written(tmp_path, f"{LABELLED}\nruns_at_once: 2")
    config = resolve(path, ["method=zerofl", "algorithm.sparsity=0.9", "rounds=9"])
    assert (config.algorithm.name, config.rounds) == ("zerofl", 9)
    assert config.algorithm.options == {"sparsity": 0.9, "mask_ratio": 0.1}
    with pytest.raises(
        ConfigError, match=r"a grid of 2 runs: .*narrow it to one by method=\.\.\., algorithm"
    ):
        resolve(path, ["method=topk"])


def test_a_file_extends_several_in_their_order(tmp_path):
    written(tmp_path, "rounds: 7\nlocal: {lr: 0.3}\ngrid: {seed: [0, 1]}\n", "first.yaml")
    written(tmp_path, "rounds: 8\nlocal: {epochs: 2}\n", "second.yaml")
    third = written(
        tmp_path, "extends: [first.yaml, second.yaml]\ngrid: {local.batch_size: [4]}\n", "third.yaml"
    )
    runs = expand(third).runs
    assert list(runs) == ["seed0-batch_size4", "seed1-batch_size4"]
    config = runs["seed1-batch_size4"]
    assert (config.rounds, config.local.lr, config.local.epochs, config.seed) == (8, 0.3, 2, 1)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            GRID,
            ["algorithm.name=topk"],
            r"algorithm.name=topk: the grid itself varies algorithm; write algorithm=",
        ),
        (GRID, ["algorithm.beta=2"], "the grid itself varies algorithm"),
        (LABELLED, ["local.lr=1"], r"the grid itself varies method; .* here local.lr is set by "),
        (LABELLED, ["local={lr: 1}"], "the grid itself varies method"),
        (LABELLED, ["method=zeroflo"], r"method=zeroflo: it has dense, zerofl, topk; did you mean zerofl\?"),
        (f"{BASE}\ngrid: {{seed: 3}}", [], r"grid.seed: expected a list of values .* found 3"),
        (f"{BASE}\ngrid: [1]", [], r"grid: expected axes, found \[1\]"),
        (f"{BASE}\ngrid: {{algorithm: [topk]}}", [], "algorithm: .* found 'topk'; write algorithm.name=topk"),
        (f"{BASE}\ngrid: {{sed: [3]}}", [], r"sed: unknown key; known here: .*; did you mean seed\?"),
        (
            f"{BASE}\ngrid: {{algorithm.bta: [3]}}",
            [],
            r"no method has this .*; did you mean algorithm.beta\?",
        ),
        (f"{BASE}\ngrid: {{rounds: [3, 3.0]}}", [], "rounds3 and rounds3.0 are one and the same run"),
        (f"{BASE}\ngrid: {{local.lr: [1], server.lr: [1, 1]}}", [], None),
        (f"{BASE}\ngrid: {{a: {{x: {{seed: 1}}, 'x ': {{seed: 2}}}}}}", [], None),
        (f"{GRID}\nruns_at_once: 0", [], "runs_at_once: expected a whole number from 1, found 0"),
        (GRID, ["runs_at_once=2"], "runs_at_once: 2 runs side by side need execution=ray"),
    ],
)
def test_a_wrong_grid_names_what_is_wrong(tmp_path, text, overrides, message):
    path = written(tmp_path, text)
    if message is None:
        assert len(expand(path, overrides).runs) >= 1
        return
    with pytest.raises(ConfigError, match=message):
        expand(path, overrides)


def test_two_runs_of_one_name_are_refused(tmp_path):
    path = written(tmp_path, f"{BASE}\ngrid: {{a: {{x y: {{seed: 1}}, x_y: {{seed: 2}}}}}}")
    with pytest.raises(ConfigError, match="two runs are named x_y"):
        expand(path)


def test_two_names_of_one_run_are_refused(tmp_path):
    """A piece goes on top of what the experiment says: without a key of its own it does not undo it."""
    path = tmp_path / "twice.yaml"
    path.write_text(
        "extends: quickstart\nalgorithm: {name: sparsyfed, beta: 1.5}\n"
        "grid:\n  method:\n    steep: {algorithm: {name: sparsyfed, beta: 1.5}}\n"
        "    default: {algorithm: {name: sparsyfed}}\n  seed: [0, 1]\n"
    )
    with pytest.raises(ConfigError, match="steep-seed0 and default-seed0 are one and the same run"):
        expand(path)
    assert len(expand(path, ["method=[default]"]).runs) == 2


@pytest.mark.parametrize("preset", [name for name in presets() if "grid" in load_tree(name)])
def test_the_runs_of_every_preset_differ(preset):
    assert expand(preset).runs


# -------------------------------------------------------------------------------------------------- runs


def test_runs_that_mlflow_would_show_under_one_name_have_the_grids(tmp_path):
    (tmp_path / "zerofl.yaml").write_text(
        "extends: quickstart\n"
        "grid:\n"
        "  method:\n"
        "    fedavg: {algorithm: {name: fedavg}}\n"
        "    zerofl: {algorithm: {name: zerofl}}\n"
        "    equal: {algorithm: {name: zerofl, mask_ratio: 0.0}}\n"
    )
    own = expand(tmp_path / "zerofl.yaml").runs
    assert {name: config.tracking.run_name for name, config in own.items()} == {
        "fedavg": None,
        "zerofl": "zerofl",
        "equal": "equal",
    }
    alone = expand(tmp_path / "zerofl.yaml", ["method=[fedavg,equal]"]).runs
    assert {config.tracking.run_name for config in alone.values()} == {None}
    assert [config.digest() for config in alone.values()] == [own[name].digest() for name in alone]
    mine = expand(tmp_path / "zerofl.yaml", ["tracking.run_name=mine"]).runs
    assert {config.tracking.run_name for config in mine.values()} == {"mine"}


def test_a_grid_run_again_resumes_what_is_not_complete(grid_file, tmp_path):
    short = run_grid(expand(grid_file, ["stop_after=1"]), tmp_path / "out", started=quiet)
    assert [result.summary["rounds"] for result in short.results.values()] == [1] * 6
    begun = []

    def started(name, config):
        begun.append(name)
        return lambda line: None

    whole = run_grid(expand(grid_file), tmp_path / "out", started=started).results
    assert len(begun) == 6
    assert all(result.summary["complete"] for result in whole.values())
    run_grid(expand(grid_file), tmp_path / "out", started=started)
    assert len(begun) == 6  # nothing was computed again
    rows = table(whole)
    assert [row[0] for row in rows[1:]] == list(whole)
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 8
    assert len(RunFolder(tmp_path / "out" / "topk-seed0").rounds()) == 3


def test_a_folder_of_another_grid_is_refused(grid_file, tmp_path):
    run_grid(expand(grid_file, ["stop_after=1", "seed=0"]), tmp_path / "out", started=quiet)
    with pytest.raises(ConfigError, match="another configuration"):
        run_grid(expand(grid_file, ["local.lr=0.01"]), tmp_path / "out", started=quiet)


def test_ctrl_c_ends_the_run_in_progress_and_begins_no_other(grid_file, tmp_path):
    def started(name, config):
        return lambda line: os.kill(os.getpid(), signal.SIGINT) if line["round"] == 1 else None

    outcome = run_grid(expand(grid_file), tmp_path / "out", started=started)
    assert list(outcome.results) == ["fedavg-seed0"]
    assert not outcome.results["fedavg-seed0"].ended


def test_a_run_that_fails_does_not_take_the_others_with_it(tmp_path, capsys):
    more = "max_update_norm: 1000.0\ngrid: {local.lr: [1.0e+20, 0.1]}"
    path = written(tmp_path, f"{BASE.replace('rounds: 3', 'rounds: 4')}\n{more}")
    command = ["run", str(path), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "[1/2] lr1e_20  failed" in said.out
    assert "[2/2] lr0.1  4 rounds" in said.out
    assert "error: lr1e_20: every update was refused in 3 rounds in a row" in said.err
    table_rows = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in table_rows] == ["run", "lr0.1"]
    assert main(command) == 1
    assert "2 runs, 1 complete before" in capsys.readouterr().out


def test_two_grids_share_a_storage(tmp_path):
    more = f"checkpoint_uri: file://{tmp_path}/shared\ngrid: {{seed: [0, 1]}}"
    path = written(tmp_path, f"{BASE.replace('rounds: 3', 'rounds: 1')}\n{more}")
    for name in ("one", "two"):
        assert not run_grid(expand(path), tmp_path / name, started=quiet).failures
    copies = {
        str(found.parent.relative_to(tmp_path / "shared"))
        for found in tmp_path.rglob("shared/*/*/result.json")
    }
    assert copies == {"one/seed0", "one/seed1", "two/seed0", "two/seed1"}


def test_a_partition_is_varied_by_its_own_keys_only(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "extends: quickstart\n"
        "grid: {partition.name: [lda, iid, shards], partition.alpha: [0.1, 1],\n"
        "  model.name: [mlp, small_cnn]}\n"
    )
    runs = expand(file, ["partition.shards_per_client=3", "model.norm=batch", "seed=4"]).runs
    assert list(runs) == [
        "lda-alpha0.1-mlp", "lda-alpha0.1-small_cnn", "lda-alpha1-mlp", "lda-alpha1-small_cnn",
        "iid-mlp", "iid-small_cnn", "shards-mlp", "shards-small_cnn",
    ]  # fmt: skip
    assert {name: config.partition.options for name, config in runs.items() if "mlp" in name} == {
        "lda-alpha0.1-mlp": {"alpha": 0.1, "order": "clients"},
        "lda-alpha1-mlp": {"alpha": 1.0, "order": "clients"},
        "iid-mlp": {},
        "shards-mlp": {"shards_per_client": 3},
    }
    assert runs["iid-small_cnn"].model.options["norm"] == "batch"
    assert {config.seed for config in runs.values()} == {4}
    for wrong, says in (
        ("partition.samples_per_client=3", "per_client=3: no partition of this grid has this key"),
        ("partition.alhpa=3", "no partition of this grid has this key; did you mean partition.alpha?"),
        ("model.widht=3", "no model of this grid has this key; did you mean model.width?"),
    ):
        with pytest.raises(ConfigError) as refused:
            expand(file, [wrong])
        assert says in str(refused.value)


def test_an_override_of_a_hyperparameter_reaches_every_method_that_has_it():
    """The pieces that name another method than the base's must not drop it."""
    runs = expand("paper-methods", ["algorithm.guard_layers=true", "algorithm.sparsity=0.8"]).runs
    found = {config.algorithm.name: config.algorithm.options for config in runs.values()}
    guarded = {name for name, options in found.items() if options.get("guard_layers")}
    assert guarded == {"topk", "flash", "sparsyfed"}
    assert {name: options.get("sparsity") for name, options in found.items()} == {
        "fedavg": None, "topk": 0.8, "zerofl": 0.8, "flash": 0.8, "sparsyfed": 0.8,
    }  # fmt: skip
    [only] = expand("paper-methods", ["method=topk", "algorithm.guard_layers=true"]).runs.values()
    assert only.algorithm.options == {"sparsity": 0.95, "guard_layers": True}
    with pytest.raises(
        ConfigError, match=r"algorithm.beta=2: no method of this grid has this hyperparameter"
    ):
        expand("paper-methods", ["method=topk", "algorithm.beta=2"])
    with pytest.raises(ConfigError, match=r"algorithm.betta=2: .*; did you mean algorithm.beta\?"):
        expand("paper-methods", ["algorithm.betta=2"])
