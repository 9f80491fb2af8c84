"""``module:attribute`` that names something else than what the key wants: one line that says so."""

from dataclasses import dataclass

import pytest

from algorithms import Algorithm, ServerOptimizer, hyperparameter
from cluster.cli import main
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError


class NotAMethod:
    """A class that derives from nothing."""


@dataclass(frozen=True, kw_only=True)
class Undeclared(Algorithm):
    """A method whose field has no declaration."""

    steps: int = 3


class Bare(Algorithm):
    """A method without a decorator and without fields."""


@dataclass(frozen=True, kw_only=True)
class Slow(ServerOptimizer):
    """A server optimizer."""

    pause: int = hyperparameter(1, "rounds it waits")


def no_sampler(*_):
    """A factory that returns none."""


def failing_sampler():
    """A factory with a mistake of its own inside."""
    raise TypeError("inside the user's own code")


HERE = "tests.cluster.configuration.test_own_names"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "algorithm.name={}:NotAMethod",
            "algorithm.name = '{}:NotAMethod': expected a subclass",
        ),
        ("algorithm.name={}:no_sampler", "expected a subclass of Algorithm, found function"),
        ("algorithm.name={}:HERE", "expected a subclass of Algorithm, found str"),
        ("algorithm.name={}:Slow", "expected a subclass of Algorithm"),
        ("algorithm.name={}:Undeclared", "declare steps with hyperparameter"),
        ("algorithm.name=algorithms:registry", "expected a subclass of Algorithm, found"),
        ("server.name={}:Bare", "server.name = '{}:Bare': expected a subclass of ServerOptimizer"),
        ("server.name=json:loads", "expected a subclass of ServerOptimizer, found function"),
        ("sampler.name={}:HERE", "sampler.name = '{}:HERE': .* is not a callable object"),
        ("sampler.name={}:no_sampler", "expected a factory that returns a sampler, .*; it returned None"),
        ("sampler.name=builtins:dict", "sampler.name = 'builtins:dict': "),
        ("sampler.name=json:nothing", "module 'json' has no 'nothing'"),
    ],
)
def test_a_name_that_stands_for_something_else(override, says):
    with pytest.raises(ConfigError, match=says.format(HERE)) as refused:
        resolve("quickstart", [override.format(HERE)])
    assert "\n" not in str(refused.value)


def test_what_is_of_the_right_kind_is_taken():
    config = resolve("quickstart", [f"server.name={HERE}:Slow", "server.pause=2"])
    assert config.build_server() == Slow(pause=2)
    tree = {"algorithm": {"name": f"{HERE}:Bare"}}
    assert isinstance(resolve(tree).method, Bare)


def test_a_mistake_inside_the_users_code_is_not_made_one_of_the_configuration():
    with pytest.raises(TypeError, match="inside the user's own code"):
        resolve("quickstart", [f"sampler.name={HERE}:failing_sampler"])


def test_describe_says_what_a_name_is_not(capsys):
    assert main(["describe", "json:loads"]) == 2
    assert (
        "describe = 'json:loads': expected a subclass of Algorithm, found function" in capsys.readouterr().err
    )
