"""Ray's metrics port tells of a run's rounds, and the dashboard draws exactly what it tells."""

import json
import re
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

import cluster
from cluster.actors.gauges import GAUGES, values_of
from cluster.actors.ray_session import ClusterError, connection
from cluster.workload.objectives import selecting

pytestmark = pytest.mark.usefixtures("no_pictures")

DASHBOARD = Path(__file__).parents[3] / "ray_configs" / "grafana-dashboard.json"

LINE = {
    "round": 7,
    "comm/uplink_bytes": 1200,
    "comm/downlink_bytes": 3400,
    "clients/trained": 10,
    "time/round_s": 4.0,
    "time/actors": 2,
    "time/lost_actors": 1,
    "time/clients_train_s": 3.0,
    "time/clients_encode_s": 0.5,
    "time/clients_decode_s": 0.25,
    "time/clients_fold_s": 0.25,
    "time/clients_evaluate_s": 2.0,
}


@pytest.fixture
def metrics_port():
    """The metrics port of a Ray of the test's own, as start_ray's, but quick to report what it measures."""
    import ray

    quick = {"metrics_report_interval_ms": 200}
    started = connection(
        "local", num_cpus=2, include_dashboard=False, object_store_memory=2**27, _system_config=quick
    )
    with ExitStack() as stack:
        try:
            stack.enter_context(started)
        except ClusterError as error:  # on a machine so busy that Ray gives up its own agent
            pytest.skip(f"no metrics port to be had: {error}")
        yield ray.nodes()[0]["MetricsExportPort"]


def config(*more):
    small = ["rounds=2", "cohort=2", "partition.clients=4", "local.epochs=1", "tracking.enabled=false"]
    return cluster.resolve("quickstart", [*small, "model={name: mlp, hidden: [8]}", *more])


def test_gauges_of_a_line_by_hand():
    selects = selecting(config())
    names = ["round", "quality", "uplink_bytes", "downlink_bytes", "clients_per_second", "idle_share"]
    assert list(GAUGES) == [f"sparsyfed_{name}" for name in [*names, "lost_actors"]]
    # Two actors had 8 seconds between them and worked for 6.
    assert list(values_of(LINE, selects).values()) == [7, None, 1200, 3400, 2.5, 0.25, 1]
    quality = [
        values_of(LINE | evaluated, selects)["sparsyfed_quality"]
        for evaluated in ({"val/accuracy": 0.5}, {"val/accuracy": 0.5, "test/accuracy": 0.75})
    ]
    assert quality == [0.5, 0.75]
    assert values_of(LINE | {"time/clients_evaluate_s": 9.0}, selects)["sparsyfed_idle_share"] == 0.0


def test_the_dashboard_draws_every_gauge_and_no_other():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    drawn = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert sorted(drawn) == sorted(f'ray_{name}{{run=~"$run"}}' for name in GAUGES)
    assert set(re.findall(r"ray_(sparsyfed_\w+)", DASHBOARD.read_text(encoding="utf-8"))) == set(GAUGES)
    (run,) = (each for each in board["templating"]["list"] if each["name"] == "run")
    assert run["query"]["query"] == "label_values(ray_sparsyfed_round, run)"


def scraped(port):
    """What Ray's metrics port tells of runs: (tags, value) by gauge; empty where nothing answers yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    found = re.findall(r"^ray_(sparsyfed_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return {name: (dict(re.findall(r'(\w+)="([^"]*)"', tags)), float(value)) for name, tags, value in found}


@pytest.mark.timeout(400)  # four processes that import Ray or torch, on a machine that may be busy
def test_the_metrics_port_of_the_cluster_tells_of_the_round(tmp_path, metrics_port):
    found = {}

    def on_line(line):
        # The driver stays until its last line is taken in, and tells the port a moment after it is stored.
        while line["round"] == 2 and found.get("sparsyfed_round", ({}, 0))[1] < 2:
            assert time.monotonic() < deadline, "nothing of the run on the metrics port"
            time.sleep(0.1)
            found.update(scraped(metrics_port))

    deadline = time.monotonic() + 300
    done = cluster.run(config("actors=1", "algorithm.name=topk"), tmp_path / "mine", progress=on_line)
    last = done.rounds.reset_index().to_dict("records")[-1]
    expected = values_of(last, selecting(config()))
    assert {name: value for name, (_, value) in found.items()} == pytest.approx(expected)
    for tags, _ in found.values():
        assert {"run": "mine", "method": "topk", "measure": "accuracy"}.items() <= tags.items()
