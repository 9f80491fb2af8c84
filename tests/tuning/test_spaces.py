"""Declared ranges become Optuna's; trial 0 lies in every space."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from algorithms import hyperparameters, registry
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from tuning.spaces import Dimension, own_space, shared_space, with_values


def space_of(name, fixed=(), searches=None, **options):
    overrides = [f"algorithm.name={name}", *(f"algorithm.{key}={value}" for key, value in options.items())]
    config = resolve("quickstart", overrides + ["rounds=1", "cohort=30"] * (name == "ma_echo"))
    return own_space(name, registry()[name], config, fixed, searches or {})


def test_the_declarations_are_the_space():
    assert space_of("sparsyfed")["algorithm.beta"].distribution == FloatDistribution(1.0, 2.0)
    zerofl = space_of("zerofl")
    assert list(zerofl) == ["algorithm.mask_ratio", "algorithm.upload"]
    ways = ("top_k_weights", "diff_on_top_k_weights", "top_k_weights_diff")
    assert zerofl["algorithm.upload"].distribution == CategoricalDistribution(ways)
    feddst = space_of("feddst")
    assert feddst["algorithm.readjust_interval"].distribution == IntDistribution(5, 30)
    assert feddst["algorithm.readjust_fraction"].distribution == FloatDistribution(0.001, 0.5, log=True)
    assert space_of("fedavg") == space_of("topk") == space_of("fixed_mask") == {}


def test_a_default_outside_the_declared_range_widens_it():
    # FLASH: 0 warm-up epochs means as many as in every round; the declared search is 1 to 10.
    warmup = space_of("flash")["algorithm.warmup_epochs"]
    assert warmup.distribution == IntDistribution(0, 10)
    assert warmup.default == 0


@pytest.mark.parametrize("name", registry())
def test_trial_0_lies_in_the_space_of_every_method(name):
    published = {f"algorithm.{p.name}": p.default for p in hyperparameters(registry()[name])}
    for key, dimension in space_of(name).items():
        assert dimension.default == published[key]
        assert dimension.distribution._contains(dimension.distribution.to_internal_repr(dimension.default))


def test_what_is_fixed_is_not_tuned():
    assert list(space_of("flash", ["refresh_interval"])) == ["algorithm.warmup_epochs"]


def test_a_range_of_the_study_replaces_the_declared_one():
    ranges = {"readjust_interval": {"low": 1, "high": 7}, "readjust_fraction": [0.1, 0.25]}
    space = space_of("feddst", (), ranges, readjust_interval=3, readjust_fraction=0.25)
    assert space["algorithm.readjust_interval"].distribution == IntDistribution(1, 7)
    assert space["algorithm.readjust_interval"].default == 3
    assert space["algorithm.readjust_fraction"].distribution == CategoricalDistribution([0.1, 0.25])


@pytest.mark.parametrize(
    ("field", "asked", "message"),
    [
        ("bta", {"low": 1, "high": 2}, "no such field; its fields: sparsity, beta, "),
        ("beta", {"low": 2, "high": 1}, "reversed or empty, low 2 is not below high 1"),
        ("beta", {"low": 1, "high": 9}, "9.0 is out of range; allowed: 1.0 to 4.0"),
        ("beta", {"low": 1.5, "high": 2}, "leaves out 1.25"),
        ("beta", {"low": 1}, "expected {low"),
        ("beta", {"low": "a", "high": 2}, "low and high are floats"),
        ("beta", {"low": 1, "high": 2, "log": 3}, "log is true or false"),
        ("exponent", {"low": 1, "high": 2}, "takes a list of choices"),
        ("exponent", ["constant", "spectrl"], "did you mean spectral"),
    ],
)
def test_a_wrong_range_is_one_line(field, asked, message):
    config = resolve("quickstart", ["algorithm.name=sparsyfed"])
    with pytest.raises(ConfigError) as raised:
        own_space("x", registry()["sparsyfed"], config, (), {field: asked})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "asked", "message"),
    [
        ("local.lrr", {"low": 0.1, "high": 1}, "did you mean local.lr"),
        ("seed", {"low": 1, "high": 2}, "not a key that can be tuned"),
        ("local.lr", {"low": -1.0, "high": 1.0}, "-1.0 is not valid"),
        ("local.lr", {"low": 0.5, "high": 1.0}, "leaves out 0.1"),
        ("local.epochs", {"low": 1.5, "high": 9}, "low and high are ints"),
    ],
)
def test_a_wrong_shared_range_is_one_line(key, asked, message):
    with pytest.raises(ConfigError) as raised:
        shared_space({key: asked}, resolve("quickstart"))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_optima_on_a_boundary():
    beta = Dimension("algorithm.beta", FloatDistribution(1.0, 2.0), 1.25, low=1.0, high=4.0)
    assert beta.boundary(1.5) is None
    assert beta.boundary(1.995) == "upper end 2"  # within a hundredth of the range
    assert beta.boundary(1.0) == "lower end 1, the limit of what is valid"
    lr = Dimension("local.lr", FloatDistribution(0.01, 1.0, log=True), 0.1)
    assert lr.boundary(0.0104) == "lower end 0.01"  # a hundredth of two decades is a factor of 1.047
    assert lr.boundary(0.011) is None
    assert Dimension("x", CategoricalDistribution(["a", "b"]), "a").boundary("a") is None


def test_values_reach_the_configuration():
    config = with_values(resolve("quickstart"), {"algorithm.beta": 1.5, "local.lr": 0.3})
    assert config.algorithm.options == {"sparsity": 0.9, "beta": 1.5}
    assert config.local.lr == 0.3
