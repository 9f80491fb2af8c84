"""What clients keep: committed with the round, in the checkpoint, with whoever plays the client."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

import cluster
from cluster.exchange import ClientError, ClientReport
from cluster.federation import Federation, MemoryNeeded
from cluster.measured import Measured
from cluster.records.checkpoint import CheckpointError, read_meta
from cluster.records.kept_files import KeptState, drop_unused, load_kept, save_kept
from cluster.records.run_folder import RunFolder, comparable
from cluster.rounds.kept import Kept
from cluster.transport.uplink import Uplink
from tests.cluster.records.interrupted_runs import ROUNDS, assert_same_run, drive
from tests.keeping_method import Keeping, KeepingClient
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

KEEPING = {"name": "tests.keeping_method:Keeping"}


def keeping(place, **more):
    return tiny_federation(place, **({"algorithm": KEEPING, "rounds": ROUNDS, "checkpoint_every": 2} | more))


def visits(run):
    """How often each client has come, by what it keeps."""
    return {client: int(s.arrays["visits"][0]) for client, s in run.driver._schedule.kept.states.items()}


def report(client, **values):
    usual = {"measured": Measured.nothing(3, 1), "seconds": 0.0, "phases": (0.0,) * 4, "refused": None}
    usual |= {"uplink_bytes": 1, "uplink_nonzero_bytes": 1, "upload_density": 1.0}
    return ClientReport(client=client, **(usual | values))


@pytest.mark.parametrize("late", [True, False])
def test_who_keeps_the_new_and_who_the_old(late):
    kept, old, new = Kept(late=late), np.zeros(2, np.float32), {"x": np.ones(2, np.float32)}
    kept.states = {client: KeptState(1, {"x": old}) for client in range(4)}
    before = kept.states
    reports = [
        report(0, kept=new),
        report(1, kept=new, late=True),
        report(2, kept=new, refused="too far away"),
        report(3, refused="failed", skipped=True),
    ]
    rest = kept.commit(2, reports)
    assert [kept.of(client)["x"].tolist() for client in range(4)] == [[1, 1], [late, late], [0, 0], [0, 0]]
    assert [kept.states[client].round for client in range(4)] == [2, 1 + late, 1, 1]
    assert rest == [replace(one, kept={}) for one in reports]
    assert before[0].arrays["x"] is old  # a snapshot of it is a value
    new["x"][:] = 7
    assert kept.of(0)["x"].tolist() == [1, 1]
    assert kept.of(9) == {}


def test_a_client_comes_back_to_what_it_kept(cache, tmp_path):
    run = run_inline(keeping(cache), tmp_path / "run")
    played = [client for _, client in run.uploads]
    assert visits(run) == {client: played.count(client) for client in set(played)}
    assert max(visits(run).values()) >= 3
    size = 4 * (run.driver.layout.trained_size + 1)
    met = [len({c for n, c in run.uploads if n <= number}) for number in range(1, ROUNDS + 1)]
    assert [line["clients/kept_bytes"] for line in run.lines] == [size * count for count in met]
    other = run_inline(keeping(cache, algorithm={**KEEPING, "strength": 0.0}), tmp_path / "other")
    assert not np.array_equal(run.state.weights.numpy(), other.state.weights.numpy())


def test_a_refused_client_keeps_what_it_had(cache, tmp_path, monkeypatch):
    fold = Uplink.fold
    config = keeping(cache, cohort=6)
    monkeypatch.setattr(
        Uplink,
        "fold",
        lambda self, total, client, *more: "planted" if client == 2 else fold(self, total, client, *more),
    )
    run = run_inline(config, tmp_path / "run")
    assert visits(run) == dict.fromkeys((0, 1, 3, 4, 5), ROUNDS)


def test_who_is_late_keeps_the_new_and_who_never_answers_what_it_had(cache, tmp_path):
    slow = {"compute": 1e6, "share": 0.5}
    tiers = {"fast": {"compute": 1e12, "share": 0.5}, "slow": slow}
    config = keeping(cache, cohort=2, devices={"tiers": tiers}, schedule={"over_selection": 3.0})
    run = run_inline(config, tmp_path / "run")
    late = sum(line["clients/late"] for line in run.lines)
    assert late == 4 * ROUNDS
    assert visits(run) == dict.fromkeys(range(6), ROUNDS)
    for tier in tiers.values():
        tier["dropout"] = 0.5
    config = keeping(cache, cohort=6, devices={"tiers": tiers})
    run = run_inline(config, tmp_path / "dropping")
    dropped = sum(line["clients/dropped"] for line in run.lines)
    assert 0 < dropped == 6 * ROUNDS - sum(visits(run).values())


@pytest.mark.parametrize(("method", "name"), [("ef21", "estimate"), ("feddyn", "h"), ("scaffold", "c")])
def test_the_server_holds_the_mean_of_what_clients_keep_though_some_are_late(cache, tmp_path, method, name):
    tiers = {"fast": {"compute": 1e9, "spread": 0.5, "share": 0.5}, "slow": {"compute": 1e6, "share": 0.5}}
    config = tiny_federation(
        cache,
        rounds=8,
        cohort=3,
        algorithm={"name": method},
        devices={"tiers": tiers},
        schedule={"over_selection": 2.0},
    )
    run = run_inline(config, tmp_path / "run")
    assert sum(line["clients/late"] for line in run.lines) == 3 * 8
    kept = run.driver._schedule.kept.states.values()
    mean = sum(state.arrays[name].astype(np.float64) for state in kept) / 6
    arrays = {**run.state.arrays, **run.driver.layout.split(run.state.weights, run.driver.layout.carried)}
    np.testing.assert_allclose(arrays[name].numpy(), mean, atol=1e-6)
    assert np.abs(mean).max() > 1e-3


def test_an_evaluation_visit_reads_and_never_commits(cache, tmp_path, monkeypatch):
    seen = []

    def look(self):
        seen.append(int(self.visit.kept["visits"]))

    monkeypatch.setattr(KeepingClient, "before_forward", look)
    judged = {"every": 1, "clients": 6, "after": 6}
    run = run_inline(keeping(cache, evaluate_clients=judged), tmp_path / "judged")
    assert max(seen) == max(visits(run).values()) + 1  # the visit that is only evaluated counts itself
    plain = run_inline(keeping(cache), tmp_path / "plain")
    assert visits(run) == visits(plain)
    assert run.state.weights.numpy().tobytes() == plain.state.weights.numpy().tobytes()


def test_a_method_may_say_what_a_client_computes_with_itself(cache, tmp_path, monkeypatch):
    judged = {"every": ROUNDS, "clients": 6, "after": 6}
    last = run_inline(keeping(cache, evaluate_clients=judged), tmp_path / "sent").lines[-1]
    monkeypatch.setattr(
        Keeping,
        "personal_weights",
        lambda self, weights, received, kept, layout: weights * (kept["visits"] > 100),
    )
    personal = run_inline(keeping(cache, evaluate_clients=judged), tmp_path / "own").lines[-1]
    assert personal["clients/accuracy_mean"] == last["clients/accuracy_mean"]
    assert personal["clients/accuracy_mean_after"] != last["clients/accuracy_mean_after"]


@pytest.mark.parametrize("schedule", ["synchronous", "buffered"])
@pytest.mark.parametrize("at", range(1, ROUNDS))
def test_interrupted_equals_uninterrupted(cache, tmp_path, at, schedule):
    more = {"schedule": {"name": "buffered", "buffer": 2, "concurrency": 3}} if schedule == "buffered" else {}
    config = keeping(cache, checkpoint_every=1, **more)
    federation = Federation.of(config)
    whole, cut = (RunFolder.create(tmp_path / name, config) for name in ("whole", "cut"))
    drive(whole, federation)
    drive(cut, federation, killed_at=at)
    drive(cut, federation)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_copy_on_shared_storage_has_it_too(cache, tmp_path):
    config = keeping(cache, checkpoint_every=1, checkpoint_uri=f"file://{tmp_path}/shared")
    cluster.run(config, tmp_path / "whole")
    short = keeping(cache, checkpoint_every=1, checkpoint_uri=f"file://{tmp_path}/shared", stop_after=3)
    cluster.run(short, tmp_path / "run")
    resumed = cluster.resume(
        f"file://{tmp_path}/shared/run", ["stop_after=null"], tmp_path / "elsewhere", trust=True
    )
    models = [(folder / "model.safetensors").read_bytes() for folder in (resumed.folder, tmp_path / "whole")]
    assert models[0] == models[1]
    lines = [RunFolder(folder).rounds() for folder in (resumed.folder, tmp_path / "whole")]
    assert [comparable(line) for line in lines[0]] == [comparable(line) for line in lines[1]]


# --------------------------------------------------------------------------------------------- its files


def states(**rounds):
    return {int(c[1:]): KeptState(r, {"x": np.full(3, r, np.float32)}) for c, r in rounds.items()}


def write(folder, number, found):
    """As the driver does; a checkpoint of which only the index matters here."""
    index = save_kept(folder, number, found)
    meta = {"round": number, "mask_version": 0, "driver": {}, "digest": "", "kept": index}
    folder.mkdir(exist_ok=True)
    save_file(
        {"w": np.zeros(1, np.float32)}, folder / f"round-{number:06d}.safetensors", {"meta": json.dumps(meta)}
    )
    drop_unused(folder)
    return index


def test_only_what_changed_is_written_again(tmp_path):
    first = write(tmp_path, 2, states(c0=1, c1=2, c2=2))
    assert first == {"kept-000002.safetensors": {"clients": [[0, 1], [1, 2], [2, 2]], "count": 3}}
    second = write(tmp_path, 4, states(c0=1, c1=4, c2=2, c3=3))
    assert second == {
        "kept-000002.safetensors": {"clients": [[0, 1], [2, 2]], "count": 3},
        "kept-000004.safetensors": {"clients": [[1, 4], [3, 3]], "count": 2},
    }
    found = load_kept(tmp_path, second)
    assert {c: (s.round, s.arrays["x"].tolist()) for c, s in found.items()} == {
        0: (1, [1, 1, 1]),
        1: (4, [4, 4, 4]),
        2: (2, [2, 2, 2]),
        3: (3, [3, 3, 3]),
    }
    # Of the first file a third is in use: what is left of it moves.
    third = write(tmp_path, 6, states(c0=1, c1=4, c2=6, c3=3))
    assert third == {
        "kept-000004.safetensors": {"clients": [[1, 4], [3, 3]], "count": 2},
        "kept-000006.safetensors": {"clients": [[0, 1], [2, 6]], "count": 2},
    }
    assert {path.name for path in tmp_path.glob("kept*")} == {*first, *second, *third}
    (tmp_path / "round-000002.safetensors").unlink()
    (tmp_path / "round-000004.safetensors").unlink()
    drop_unused(tmp_path)
    assert {path.name for path in tmp_path.glob("kept*")} == set(third)
    assert read_meta(tmp_path / "round-000006.safetensors")["kept"] == third


def test_a_damaged_or_missing_file_is_named(tmp_path):
    index = write(tmp_path, 2, states(c0=1))
    path = tmp_path / "kept-000002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"kept-000002.safetensors: damaged checkpoint .checksum"):
        load_kept(tmp_path, index)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"kept-000002.safetensors: there is no such"):
        load_kept(tmp_path, index)


# ------------------------------------------------------------------------------------------- what is refused


def test_what_is_kept_must_be_declared(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(Keeping, "keeps", lambda self, layout: {"last": layout.trained_size})
    with pytest.raises(ClientError, match=r"visit.kept\['visits'\] holds 1 values .* declares last of"):
        cluster.run(keeping(cache), tmp_path / "run")


def test_more_than_the_machine_holds_is_refused_before_the_start(cache, tmp_path, monkeypatch):
    federation = Federation.of(keeping(cache))
    size = federation.kept_bytes
    assert size == 4 * (federation.layout.trained_size + 1)
    federation.check_memory(6 * size)
    with pytest.raises(MemoryNeeded, match=r"each of the 6 clients keeps .* MB"):
        federation.check_memory(6 * size - 1)
    monkeypatch.setattr(Keeping, "keeps_updates", True)
    monkeypatch.setattr(Keeping, "keeps", lambda self, layout: {})
    federation.check_memory(4 * 4 * federation.layout.up_size)
    with pytest.raises(MemoryNeeded, match="every update of a round: 4 of"):
        federation.check_memory(4 * 4 * federation.layout.up_size - 1)


def test_nothing_is_kept_where_nothing_is_declared(cache, tmp_path):
    run = run_inline(tiny_federation(cache), tmp_path / "run")
    assert "clients/kept_bytes" not in run.lines[-1]
    assert not list((tmp_path / "run" / "checkpoints").glob("kept*"))
