"""Devices: tiers and budgets, figures that depend on seed and client alone, availability, clear errors."""

import numpy as np
import pytest

import cluster
from cluster.configuration.profiles import PROFILES
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.simulation.availability import Recording
from cluster.simulation.clock import Device, DeviceError
from cluster.simulation.devices import Devices
from tests.tiny_experiment import tiny_federation

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
    with pytest.raises(ConfigError, match=r"fixed_mask has one sparsity .* flash, .*sparsyfed, .*topk"):
        config("algorithm.name=fixed_mask")


def test_shares_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ConfigError, match=r"shares must sum to 1, found large 0\.5"):
        config("devices.tiers.large.share=0.5")


def test_the_method_is_told_the_densest_budget():
    with pytest.raises(ConfigError, match=r"set algorithm\.sparsity=0\.9"):
        config("algorithm.sparsity=0.95")


# ------------------------------------------------------------------------------------- what a device is


def devices(*overrides, clients=100):
    return Devices(cluster.resolve("quickstart", [f"partition.clients={clients}", *overrides]))


def test_a_device_depends_on_seed_and_client_alone():
    phones = devices("devices.profile=phones")
    all_of_them = phones.of(range(100))
    assert phones.of([70, 3]) == [all_of_them[70], all_of_them[3]]
    assert devices("devices.profile=phones", "algorithm.name=topk").of([70, 3]) == phones.of([70, 3])
    assert devices("devices.profile=phones", "seed=1").of([70]) != phones.of([70])
    assert len({device.compute for device in all_of_them}) == 100


def test_the_spread_is_log_normal_about_the_tier():
    one = {"share": 1.0, "compute": 1e9, "downlink": 1e7, "uplink": 1e6, "spread": 0.5}
    drawn = devices(f"devices.tiers.one={one}".replace("'", ""), clients=4000).of(range(4000))
    compute = np.log([device.compute / 1e9 for device in drawn])
    network = np.log([device.downlink / 1e7 for device in drawn])
    # A mean of 4,000 draws of sigma .5 is within .03 of 0 (4 deviations), their deviation within .025 of .5.
    assert abs(compute.mean()) < 0.03
    assert abs(network.mean()) < 0.03
    assert abs(compute.std() - 0.5) < 0.025
    assert abs(network.std() - 0.5) < 0.025
    assert abs(np.corrcoef(compute, network)[0, 1]) < 0.07
    assert all(device.uplink == pytest.approx(device.downlink / 10) for device in drawn[:50])


def test_jitter_by_hand(monkeypatch):
    """u = 1 - e^-2 is a radius of two deviations: at an angle of 0 of compute, at a quarter turn of links."""
    steps = []

    def uniform(seed, purpose, step, clients):
        steps.append((purpose, step))
        if purpose == "devices":
            return np.zeros(len(clients))
        return np.full(len(clients), 1.0 - np.exp(-2.0)) if step % 2 == 0 else np.array([0.0, 0.25])

    shaky = devices("devices.tiers.a={share: 1, compute: 1e9, downlink: 1e7, uplink: 1e6, jitter: 0.3}")
    monkeypatch.setattr("cluster.seeding.uniform", uniform)
    first, second = shaky.of([4, 5], 7)
    grown = np.exp(0.3 * 2.0)
    assert first.compute == pytest.approx(1e9 * grown)
    assert (first.downlink, first.uplink) == (1e7, 1e6)
    assert second.compute == pytest.approx(1e9)
    assert (second.downlink, second.uplink) == pytest.approx((1e7 * grown, 1e6 * grown))
    assert first.latency == shaky.kinds[0].latency
    assert steps == [("devices", 1), ("devices", 2), ("jitter", 14), ("jitter", 15)]


def test_jitter_is_drawn_anew_for_every_client_and_round():
    tier = "{share: 1, compute: 1e9, downlink: 1e7, uplink: 1e6, spread: 0.5, jitter: 0.2}"
    shaky = devices(f"devices.tiers.a={tier}", clients=400)
    usual = shaky.of(range(400))
    rounds = [shaky.of(range(400), number) for number in range(10)]
    assert [shaky.of([70, 3], number) for number in range(10)] == [[own[70], own[3]] for own in rounds]
    factors = np.log([[d.compute / u.compute for d, u in zip(own, usual, strict=True)] for own in rounds])
    links = np.log([[d.uplink / u.uplink for d, u in zip(own, usual, strict=True)] for own in rounds])
    # 4,000 draws of sigma .2: four deviations of their mean are .013, of their own deviation .009.
    for drawn in (factors, links):
        assert abs(drawn.mean()) < 0.013
        assert abs(drawn.std() - 0.2) < 0.009
        assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.07
    assert abs(np.corrcoef(factors.ravel(), links.ravel())[0, 1]) < 0.07


def test_without_jitter_a_round_changes_nothing():
    phones = devices("devices.profile=phones")
    assert phones.of(range(100), 5) == phones.of(range(100))
    # Nor for the tiers that have none.
    mixed = devices("devices.profile=phones", "devices.tiers.low.jitter=0.3")
    usual, now = mixed.of(range(100)), mixed.of(range(100), 5)
    moved = [own != was for own, was in zip(now, usual, strict=True)]
    assert moved == (mixed.tiers == 0).tolist()


def test_drop_outs_come_at_their_rate_and_anew_each_round():
    lossy = devices("devices.tiers.a={share: 1.0, dropout: 0.3}", clients=4000)
    clients = np.arange(4000)
    gone = lossy.drop_outs(clients, 5)
    assert abs(gone.mean() - 0.3) < 0.03  # four standard deviations
    assert np.array_equal(lossy.drop_outs(clients[17:30], 5), gone[17:30])
    assert not np.array_equal(lossy.drop_outs(clients, 6), gone)
    assert not devices("devices.tiers.a={share: 1.0}").drop_outs(np.arange(100), 5).any()


def test_a_million_devices_are_described_by_a_byte_each():
    million = devices("devices.profile=phones", clients=10**6)
    assert million.tiers.nbytes == 10**6
    assert np.bincount(million.tiers).tolist() == [300_000, 500_000, 200_000]
    assert million.of([999_999])[0].compute > 0


def test_the_day_has_its_height_at_the_phase_and_states_last_a_slot():
    tier = "{share: 1.0, availability: {name: diurnal, low: 0.2, high: 0.8, phase: 3, slot: 900}}"
    diurnal, clients = devices(f"devices.tiers.a={tier}", clients=4000), np.arange(4000)

    def share(hour):
        return diurnal.available(clients, 3600.0 * hour).mean()

    assert abs(share(3) - 0.8) < 0.03
    assert abs(share(15) - 0.2) < 0.03
    assert abs(share(9) - 0.5) < 0.035
    assert abs(share(27) - 0.8) < 0.03  # and so the next day
    assert np.array_equal(diurnal.available(clients, 900.0), diurnal.available(clients, 1799.9))
    assert not np.array_equal(diurnal.available(clients, 1800.0), diurnal.available(clients, 1799.9))
    assert np.array_equal(diurnal.available(clients[5:9], 900.0), diurnal.available(clients, 900.0)[5:9])


def trace(tmp_path, text):
    (tmp_path / "trace.csv").write_text(text)
    return f"devices.tiers.a={{share: 1.0, availability: {{name: trace, path: {tmp_path / 'trace.csv'}}}}}"


def test_a_trace_is_followed_and_repeated(tmp_path):
    # Clients 4, 8 and 9 of the trace are those of this run: 0, 1, 2, and again 3, 4, 5.
    text = "client,start,end\n8,0,10\n4,5,20\n9,15,30\n8,25,30\n"
    traced = devices(trace(tmp_path, text), "cohort=2", clients=6)
    expected_at = {0: [1], 5: [0, 1], 9.5: [0, 1], 10: [0], 15: [0, 2], 20: [2], 25: [1, 2]}
    for time, awake in expected_at.items():
        expected = sorted([*awake, *(client + 3 for client in awake)])
        for later in (0, 30, 300):  # the trace ends at 30 s and starts over
            found = traced.available(np.arange(6), float(time + later))
            assert np.flatnonzero(found).tolist() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "client,begin,end\n0,1,2\n",
            r"trace.csv: expected the columns client, start, end, found \['cl",
        ),
        (
            "client,start,end\n0,1,2\n1,5,4\n",
            r"trace.csv, line 3: .* 0 <= start < end .* found 1,5,4",
        ),
        ("client,start,end\n0,now,2\n", "line 2: .* found 0,now,2"),
        ("client,start,end\n", "holds no interval"),
    ],
)
def test_a_bad_trace_names_file_and_line(tmp_path, text, message):
    with pytest.raises(DeviceError, match=message):
        devices(trace(tmp_path, text)).check({})


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffclient,start,end\n4,0,10\n8,5,20\n".encode(),  # as Excel saves "CSV UTF-8"
        "client,start,end\n4,0,10\n8,5,20\n".encode("utf-16"),
        "\ufeffclient,start,end\r\n4,0,10\r\n8,5,20\r\n".encode("utf-16-be"),
        b"client,start,end\r\n4,0,10\r\n\r\n8,5,20\r\n,,\r\n",
        b"\n# recorded in spring\n client , start,end \n 4, 0 ,10\n\n  # and more\n8,5,20\n  \n",
        b"client,start,end,note\n4,0,10\n8,5,20,late\n",
        b'"end","client","start"\n"10","4","0"\n"20","8","5"',
        b"client,start,end\r4,0,10\r8,5,20\r",
    ],
)
def test_a_trace_is_read_as_other_programs_write_it(tmp_path, content):
    (tmp_path / "trace.csv").write_bytes(content)
    read = Recording.read(tmp_path / "trace.csv")
    assert (read.rows.tolist(), read.starts.tolist(), read.ends.tolist()) == ([0, 1], [0, 5], [10, 20])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no interval"),
        (b"\xff\xfe", "holds no interval"),
        (b"client,start,end\n# nothing\n", "holds no interval"),
        (
            b"client;start;end\n1;2;3\n",
            r"expected the columns client, start, end, found \['client;start;end'\]",
        ),
        (b"client,start,end\n# one\n\n1,nan,3\n", "line 4: .* found 1,nan,3"),
        (b"client,start,end\n1,2\n", "line 2: .* found 1,2,None"),
        (b"client,start,end\n1.5,2,3\n", "line 2: .* found 1.5,2,3"),
        (b"client,start,end\n1,2,inf\n", "line 2: .* found 1,2,inf"),
        (b"caf\xe9,start,end\n", "is no CSV file in UTF-8 or UTF-16"),
        (b"\xff\xfec\x00l", "is no CSV file"),
        (b"PK\x03\x04\x00\x00", "expected the columns"),
    ],
)
def test_what_is_no_trace_says_so(tmp_path, content, message):
    (tmp_path / "trace.csv").write_bytes(content)
    with pytest.raises(DeviceError, match=message):
        Recording.read(tmp_path / "trace.csv")


def test_a_missing_trace_is_named(tmp_path):
    wanted = trace(tmp_path, "")
    (tmp_path / "trace.csv").unlink()
    with pytest.raises(DeviceError, match=r"trace.csv cannot be read: No such file"):
        devices(wanted).check({})


# -------------------------------------------------------------------------------------- the configuration


def test_a_profile_is_a_start_that_keys_go_on_top_of():
    settings = cluster.resolve(
        "quickstart",
        ["devices.profile=phones", "devices.tiers.low.share=0.5", "devices.tiers.high={share: 0}"],
    )
    low, mid, high = settings.devices.kinds.values()
    assert (low.share, mid.share, high.share) == (0.5, 0.5, 0.0)
    assert low.compute == PROFILES["phones"]["low"]["compute"]
    assert cluster.resolve(settings.dump()).devices == settings.devices


def test_without_tiers_all_devices_are_alike():
    alike = devices()
    assert set(alike.of(range(100))) == {Device(22.5e9, 35.96e6, 11.22e6, 0.04, 2.49e-10, 7.02e-7, 4.43e-6)}
    assert alike.available(np.arange(100), 1e6).all()


@pytest.mark.parametrize("profile", PROFILES)
def test_built_in_profiles_are_whole(profile):
    kinds = cluster.resolve("quickstart", [f"devices.profile={profile}"]).devices.kinds
    assert sum(tier.share for tier in kinds.values()) == pytest.approx(1.0)


#: Watts of training, and milliwatts of the radio: up and down a Mbit/s, and while it is busy.
LTE, WIFI = (438.39, 51.97, 1288.04), (283.17, 137.01, 132.86)
WATTS = {
    "device": (5.6, LTE),
    "low": (3.6, LTE),
    "mid": (5.6, LTE),
    "high": (2.8, LTE),
    "raspberry-pi-4": (6.4, WIFI),
    "jetson-nano": (10.0, WIFI),
    "jetson-xavier-nx": (15.0, WIFI),
}


@pytest.mark.parametrize(
    ("name", "tier"), [pair for profile in PROFILES.values() for pair in profile.items()]
)
def test_energy_of_the_profiles_is_what_their_sources_come_to(name, tier):
    watts, (up, down, busy) = WATTS[name]
    assert tier["flop_energy"] == pytest.approx(watts / tier["compute"], rel=0.005)
    for milliwatts, way in ((up, "uplink"), (down, "downlink")):
        seconds_a_byte = 8 / tier[way]
        drawn = (milliwatts * tier[way] / 1e6 + busy) / 1e3
        assert tier[f"{way}_energy"] == pytest.approx(drawn * seconds_a_byte, rel=0.005)


def test_energy_does_not_vary_within_a_tier():
    drawn = devices("devices.tiers.a={share: 1, spread: 1, flop_energy: 2e-10}").of(range(20))
    assert len({device.compute for device in drawn}) == 20
    assert {device.flop_energy for device in drawn} == {2e-10}


def test_tiers_with_and_without_a_budget_mix():
    tiers = ["devices.tiers.a={share: 0.5}", "devices.tiers.b={share: 0.5, sparsity: 0.95}"]
    mixed = devices(*tiers, "algorithm.sparsity=0.9")
    found = [mixed.sparsity(client, 0.9, 1) for client in range(100)]
    assert sorted(set(found)) == [0.9, 0.95]
    assert found.count(0.95) == 50


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "devices.tiers.large.comptue=1e9",
            r"devices.tiers.large.comptue: unknown .* mean .*compute",
        ),
        ("devices.profile=phone", r"devices.profile: .*'phones'.* found 'phone'; did you mean phones\?"),
        (
            "devices.tiers.large.availability.name=trace",
            r"devices.tiers.large.availability: a trace needs its CSV file, path=FILE; found none",
        ),
        ("devices.tiers.large.dropout=2", r"devices.tiers.large.dropout: .*less than or equal to 1"),
        (
            "schedule.deadline=-1",
            r"schedule.deadline: -1.0 is out of range; allowed: a finite number",
        ),
        ("schedule.buffer=3", "schedule.buffer: .* no such field; .*; buffer belongs to buffered"),
        ("shift.every=3", r"shift.every: needs shift.round"),
        (
            "shift={round: 2, partition: {alhpa: 1}}",
            r"shift.partition.alhpa: lda has no such field; ",
        ),
        ("shift={round: 2, partition: {clients: 3}}", "shift.partition.clients: a shift keeps the clients"),
        ("shift.round=20", r"shift.round: 20 is beyond rounds: 2"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_error(override, message):
    with pytest.raises(ConfigError, match=message):
        config(override)


def test_a_device_that_is_too_small_is_refused_before_anything_starts(cache):
    settings = tiny_federation(cache, devices={"tiers": {"tiny": {"share": 1.0, "memory": 5000}}})
    with pytest.raises(DeviceError, match=r"tiers.tiny.memory: 5,000 bytes, but training takes [\d,]+"):
        Federation.of(settings)
    unused = {"tiny": {"share": 0.0, "memory": 5000}, "large": {"share": 1.0}}
    Federation.of(tiny_federation(cache, devices={"tiers": unused}))


def test_training_takes_weights_gradient_and_activations(cache):
    federation = Federation.of(tiny_federation(cache, model={"name": "mlp", "hidden": [16]}))
    # 64 x 16 + 16 and 16 x 3 + 3 parameters, twice; a batch of 8 leaves 64 (flat), 16, 16 (ReLU) and 3.
    assert federation.training_bytes == 4 * (2 * (1040 + 51) + 8 * (64 + 16 + 16 + 3))


def test_the_moments_of_a_local_optimizer_take_memory(cache):
    plain, momentum, adamw = (
        Federation.of(tiny_federation(cache, local={"optimizer": optimizer}))
        for optimizer in ({"name": "sgd"}, {"name": "sgd", "momentum": 0.9}, {"name": "adamw"})
    )
    one = 4 * plain.layout.trained_size
    assert momentum.training_bytes == plain.training_bytes + one
    assert adamw.training_bytes == plain.training_bytes + 2 * one
