"""A round, as the driver draws, sends, measures, evaluates and logs it, against counts made one by one."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import cluster
from algorithms.topk import TopKClient
from cluster.configuration.config import resolve
from cluster.federation import Federation
from cluster.records import outputs
from cluster.records.checkpoint import list_rounds
from cluster.records.run_folder import RunFolder, comparable
from cluster.rounds import driver as driver_module
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from cluster.transport import wire
from tests.cluster.observed import accuracy, flat_upload, support
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

TOPK = {"name": "topk", "sparsity": 0.8}


# ---------------------------------------------------------------------------------- what a round measures


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory, cache):
    """Three rounds of top-K on clients of unequal size, with each client's support before its final cut."""
    config = tiny_federation(
        cache,
        rounds=3,
        algorithm={"name": "topk", "sparsity": 0.5},
        local={"lr": 0.5, "epochs": 2},
        model={"name": "mlp", "hidden": [16]},
    )
    before_cut, finish = [], TopKClient.finish

    def recording(self):
        before_cut.append((self.visit.prunable != 0).nonzero().flatten().tolist())
        return finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TopKClient, "finish", recording)
        run = run_inline(config, tmp_path_factory.mktemp("run") / "run")
    return run, before_cut


def test_sparsity_regrowth_deactivation_and_overlap(sparse_run):
    run, before_cut = sparse_run
    layout, size = run.driver.layout, run.driver.layout.prunable_size
    assert [line["round"] for line in run.lines] == [1, 2, 3]
    cuts = iter(before_cut)
    for round_number, line in enumerate(run.lines, 1):
        old = support(layout, run.states[round_number - 1].weights)
        new = support(layout, run.states[round_number].weights)
        assert line["sparsity/global"] == pytest.approx(1 - len(new) / size)
        assert line["masks/regrowth"] == len(new - old)
        assert line["masks/deactivation"] == len(old - new)
        assert line["masks/regrowth_share"] == pytest.approx(len(new - old) / size)
        assert line["masks/deactivation_share"] == pytest.approx(len(old - new) / size)
        assert line["masks/overlap"] == pytest.approx(len(old & new) / len(old | new))
        layers = [sum(j in range(e.start, e.stop) for j in new) / e.size for e in layout.prunable]
        assert line["sparsity/layers"] == pytest.approx([1 - density for density in layers])
        clients = sorted(client for r, client in run.uploads if r == round_number)
        uploads = [support(layout, flat_upload(run, (round_number, client))[0]) for client in clients]
        before = [set(next(cuts)) for _ in clients]
        assert line["masks/client_regrowth"] == pytest.approx(np.mean([len(u - old) for u in uploads]))
        assert line["masks/client_deactivation"] == pytest.approx(np.mean([len(old - u) for u in uploads]))
        assert line["masks/client_regrowth_before_cut"] == pytest.approx(
            np.mean([len(b - old) for b in before])
        )
        keep = round(0.5 * size)
        assert line["sparsity/upload"] == pytest.approx(1 - keep / size)
    # The case could fail: masks differ between clients and rounds, and weights come and go.
    assert run.lines[1]["masks/regrowth"] > 0
    assert run.lines[1]["masks/deactivation"] > 0
    assert run.lines[1]["masks/client_regrowth_before_cut"] > run.lines[1]["masks/client_regrowth"] > 0


def test_consensus_of_the_real_uploads(sparse_run):
    run, _ = sparse_run
    for round_number, line in enumerate(run.lines, 1):
        masks = [flat_upload(run, key)[1] for key in run.uploads if key[0] == round_number]
        assert len(masks) == 4
        # The mean overlap of two masks over the mean size of one.
        shared = [len(a & b) for a, b in itertools.combinations(masks, 2)]
        expected = np.mean(shared) / np.mean([len(mask) for mask in masks])
        assert line["masks/consensus"] == pytest.approx(expected)
        assert 0.1 < expected < 1


def test_flops_of_the_cohort(sparse_run):
    run, _ = sparse_run
    federation = run.driver.federation
    # A multilayer perceptron: 16 outputs of 64 products, 3 outputs of 16.
    forward = [64 * 16 * 2, 16 * 3 * 2]
    per_sample = 3 * sum(forward) - forward[0]
    for round_number, line in enumerate(run.lines, 1):
        samples = sum(int(federation.sizes[client]) for r, client in run.uploads if r == round_number)
        assert line["clients/samples"] == samples
        assert line["flops/dense"] == 2 * samples * per_sample  # two epochs
        assert 0 < line["flops/sparse"] <= line["flops/dense"]
        assert sum(line["flops/layers"]) == pytest.approx(line["flops/sparse"])
    assert run.lines[2]["flops/dense_total"] == sum(line["flops/dense"] for line in run.lines)


def test_sparse_flops_by_density(cache, tmp_path, monkeypatch):
    """A client's first step has the density it received, the later ones that of its trained weights."""
    trained, finish = [], TopKClient.finish

    def recording(self):
        flat, layout = self.visit.prunable, self.visit.layout
        trained.append(np.array([len(flat[e.span].nonzero()) / e.size for e in layout.prunable]))
        return finish(self)

    monkeypatch.setattr(TopKClient, "finish", recording)
    config = tiny_federation(
        cache, algorithm=TOPK, cohort=1, partition={"clients": 1}, local={"batch_size": 30}
    )
    run = run_inline(config, tmp_path / "run")
    forward = np.array([4 * 64 * 9 * 2, 6 * 16 * 36 * 2, 16 * 24 * 2, 3 * 16 * 2], float)
    passes = np.array([1, 2, 2, 2])  # forward, and input gradient but for the first layer
    # One client with all 120 samples in batches of 30. In round 2 it starts from w_1 with these densities:
    layout, weights = run.driver.layout, run.states[1].weights
    density = np.array([len(weights[e.span].nonzero()) / e.size for e in layout.prunable])
    assert (density < trained[1]).any()
    expected = forward * (30 * (passes * density + 1) + 90 * (passes * trained[1] + 1))
    np.testing.assert_allclose(run.lines[1]["flops/layers"], expected)
    np.testing.assert_allclose(run.lines[0]["flops/layers"], forward * 120 * (passes + 1))  # dense w_0


def test_bytes_are_those_of_the_real_messages(cache, tmp_path, uplink, downlink):
    config = tiny_federation(cache, rounds=3, algorithm=TOPK)
    run = run_inline(config, tmp_path / "run")
    layout, per_round = run.driver.layout, 4
    for round_number, line in enumerate(run.lines, 1):
        messages = uplink.sent[per_round * (round_number - 1) : per_round * round_number]
        assert line["comm/uplink_bytes"] == sum(map(len, messages))
        assert line["comm/uplink_bytes_per_client"] == sum(map(len, messages)) / 4
        # Every client of the cohort is sent the same bytes.
        assert line["comm/downlink_bytes"] == 4 * len(downlink.sent[round_number - 1])
        assert line["comm/downlink_bytes_per_client"] == len(downlink.sent[round_number - 1])
        # The paper counts 4 bytes a nonzero prunable weight and sends the rest dense.
        rest = layout.size - layout.prunable_size
        uploads = [flat_upload(run, key)[0] for key in run.uploads if key[0] == round_number]
        assert line["comm/uplink_nonzero_bytes"] == sum(4 * (len(support(layout, u)) + rest) for u in uploads)
        sent = support(layout, run.states[round_number - 1].weights)
        assert line["comm/downlink_nonzero_bytes"] == 4 * 4 * (len(sent) + rest)
        assert line["comm/dense_bytes"] == 4 * 4 * layout.size
        for way in ("uplink", "downlink"):
            total = sum(earlier[f"comm/{way}_bytes"] for earlier in run.lines[:round_number])
            assert line[f"comm/{way}_bytes_total"] == total
    assert len(uplink.sent) == 12
    # Sparse uploads, and a sparse model from round 2 on, cost less than dense ones.
    assert run.lines[2]["comm/uplink_bytes"] < run.lines[2]["comm/dense_bytes"] / 2
    assert run.lines[2]["comm/downlink_bytes"] < run.lines[0]["comm/downlink_bytes"]


def test_a_client_is_sent_a_mask_once(cache, tmp_path):
    """Both sides hold the mask: a client met again gets values alone, and a new one all of it."""
    config = tiny_federation(cache, rounds=4, algorithm={"name": "fixed_mask", "sparsity": 0.8}, cohort=2)
    run = run_inline(config, tmp_path / "run")
    shape, met, again = wire.Shape.of(run.driver.layout), set(), 0
    for round_number, line in enumerate(run.lines, 1):
        state = run.states[round_number - 1]
        weights, mask = state.weights.numpy(), state.mask.numpy()
        first = len(wire.encode(weights, mask, shape))
        later = len(wire.encode(weights, mask, shape, held=mask))
        assert later < first
        cohort = [client for r, client in run.uploads if r == round_number]
        assert line["comm/downlink_bytes"] == sum(later if client in met else first for client in cohort)
        again += len(met & set(cohort))
        met |= set(cohort)
    assert again > 0


def test_a_weight_in_the_mask_travels_even_if_it_is_zero(cache, tmp_path):
    config = tiny_federation(cache, algorithm={"name": "fixed_mask", "sparsity": 0.8}, local={"lr": 1e-30})
    run = run_inline(config, tmp_path / "run")
    held = int(run.states[0].mask.sum())
    assert all(len(flat_upload(run, key)[1]) == held for key in run.uploads)


# ---------------------------------------------------------------------------------------- lines, evaluation


def keys_of(lines, prefix):
    return [[key for key in line if key.startswith(prefix)] for line in lines]


def test_every_round_has_one_line_in_order(cache, tmp_path):
    config = tiny_federation(cache, rounds=5, checkpoint_every=2)
    seen = []
    result = cluster.run(config, tmp_path / "run", progress=seen.append)
    lines = RunFolder(tmp_path / "run").rounds()
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
    assert seen == lines
    assert list(result.rounds.index) == [1, 2, 3, 4, 5]
    assert all("test/accuracy" in line for line in lines)
    assert list_rounds(tmp_path / "run" / "checkpoints")[-2:] == [4, 5]


def test_evaluation_every_few_rounds_and_at_the_end(cache, tmp_path):
    run = run_inline(tiny_federation(cache, rounds=5, evaluate_every=2), tmp_path / "a")
    assert [line["round"] for line in run.lines if "test/accuracy" in line] == [2, 4, 5]
    assert [line["round"] for line in run.lines] == [1, 2, 3, 4, 5]
    # How often one looks does not change what is seen.
    every = run_inline(tiny_federation(cache, rounds=5), tmp_path / "b")
    for line in run.lines:
        other = every.lines[line["round"] - 1]
        assert all(other[key] == value for key, value in comparable(line).items())


def test_stop_after_is_evaluated(cache, tmp_path):
    run = run_inline(tiny_federation(cache, rounds=5, stop_after=3, evaluate_every=5), tmp_path / "run")
    assert [line["round"] for line in run.lines if "test/accuracy" in line] == [3]


def test_a_run_that_is_stopped_is_evaluated(cache, tmp_path, monkeypatch):
    config = tiny_federation(cache, rounds=9, evaluate_every=5)
    federation = Federation.of(config)
    folder = RunFolder.create(tmp_path / "run", config)
    asked = iter([True, False, True])  # before round 1, where it is too early, before rounds 2 and 3
    driver = Driver(folder, federation, InlineEngine(federation.setup()), should_stop=lambda: next(asked))
    last = driver.run()
    assert last["round"] == 2
    assert ["test/accuracy" in line for line in folder.rounds()] == [False, True]
    assert list_rounds(folder.checkpoints) == [2]
    assert outputs.summary_of(folder, config, federation, last, 1.0)["accuracy"] == last["test/accuracy"]


def test_accuracy_and_loss_of_each_split(cache, tmp_path):
    """Logged numbers are those of the plain module on the rows of the split, client rows left out."""
    config = tiny_federation(cache, rounds=2, data={"validation": 0.2})
    run = run_inline(config, tmp_path / "run")
    federation = run.driver.federation
    assert len(federation.validation) == 24
    assert federation.selection_metric == "val/accuracy"
    assert not set(federation.validation) & set(federation.partition.indices)
    train, test = federation.dataset.train, federation.dataset.test
    splits = {"test": (test.inputs, test.targets)}
    splits["val"] = (train.inputs[federation.validation], train.targets[federation.validation])
    module = federation.model
    for line, state in zip(run.lines, run.states[1:], strict=True):
        federation.layout.bind(module, state.weights)
        for split, (images, labels) in splits.items():
            inputs = (torch.tensor(np.array(images)).float() / 255 - 0.5) / 0.5
            logits = module.eval()(inputs).detach().double()
            hits = sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True))
            assert line[f"{split}/accuracy"] == hits / len(labels)
            loss = F.cross_entropy(logits, torch.tensor(np.array(labels)))
            assert line[f"{split}/loss"] == pytest.approx(float(loss), rel=1e-5)


def test_chunks_add_up_to_the_whole(cache, tmp_path, monkeypatch):
    whole = run_inline(tiny_federation(cache), tmp_path / "whole")
    monkeypatch.setattr(driver_module, "_CHUNK_ROWS", 7)  # 60 test images: eight chunks of 7 and one of 4
    parts = run_inline(tiny_federation(cache), tmp_path / "parts")
    for one, other in zip(whole.lines, parts.lines, strict=True):
        assert one["test/accuracy"] == other["test/accuracy"]
        assert one["test/loss"] == pytest.approx(other["test/loss"], rel=1e-6)


def test_the_best_checkpoint_is_kept(cache, tmp_path):
    config = tiny_federation(cache, rounds=8, checkpoint_every=1, local={"lr": 0.9})
    run = run_inline(config, tmp_path / "run")
    folder = run.driver.folder
    scores = {line["round"]: line["test/accuracy"] for line in run.lines}
    # The last round's own score is not known when its checkpoint is written.
    best = max(range(1, 8), key=lambda r: (scores[r], -r))
    assert set(list_rounds(folder.checkpoints)) == {7, 8, best}
    summary = outputs.summary_of(folder, config, run.driver.federation, folder.rounds()[-1], 1.0)
    assert summary["best_round"] == max(scores, key=lambda r: (scores[r], -r))
    assert summary["accuracy"] == scores[8]


# ------------------------------------------------------------------------------------------- the lossy wire


def on_the_grid(values, layout, value_format):
    """Whether every trained tensor of a decoded message is one that the format can hold."""
    if value_format == "bfloat16":
        return bool((values[: layout.trained_size].view(np.uint32) & 0xFFFF == 0).all())
    return all(len(np.unique(values[e.span])) <= 255 for e in layout.trained)


@pytest.mark.parametrize("value_format", ["bfloat16", "int8"])
def test_a_lossy_uplink_is_averaged_as_it_was_decoded(cache, tmp_path, value_format, uplink):
    config = tiny_federation(
        cache, rounds=1, wire={"uplink": value_format}, model={"name": "tests.tiny_experiment:tiny_model"}
    )
    run = run_inline(config, tmp_path / "run")
    layout, sizes = run.driver.layout, run.driver.federation.sizes
    clients = sorted(client for _, client in run.uploads)
    decoded = [message.values for message in uplink.received]
    assert len(decoded) == 4
    assert all(on_the_grid(values, layout, value_format) for values in decoded)
    weights = sizes[clients] / sizes[clients].sum()
    mean = sum(w * values.astype(np.float64) for w, values in zip(weights, decoded, strict=True))
    np.testing.assert_allclose(run.state.weights.numpy(), mean, rtol=1e-6, atol=1e-9)
    exact = run_inline(config.model_copy(update={"wire": cluster.resolve().wire}), tmp_path / "exact")
    assert not torch.equal(exact.state.weights, run.state.weights)
    assert run.lines[0]["comm/uplink_bytes"] < exact.lines[0]["comm/uplink_bytes"]


@pytest.mark.parametrize("value_format", ["bfloat16", "int8"])
def test_a_lossy_downlink_is_what_clients_train_from(cache, tmp_path, value_format):
    config = tiny_federation(cache, algorithm=TOPK, wire={"downlink": value_format})
    federation = Federation.of(config)
    engine, broadcasts = InlineEngine(federation.setup()), []
    run = engine.run

    def recording(broadcast, *arguments):
        broadcasts.append(broadcast)
        return run(broadcast, *arguments)

    engine.run = recording
    driver = Driver(RunFolder.create(tmp_path / "run", config), federation, engine)
    driver.run()
    shape = wire.Shape.of(driver.layout)
    assert len(broadcasts) == 3  # two rounds, and the evaluation of the last
    for broadcast in broadcasts:
        kept = broadcast.exact[: shape.prunable] != 0
        message = wire.encode(broadcast.exact, kept, shape, value_format=value_format)
        np.testing.assert_array_equal(broadcast.weights, wire.decode(message, shape).values)
        assert not np.array_equal(broadcast.weights, broadcast.exact)
    # What is evaluated is the server's own model, not a client's copy of it.
    np.testing.assert_array_equal(broadcasts[-1].exact, driver.state.weights.numpy())
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    federation.model.load_state_dict(tensors)
    assert (
        accuracy(federation.model.eval(), federation.dataset) == driver.folder.rounds()[-1]["test/accuracy"]
    )


@pytest.mark.parametrize("value_format", ["bfloat16", "int8"])
def test_both_ways_lossy_still_learns(cache, tmp_path, value_format):
    both = {"uplink": value_format, "downlink": value_format}
    config = tiny_federation(cache, rounds=4, wire=both, algorithm={"name": "sparsyfed", "sparsity": 0.5})
    run = run_inline(config, tmp_path / "run")
    assert run.lines[-1]["test/loss"] < run.lines[0]["test/loss"]


def test_the_support_is_compared_with_that_of_ten_rounds_before(cache, tmp_path):
    config = tiny_federation(cache, rounds=21, cohort=2, algorithm=TOPK, evaluate_every=21)
    run = run_inline(config, tmp_path / "run")
    assert [line["round"] for line in run.lines if "masks/overlap_10" in line] == [20]
    size = run.driver.layout.prunable_size
    ten, twenty = (set(run.states[r].weights[:size].nonzero().flatten().tolist()) for r in (10, 20))
    assert run.lines[19]["masks/overlap_10"] == pytest.approx(len(ten & twenty) / len(ten | twenty))
    # A run that went on from round 15 has kept the support of round 10.
    half = resolve(config.dump() | {"stop_after": 15})
    folder = RunFolder.create(tmp_path / "half", half)
    Driver(folder, Federation.of(half), InlineEngine(Federation.of(half).setup())).run()
    Driver(folder, Federation.of(config), InlineEngine(Federation.of(config).setup())).run()
    assert folder.rounds()[19]["masks/overlap_10"] == run.lines[19]["masks/overlap_10"]
