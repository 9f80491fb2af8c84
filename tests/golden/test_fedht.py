"""The first rounds of the published table, with one order of the batches; the command does all of it."""

import numpy as np
import pytest

from cluster import seeding
from cluster.configuration.config import resolve
from cluster.federation import Federation
from cluster.workload.simulated import rows
from tests.golden import fedht

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize(("method", "until"), [("fedht", 20), ("fediterht", 1)])
def test_the_objective_is_that_of_the_published_table(cache, tmp_path, method, until):
    more = [f"data.cache={cache}", "tracking.enabled=false", f"stop_after={until}"]
    found = fedht.objectives(method, 0, tmp_path / "run", more)
    for number, published in fedht.PUBLISHED[method].items():
        if number <= until:
            assert found[number - 1] == pytest.approx(published, rel=0.12), number


@pytest.mark.parametrize(
    ("method", "steps", "lr"), [("distributed_iht", 1, 0.01), ("fedht", 3, 0.003), ("fediterht", 1, 0.03)]
)
def test_rounds_are_those_of_numpy_on_the_same_batches(cache, tmp_path, method, steps, lr):
    """Three rounds in float64: the objective on 100 rows, and on all of them, to rounding."""

    def cut(weights):
        kept = np.argsort(-np.abs(weights), kind="stable")[:200]
        return np.where(np.isin(np.arange(1000), kept), weights, 0.0)

    inputs, targets = (array.astype(np.float64) for array in rows())
    tested = np.random.default_rng(42).permutation(1000)[:100]
    weights, expected = np.zeros(1000), []
    for number in range(1, 4):
        ends = []
        for client in range(100):
            held = np.sort(np.random.default_rng(client).permutation(100)[10:])
            order = held[seeding.generator(0, "batches", number, client).permutation(90)]
            own = weights
            for batch in np.split(order[: 20 * steps], steps):
                x, y = inputs[client][batch], targets[client][batch]
                own = own - lr * 2 / 20 * (x.T @ (x @ own - y))
                own = cut(own) if method == "fediterht" else own
            ends.append(own)
        weights = cut(np.mean(ends, axis=0))
        errors = (inputs @ weights - targets) ** 2
        expected.append(errors[90:].reshape(-1)[tested].mean())
    more = [f"data.cache={cache}", "tracking.enabled=false", "stop_after=3"]
    found = fedht.objectives(method, 0, tmp_path / "run", more)
    assert found == pytest.approx([*expected, errors.mean()], rel=1e-4)


def test_every_client_has_its_own_ninety_rows(cache):
    config = resolve("fedht-simulation", ["method=fedht", "seed=0", f"data.cache={cache}"])
    federation = Federation.divided(config)
    train = federation.dataset.train
    inputs, targets = rows()
    for client in (0, 7, 99):
        held = federation.partition.client(client)
        own = np.sort(np.random.default_rng(client).permutation(100)[10:])
        assert np.array_equal(train.inputs[held], inputs[client][own])
        assert np.array_equal(train.targets[held], targets[client][own])
    assert federation.dataset.test.inputs.shape == (100, 1000)
