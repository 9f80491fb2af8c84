"""What a cluster is asked for before anything runs on it; no Ray is started here."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import grpc
import pytest
import ray
from ray._private.authentication import grpc_authentication_client_interceptor as interceptor

from cluster.actors import ray_session
from cluster.actors.ray_session import ClusterError
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


@pytest.fixture
def guarded():
    """The address of a server that answers as the head of a cluster with a token does."""

    class Head(grpc.GenericRpcHandler):
        def service(self, call):
            def answer(request, context):
                if ("authorization", "Bearer right") not in map(tuple, context.invocation_metadata()):
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
                if call.method != "/ray.rpc.NodeInfoGcsService/GetClusterId":
                    context.abort(grpc.StatusCode.UNIMPLEMENTED, call.method)
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Head()])
    port = server.add_insecure_port("0.0.0.0:0")  # Ray makes a reachable address of a loopback one
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def missing_token():
    """What Ray's loader does where RAY_AUTH_MODE=token is set and no token is found."""
    raise ray.exceptions.AuthenticationError("no token")


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize(
    ("given", "known"),
    [
        (lambda: (), False),
        (missing_token, False),
        (lambda: (("authorization", "Bearer wrong"),), False),
        (lambda: (("authorization", "Bearer right"),), True),
    ],
    ids=["none", "lost", "wrong", "right"],
)
def test_a_cluster_that_wants_its_token_says_so_at_once(guarded, monkeypatch, given, known, auto):
    # Ray reads its settings once a process, so what it makes of them is given here.
    monkeypatch.setattr(interceptor, "_get_authentication_metadata_tuple", given)
    monkeypatch.setenv("RAY_ADDRESS", guarded)
    address = "auto" if auto else guarded
    if known:
        ray_session._check_answer(address)
        return
    with pytest.raises(ClusterError, match=f"the Ray cluster at '{address}' wants its token: set RAY_AUTH_M"):
        ray_session._check_answer(address)
