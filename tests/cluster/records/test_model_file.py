"""The model file of a run: effective weights that load into the plain module."""

import pytest
import torch
from safetensors.torch import load_file

import cluster
from cluster.federation import Federation
from cluster.records.checkpoint import latest, load_checkpoint
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from tests.cluster.observed import accuracy
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

TOPK = {"name": "topk", "sparsity": 0.8}
DIGITS = {"name": "digits"}
RESNET = {"name": "resnet18", "width": 8}


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
    config = tiny_federation(cache, rounds=1, model={"name": "tests.tiny_experiment:tiny_model"})
    federation = Federation.of(config)
    engine = InlineEngine(federation.setup())
    trainer, counts = engine._host._trainer, []
    visit = trainer.visit

    def counting(client, *arguments, **more):
        trained = visit(client, *arguments, **more)
        seen = dict(trainer.module.named_buffers())["1.num_batches_tracked"]
        counts.append((int(seen), trained.measured.steps))
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
    config = tiny_federation(
        cache, model={"name": "tests.cluster.records.test_model_file:tied_model"}, algorithm=TOPK
    )
    result = cluster.run(config, tmp_path / "run")
    model = result.model()
    assert model[1].weight is model[3].weight
    assert accuracy(model, Federation.of(config).dataset) == result.summary["accuracy"]
