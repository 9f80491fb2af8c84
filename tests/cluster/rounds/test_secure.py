"""Secure runs end where plain ones do; what they cost, who is recovered, what is lost, hidden and refused."""

import numpy as np
import pytest
import torch

from cluster.command_line.describe_secure import secure_text
from cluster.configuration.config import resolve
from cluster.configuration.secure import SecureSection
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder, comparable
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from cluster.rounds.secure import HIDDEN, SecureRound, StageError
from cluster.simulation.byzantine import Byzantine
from cluster.simulation.clock import Device
from cluster.transport.masking import Drawn, WrongShare
from cluster.transport.secure_uplink import SecureUplink
from tests.cluster.rounds.test_schedule import two_kinds
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation

DROPPING = {"tiers": {"all": {"share": 1.0, "dropout": 0.2}}}
FLASH = {"name": "flash", "sparsity": 0.8, "refresh_interval": 3}
FEDDST = {"name": "feddst", "sparsity": 0.8, "readjust_interval": 1, "readjust_fraction": 0.5}


def run(cache, folder, masks=None, threshold=0.5, **keys):
    """A run of six clients, five a round, who drop out now and then."""
    secure = {"masks": masks} | ({"threshold": threshold} if masks else {})
    tree = {"rounds": 4, "cohort": 5, "devices": DROPPING, "privacy": {"secure": secure}} | keys
    return run_inline(tiny_federation(cache, **tree), folder)


# --------------------------------------------------------------------------------------- the same weights


@pytest.mark.parametrize(
    ("method", "grid"),
    [
        ({"name": "fedavg"}, "exact"),
        ({"name": "fedavg"}, 32),
        ({"name": "fixed_mask", "sparsity": 0.8}, 48),
        (FLASH, "exact"),
        (FEDDST, 48),
        ({"name": "topk", "sparsity": 0.8}, "exact"),
        ({"name": "scaffold"}, 64),
    ],
)
def test_a_secure_run_ends_in_the_bits_of_a_plain_one_on_the_same_grid(tmp_path, method, grid):
    plain, billed, real = (
        run(tmp_path, tmp_path / str(masks), masks, algorithm=method, wire={"grid": grid})
        for masks in (None, "billed", "real")
    )
    assert_identical(plain, billed)
    assert_identical(plain, real)
    assert [comparable(line) for line in billed.lines] == [comparable(line) for line in real.lines]
    assert sum(line["secure/recovered"] for line in real.lines) == sum(
        line["clients/dropped"] for line in plain.lines
    )
    assert any(line["secure/recovered"] for line in real.lines)
    assert not any(line["secure/lost"] for line in real.lines)


def test_the_folding_side_holds_no_plain_word(tmp_path, monkeypatch):
    """Of what arrives every word differs from the plain one, n_i too, and so does every word of the sum."""
    seen = {"billed": {}, "real": {}}
    fold = SecureUplink.fold

    def watching(self, total, client, received, *rest):
        fold(self, total, client, received, *rest)
        seen[masks][len(seen[masks])] = (client, received.copy(), total.words.copy())

    monkeypatch.setattr(SecureUplink, "fold", watching)
    for masks in seen:
        run(tmp_path, tmp_path / masks, masks, rounds=1, devices={}, wire={"grid": 64})
    assert len(seen["real"]) == 5
    for (client, plain, plain_sum), (same, masked, masked_sum) in zip(
        seen["billed"].values(), seen["real"].values(), strict=True
    ):
        assert client == same
        assert not (plain == masked).any()
        assert not (plain_sum == masked_sum).any()
        assert abs(np.unpackbits(masked.view(np.uint8)).mean() - 0.5) < 0.02
        assert np.unpackbits((plain - masked).view(np.uint8)).mean() == pytest.approx(0.5, abs=0.02)


def test_an_interrupted_secure_run_goes_on_to_the_same_bits(tmp_path):
    whole = run(tmp_path, tmp_path / "whole", "real", checkpoint_every=1)
    config = whole.driver.config
    folder = RunFolder.create(tmp_path / "halves", config)
    for stop in (2, None):
        federation = Federation.of(config)
        engine, rounds = InlineEngine(federation.setup()), []
        driver = Driver(
            folder, federation, engine, should_stop=lambda r=rounds, s=stop: len(r) == s or bool(r.append(1))
        )
        driver.run()
    assert driver.state.weights.numpy().tobytes() == whole.state.weights.numpy().tobytes()
    assert [comparable(line) for line in folder.rounds()] == [comparable(line) for line in whole.lines]


# ------------------------------------------------------------------------------------------ what it costs


def test_bytes_and_seconds_by_hand():
    section = SecureSection(masks="billed", threshold=0.6)
    config = resolve("quickstart", ["privacy.secure.masks=billed", "privacy.secure.threshold=0.6"])
    fast, slow = Device(1.0, 8e3, 8e3, 0.5), Device(1.0, 4e3, 2e3, 1.0)  # 1000 and 500 bytes/s down ...

    class Sent:
        def __init__(self, client, device):
            self.client, self.device = client, device

    own = SecureRound.of(
        config, 3, [Sent(0, fast), Sent(4, slow), Sent(7, fast), Sent(9, fast), Sent(11, slow)]
    )
    assert own.threshold == section.threshold_of(5) == 3
    # Two keys and a commitment up, two keys of each of four others down; then four times two shares, a tag.
    assert own.bytes_up(0) == 5 * (3 * 32 + 4 * (2 * 33 + 16))
    assert own.bytes_down(0) == 5 * (4 * 2 * 32 + 4 * (2 * 33 + 16))
    # Four in the sum send a share of each of the five, and are told who the four are.
    assert own.bytes_up(4) - own.bytes_up(0) == 4 * 5 * 33
    assert own.bytes_down(4) - own.bytes_down(0) == 4 * 4 * 4
    # The slow ones: 96 up at 250 bytes/s, 256 down at 500; then 328 either way; a second of latency each.
    assert own.setup_s == pytest.approx((96 / 250 + 256 / 500 + 1) + (328 / 250 + 328 / 500 + 1))
    # The third to answer is the third fast one, or, of two fast ones, a slow one.
    assert own.recovery_s([0, 7, 9, 4]) == pytest.approx(165 / 1000 + 16 / 1000 + 0.5)
    assert own.recovery_s([0, 7, 4, 11]) == pytest.approx(165 / 250 + 16 / 500 + 1.0)
    assert own.recovery_s([0, 7]) == 0.0
    # Of ten clients it is some kilobytes a client: only the vector counts.
    ten = SecureRound.of(config, 1, [Sent(client, fast) for client in range(10)])
    assert (ten.bytes_up(10) + ten.bytes_down(10)) / 10 < 3600


@pytest.mark.parametrize(
    ("clients", "threshold", "takes"),
    [(10, 2 / 3, 7), (6, 2 / 3, 4), (5, 0.5, 3), (4, 0.5, 3), (3, 1.0, 3), (1, 0.5, 2), (0, 0.5, 2)],
)
def test_more_than_half_and_never_one_alone_can_unmask(clients, threshold, takes):
    assert SecureSection(masks="real", threshold=threshold).threshold_of(clients) == takes


def test_all_of_it_is_in_the_uplink_the_downlink_and_on_the_clock(tmp_path):
    plain, billed = (
        run(tmp_path, tmp_path / str(masks), masks, wire={"grid": 32}) for masks in (None, "billed")
    )
    for before, line in zip(plain.lines, billed.lines, strict=True):
        sent = line["clients/trained"] + line["clients/dropped"]
        message = SecureUplink(billed.driver.layout, billed.driver.method, 32).message_bytes(
            None, shared=True
        )
        summed = line["clients/trained"]
        keys = sent * (96 + (sent - 1) * 82) + summed * sent * 33
        assert line["secure/uplink_bytes"] == keys
        assert line["comm/uplink_bytes"] == summed * message + keys
        assert line["secure/downlink_bytes"] == sent * (sent - 1) * (64 + 82) + 4 * summed**2
        assert line["comm/downlink_bytes"] == before["comm/downlink_bytes"] + line["secure/downlink_bytes"]
        assert line["time/round_simulated_s"] > before["time/round_simulated_s"]
    assert billed.lines[-1]["comm/uplink_bytes_total"] == sum(
        line["comm/uplink_bytes"] for line in billed.lines
    )


def test_who_is_late_is_recovered_and_paid_for(tmp_path):
    """All six are asked, the first four count: the others' messages have come, and stay masked."""
    schedule, devices = {"over_selection": 1.5}, two_kinds(fast=1.0, slow=5.0)
    runs = [
        run(tmp_path, tmp_path / str(masks), masks, cohort=4, schedule=schedule, devices=devices)
        for masks in (None, "billed", "real")
    ]
    assert_identical(runs[0], runs[1])
    assert_identical(runs[0], runs[2])
    for line in runs[2].lines:
        assert (line["clients/late"], line["secure/recovered"], line["clients/trained"]) == (2, 2, 6)
        message = SecureUplink(runs[2].driver.layout, runs[2].driver.method, None).message_bytes(
            None, shared=True
        )
        assert line["comm/uplink_bytes"] == 6 * message + line["secure/uplink_bytes"]


# -------------------------------------------------------------------------------- what is lost and hidden


def test_a_round_of_too_few_is_lost_and_the_next_one_goes_on(tmp_path):
    own = run(tmp_path, tmp_path / "run", "real", threshold=1.0)
    lost = [line["secure/lost"] for line in own.lines]
    assert lost == [int(line["clients/dropped"] > 0) for line in own.lines]
    assert 0 < sum(lost) < len(lost)
    for number, line in enumerate(own.lines):
        same = torch.equal(own.states[number].weights, own.states[number + 1].weights)
        assert same == bool(line["secure/lost"])
        if line["secure/lost"]:
            assert (line["secure/recovered"], line["clients/samples"]) == (0, 0)


def test_cohorts_of_any_size_are_secure_or_lost(tmp_path):
    """By coins: of three or more some can be gone, two have to be there both, one alone is never read."""
    coins = {"sampler": {"name": "poisson"}, "cohort": 2, "rounds": 10, "devices": {}}
    own = run(tmp_path, tmp_path / "run", "real", **coins)
    sizes = [line["clients/trained"] for line in own.lines]
    assert {min(sizes), max(sizes)} - {0, 1} == {max(sizes)}
    assert [line["secure/lost"] for line in own.lines] == [int(size < 2) for size in sizes]


def test_a_stage_before_round_1_that_is_lost_ends_the_run(tmp_path):
    method = {"name": "flash", "stage1": "sensitivity", "init_fraction": 0.2, "init_epochs": 1}
    with pytest.raises(StageError, match=r"1 of the 1 clients .* takes 2 to unmask"):
        run(tmp_path, tmp_path / "run", "real", algorithm=method, devices={})


def test_a_wrong_share_ends_the_run(tmp_path, monkeypatch):
    share = Drawn.share
    monkeypatch.setattr(Drawn, "share", lambda self, *which: share(self, *which) ^ (which[0] == "key"))
    with pytest.raises(WrongShare, match="do not give the key of client"):
        run(tmp_path, tmp_path / "run", "real")


def test_an_update_that_is_not_finite_is_withheld_and_its_sender_recovered(tmp_path, monkeypatch):
    def planted(self, client, number, values, received, support):
        if client == 1:
            values[0] = np.nan

    monkeypatch.setattr(Byzantine, "corrupt", planted)
    plain, real = (run(tmp_path, tmp_path / str(m), m, cohort=6, devices={}) for m in (None, "real"))
    assert_identical(plain, real)
    for line in real.lines:
        assert [client for client, _ in line["clients/refused_list"]] == [1]
        assert line["clients/refused_list"][0][1].startswith("its update cannot be averaged: a value is not")
        assert (line["clients/refused"], line["secure/recovered"]) == (1, 1)


def test_single_updates_leave_no_trace_in_a_line(tmp_path):
    topk, flash = {"name": "topk", "sparsity": 0.8}, FLASH
    for method, shared in ((topk, [False] * 4), (flash, [False, True, False, True])):
        own = run(tmp_path, tmp_path / method["name"], "billed", algorithm=method)
        for line, same in zip(own.lines, shared, strict=True):
            assert [line[key] for key in HIDDEN] == [None] * len(HIDDEN)
            assert line["masks/consensus"] == (1.0 if same else None)
            assert (line["sparsity/upload"] > 0.5) == same
        plain = run(tmp_path, tmp_path / f"plain {method['name']}", algorithm=method)
        assert all(plain.lines[0][key] is not None for key in HIDDEN)
        assert not any(key.startswith("secure/") for key in plain.lines[0])


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (
            ["schedule.name=buffered", "algorithm.name=topk"],
            "schedule.name: buffered, and privacy.secure needs",
        ),
        (
            ["max_update_norm=5"],
            "max_update_norm: 5, and with privacy.secure the server sees no single update",
        ),
        (["aggregation.name=median", "algorithm.name=fedavg"], "aggregation.name: median, and with"),
        (["aggregation.name=krum", "algorithm.name=fedavg"], "aggregation.name: krum, and with"),
        (["aggregation.name=trimmed", "algorithm.name=fedavg"], "aggregation.name: trimmed, and with"),
        (["algorithm.name=fedrts"], "fedrts looks at every update of a round, and with"),
        (["algorithm.name=prunefl"], "prunefl begins with the update of a single client, and with"),
        (["algorithm.name=flying_bird", "algorithm.adaptive=true"], "counts how many clients hold a weight"),
        (["algorithm.name=heterofl"], "heterofl gives every client a part of its own, and with"),
        (["wire.uplink=float16"], "wire.uplink: float16, and values travel as words"),
        (
            ["byzantine.share=0.2", "byzantine.kind=little_is_enough", "algorithm.name=fedavg"],
            "little_is_enough",
        ),
        (["cohort=1"], "it takes 2 of 1 clients to unmask a sum, and cohort: 1 is all that counts"),
        (["schedule.over_selection=2"], "it takes 14 of 20 clients to unmask a sum, and cohort: 10 is all"),
        (
            ["privacy.secure.masks=null", "privacy.secure.threshold=0.8"],
            "threshold: 0.8, but privacy.secure.masks",
        ),
        (["privacy.secure.threshold=0.4"], "privacy.secure.threshold"),
        (["privacy.secure.masks=fake"], "privacy.secure.masks"),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides, found):
    with pytest.raises(ConfigError) as error:
        resolve("quickstart", ["privacy.secure.masks=real", *overrides])
    assert any(found in line for line in str(error.value).splitlines()), str(error.value)


def test_private_models_and_hidden_updates_are_refused_by_name():
    """The clip of privacy.dp is the folding side's, which sees no update to clip."""
    dp = ["privacy.dp={clip: 1.0, noise_multiplier: 1.0}", "sampler.name=poisson", "algorithm.name=fedavg"]
    resolve("quickstart", dp)
    with pytest.raises(
        ConfigError, match=r"privacy\.secure\.masks: billed beside privacy\.dp, which clips"
    ) as error:
        resolve("quickstart", [*dp, "privacy.secure.masks=billed"])
    assert "\n" not in str(error.value)


def test_it_is_part_of_what_an_experiment_is():
    plain = resolve("quickstart").digest()
    assert resolve("quickstart", ["privacy.secure.masks=null"]).digest() == plain
    others = [["masks=real"], ["masks=billed"], ["masks=real", "threshold=0.9"]]
    digests = {resolve("quickstart", [f"privacy.secure.{own}" for own in keys]).digest() for keys in others}
    assert len(digests | {plain}) == 4


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (
            {"name": "fixed_mask", "sparsity": 0.8},
            "all clients share one mask, whose values alone travel: 0.00",
        ),
        ({"name": "topk"}, "topk pays dense, 0."),
        (FLASH, "flash pays dense, 0."),
        ({"name": "fedavg"}, "every value travels, 0."),
    ],
)
def test_describe_says_who_pays_dense(tmp_path, method, found):
    config = tiny_federation(
        tmp_path, algorithm=method, privacy={"secure": {"masks": "real"}}, wire={"grid": 48}
    )
    federation = Federation.of(config)
    state = config.method.initial_state(
        federation.initial_weights, federation.layout, np.random.default_rng(0)
    )
    assert found in secure_text(federation, state)
    assert "3 of 4 clients unmask a sum; in round 1" in secure_text(federation, state)
