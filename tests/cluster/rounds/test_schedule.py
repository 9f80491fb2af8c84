"""Synchronous rounds on the simulated clock: who counts, who is left out, and when a round is over."""

import pickle

import numpy as np
import pytest

from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.buffered import Buffered
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from cluster.rounds.setbacks import DivergedError
from cluster.rounds.synchronous import Synchronous
from cluster.simulation.devices import Devices
from cluster.transport.downlink import Sender
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

#: So fast that a visit takes its latency alone, to the last bit.
INSTANT = {"compute": 1e40, "uplink": 1e40, "downlink": 1e40}


def these(clients=()):
    """A sampler that always asks the same clients."""
    return lambda rng, count, candidates: np.array(clients)


def only(clients):
    return {
        "name": "tests.cluster.rounds.test_schedule:these",
        "clients": [int(client) for client in clients],
    }


def two_kinds(fast=1.0, slow=5.0, **slow_too):
    """Half of the six clients take ``fast`` seconds, the others ``slow``."""
    kinds = {
        "fast": {"share": 0.5, "latency": fast, **INSTANT},
        "slow": {"share": 0.5, "latency": slow, **INSTANT, **slow_too},
    }
    return {"tiers": kinds}


def members(config):
    """The clients of each tier, ascending."""
    tiers = Devices(config).tiers
    return [np.flatnonzero(tiers == index).tolist() for index in range(tiers.max() + 1)]


def recorded(config, folder):
    """A run, and what the engine was asked and reported in each round."""
    federation = Federation.of(config)
    engine, calls = InlineEngine(federation.setup()), []
    play = engine.run

    def recording(broadcast, tasks, chunks, meanwhile):
        outcome = play(broadcast, tasks, chunks, meanwhile)
        if tasks:
            calls.append((tasks, list(outcome.reports)))
        return outcome

    engine.run = recording
    driver = Driver(RunFolder.create(folder, config), federation, engine)
    driver.run()
    return driver, driver.folder.rounds(), calls


def assert_same_model(one, other):
    assert one.numpy().tobytes() == other.numpy().tobytes()


# ------------------------------------------------------------------------------------------ its length


@pytest.mark.parametrize("flops", ["dense", "sparse"])
def test_a_round_lasts_as_long_as_its_slowest_visit(cache, tmp_path, flops):
    kinds = {
        "a": {"share": 0.5, "compute": 1e6, "uplink": 1e4, "downlink": 2e4, "latency": 0.25},
        "b": {"share": 0.5, "compute": 3e6, "uplink": 2e4, "downlink": 5e4, "latency": 0.5},
    }
    config = tiny_federation(
        cache,
        algorithm={"name": "topk", "sparsity": 0.8},
        devices={"tiers": kinds, "flops": flops},
        rounds=3,
        local={"epochs": 2},
    )
    _, lines, calls = recorded(config, tmp_path / "run")
    tiers, so_far = Devices(config).tiers, 0.0
    for line, (tasks, reports) in zip(lines, calls, strict=True):
        sent = {task.client: task.downlink_bytes for task in tasks}
        assert sum(sent.values()) == line["comm/downlink_bytes"]
        seconds = []
        for report in reports:
            kind = kinds["ab"[tiers[report.client]]]
            work = report.measured.flops_dense if flops == "dense" else report.measured.flops_sparse.sum()
            download, upload = (
                8 * sent[report.client] / kind["downlink"],
                8 * report.uplink_bytes / kind["uplink"],
            )
            seconds.append(download + work / kind["compute"] + upload + kind["latency"])
            assert report.visit_s == pytest.approx(seconds[-1], rel=1e-12)
        assert line["time/round_simulated_s"] == pytest.approx(max(seconds), rel=1e-12)
        so_far += line["time/round_simulated_s"]
        assert line["time/simulated_s"] == pytest.approx(so_far, rel=1e-12)
        assert line["clients/late"] == line["clients/stragglers"] == line["clients/dropped"] == 0


@pytest.mark.parametrize("flops", ["dense", "sparse"])
@pytest.mark.parametrize("kind", [Synchronous, Buffered])
def test_the_energy_of_a_round(cache, tmp_path, monkeypatch, kind, flops):
    """Of who trained what it computed and sent; of all that were sent the model what that took to receive."""
    kinds = {
        "a": {"share": 0.5, "flop_energy": 2e-9, "uplink_energy": 5e-6, "downlink_energy": 1e-6},
        "b": {"share": 0.5, "flop_energy": 3e-9, "uplink_energy": 7e-6, "downlink_energy": 4e-6},
    }
    buffered = {"name": "buffered", "buffer": 2, "concurrency": 3}
    config = tiny_federation(
        cache,
        algorithm={"name": "topk", "sparsity": 0.8},
        devices={"tiers": {name: tier | {"dropout": 0.3} for name, tier in kinds.items()}, "flops": flops},
        schedule=buffered if kind is Buffered else {"name": "synchronous"},
        cohort=2 if kind is Buffered else 4,
        rounds=4,
    )
    sent, came, deliver, play = [], [], Sender.deliver, kind.round

    def delivering(self, clients, parcel):
        sent[-1] += [(client, parcel.full_bytes) for client in clients]
        deliver(self, clients, parcel)

    def playing(self, *given):
        sent.append([])
        result = play(self, *given)
        came.append(result.outcome.reports[:])
        return result

    monkeypatch.setattr(Sender, "deliver", delivering)
    monkeypatch.setattr(kind, "round", playing)
    _, lines, _ = recorded(config, tmp_path / "run")
    tiers, so_far = Devices(config).tiers, 0.0
    for line, asked, reports in zip(lines, sent, came, strict=True):
        joules = sum(kinds["ab"[tiers[client]]]["downlink_energy"] * size for client, size in asked)
        for report in reports:
            tier, own = kinds["ab"[tiers[report.client]]], report.measured
            work = own.flops_dense if flops == "dense" else own.flops_sparse.sum() + own.flops_frozen
            joules += tier["flop_energy"] * work + tier["uplink_energy"] * report.uplink_bytes
        so_far += joules
        assert line["energy/joules"] == pytest.approx(joules, rel=1e-12)
        assert line["energy/joules_total"] == pytest.approx(so_far, rel=1e-12)
    assert sum(line["clients/dropped"] for line in lines) > 0


def test_a_device_that_exploits_zeros_is_back_earlier(cache, tmp_path):
    def seconds(flops):
        config = tiny_federation(
            cache,
            algorithm={"name": "fixed_mask", "sparsity": 0.9},
            devices={"tiers": {"a": {"share": 1.0, "compute": 1e6}}, "flops": flops},
        )
        return recorded(config, tmp_path / flops)[1][-1]["time/simulated_s"]

    assert seconds("sparse") < 0.7 * seconds("dense")


def test_a_round_of_no_duration(cache, tmp_path):
    config = tiny_federation(cache, devices={"tiers": {"a": {"share": 1.0, "latency": 0.0, **INSTANT}}})
    _, lines, _ = recorded(config, tmp_path / "run")
    assert lines[-1]["time/simulated_s"] < 1e-30
    assert lines[-1]["clients/late"] == 0


# ------------------------------------------------------------------------------------------- who counts


def test_who_cannot_make_the_deadline_is_not_trained(cache, tmp_path):
    settings = {"cohort": 6, "rounds": 3, "devices": two_kinds(slow=5.0)}
    config = tiny_federation(cache, **settings, schedule={"deadline": 2.0})
    fast, slow = members(config)
    driver, lines, calls = recorded(config, tmp_path / "run")
    for line, (tasks, _) in zip(lines, calls, strict=True):
        assert [task.client for task in tasks] == fast
        assert (line["clients/trained"], line["clients/stragglers"], line["clients/late"]) == (3, 3, 0)
        # Nobody is left to wait for when the three are back.
        assert line["time/round_simulated_s"] == 1.0
    alone = tiny_federation(cache, **settings, sampler=only(fast))
    assert_same_model(driver.state.weights, run_inline(alone, tmp_path / "alone").state.weights)
    assert len(slow) == 3


def test_who_is_trained_and_still_late_is_left_out(cache, tmp_path):
    # Some 1,500 parameters, 48,000 bits: about 48 s at 1,000 bit/s, of which nothing is known beforehand.
    settings = {"cohort": 6, "rounds": 2, "devices": two_kinds(slow=1.0, uplink=1000.0)}
    config = tiny_federation(cache, **settings, schedule={"deadline": 2.0})
    fast, slow = members(config)
    driver, lines, calls = recorded(config, tmp_path / "run")
    for line, (tasks, reports) in zip(lines, calls, strict=True):
        assert [task.client for task in tasks] == sorted(fast + slow)
        assert [r.client for r in reports if r.late] == slow
        assert (line["clients/trained"], line["clients/stragglers"], line["clients/late"]) == (6, 0, 3)
        assert line["time/round_simulated_s"] == 2.0  # the server waits for them until the deadline
        assert line["comm/uplink_bytes"] == sum(r.uplink_bytes for r in reports)  # they did send
    alone = tiny_federation(cache, **settings, sampler=only(fast))
    assert_same_model(driver.state.weights, run_inline(alone, tmp_path / "alone").state.weights)


def test_the_deadline_itself_is_in_time(cache, tmp_path):
    config = tiny_federation(cache, cohort=6, devices=two_kinds(slow=2.0), schedule={"deadline": 2.0})
    _, lines, _ = recorded(config, tmp_path / "run")
    assert [line["clients/late"] + line["clients/stragglers"] for line in lines] == [0, 0]


@pytest.mark.parametrize("slow", [5.0, 1.0], ids=["folded by the actors", "decided by the driver"])
def test_of_more_clients_the_first_count(cache, tmp_path, slow):
    settings = {"cohort": 3, "rounds": 2, "devices": two_kinds(slow=slow)}
    config = tiny_federation(cache, **settings, schedule={"over_selection": 2.0})
    fast, _ = members(config)
    driver, lines, calls = recorded(config, tmp_path / "run")
    # Where all arrive at 1 s, the lower index goes first.
    first = fast if slow == 5.0 else [0, 1, 2]
    for line, (_, reports) in zip(lines, calls, strict=True):
        assert (line["clients/trained"], line["clients/late"]) == (6, 3)
        assert line["time/round_simulated_s"] == 1.0
        assert sum(r.folded for r in reports) == (3 if slow == 5.0 else 0)
        assert sum(r.message is not None for r in reports) == (3 if slow == 5.0 else 6)
    alone = tiny_federation(cache, **settings, sampler=only(first))
    assert_same_model(driver.state.weights, run_inline(alone, tmp_path / "alone").state.weights)


def test_drop_outs_download_and_never_answer(cache, tmp_path):
    kinds = {"a": {"share": 1.0, "dropout": 0.5, "latency": 1.0, **INSTANT}}
    settings = {"cohort": 6, "rounds": 4, "devices": {"tiers": kinds}}
    config = tiny_federation(cache, **settings)
    _, lines, calls = recorded(config, tmp_path / "run")
    everyone = np.arange(6)
    gone = [int(Devices(config).drop_outs(everyone, number).sum()) for number in (1, 2, 3, 4)]
    assert sum(gone) > 0
    assert [line["clients/dropped"] for line in lines] == gone
    assert [line["clients/trained"] for line in lines] == [6 - lost for lost in gone]
    for line, (tasks, _) in zip(lines, calls, strict=True):
        assert line["comm/downlink_bytes"] == 6 * tasks[0].downlink_bytes
    # With a deadline the server does not know that they are gone.
    late = tiny_federation(cache, **settings, schedule={"deadline": 3.0})
    _, lines, _ = recorded(late, tmp_path / "deadline")
    assert [line["time/round_simulated_s"] for line in lines] == [3.0 if lost else 1.0 for lost in gone]


def trace(tmp_path, text):
    (tmp_path / "trace.csv").write_text(f"client,start,end\n{text}")
    availability = {"name": "trace", "path": str(tmp_path / "trace.csv")}
    return {"tiers": {"a": {"share": 1.0, "latency": 10.0, **INSTANT, "availability": availability}}}


def test_availability_follows_the_simulated_time(cache, tmp_path):
    # Clients 0 to 2 are there for the first 10 s of every 20 s, 3 to 5 for the others; a round takes 10 s.
    text = "".join(f"{client},{0 if client < 3 else 10},{10 if client < 3 else 20}\n" for client in range(6))
    settings = {"cohort": 6, "rounds": 4, "devices": trace(tmp_path, text)}
    _, lines, calls = recorded(tiny_federation(cache, **settings), tmp_path / "run")
    assert [[task.client for task in tasks] for tasks, _ in calls] == [[0, 1, 2], [3, 4, 5]] * 2
    assert [line["clients/unavailable"] for line in lines] == [3] * 4
    settings |= {"cohort": 2, "sampler": {"name": "availability"}}
    _, lines, calls = recorded(tiny_federation(cache, **settings), tmp_path / "sampled")
    assert [line["clients/unavailable"] for line in lines] == [0] * 4
    assert [{task.client // 3 for task in tasks} for tasks, _ in calls] == [{0}, {1}, {0}, {1}]


def test_a_round_in_which_nobody_answers_leaves_the_model(cache, tmp_path):
    # Everybody is away from second 60 to 170.
    text = "".join(f"{client},0,60\n{client},170,200\n" for client in range(6))
    devices = trace(tmp_path, text)
    devices["tiers"]["a"]["latency"] = 60.0
    config = tiny_federation(cache, cohort=6, rounds=4, devices=devices)
    run = run_inline(config, tmp_path / "run")
    assert [line["clients/trained"] for line in run.lines] == [6, 0, 0, 6]
    assert [line["time/simulated_s"] for line in run.lines] == [60.0, 120.0, 180.0, 240.0]
    assert [line["train/loss"] is None for line in run.lines] == [False, True, True, False]
    assert_same_model(run.states[1].weights, run.states[3].weights)
    assert run.lines[1]["test/accuracy"] == run.lines[0]["test/accuracy"]


def test_a_stage_before_round_1_needs_somebody(cache, tmp_path):
    config = tiny_federation(
        cache,
        algorithm={"name": "flash", "sparsity": 0.8, "stage1": "sensitivity", "init_fraction": 1.0},
        devices=two_kinds(fast=5.0, slow=5.0),
        schedule={"deadline": 1.0},
    )
    with pytest.raises(DivergedError, match=r"no update of the stage before round 1 .* no client answered"):
        run_inline(config, tmp_path / "run")


def test_a_model_is_written_once_into_a_broadcast(cache, tmp_path, monkeypatch):
    """The server's own and what clients decode are one array unless the downlink is lossy."""
    play, sent = InlineEngine.run, []

    def looking(engine, broadcast, *others):
        sent.append(broadcast)
        return play(engine, broadcast, *others)

    monkeypatch.setattr(InlineEngine, "run", looking)
    run_inline(tiny_federation(cache), tmp_path / "run")
    assert sent
    for broadcast in sent:
        assert pickle.dumps(broadcast).count(broadcast.weights.tobytes()) == 1
        assert broadcast.nbytes == broadcast.weights.nbytes
