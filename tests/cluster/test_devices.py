"""Device tiers: shares are met, budgets respected, the global model is measured at each budget."""

import numpy as np
import pytest

import cluster
from cluster.devices import Devices
from cluster.run_folder import RunFolder
from cluster.trees import ConfigError

TIERS = [
    "algorithm.sparsity=0.9",
    "devices.tiers.large={share: 0.4, sparsity: 0.9}",
    "devices.tiers.middle={share: 0.3, sparsity: 0.95}",
    "devices.tiers.small={share: 0.3, sparsity: 0.99}",
]
SMALL = ["execution=inline", "tracking.enabled=false", "rounds=2", "local.epochs=1", "partition.clients=10"]


def config(*more):
    return cluster.resolve("quickstart", [*SMALL, *TIERS, *more])


def test_shares_are_met_and_depend_on_the_seed_alone():
    tiers = Devices(config()).tiers
    assert np.bincount(tiers).tolist() == [4, 3, 3]
    assert np.array_equal(tiers, Devices(config("algorithm.name=topk")).tiers)
    assert not np.array_equal(tiers, Devices(config("seed=1")).tiers)


@pytest.mark.parametrize("method", ["sparsyfed", "topk", "flash"])
def test_budgets_are_respected_and_reported(method, tmp_path):
    settings = config(f"algorithm.name={method}", "model.channels=[8, 16]", "model.hidden=32")
    cluster.run(settings, tmp_path / "run")
    last = RunFolder(tmp_path / "run").rounds()[-1]
    assert {f"tiers/{name}/accuracy" for name in ("large", "middle", "small")} <= last.keys()
    # All ten clients in the cohort: .4 * .9 + .3 * .95 + .3 * .99 = .942, each K rounded to one weight.
    assert last["sparsity/upload"] == pytest.approx(0.942, abs=2e-4)
    # Cut to the densest tier's budget, a mask of just that size is the model itself.
    if method == "flash":
        assert last["tiers/large/accuracy"] == last["test/accuracy"]


def test_a_method_with_one_sparsity_refuses_tiers():
    with pytest.raises(ConfigError, match=r"fixed_mask has one sparsity .* flash, sparsyfed, topk"):
        config("algorithm.name=fixed_mask")


def test_shares_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ConfigError, match=r"shares must sum to 1, found large 0\.5"):
        config("devices.tiers.large.share=0.5")


def test_the_method_is_told_the_densest_budget():
    with pytest.raises(ConfigError, match=r"set algorithm\.sparsity=0\.9"):
        config("algorithm.sparsity=0.95")
