"""Every preset loads, resolves and runs two rounds on a tiny stand-in of its data set."""

import numpy as np
import pytest

from cluster.configuration.config import resolve
from cluster.configuration.trees import load_tree, presets
from cluster.execution import run
from cluster.grid import expand
from tests.cluster import workloads
from tests.cluster.workloads import import_timm

pytestmark = pytest.mark.usefixtures("no_pictures")

STAND_INS = {
    "uoft-cs/cifar10": workloads.cifar10,
    "uoft-cs/cifar100": workloads.cifar100,
    "zalando-datasets/fashion_mnist": workloads.fashion_mnist,
    "google/speech_commands": workloads.speech_commands,
    "shakespeare": workloads.shakespeare,
    "flwrlabs/femnist": workloads.femnist,
    "cub-200-2011": workloads.birds,
}
NARROW = {
    "linear": [],
    "resnet18": ["model.width=4", "model.groups=2"],
    "transformer": ["model.width=16", "model.layers=1"],
    "timm": ["model.config={embed_dims: [8,8,16,16], depths: [1,1,1,1], num_heads: [1,1,2,2]}"],
    "mlp": ["model.hidden=[100]"],
    "small_cnn": ["model.channels=[8,16]", "model.hidden=16", "model.groups=8"],  # eight bases divide it
}


def narrowed(name):
    """Overrides that make a preset small: its model, clients and rounds, never what it is about."""
    tree = load_tree(name)
    if tree["rounds"] == 1:  # of all clients
        return [
            "execution=inline",
            "tracking.enabled=false",
            "local.epochs=1",
            *NARROW[tree["model"]["name"]],
        ]
    axes = tree.get("grid", {})
    krum = "attackers" in str(axes)  # three, and five of the rest
    clients = "partition.clients=" + ("[2,3,4]" if "partition.clients" in axes else "10" if krum else "8")
    cohort = "cohort=" + ("[1,2,3]" if "cohort" in axes else "10" if krum else "2")
    model = NARROW[tree["model"]["name"]]
    rest = ["stop_after=2", "local.epochs=1", "execution=inline", "tracking.enabled=false"]
    rest += ["shift.round=2"] * ("shift" in tree)
    rest += ["algorithm.draw_rounds=1"] * ("robust_bird" in str(axes))
    return ["rounds=2", clients, cohort, *model, *rest]


def points(name):
    """The configurations of a preset, narrowed, by the name of the run."""
    grid = expand(name, narrowed(name))
    return {"run": resolve(name, narrowed(name))} if grid is None else grid.runs


def plan():
    """Of every preset the run with most that no chosen run has shown yet, until all has been shown."""
    shown, chosen = set(), []
    experiments = [name for name in presets() if "study" not in load_tree(name)]  # studies: tests/tuning
    for name in experiments:
        sets = {
            run: {(config.data.name, key, str(value)) for key, value in config.flat().items()}
            for run, config in points(name).items()
        }
        while True:
            best = max(sets, key=lambda run: len(sets[run] - shown))
            if chosen and chosen[-1][0] == name and not sets[best] - shown:
                break
            chosen.append((name, best))
            shown |= sets[best]
    return chosen


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of parquet files of each data set, made when it is first asked for."""
    made = {}

    def folder(data):
        if data not in made:
            made[data] = STAND_INS[data](tmp_path_factory.mktemp("stand-in"))
        return made[data]

    return folder


@pytest.mark.parametrize(("name", "point"), plan(), ids=lambda value: value)
def test_a_preset_runs_two_rounds(name, point, folders, cache, tmp_path):
    tree = points(name)[point].dump()
    if tree["model"]["name"] == "timm":
        import_timm()
    if tree["privacy"]["dp"]["clip"]:
        pytest.importorskip("dp_accounting", reason="epsilon is composed by dp-accounting, the extra dp")
    tree["data"]["cache"] = str(cache)
    if tree["data"]["name"] in STAND_INS:
        tree["data"]["path"] = str(folders(tree["data"]["name"]))
        if "[" in tree["data"]["test_split"]:  # parts of a split are the hub's
            tree["data"] |= {"train_split": "train", "test_split": "test"}
    result = run(resolve(tree), tmp_path / "run")
    lines, method = result.rounds, resolve(tree).method
    assert lines.index.tolist() == list(range(method.first_round, 1 + min(2, tree["rounds"])))
    assert np.isfinite(lines["train/loss"]).all()
    if tree["objective"]["name"] == "language_model":
        assert 1 < lines["test/perplexity"].iloc[-1] < 1000
    elif tree["objective"]["name"] == "regression":
        assert lines["test/rmse"].iloc[-1] < (200 if tree["data"]["name"] == "diabetes" else 20)
    else:
        assert 0 <= lines["test/accuracy"].iloc[-1] <= 1
    more = ("zerofl", "fedht", "pfedgate")  # they send more than 1 - s, or whole blocks
    if method.sparsity and not tree["devices"]["tiers"] and method.name not in more:
        assert lines["sparsity/upload"].iloc[-1] == pytest.approx(method.sparsity, abs=1e-3)


def test_the_published_setting():
    """What the authors' runs had in common, in one run of each data set."""
    for name, rounds, data in (
        ("paper-cifar10", 700, "uoft-cs/cifar10"),
        ("paper-cifar100", 700, "uoft-cs/cifar100"),
        ("paper-speech", 500, "google/speech_commands"),
    ):
        config = resolve(name)
        assert (config.rounds, config.cohort, config.partition.clients) == (rounds, 10, 100)
        assert (config.partition.name, config.partition.seed, config.data.name) == ("lda", 1337, data)
        assert config.data.validation == 0  # so that clients have 500 samples
        local = config.local
        assert (local.epochs, local.batch_size, local.weight_decay) == (1, 16, 1e-3)
        assert config.model.name == "resnet18"
        assert config.method.min_activation_density == 0.01


def test_the_published_runs_of_ssfl():
    ten, hundred = resolve("paper-ssfl"), resolve("paper-ssfl-cifar100")
    # From round 1 on .998 a round; .0135 at the end.
    for number in (1, 2, 500, 999):
        assert ten.learning_rate(number) == pytest.approx(0.1 * 0.998**number, rel=1e-12)
    assert (ten.method.sparsity, ten.cohort, ten.partition.clients, ten.seed) == (0.5, 10, 100, 550)
    assert (ten.local.clip_norm, ten.local.augment.crop, ten.local.augment.flip) == (10, 4, True)
    assert {hundred.learning_rate(number) for number in (1, 999)} == {0.1}
    assert (hundred.local.epochs, hundred.local.batch_size) == (10, 128)
    assert hundred.local.optimizer.options["momentum"] == 0.9
    assert hundred.partition == ten.partition


def test_the_published_learning_rates():
    for name in ("paper-cifar10", "paper-cifar100"):
        config = resolve(name)
        assert (config.local.lr, config.local.lr_final, config.local.lr_horizon) == (0.5, 0.01, 500)
        # .01 in round 500, and .5 * .02^1.4 in round 700.
        assert config.learning_rate(500) == pytest.approx(0.01)
        assert config.learning_rate(700) == pytest.approx(0.00209, abs=1e-5)
    starts = {
        config.algorithm.name: (config.local.lr, config.local.lr_final, config.data.test_split)
        for config in expand("paper-accuracy-speech").runs.values()
    }
    assert starts == {
        name: (0.1 if name == "sparsyfed" else 0.5, 0.001, "validation")
        for name in ("fedavg", "topk", "zerofl", "flash", "sparsyfed")
    }


def test_zerofl_sends_as_much_as_the_others():
    for name in ("paper-methods", "paper-laptop", "paper-accuracy"):
        found = [c for c in expand(name).runs.values() if c.algorithm.name == "zerofl"]
        assert {c.method.mask_ratio for c in found} == {0.0}
        assert {c.method.threshold for c in found} == {"first_batch_conv"}
    for name in ("compare-digits", "compare-fashion-mnist"):
        ratios = [c.method.mask_ratio for c in expand(name).runs.values() if "zerofl" in c.algorithm.name]
        assert set(ratios) == {0.0, 0.2}


def test_unequal_budgets_cut_what_they_receive():
    for label, config in expand("paper-tiers").runs.items():
        unequal = "unequal" in label
        assert config.method.cut_received == unequal
        assert config.sampler.name == ("stratified" if unequal else "uniform")


def test_the_search_of_beta_and_of_exponents():
    betas = {config.method.beta for config in expand("paper-beta").runs.values()}
    assert betas == {1.0, 1.001, 1.125, 1.25, 1.375, 2.0, 2.75, 4.0}
    assert {(c.rounds, c.partition.alpha) for c in expand("paper-beta").runs.values()} == {(500, 1.0)}
    exponents = {(c.method.exponent, c.method.spectral_mean) for c in expand("paper-ablation").runs.values()}
    assert exponents == {("constant", "entries"), ("spectral", "entries"), ("spectral", "nonzeros")}


def test_the_laptops_runs():
    runs = expand("paper-laptop").runs
    assert len(runs) == 5 * 3
    one = runs["sparsyfed-seed2"]
    assert (one.rounds, one.cohort, one.model.options["width"], one.model.options["norm"]) == (
        20,
        5,
        8,
        "batch",
    )
    assert (one.partition.alpha, one.partition_seed, one.local.lr_horizon) == (1, 2, 500)
    assert {c.partition_seed for c in runs.values()} == {0, 1, 2}


def test_every_table_has_its_grid():
    for name in ("paper-accuracy", "paper-accuracy-cifar100", "paper-accuracy-speech"):
        runs = expand(name).runs
        # Four sparse methods at five sparsities and the dense one, three alphas, three seeds.
        assert len(runs) == (4 * 5 + 1) * 3 * 3
        assert {config.partition.alpha for config in runs.values()} == {1000, 1, 0.1}
        assert {c.algorithm.options.get("sparsity") for c in runs.values()} == {
            None,
            0.9,
            0.95,
            0.99,
            0.995,
            0.999,
        }
    assert len({config.digest() for config in expand("paper-ablation").runs.values()}) == 4 * 2 * 2 * 3
    assert {c.data.name for c in expand("paper-accuracy-speech").runs.values()} == {"google/speech_commands"}


def test_methods_differ_in_nothing_but_their_method():
    runs = expand("paper-methods").runs
    flat = [{k: v for k, v in c.flat().items() if not k.startswith("algorithm.")} for c in runs.values()]
    assert all(one == flat[0] for one in flat)
    assert {config.algorithm.name for config in runs.values()} == {
        "fedavg",
        "topk",
        "zerofl",
        "flash",
        "sparsyfed",
    }
