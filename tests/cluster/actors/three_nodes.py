"""What the tests on a cluster of three nodes share: its nodes, a run on it, and that run without it."""

from cluster.configuration.config import validate
from cluster.records.run_folder import RunFolder, comparable
from tests.tiny_experiment import tiny_federation

#: A dead node, which refuses each check at once, is noticed in two seconds; one that is only slow has twenty.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
    "health_check_timeout_ms": 5000,
}
STORE = 150 * 2**20


def add(nodes, name, **more):
    """A node more. Ray gives one half a minute to start, which a busy machine may not have."""
    options = {"num_cpus": 3, "num_gpus": 2, "labels": {"class": name}, "object_store_memory": STORE} | more
    for _ in range(4):
        try:
            return nodes.add_node(**options)
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    raise TimeoutError(f"node {name} did not start")


def config(place, **more):
    """24 clients of unequal size, half of them a round."""
    usual = {
        "rounds": 3,
        "cohort": 12,
        "partition": {"clients": 24, "alpha": 1.0},
        "checkpoint_every": 1,
        "execution": "ray",
        "address": "auto",
        "client_timeout_s": 10.0,
        # Clients that keep states and carry floats, so that a lost actor, node or driver could lose them.
        "algorithm": {"name": "tests.keeping_method:Keeping"},
    }
    return tiny_federation(place, **(usual | more))


def inline(settings):
    return validate(settings.dump() | {"execution": "inline", "detached": False})


def assert_same_run(folder, reference):
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    lines = [[comparable(line) for line in RunFolder(path).rounds()] for path in (folder, reference)]
    assert lines[0] == lines[1]
