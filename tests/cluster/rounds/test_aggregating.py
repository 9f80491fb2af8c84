"""Rounds with a rule of aggregation and with attackers: by hand from the uploads, and what is refused."""

import numpy as np
import pytest
import torch

from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation, MemoryNeeded
from cluster.simulation.byzantine import Byzantine
from tests.tiny_experiment import run_inline, tiny_federation


def sent(run, number):
    """What the clients of a round sent, by client, float32[size]."""
    found = {client: values for (when, client), (values, _) in run.uploads.items() if when == number}
    return {c: torch.cat([v.flatten() for v in found[c].values()]).numpy() for c in sorted(found)}


@pytest.mark.parametrize("algorithm", [{"name": "fedavg"}, {"name": "fixed_mask", "sparsity": 0.5}])
def test_a_round_ends_at_the_median_of_what_was_sent(tmp_path, algorithm):
    config = tiny_federation(tmp_path, algorithm=algorithm, aggregation={"name": "median"}, cohort=5)
    run = run_inline(config, tmp_path / "run")
    for number in (1, 2):
        expected = np.median(np.stack(list(sent(run, number).values())), axis=0)
        assert (run.states[number].weights.numpy() == expected).all()


def test_nothing_clipped_is_fedavg_with_equal_weights_bit_for_bit(tmp_path):
    plain = run_inline(tiny_federation(tmp_path, aggregation={"weighting": "equal"}), tmp_path / "plain")
    clip = run_inline(tiny_federation(tmp_path, aggregation={"name": "clip", "norm": 1e9}), tmp_path / "clip")
    assert torch.equal(plain.state.weights, clip.state.weights)
    assert plain.lines[-1]["comm/uplink_bytes_total"] == clip.lines[-1]["comm/uplink_bytes_total"]


# ------------------------------------------------------------------------------------------------ attackers


def test_attackers_are_the_same_ones_all_along_and_as_many_as_asked_for(tmp_path):
    config = tiny_federation(
        tmp_path, partition={"clients": 20, "name": "iid"}, byzantine={"share": 0.2}, cohort=4
    )
    own = Byzantine(config).clients
    assert len(own) == 4
    assert own == Byzantine(config).clients != Byzantine(resolve(config.dump(), ["seed=4"])).clients


@pytest.mark.parametrize("kind", ["sign_flip", "scale", "noise"])
def test_what_attackers_send_is_worked_out_from_what_they_trained(tmp_path, kind):
    honest = run_inline(tiny_federation(tmp_path, cohort=6, rounds=1), tmp_path / "honest")
    byzantine = {"share": 0.4, "kind": kind, "factor": 3.0}
    config = tiny_federation(tmp_path, cohort=6, rounds=1, byzantine=byzantine)
    attacked = run_inline(config, tmp_path / "attacked")
    trained, own = sent(honest, 1), sent(attacked, 1)
    start = honest.states[0].weights.numpy().astype(np.float64)
    attackers = Byzantine(config).clients
    assert len(attackers) == 2
    for client in range(6):
        delta, there = trained[client] - start, own[client] - start
        if client not in attackers:
            assert (own[client] == trained[client]).all()
        elif kind == "noise":
            # 3 root mean squares of noise beside the update; about 200 weights.
            assert np.sqrt(np.mean((there - delta) ** 2)) == pytest.approx(
                3 * np.sqrt(np.mean(delta**2)), rel=0.2
            )
        else:
            assert there == pytest.approx({"sign_flip": -3, "scale": 3}[kind] * delta, abs=1e-5)


def test_a_label_flipper_learns_the_classes_from_the_other_end(tmp_path):
    byzantine = {"share": 0.4, "kind": "label_flip"}
    honest = tiny_federation(tmp_path, cohort=6, rounds=1)
    config = tiny_federation(tmp_path, cohort=6, rounds=1, byzantine=byzantine)
    plain, flipped = run_inline(honest, tmp_path / "a"), run_inline(config, tmp_path / "b")
    differing = {c for c in range(6) if (sent(plain, 1)[c] != sent(flipped, 1)[c]).any()}
    assert differing == Byzantine(config).clients
    # The same as data whose labels of those clients are the other way round.
    federation = Federation.of(honest)
    labels = federation.dataset.train.targets.copy()
    for client in differing:
        rows = federation.partition.client(client)
        labels[rows] = 2 - labels[rows]
    driver = plain.driver
    driver.engine._host._trainer._data._split = type(federation.dataset.train)(
        federation.dataset.train.inputs, labels, None
    )
    state = plain.states[0]
    schedule = type(driver._schedule)(federation, driver.engine, driver.method)
    total = schedule.round(state, [], lambda: None).outcome.total
    assert torch.equal(
        driver.method.advance(state, total, driver.server, driver.layout).weights, flipped.state.weights
    )


def test_a_little_is_enough_is_the_mean_of_the_others_less_some_of_their_deviations(tmp_path):
    byzantine = {"share": 0.4, "kind": "little_is_enough", "factor": 2.0}
    config = tiny_federation(tmp_path, cohort=6, rounds=1, byzantine=byzantine)
    run = run_inline(config, tmp_path / "run")
    attackers, trained = Byzantine(config).clients, sent(run, 1)
    others = np.stack([trained[c].astype(np.float64) for c in range(6) if c not in attackers])
    poisoned = (others.mean(0) - 2.0 * others.std(0)).astype(np.float32)
    sizes = Federation.of(config).sizes
    rows = [poisoned if c in attackers else trained[c] for c in range(6)]
    expected = np.average(np.stack(rows).astype(np.float64), axis=0, weights=sizes)
    assert run.state.weights.numpy() == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["aggregation.name=median", "algorithm.name=topk"], "sent by fewer than half has median 0"),
        (["aggregation.name=median", "algorithm.name=sparsyfed"], "aggregation.name: median"),
        (["aggregation.name=krum", "algorithm.name=fedef"], "aggregation.name: krum"),
        (["aggregation.name=median", "schedule.name=buffered"], "schedule.name=synchronous"),
        (["aggregation.name=median", "aggregation.weighting=samples"], "none may buy weight"),
        (["aggregation.name=krum", "aggregation.attackers=4"], "2 f + 3 = 11 at least, found cohort: 10"),
        (["aggregation.name=multi_krum", "aggregation.chosen=8"], "at most cohort - f - 2 = 7"),
        (["aggregation.name=trimmed", "aggregation.beta=0.5"], "aggregation.beta: 0.5 is out of range"),
        (["aggregation.name=medain"], "did you mean median?"),
        (["aggregation.norm=1"], "norm belongs to clip"),
        (["byzantine.kind=scale"], "byzantine.kind: scale, but byzantine.share is 0"),
        (["byzantine.share=0.2", "byzantine.kind=label_flip", "byzantine.factor=2"], "label_flip has none"),
        (
            ["byzantine.share=0.2", "byzantine.kind=little_is_enough", "algorithm.name=topk"],
            "byzantine.kind: little_is_enough compares",
        ),
        (["byzantine.share=0.5"], "byzantine.share"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_before_anything_starts(overrides, says):
    with pytest.raises(ConfigError) as raised:
        resolve("quickstart", ["algorithm.name=fedavg", *overrides])
    assert says in str(raised.value)


def test_the_memory_of_all_updates_is_told_before_the_start(tmp_path):
    config = tiny_federation(tmp_path, aggregation={"name": "median"})
    federation = Federation.of(config)
    assert federation.updates_bytes == 3 * 4 * 4 * federation.layout.size
    with pytest.raises(MemoryNeeded, match="median looks at every update of a round"):
        federation.check_memory(federation.updates_bytes - 1)
    assert Federation.of(tiny_federation(tmp_path)).updates_bytes == 0
