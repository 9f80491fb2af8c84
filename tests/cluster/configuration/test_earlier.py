"""Configurations of earlier versions load as they were meant, and no experiment gets another hash."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from cluster.configuration.config import resolve
from cluster.configuration.trees import load_tree
from cluster.grid import expand
from cluster.records.run_folder import RunFolder
from tuning.study import load_plan

#: Hash of every preset as it was on 2026-11-27; of several runs the hash of all of theirs by name.
PRESETS = {
    "compare-digits": "98fd037d41b7",
    "compare-fashion-mnist": "7ffa58c56911",
    "fashion-mnist": "b7bc323f5e34",
    "femnist": "110b94867571",
    "paper-ablation": "371ccc72e750",
    "paper-accuracy": "4d28da5f913b",
    "paper-accuracy-cifar100": "3e019c5015ef",
    "paper-accuracy-speech": "5b4b92785a47",
    "paper-beta": "6d3502807e10",
    "paper-cifar10": "6f63fe6e99a1",
    "paper-cifar100": "5b70316d8c38",
    "paper-client-size": "0d0a0fde6cba",
    "paper-cub": "8c3e4fec2fb6",
    "paper-flops": "168faaee0b08",
    "paper-laptop": "e7176eadaf0d",
    "paper-methods": "659668fdbe30",
    "paper-participation": "c7e30dce87ad",
    "paper-regrowth": "eba4d64c0d9a",
    "paper-shift": "778a49764f2f",
    "paper-speech": "40ea1844c907",
    "paper-tiers": "8ace5fa31657",
    "quickstart": "990db58c5bec",
    "study-cifar10": "f8fa761a557e",
    "study-digits": "a31fd8a1e4f2",
    "study-fashion-mnist": "9ce37fda2681",
}

EARLIER = yaml.safe_load((Path(__file__).parent / "earlier_configs.yaml").read_text(encoding="utf-8"))


def digests(preset):
    """Hashes of a preset's runs by name."""
    tree = load_tree(preset)
    if "study" in tree:
        plan = load_plan(preset)
        of_methods = {label: contender.config.digest() for label, contender in plan.contenders.items()}
        return {"": plan.base.digest(), **of_methods}
    if "grid" in tree:
        return {name: config.digest() for name, config in expand(preset).runs.items()}
    return {"": resolve(preset).digest()}


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_gets_another_hash(preset):
    found = digests(preset)
    whole = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
    assert (whole if len(found) > 1 else found[""]) == PRESETS[preset]


@pytest.mark.parametrize("earlier", EARLIER, ids=lambda earlier: earlier["name"])
def test_an_earlier_config_is_the_experiment_that_it_was(earlier, tmp_path):
    config = resolve("quickstart", earlier["overrides"])
    assert config.digest() == earlier["digest"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**EARLIER[0]["config"], **earlier["config"]}))
    stored = RunFolder.open(tmp_path).config()
    assert stored.digest() == earlier["digest"]
    assert stored.resolved() == config.resolved()
    # As an experiment's file it is the same.
    assert resolve(tmp_path / "config.yaml").resolved() == config.resolved()
