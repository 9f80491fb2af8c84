"""What makes another run of a configuration, and what does not."""

import pytest

from cluster.configuration import identity
from cluster.configuration.config import Config, resolve
from cluster.configuration.identity import RESULT_FREE, changes_results


@pytest.mark.parametrize(
    "override",
    [
        "stop_after=3",
        "execution=inline",
        "address=auto",
        "actors=7",
        "cpus_per_actor=0.5",
        "checkpoint_every=3",
        "tracking.enabled=false",
        "tracking.uri=sqlite:///x.db",
        "tracking.tags.a=b",
        "data.cache=/somewhere",
        "algorithm.beta=1.25",  # the default, spelt out
        "server.momentum=0",
    ],
)
def test_the_digest_ignores_what_cannot_change_a_result(override):
    base = resolve("quickstart")
    assert resolve("quickstart", [override]) != base
    assert resolve("quickstart", [override]).digest() == base.digest()


@pytest.mark.parametrize(
    "override",
    [
        "rounds=31",
        "seed=1",
        "cohort=9",
        "evaluate_every=2",  # decides which round is the best
        "max_update_norm=10",
        "gpus_per_actor=1",
        "threads=2",
        "algorithm.sparsity=0.8",
        "algorithm.beta=1.3",
        "algorithm.name=topk",
        "model.hidden=255",
        "data.validation=0.1",
        "data.name=owner/name",
        "partition.alpha=0.6",
        "partition.seed=1",
        "local.epochs=1",
        "local.lr_final=0.01",
        "local.proximal=0.1",
        "server.momentum=0.9",
        "wire.uplink=bfloat16",
        "wire.downlink=bfloat16",
    ],
)
def test_the_digest_changes_with_what_can(override):
    assert resolve("quickstart", [override]).digest() != resolve("quickstart").digest()


def test_what_is_result_free_exists():
    assert set(Config.model_fields) >= RESULT_FREE


def test_where_a_run_is_computed_does_not_make_it_another_run():
    places = ("actors", "cpus_per_actor", "devices.tiers.weak.cpus", "devices.tiers.weak.label.class")
    assert not any(changes_results(key) for key in places)
    assert all(
        changes_results(key) for key in ("seed", "devices.tiers.weak.share", "devices.tiers.weak.compute")
    )


#: As they were before tiers had energy.
BEFORE_ENERGY = {
    (): "990db58c5bec",
    ("devices.profile=phones",): "c14599028a40",
    ("devices.profile=edge-boxes", "devices.tiers.jetson-nano.dropout=0"): "b0a856cc1f31",
    ("devices.profile=phones", "devices.tiers.own={share: 0}"): "5861eaf3e4ba",
    ("devices.tiers.low={share: 1}",): "8ffe6ff3453c",
}


@pytest.mark.parametrize("overrides", BEFORE_ENERGY)
def test_energy_that_nobody_set_moves_no_hash(overrides):
    assert resolve("quickstart", overrides).digest() == BEFORE_ENERGY[overrides]


def test_energy_that_somebody_set_makes_another_run():
    digests = [
        resolve("quickstart", ["devices.profile=phones", *own]).digest()
        for own in ([], ["devices.tiers.low.flop_energy=4.5e-10"], ["devices.tiers.low.flop_energy=2.49e-10"])
    ]
    assert digests[0] == digests[1] != digests[2]  # the second is what the profile says
    # Without a profile the figure of a tier of that name is not what goes without saying.
    plain = [["devices.tiers.low.share=1"], ["devices.tiers.low={share: 1, flop_energy: 4.5e-10}"]]
    first, second = (resolve("quickstart", own).digest() for own in plain)
    assert first != second


def test_hashes_of_version_0_1_still_hold():
    """Keys that came later stay out of the hash at their defaults, so that old folders can be continued."""
    assert resolve("quickstart").digest() == "990db58c5bec"
    assert resolve("quickstart", ["algorithm.name=topk"]).digest() == "a38a8f0cc074"
    assert resolve("quickstart", ["algorithm.name=fixed_mask"]).digest() == "ecaf42c868b5"
    changed = resolve("quickstart", ["algorithm.name=topk", "algorithm.guard_layers=true"])
    assert changed.digest() != "a38a8f0cc074"


def test_a_run_is_of_the_code_that_its_process_found_first(monkeypatch):
    first = identity.loaded_code()
    monkeypatch.setattr(identity, "code_digest", lambda: "changed under it")
    assert identity.loaded_code() == first != identity.code_digest()
