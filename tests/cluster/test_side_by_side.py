"""Runs of a grid that share a cluster: how many, with how many actors each, alone when one of them ends."""

import os
import signal
import threading

import pytest

from cluster.actors import ray_session
from cluster.actors.ray_session import ClusterError
from cluster.configuration.config import resolve
from cluster.grid import expand, run_grid, shares_of
from cluster.rounds.setbacks import DivergedError
from tests.cluster.test_grid import BASE, lines, quiet, written

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_code_of_any_run_travels_to_the_cluster(tmp_path, monkeypatch):
    def connection(address, **arguments):
        raise ClusterError(str(arguments.get("runtime_env")))

    monkeypatch.setattr(ray_session, "connection", connection)
    methods = "[topk, 'tests.example_method:RandomK']"
    base = BASE.replace("execution: inline", "execution: ray")
    path = written(tmp_path, f"{base}\naddress: auto\ngrid: {{algorithm.name: {methods}}}\n")
    for overrides, environment in (([], {"working_dir": os.getcwd()}), (["algorithm.name=topk"], None)):
        with pytest.raises(ClusterError) as found:
            run_grid(expand(path, overrides), tmp_path / "out", started=quiet)
        assert str(found.value) == str(environment)


@pytest.mark.parametrize(
    ("room", "cohort", "actors", "runs", "at_once", "expected"),
    [
        (2, 10, None, 9, None, (1, 2)),  # two cores: one run on both
        (64, 10, None, 9, None, (6, 10)),  # six cohorts fit
        (64, 10, None, 3, None, (3, 10)),  # no more than there are runs, and no actor without a client
        (64, 10, None, 9, 8, (8, 8)),
        (2, 10, None, 9, 2, (2, 1)),
        (7, 10, 2, 9, None, (3, 2)),  # a number of actors that was asked for is each run's
        (2, 2, 4, 9, None, (1, 4)),  # that it does not fit is said when it is placed
    ],
)
def test_shares_by_hand(room, cohort, actors, runs, at_once, expected):
    config = resolve("quickstart", [f"cohort={cohort}", f"actors={'null' if actors is None else actors}"])
    assert shares_of(room, config, runs, at_once) == expected


def test_more_at_once_than_there_is_room_for_is_refused():
    with pytest.raises(ClusterError, match=r"runs_at_once: 3 runs with 1 actors each, .* room for 2"):
        shares_of(2, resolve("quickstart"), 9, 3)


# ------------------------------------------------------------------------------------------ side by side


@pytest.fixture(scope="module")
def two_cores(start_ray):
    start_ray(2)


SIDE_BY_SIDE = f"""{BASE.replace("rounds: 3", "rounds: 5").replace("execution: inline", "execution: ray")}
runs_at_once: 2
evaluate_clients: {{every: 1, after: 2}}
max_update_norm: 1000.0
grid:
  local.lr: [0.1, 1.0e+20, 0.2]
"""


@pytest.mark.timeout(600)  # eight processes that import torch, on a machine that may be busy
def test_runs_side_by_side_fail_stop_and_go_on_alone(tmp_path, two_cores, capsys):
    path = written(tmp_path, SIDE_BY_SIDE)
    threads, failed = [], threading.Event()

    def started(name, config):
        assert config.actors == 1
        threads.append(threading.current_thread())

        def on_line(line):
            # The signal arrives at the main thread while a run is under way in another.
            if name == "lr0.2" and line["round"] == 1:
                assert failed.wait(60)
                os.kill(os.getpid(), signal.SIGINT)

        return on_line

    def ended(name, result):
        if name == "lr1e_20":
            failed.set()

    outcome = run_grid(expand(path), tmp_path / "out", started=started, ended=ended)
    assert threading.main_thread() not in threads
    assert isinstance(outcome.failures["lr1e_20"], DivergedError)
    assert outcome.results["lr0.1"].ended
    assert not outcome.results["lr0.2"].ended
    assert "stopping after this round" in capsys.readouterr().err

    # Run again, what is complete is skipped and what was stopped goes on.
    threads.clear()
    again = run_grid(expand(path, ["local.lr=[0.1,0.2]"]), tmp_path / "out", started=started)
    assert len(threads) == 1
    assert all(result.summary["complete"] for result in again.results.values())

    # The same bits as in this process and one after the other, also of what clients are judged on.
    inline = expand(path, ["execution=inline", "runs_at_once=1", "local.lr=[0.1,0.2]"])
    run_grid(inline, tmp_path / "inline", started=quiet)
    for name in ("lr0.1", "lr0.2"):
        one, other = (tmp_path / kind / name for kind in ("out", "inline"))
        assert lines(one) == lines(other)
        for file in ("model.safetensors", "clients.csv"):
            assert (one / file).read_bytes() == (other / file).read_bytes()
