"""One typed tree from presets, files and overrides; a mistake is a line that says what to write."""

import math

import pytest
import yaml

from algorithms import registry
from cluster.configuration.choices import fields
from cluster.configuration.config import resolve, validate
from cluster.configuration.trees import ConfigError, apply_overrides, load_tree, presets
from cluster.federation import Federation
from cluster.simulation.shift import partition_of


def message(overrides, source="quickstart"):
    with pytest.raises(ConfigError) as raised:
        resolve(source, overrides)
    return str(raised.value)


# ------------------------------------------------------------------------------------- presets and files


EXPERIMENTS = [
    name for name, path in presets().items() if not {"grid", "study"} & load_tree(path).keys()
]  # the rest: comparisons and studies


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_preset_loads(name):
    config = resolve(name)
    assert resolve(presets()[name]) == config
    assert validate(config.dump()) == config


def test_the_default_is_the_quickstart():
    assert resolve() == resolve("quickstart")


def test_an_unknown_preset_names_the_nearest():
    assert "did you mean quickstart?" in message([], "quikstart")
    assert "presets: " in message([], "zzz")


def test_a_file_extends_a_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: quickstart\nrounds: 7\nlocal: {lr: 0.5}\n")
    config, base = resolve(file), resolve("quickstart")
    assert (config.rounds, config.local.lr) == (7, 0.5)
    assert config.local.epochs == base.local.epochs == 5
    assert config.algorithm == base.algorithm


def test_extends_finds_a_file_beside_its_own(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("rounds: 3\ncohort: 4\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ncohort: 5\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = resolve(tmp_path / "mine.yaml")
    assert (config.rounds, config.cohort) == (3, 5)


def test_extends_switches_the_method(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: quickstart\nalgorithm: {name: topk}\n")
    assert resolve(tmp_path / "mine.yaml").algorithm.options == {"sparsity": 0.9}


def test_files_that_extend_each_other_end(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert "extends itself" in message([], tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "found"), [("rounds: [", "not a YAML file"), ("- 1", "expected keys and values")]
)
def test_a_file_that_is_no_configuration(tmp_path, text, found):
    (tmp_path / "bad.yaml").write_text(text)
    text = message([], tmp_path / "bad.yaml")
    assert found in text
    assert "bad.yaml" in text


@pytest.mark.parametrize(("key", "value"), [("data.columns", "age"), ("callbacks", "my:Class")])
def test_what_is_a_list_says_so(key, value):
    assert message([f"{key}={value}"]) == f"{key}: a list, found '{value}'; write {key}=[{value}]"


def test_a_dump_is_read_back_the_same():
    config = resolve("quickstart", ["algorithm.min_activation_density=1e-7", "server.name=fedadam"])
    text = yaml.safe_dump(config.dump(), sort_keys=False)
    assert validate(yaml.safe_load(text)) == config


# ------------------------------------------------------------------------------------------- overrides


def test_overrides_reach_every_level():
    config = resolve(
        "quickstart",
        ["rounds=3", "local.lr=0.25", "algorithm.beta=2", "tracking.tags.who=me", "local.lr_final=0.01"],
    )
    assert (config.rounds, config.local.lr, config.local.lr_final) == (3, 0.25, 0.01)
    assert config.method.beta == 2.0
    assert isinstance(config.method.beta, float)
    assert config.tracking.tags == {"who": "me"}


def test_null_unsets():
    assert resolve("quickstart", ["stop_after=3", "stop_after=null"]).stop_after is None


def test_the_source_is_left_as_it_was():
    tree = {"local": {"lr": 0.1}}
    apply_overrides(tree, ["local.lr=0.2", "rounds=3"])
    assert tree == {"local": {"lr": 0.1}}


# YAML 1.1, which pyyaml reads, takes 1e-3 (no dot, no sign) as text.
@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 0.001), ("1E-3", 0.001), ("1.5e2", 150.0), (".5e-1", 0.05), ("-2e+1", -20.0)],
)
def test_numbers_in_scientific_notation(tmp_path, text, number):
    tree = apply_overrides({}, [f"local.lr={text}"])
    assert tree["local"]["lr"] == number
    (tmp_path / "a.yaml").write_text(f"local: {{lr: {text}}}\nmodel: {{channels: [{text}]}}\n")
    assert load_tree(tmp_path / "a.yaml") == {"local": {"lr": number}, "model": {"channels": [number]}}


def test_texts_that_look_like_numbers_stay():
    assert apply_overrides({}, ["data.name=8els", "a=e3", "b=1e"]) == {
        "data": {"name": "8els"},
        "a": "e3",
        "b": "1e",
    }


@pytest.mark.parametrize("method", registry())
def test_a_new_method_keeps_sparsity_alone(method):
    one_round = ["rounds=1", "cohort=30"] * (method == "ma_echo")
    config = resolve("quickstart", ["algorithm.beta=2", *one_round])
    options = validate(apply_overrides(config.dump(), [f"algorithm.name={method}"])).algorithm.options
    if method == "sparsyfed":
        assert options == {"sparsity": 0.9, "beta": 2}  # the same choice again: nothing falls away
    else:
        # A dense method has no target; every other one is compared at the same.
        assert options == ({"sparsity": 0.9} if "sparsity" in fields("algorithm", method) else {})


def test_a_name_and_its_fields_in_either_order():
    for overrides in (
        ["algorithm.name=topk", "algorithm.sparsity=0.5"],
        ["algorithm.sparsity=0.5", "algorithm.name=topk"],
    ):
        assert resolve("quickstart", overrides).algorithm.options == {"sparsity": 0.5}


def test_a_method_of_ones_own_keeps_sparsity():
    options = resolve("quickstart", ["algorithm.name=tests.example_method:RandomK"]).algorithm.options
    assert options == {"sparsity": 0.9}


def test_a_new_model_or_server_drops_all_fields():
    config = resolve("quickstart", ["server.name=fedadam", "server.tau=0.1", "model.name=mlp"])
    assert config.model.options == {}
    again = validate(apply_overrides(config.dump(), ["server.name=fedyogi"]))
    assert again.server.options == {}


def test_a_new_partition_or_data_set_keeps_what_all_share():
    tree = resolve(
        "quickstart", ["data.validation=0.1", "data.path=x", "data.name=y", "partition.seed=3"]
    ).dump()
    tree = apply_overrides(tree, ["data.name=digits", "partition.name=iid"])
    config = validate(tree)
    assert (config.data.validation, config.data.path) == (0.1, None)
    assert (config.partition.clients, config.partition.seed, config.partition.options) == (30, 3, {})


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # unknown keys, at every level
        ("rouds=3", ["rouds: unknown key", "did you mean rounds?"]),
        ("locl.lr=3", ["locl: unknown key", "did you mean local?"]),
        ("local.lrr=3", ["local.lrr: unknown key", "did you mean local.lr?", "epochs, batch_size, lr"]),
        ("wire.uplnk=int8", ["wire.uplnk", "did you mean wire.uplink?"]),
        ("tracking.register=it's", ["tracking.register: String should match pattern", 'found "it\'s"']),
        ("tracking.tag.a=b", ["tracking.tag: unknown key", "did you mean tracking.tags?"]),
        (
            "algorithm.betta=2",
            ["algorithm.betta: sparsyfed has no such field", "did you mean beta?", "sparsity, beta"],
        ),
        ("server.momentun=0.9", ["server.momentun: fedavg has no such field", "did you mean momentum?"]),
        # unknown names
        (
            "algorithm.name=sparsifed",
            ["algorithm.name: 'sparsifed' is unknown", "did you mean sparsyfed?", "topk"],
        ),
        ("server.name=adam", ["server.name: 'adam' is unknown", "did you mean fedadam?", "fedyogi"]),
        ("partition.name=ldaa", ["partition.name: 'ldaa' is unknown", "dirichlet", "did you mean lda?"]),
        ("wire.downlink=int4", ["wire.downlink", "'int8'", "found 'int4'"]),
        ("algorithm.exponent=spectrl", ["algorithm.exponent: 'spectrl'", "did you mean spectral?"]),
        (
            "algorithm.name=no_such_module:Method",
            ["algorithm.name = 'no_such_module:Method': there is no module"],
        ),
        (
            "algorithm.name=tests.example_method:RandomX",
            ["has no 'RandomX'", "did you mean RandomK?"],
        ),
        # wrong types
        ("rounds=many", ["rounds", "integer", "found 'many'"]),
        ("rounds=1.5", ["rounds", "integer", "found 1.5"]),
        ("local.lr=fast", ["local.lr", "number", "found 'fast'"]),
        ("algorithm.beta=steep", ["algorithm.beta: expected float, found 'steep'"]),
        ("algorithm.activation_pruning=1", ["algorithm.activation_pruning: expected bool, found 1"]),
        ("algorithm.plain_layers=3", ["algorithm.plain_layers: expected a list of name patterns, found 3"]),
        ("algorithm=topk", ["algorithm: a section", "found 'topk'", "write algorithm.name=topk"]),
        ("local=3", ["local: a section", "found 3"]),
        ("local.lr.x=3", ["local.lr", "number"]),
        # ranges
        ("rounds=0", ["rounds", "greater than or equal to 1", "found 0"]),
        ("local.lr=0", ["local.lr", "greater than 0", "found 0"]),
        ("local.lr=.nan", ["local.lr", "greater than 0", "nan"]),
        ("data.validation=1", ["data.validation", "less than 1", "found 1"]),
        ("algorithm.sparsity=1.5", ["algorithm.sparsity: 1.5 is out of range; allowed: 0.0 to 0.9999"]),
        ("algorithm.sparsity=.nan", ["algorithm.sparsity: nan is out of range"]),
        ("server.momentum=-1", ["server.momentum: -1.0 is out of range"]),
        # between keys
        ("cohort=31", ["cohort: 31 clients a round", "partition.clients is 30"]),
        ("stop_after=31", ["stop_after: 31 is beyond rounds: 30"]),
        # no override at all
        ("rounds", ["'rounds' is not an override; write key=value"]),
        ("=3", ["'=3' is not an override"]),
        ("rounds=[", ["rounds: '[' is not a YAML value"]),
    ],
)
def test_a_mistake_names_key_found_and_allowed(override, parts):
    text = message([override])
    for part in parts:
        assert part in text
    assert "pydantic" not in text
    assert "http" not in text


def test_all_mistakes_are_told_at_once():
    text = message(["rounds=0", "local.lr=-1", "lokal.lr=1", "wire.uplink=x"])
    assert len(text.splitlines()) == 4
    text = message(["algorithm.betta=1", "algorithm.sparsity=7", "server.lrr=1", "cohort=99"])
    assert len(text.splitlines()) == 4


def test_a_model_to_register_that_is_not_made_is_refused():
    text = message(["tracking.register=mine", "tracking.models=false"])
    assert "tracking.register: the best model, and tracking.models=false makes none" in text
    assert len(text.splitlines()) == 1


def test_the_tree_is_frozen():
    config = resolve("quickstart")
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3
    with pytest.raises(ValueError, match="frozen"):
        config.local.lr = 3.0


def test_flat_fills_in_the_defaults_of_the_choices():
    flat = resolve("quickstart").flat()
    assert flat["algorithm.beta"] == 1.25
    assert flat["server.lr"] == 1.0
    assert flat["local.lr"] == 0.1


# ------------------------------------------------------------------------------------------ learning rate


def rates(rounds, *overrides):
    config = resolve("quickstart", [f"rounds={rounds[-1]}", *overrides])
    return [config.learning_rate(round_number) for round_number in rounds]


def test_a_constant_learning_rate():
    assert rates([1, 15, 30], "local.lr=0.3") == [0.3, 0.3, 0.3]


def test_the_learning_rate_falls_exponentially():
    # lr0 = 0.5, lrT = 0.005, T = 4: each round divides by 100^(1/4) = sqrt(10) = 3.16228.
    # 0.5 / 3.16228 = 0.158114, / 3.16228 = 0.05, / 3.16228 = 0.0158114, / 3.16228 = 0.005.
    found = rates([1, 2, 3, 4], "local.lr=0.5", "local.lr_final=0.005")
    assert found == pytest.approx([0.15811388, 0.05, 0.015811388, 0.005], rel=1e-7)


def test_the_fall_goes_on_beyond_the_horizon():
    # T = 2: a factor of 0.01^(1/2) = 0.1 a round, 0.005 in round 2 and falling on.
    found = rates([1, 2, 3, 4], "local.lr=0.5", "local.lr_final=0.005", "local.lr_horizon=2")
    assert found == pytest.approx([0.05, 0.005, 0.0005, 0.00005])


def test_the_paper_schedule():
    # lr0 = 0.5, lrT = 0.01, T = 700 (ALGORITHMS.md, common setting): round 350 is the geometric mean.
    config = resolve("quickstart", ["rounds=700", "local.lr=0.5", "local.lr_final=0.01"])
    assert config.learning_rate(350) == pytest.approx(math.sqrt(0.5 * 0.01))
    assert config.learning_rate(700) == pytest.approx(0.01)


def test_the_partition_may_follow_the_runs_seed(cache):
    own = [resolve("quickstart", ["partition.seed=seed", f"seed={seed}"]) for seed in (4, 5)]
    fixed = [resolve("quickstart", [f"seed={seed}"]) for seed in (4, 5)]
    assert [config.partition_seed for config in own + fixed] == [4, 5, 1337, 1337]
    assert [partition_of(config, 0).seed for config in own] == [4, 5]
    digests = [Federation.of(config).partition.digest() for config in own + fixed]
    assert digests[0] != digests[1]
    assert digests[2] == digests[3]
    named = resolve("quickstart", ["partition.seed=4"])
    assert Federation.of(named).partition.digest() == digests[0]
    assert "partition.seed" in message(["partition.seed=sead"])
