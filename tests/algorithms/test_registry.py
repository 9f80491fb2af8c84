"""The registry, the declared hyperparameters, and a user's own method end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import algorithms
from algorithms import SERVER_OPTIMIZERS, Algorithm, hyperparameters, registry
from cluster.configuration.trees import ConfigError
from tests.example_method import RandomK
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation


def test_lists_the_methods_in_alphabetical_order():
    names = list(registry())
    assert {"fedavg", "sparsyfed", "topk"} <= set(names)
    assert names == sorted(names)
    for name, method in registry().items():
        assert issubclass(method, Algorithm)
        assert method.name == name
        assert method.paper, f"{name} names no paper"
        assert method().name == name  # every field has a default


@pytest.mark.parametrize(
    "declared", [*registry().values(), *SERVER_OPTIMIZERS.values()], ids=lambda c: c.name
)
def test_every_hyperparameter_is_declared_with_a_meaning(declared):
    for parameter in hyperparameters(declared):
        assert parameter.meaning, parameter.name
        assert parameter.kind in ("float", "int", "bool", "str", "patterns"), parameter
        if parameter.kind in ("float", "int"):
            assert parameter.low is not None, parameter.name
            if parameter.default is not None:
                assert parameter.low <= parameter.default, parameter.name
                assert parameter.high is None or parameter.default <= parameter.high, parameter.name
        if parameter.kind == "str":
            assert parameter.default in parameter.choices, parameter.name
        if parameter.search is not None and parameter.choices is None:
            assert parameter.low <= parameter.search[0] < parameter.search[1] <= parameter.high


def test_sparsity_is_the_first_field_of_every_method_that_has_a_target():
    for name, method in registry().items():
        declared = [parameter.name for parameter in hyperparameters(method)]
        if "sparsity" in declared:
            assert declared[0] == "sparsity", name


def test_methods_are_frozen_and_compare_by_value():
    method = registry()["sparsyfed"](beta=1.5)
    with pytest.raises(AttributeError):
        method.beta = 2.0
    assert method == registry()["sparsyfed"](beta=1.5) != registry()["sparsyfed"]()


def test_a_field_without_a_declaration_is_an_error():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Undeclared:
        width: int = 3

    with pytest.raises(TypeError, match="declare width with hyperparameter"):
        hyperparameters(Undeclared)


def test_the_package_loads_neither_the_cluster_nor_its_libraries():
    import subprocess
    import sys

    code = (
        "import sys, algorithms; "
        "print([m for m in ('ray', 'mlflow', 'optuna', 'datasets', 'cluster', 'tuning') if m in sys.modules])"
    )
    root = Path(algorithms.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------------- a method of one's own


class NaiveRandomK(NaiveFederation):
    def upload(self, weights, received, visit):
        sizes = [weights[name].numel() for name in self.prunable]
        drawn = visit.rng.choice(sum(sizes), size=self.kept_count(self.options.sparsity), replace=False)
        flat = np.isin(np.arange(sum(sizes)), drawn)
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        mask = {
            name: torch.from_numpy(part).view(weights[name].shape)
            for name, part in zip(self.prunable, parts, strict=True)
        }
        return self.masked(weights, mask), mask


def test_a_method_of_ones_own_runs_end_to_end(tmp_path):
    own = {"name": "tests.example_method:RandomK", "sparsity": 0.75}
    config = tiny_federation(tmp_path, algorithm=own)
    assert isinstance(config.method, RandomK)
    run = run_inline(config, tmp_path / "run")
    assert [line["round"] for line in run.lines] == [1, 2]
    # 36 + 216 + 384 + 48 = 684 prunable weights, a quarter of them is 171.
    assert all(sum(int(m.sum()) for m in support.values()) == 171 for _, support in run.uploads.values())
    assert run.lines[0]["sparsity/upload"] == 0.75
    assert_same(run, NaiveRandomK(config).run())


def test_a_method_of_ones_own_at_sparsity_0_is_fedavg(tmp_path):
    own = {"name": "tests.example_method:RandomK", "sparsity": 0.0}
    run = run_inline(tiny_federation(tmp_path, algorithm=own), tmp_path / "own")
    assert_identical(run, run_inline(tiny_federation(tmp_path), tmp_path / "fedavg"))


def test_hyperparameters_of_ones_own_method_are_checked_like_any_other(tmp_path):
    with pytest.raises(ConfigError, match="unbiased: expected bool"):
        tiny_federation(tmp_path, algorithm={"name": "tests.example_method:RandomK", "unbiased": 2})
    with pytest.raises(ConfigError, match="has no 'RandomL'"):
        tiny_federation(tmp_path, algorithm={"name": "tests.example_method:RandomL"})
