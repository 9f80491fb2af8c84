"""The Ray that a run starts for itself: reachable from this machine alone, and in no other Ray's way."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

#: Starts a private cluster with an actor on it, says so, and stays until its stdin ends.
PRIVATE = """
import sys
import ray
from cluster.actors.ray_session import connection, private_cluster

with connection("local", **private_cluster(1000, 1)):
    actor = ray.remote(type("Idle", (), {"ready": lambda self: None})).remote()
    ray.get(actor.ready.remote())
    print(ray.util.get_node_ip_address(), flush=True)
    sys.stdin.read()
"""


def start():
    """A process with a private cluster below it."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRIVATE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "127.0.0.1\n"
    return process


@pytest.fixture(scope="module")
def private():
    """The process; at the end nothing of it is left."""
    process = start()
    everything = family(psutil.Process(process.pid))
    yield everything[0]
    process.communicate("")
    assert process.returncode == 0
    assert not left_of(everything)


def left_of(processes):
    """Those that outlive the first one by more than they need to end; Ray's agents used to take a minute."""
    return psutil.wait_procs(processes, timeout=30)[1]


def family(process):
    """The process and everything below it."""
    return [process, *process.children(recursive=True)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell of children's sockets")
def test_it_listens_on_loopback_alone_and_on_no_port_of_another_ray(private):
    found = {
        connection.laddr
        for process in family(private)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(found) >= 5  # the store of the cluster's state, the raylet, agents, the actor
    assert {address.ip.removeprefix("::ffff:") for address in found} == {"127.0.0.1"}
    # What `ray start` gives the dashboard's agent, the metrics of dashboard and autoscaler, the head.
    assert not {address.port for address in found} & {52365, 44227, 44217, 6379, 8265}


def test_nobody_tails_its_logs_and_nobody_scales_it(private):
    commands = " ".join(" ".join(process.cmdline()) for process in family(private))
    assert "gcs_server" in commands
    assert "log_monitor" not in commands
    assert "monitor.py" not in commands


def test_nothing_outlives_a_process_that_is_killed():
    process = start()
    everything = family(psutil.Process(process.pid))
    assert len(everything) >= 7
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert not left_of(everything)


def test_a_terminal_that_closes_leaves_it_alone(private):
    told = os.getsid(private.pid)  # what is in another session is not told
    before = [process for process in family(private) if os.getsid(process.pid) == told]
    assert len(before) >= 6
    for process in before[1:]:
        process.send_signal(signal.SIGHUP)
    with pytest.raises(psutil.TimeoutExpired):
        before[0].wait(1.0)
    assert all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in before)


def test_ray_is_left_as_it_was(monkeypatch):
    from ray._private import parameter

    from cluster.actors.ray_session import _on_loopback

    made = parameter.RayParams
    monkeypatch.setenv("DASHBOARD_METRIC_PORT", "4711")
    with _on_loopback():
        own = parameter.RayParams(node_ip_address=None, num_cpus=3)
        assert (own.node_ip_address, own.dashboard_agent_listen_port, own.num_cpus) == ("127.0.0.1", 0, 3)
        assert os.environ["DASHBOARD_METRIC_PORT"] == "0"
    assert parameter.RayParams is made
    assert os.environ["DASHBOARD_METRIC_PORT"] == "4711"
