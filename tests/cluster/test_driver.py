"""A round, as the driver draws, sends, measures, evaluates and logs it, against counts made one by one."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import cluster
from algorithms.topk import TopKClient
from cluster import client as client_module
from cluster import downlink as downlink_module
from cluster import driver as driver_module
from cluster import outputs, wire
from cluster.checkpoint import latest, list_rounds, load_checkpoint
from cluster.client import wire_shape
from cluster.driver import DivergedError, Driver
from cluster.engine import InlineEngine
from cluster.federation import Federation
from cluster.run_folder import RunFolder, comparable
from tests.naive import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

TOPK = {"name": "topk", "sparsity": 0.8}
DIGITS = {"name": "digits"}
RESNET = {"name": "resnet18", "width": 8}


class Recorded:
    """The wire as one module sees it; keeps every message and every decoded update."""

    def __init__(self):
        self.sent, self.received = [], []

    def __getattr__(self, name):
        return getattr(wire, name)

    def encode(self, *arguments, **options):
        self.sent.append(wire.encode(*arguments, **options))
        return self.sent[-1]

    def decode(self, *arguments, **options):
        message = wire.decode(*arguments, **options)
        # The host decodes the next update into the same memory.
        self.received.append(replace(message, values=message.values.copy()))
        return message


@pytest.fixture
def uplink(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(client_module, "wire", recorded)
    return recorded


@pytest.fixture
def downlink(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(downlink_module, "wire", recorded)
    return recorded


def support(layout, flat):
    """Positions of nonzero prunable weights, as a set."""
    return {j for j, value in enumerate(flat[: layout.prunable_size].tolist()) if value != 0}


def flat_upload(run, key):
    """An upload as a flat list, in the layout's order."""
    values, mask = run.uploads[key]
    layout = run.driver.layout
    flat = torch.cat([values[entry.name].flatten() for entry in layout.trained + layout.buffers])
    kept = None
    if mask is not None:
        bits = torch.cat([mask[entry.name].flatten() for entry in layout.prunable])
        kept = {j for j, bit in enumerate(bits.tolist()) if bit}
    return flat, kept


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
    shape, met, again = wire_shape(run.driver.layout), set(), 0
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
    driver = Driver(folder, federation, InlineEngine(federation.workload()), should_stop=lambda: next(asked))
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
    splits = {"test": (test.images, test.labels)}
    splits["val"] = (train.images[federation.validation], train.labels[federation.validation])
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


# ---------------------------------------------------------------------------------------- the model file


def accuracy(model, dataset):
    images = (torch.tensor(np.array(dataset.test.images)).float() / 255 - 0.5) / 0.5
    hits = 0
    with torch.no_grad():
        for start in range(0, len(images), 256):
            found = model(images[start : start + 256]).argmax(1).numpy()
            hits += int((found == dataset.test.labels[start : start + 256]).sum())
    return hits / len(images)


def test_the_model_file_holds_theta(cache, tmp_path):
    config = tiny_federation(
        cache,
        algorithm={"name": "sparsyfed", "sparsity": 0.7, "beta": 1.25},
        data=DIGITS,
        model={"name": "small_cnn", "channels": [8, 16], "hidden": 32},
        local={"epochs": 3, "lr": 0.1},
    )
    result = cluster.run(config, tmp_path / "run")
    federation = Federation.of(config)
    model = federation.model  # the plain module, nothing of the method in it
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    model.load_state_dict(tensors, strict=True)
    logged = RunFolder(tmp_path / "run").rounds()[-1]["test/accuracy"]
    assert logged > 0.3
    assert accuracy(model.eval(), federation.dataset) == logged == result.summary["accuracy"]
    assert accuracy(result.model(), federation.dataset) == logged
    state = load_checkpoint(latest(tmp_path / "run" / "checkpoints")).state
    for entry in federation.layout.prunable:
        w = state.weights[entry.span].view(entry.shape)
        torch.testing.assert_close(tensors[entry.name], w.sign() * w.abs() ** 1.25)
        assert not torch.equal(tensors[entry.name], w)
    for entry in federation.layout.other:
        assert torch.equal(tensors[entry.name], state.weights[entry.span].view(entry.shape))


@pytest.mark.parametrize("method", ["fedavg", "sparsyfed"])
def test_a_resnet_with_batch_norm(cache, tmp_path, method):
    """Unequal clients of real digits; running statistics are averaged, the integer counters are not."""
    config = tiny_federation(
        cache,
        data=DIGITS,
        model=RESNET,
        algorithm={"name": method},
        partition={"clients": 60, "alpha": 0.3},
        local={"batch_size": 16, "lr": 0.05},
        cohort=5,
    )
    result = cluster.run(config, tmp_path / "run")
    federation = Federation.of(config)
    assert len(set(federation.sizes.tolist())) > 5
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    counters = {name: t for name, t in tensors.items() if t.dtype == torch.int64}
    assert len(counters) == 20
    assert all(int(counter) == 0 for counter in counters.values())
    assert not torch.equal(tensors["norm1.running_mean"], torch.zeros(8))
    model = federation.model
    model.load_state_dict(tensors, strict=True)
    logged = RunFolder(tmp_path / "run").rounds()[-1]["test/accuracy"]
    assert accuracy(model.eval(), federation.dataset) == logged == result.summary["accuracy"]
    assert accuracy(result.model(), federation.dataset) == logged


def test_integer_buffers_are_restored_at_each_start(cache, tmp_path):
    """The counter says how many batches this client has seen, not its predecessors on the same actor."""
    config = tiny_federation(cache, rounds=1, model={"name": "tests.naive:tiny_model"})
    federation = Federation.of(config)
    engine = InlineEngine(federation.workload())
    trainer, counts = engine._host._trainer, []
    visit = trainer.visit

    def counting(client, *arguments):
        trained = visit(client, *arguments)
        seen = dict(trainer.module.named_buffers())["1.num_batches_tracked"]
        counts.append((int(seen), trained.steps))
        return trained

    trainer.visit = counting
    Driver(RunFolder.create(tmp_path / "run", config), federation, engine).run()
    assert len(counts) == 4
    assert all(seen == steps for seen, steps in counts)


def tied_model(*, input_shape, classes):
    """Two layers share a weight, and one parameter is frozen."""
    from torch import nn

    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    frozen = nn.Linear(64, classes)
    frozen.bias.requires_grad_(False)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), frozen)


def test_tied_and_frozen_tensors_are_in_the_model_file(cache, tmp_path):
    config = tiny_federation(cache, model={"name": "tests.cluster.test_driver:tied_model"}, algorithm=TOPK)
    result = cluster.run(config, tmp_path / "run")
    model = result.model()
    assert model[1].weight is model[3].weight
    assert accuracy(model, Federation.of(config).dataset) == result.summary["accuracy"]


# ------------------------------------------------------------------------------------------- the lossy wire


def on_the_grid(values, layout, value_format):
    """Whether every trained tensor of a decoded message is one that the format can hold."""
    if value_format == "bfloat16":
        return bool((values[: layout.trained_size].view(np.uint32) & 0xFFFF == 0).all())
    return all(len(np.unique(values[e.span])) <= 255 for e in layout.trained)


@pytest.mark.parametrize("value_format", ["bfloat16", "int8"])
def test_a_lossy_uplink_is_averaged_as_it_was_decoded(cache, tmp_path, value_format, uplink):
    config = tiny_federation(
        cache, rounds=1, wire={"uplink": value_format}, model={"name": "tests.naive:tiny_model"}
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
    engine, broadcasts = InlineEngine(federation.workload()), []
    run = engine.run

    def recording(broadcast, *arguments):
        broadcasts.append(broadcast)
        return run(broadcast, *arguments)

    engine.run = recording
    driver = Driver(RunFolder.create(tmp_path / "run", config), federation, engine)
    driver.run()
    shape = wire_shape(driver.layout)
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


# --------------------------------------------------------------------------------------- clients that fail


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
    initial = config.build_algorithm().initial_state(
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
    engine = InlineEngine(federation.workload())
    fold = engine._host._fold

    def refusing(broadcast, client, received, samples):
        return fold(broadcast, client, received, samples) if broadcast.instructions.round == 3 else "planted"

    engine._host._fold = refusing
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
        data={"name": f"tests.cluster.test_driver:{hook}"},
        partition={"name": "natural", "clients": 6},
        **more,
    )


def test_float_images_are_used_as_they_are(cache):
    dataset = Federation.of(writers(cache, "bright_images")).dataset
    expected = bright_images()["train_images"][:, None]
    assert dataset.train.images.dtype == np.float32
    np.testing.assert_array_equal(dataset.train.images, expected)


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
def test_a_poisoned_client_is_refused_counted_and_named(cache, tmp_path, algorithm, uplink_format):
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
