"""Updates that are refused: divergence, poisoned clients, outliers; and how a run ends by them."""

import math

import numpy as np
import pytest
import torch

import cluster
from cluster.federation import Federation
from cluster.records.checkpoint import latest, load_checkpoint
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from cluster.rounds.setbacks import DivergedError
from tests.cluster.observed import flat_upload
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

TOPK = {"name": "topk", "sparsity": 0.8}


@pytest.mark.parametrize("method", ["fedavg", "sparsyfed"])
def test_divergence_ends_the_run_and_leaves_the_model(cache, tmp_path, method):
    config = tiny_federation(cache, rounds=9, local={"lr": 1e9}, algorithm={"name": method})
    with pytest.raises(DivergedError, match="refused in 3 rounds in a row, last in round 3") as raised:
        cluster.run(config, tmp_path / "run")
    assert "local.lr (now 1e+09)" in str(raised.value)
    assert "client " in str(raised.value)
    lines = RunFolder(tmp_path / "run").rounds()
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert all(line["clients/refused"] == line["clients/trained"] == 4 for line in lines)
    assert all(len(line["clients/refused_list"]) == 4 for line in lines)
    assert [line["train/loss"] for line in lines] == [None] * 3
    assert len({line["test/accuracy"] for line in lines}) == 1
    federation = Federation.of(config)
    initial = config.method.initial_state(
        federation.initial_weights, federation.layout, np.random.default_rng()
    )
    stored = load_checkpoint(latest(tmp_path / "run" / "checkpoints")).state
    assert torch.equal(stored.weights, initial.weights)
    assert stored.round == 3
    with pytest.raises(DivergedError):
        cluster.resume(tmp_path / "run")


def test_divergence_in_the_last_rounds_is_no_success_when_resumed(cache, tmp_path):
    config = tiny_federation(cache, rounds=3, local={"lr": 1e9})
    for attempt in (cluster.run, lambda _, folder: cluster.resume(folder)):
        with pytest.raises(DivergedError, match="last in round 3: client "):
            attempt(config, tmp_path / "run")
        assert not (tmp_path / "run" / "result.json").exists()


def test_only_rounds_in_a_row_count(cache, tmp_path):
    config = tiny_federation(cache, rounds=6)
    federation = Federation.of(config)
    engine = InlineEngine(federation.setup())
    host = engine._host
    fold = host._uplink.fold
    host._uplink.fold = lambda *update: fold(*update) if host._round == 3 else "planted"
    driver = Driver(RunFolder.create(tmp_path / "run", config), federation, engine)
    with pytest.raises(DivergedError, match="last in round 6"):
        driver.run()
    refused = [line["clients/refused"] for line in driver.folder.rounds()]
    assert refused == [4, 4, 0, 4, 4, 4]


def float_images(poison):
    """Six writers of 20 float32 images each; writer 2's pixels are multiplied."""
    rng = np.random.default_rng(7)
    patterns = rng.normal(size=(3, 8, 8))
    arrays = {}
    for split, count in (("train", 120), ("test", 60)):
        labels = rng.integers(0, 3, size=count)
        images = patterns[labels] + rng.normal(0.0, 0.7, size=(count, 8, 8))
        arrays |= {f"{split}_images": images.astype(np.float32), f"{split}_labels": labels}
    writers = np.arange(120) % 6
    arrays["train_images"][writers == 2] *= np.float32(poison)
    return arrays | {"train_groups": writers}


def infinite_images():
    return float_images(math.inf)


def bright_images():
    return float_images(30.0)


def writers(cache, hook, **more):
    return tiny_federation(
        cache,
        cohort=6,
        data={"name": f"tests.cluster.test_refusals:{hook}"},
        partition={"name": "natural", "clients": 6},
        **more,
    )


def test_float_images_are_used_as_they_are(cache):
    dataset = Federation.of(writers(cache, "bright_images")).dataset
    expected = bright_images()["train_images"][:, None]
    assert dataset.train.inputs.dtype == np.float32
    np.testing.assert_array_equal(dataset.train.inputs, expected)


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "fedavg"},
        TOPK,
        {"name": "sparsyfed", "sparsity": 0.8},
        {"name": "zerofl", "sparsity": 0.8, "upload": "top_k_weights_diff"},
        {"name": "fixed_mask", "sparsity": 0.8},
    ],
    ids=lambda algorithm: algorithm["name"],
)
@pytest.mark.parametrize("uplink_format", ["float32", "int8"])
def test_a_poisoned_client_is_refused_counted_and_named(
    cache, tmp_path, monkeypatch, algorithm, uplink_format
):
    # Decoding refuses such pixels; a client's own code may make them all the same.
    monkeypatch.setattr("cluster.workload.arrays.refuse_not_finite", lambda *arguments: None)
    config = writers(cache, "infinite_images", algorithm=algorithm, wire={"uplink": uplink_format})
    run = run_inline(config, tmp_path / "run")
    for line in run.lines:
        assert line["clients/trained"] == 6
        assert line["clients/refused"] == 1
        ((client, reason),) = line["clients/refused_list"]
        assert client == 2
        assert "not finite" in reason
        assert line["clients/samples"] == 100
        assert math.isfinite(line["train/loss"])
        assert math.isfinite(line["test/loss"])
    assert bool(torch.isfinite(run.state.weights).all())
    if algorithm["name"] == "fedavg":  # equal sizes: the plain mean of the five others
        others = [flat_upload(run, (2, client))[0].double() for client in (0, 1, 3, 4, 5)]
        torch.testing.assert_close(run.state.weights.double(), sum(others) / 5, rtol=1e-6, atol=1e-9)


def test_max_update_norm_refuses_a_finite_outlier(cache, tmp_path):
    # No normalisation, which would undo the brightness.
    options = {"rounds": 1, "model": {"name": "mlp", "hidden": [16]}}
    free = run_inline(writers(cache, "bright_images", **options), tmp_path / "free")
    start, trained = free.states[0].weights, free.driver.layout.trained_size
    far = {c: float((flat_upload(free, (1, c))[0] - start)[:trained].double().norm()) for c in range(6)}
    assert far[2] == max(far.values())
    limit = (far[2] + max(distance for c, distance in far.items() if c != 2)) / 2
    assert free.lines[0]["clients/refused"] == 0
    run = run_inline(writers(cache, "bright_images", **options, max_update_norm=limit), tmp_path / "run")
    ((client, reason),) = run.lines[0]["clients/refused_list"]
    assert client == 2
    assert f"{far[2]:.3g} away" in reason
    assert "max_update_norm" in reason
    others = [flat_upload(run, (1, c))[0].double() for c in (0, 1, 3, 4, 5)]
    torch.testing.assert_close(run.state.weights.double(), sum(others) / 5, rtol=1e-6, atol=1e-9)


def test_a_difference_is_measured_from_zero(cache, tmp_path):
    """Methods that send w_i - w_t are judged by that difference, not by its distance from w_t."""
    method = {"name": "zerofl", "sparsity": 0.5, "upload": "top_k_weights_diff"}
    config = writers(cache, "bright_images", rounds=1, algorithm=method)
    free = run_inline(config, tmp_path / "free")
    trained = free.driver.layout.trained_size
    far = {c: float(flat_upload(free, (1, c))[0][:trained].double().norm()) for c in range(6)}
    limit = sorted(far.values())[-1] * 0.999
    run = run_inline(config.model_copy(update={"max_update_norm": limit}), tmp_path / "run")
    assert [client for client, _ in run.lines[0]["clients/refused_list"]] == [max(far, key=far.get)]


def test_the_cohort_is_drawn_without_replacement_and_differs(cache, tmp_path):
    run = run_inline(tiny_federation(cache, rounds=6), tmp_path / "run")
    cohorts = [tuple(c for r, c in run.uploads if r == round_number) for round_number in range(1, 7)]
    assert all(len(set(cohort)) == 4 for cohort in cohorts)
    assert len(set(cohorts)) > 1
