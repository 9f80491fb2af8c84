"""What a cluster is asked for before anything runs on it; no Ray is started here."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import ray

from cluster.actors import ray_session
from cluster.references import DataError
from tests.tiny_experiment import tiny_federation

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.mark.parametrize(
    ("job", "shipped"),
    [(None, True), ({"runtime_env": {}}, True), ({"runtime_env": {"working_dir": "gcs://a.zip"}}, False)],
    ids=["no job", "a job without code", "a job with its code"],
)
def test_user_code_is_shipped_once(tmp_path, monkeypatch, job, shipped):
    asked = []

    @contextmanager
    def connection(address, **arguments):
        asked.append(arguments)
        yield

    monkeypatch.setattr(ray_session, "connection", connection)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(JOB, raising=False)
    if job is not None:
        monkeypatch.setenv(JOB, json.dumps(job))
    config = tiny_federation(tmp_path, execution="ray", address="auto")
    assert ":" in config.data.name
    with ray_session.connected(config, 100):
        pass
    assert asked == [{"runtime_env": {"working_dir": str(tmp_path)}} if shipped else {}]


def test_only_nodes_that_may_hold_an_actor_decode_the_data(tmp_path, monkeypatch):
    found = {"here": {}, "big": {"class": "big"}, "small": {"class": "small", "zone": "a"}, "bare": {}}
    nodes = [{"NodeID": f"{i:056x}", "Alive": True, "Labels": found[name]} for i, name in enumerate(found)]
    decoded, folder = [], tmp_path / "digits-0123"
    folders = {}

    def options(*, num_cpus, scheduling_strategy):
        node = list(found)[int(scheduling_strategy.node_id, 16)]

        def remote(**_):
            decoded.append(node)
            return folders.get(node, folder)

        return SimpleNamespace(remote=remote)

    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get", lambda results: results)
    monkeypatch.setattr(ray, "remote", lambda _: SimpleNamespace(options=options))
    here = SimpleNamespace(get_node_id=lambda: nodes[0]["NodeID"])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)

    def decoding(**options):
        decoded.clear()
        ray_session._decode_on_every_node(tiny_federation(tmp_path, execution="ray", **options), folder)
        return decoded

    assert decoding() == ["big", "small", "bare"]
    assert decoding(label={"class": "small"}) == ["small"]
    tiers = {"weak": {"share": 0.5, "label": {"class": "small", "zone": "b"}}, "strong": {"share": 0.5}}
    assert decoding(label={"class": "big"}, devices={"tiers": tiers}) == ["big"]
    tiers["weak"]["label"]["zone"] = "a"
    assert decoding(label={"class": "big"}, devices={"tiers": tiers}) == ["big", "small"]
    folders["small"] = tmp_path / "digits-4567"
    with pytest.raises(DataError, match=r"other data on node 0*2 than here: digits-4567 there, digits-01"):
        decoding()
    assert decoding(label={"class": "big"}) == ["big"]


def test_a_private_ray_that_does_not_start_is_one_line(monkeypatch):
    def init(**arguments):
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with (
        pytest.raises(ray_session.ClusterError, match=r"own Ray did not start \(The current .* startup\.\);"),
        ray_session.connection("local"),
    ):
        pass
