"""Runs with an adapter: a naive reference, what travels, what is kept, and what comes out."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn import functional as F

import cluster
from cluster.cli import main
from cluster.clients.client import ClientHost
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.records.checkpoint import latest, load_checkpoint
from cluster.records.run_folder import RunFolder
from cluster.trained_model import build_model
from cluster.workload.models import ModelError
from tests.algorithms.test_flasc import NaiveFlasc
from tests.algorithms.test_topk import NaiveTopK
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.cluster.observed import accuracy
from tests.cluster.records.interrupted_runs import assert_same_run, drive
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_same, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

MLP = {"name": "mlp", "hidden": [12, 10]}
LORA = {"name": "lora", "rank": 2, "alpha": 8.0}

# 64 -> 12 -> 10 -> 3 of rank 2: the base, what is trained, and a message's header.
BASE = 64 * 12 + 12 + 12 * 10 + 10
TRAINED = 2 * 64 + 12 * 2 + 2 * 12 + 10 * 2 + 3 * 10 + 3
HEADER = 44


def adapted(cache, **overrides):
    return tiny_federation(cache, **{"model": MLP, "adapter": LORA, **overrides})


# ------------------------------------------------------------------------------------------- the reference


class WrittenOut:
    """The plain module at W + alpha / rank B A, written out; torch.optim steps on A, B and head."""

    def __init__(self, config):
        super().__init__(config)
        dataset = Federation.of(config).dataset
        self.plain = build_model(config, dataset).train()
        self.base = {name: own.detach().clone() for name, own in self.plain.named_parameters()}

    def initial(self, weights):
        return {name: weights[name] for name in self.trained}

    def gradients(self, weights, images, labels, visit):
        leaves = {name: weights[name].requires_grad_() for name in self.trained}
        options = self.config.adapter.options
        tensors = dict(self.base)
        for layer in ("1", "3"):
            a, b = leaves[f"{layer}.lora_A.weight"], leaves[f"{layer}.lora_B.weight"]
            tensors[f"{layer}.weight"] = (
                self.base[f"{layer}.weight"] + options["alpha"] / options["rank"] * b @ a
            )
        tensors |= {name: leaf for name, leaf in leaves.items() if name.startswith("5.")}
        loss = F.cross_entropy(functional_call(self.plain, tensors, (images,)), labels)
        found = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(leaves, (gradient.clone() for gradient in found), strict=True))


class NaiveLora(WrittenOut, NaiveFederation):
    pass


class NaiveTopKLora(WrittenOut, NaiveTopK):
    pass


class NaiveFlascLora(WrittenOut, NaiveFlasc):
    pass


@pytest.mark.parametrize(
    ("naive", "method"),
    [
        (NaiveLora, {"name": "fedavg"}),
        (NaiveTopKLora, {"name": "topk", "sparsity": 0.7}),
        (NaiveFlascLora, {"name": "flasc", "sparsity": 0.7, "down_sparsity": 0.4}),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_the_naive_reference(cache, tmp_path, naive, method):
    config = adapted(cache, algorithm=method, local={"epochs": 2, "weight_decay": 0.01})
    run = run_inline(config, tmp_path / "run")
    assert set(run.weights) == {
        "1.lora_A.weight",
        "1.lora_B.weight",
        "3.lora_A.weight",
        "3.lora_B.weight",
        "5.weight",
        "5.bias",
    }
    assert_same(run, naive(config).run())


def test_a_frozen_head_is_part_of_the_base(cache, tmp_path):
    config = adapted(
        cache, adapter={**LORA, "freeze_head": True}, algorithm={"name": "flasc", "sparsity": 0.5}
    )
    run = run_inline(config, tmp_path / "run")
    assert run.state.weights.numel() == TRAINED - 33
    assert run.lines[-1]["comm/base_bytes_total"] % (HEADER + 4 * (BASE + 33)) == 0
    assert_same(run, NaiveFlascLora(config).run())


# ---------------------------------------------------------------------------------------------- what travels


#: Weights that are 0 are not sent down; of B at 0 there would be none in round 1.
SENT_WHOLE = {**LORA, "b_init": 0.01}


def test_bytes_by_hand(cache, tmp_path):
    run = run_inline(adapted(cache, rounds=3, adapter=SENT_WHOLE), tmp_path / "run")
    sent, message = set(), HEADER + 4 * TRAINED
    for line in run.lines:
        clients = {client for number, client in run.uploads if number == line["round"]}
        assert line["comm/uplink_bytes"] == 4 * message
        first = len(clients - sent) * (HEADER + 4 * BASE)
        assert line["comm/downlink_bytes"] == 4 * message + first
        assert line["comm/dense_bytes"] == 4 * 4 * TRAINED
        sent |= clients
        assert line["comm/base_bytes_total"] == len(sent) * (HEADER + 4 * BASE)
    assert run.state.weights.numel() == TRAINED
    stored = load_checkpoint(latest(tmp_path / "run" / "checkpoints"))
    assert stored.driver["installed"] == {"version": 0, "clients": sorted(sent)}


def test_who_is_sent_a_part_is_sent_the_base_too(cache, tmp_path):
    """All are asked in round 1, and have the base from then on."""
    flasc = {"name": "flasc", "down_sparsity": 0.75}
    run = run_inline(adapted(cache, rounds=2, cohort=6, algorithm=flasc), tmp_path / "run")
    first, second = (line["comm/downlink_bytes"] for line in run.lines)
    assert first - second == pytest.approx(6 * (HEADER + 4 * BASE), abs=6 * 16)  # but for positions
    assert run.lines[1]["comm/base_bytes_total"] == 6 * (HEADER + 4 * BASE)


def test_a_first_visit_takes_the_time_of_the_base(cache, tmp_path):
    # 8 bit/s down: the message and, at first, the base, at a byte a second.
    slow = {
        "tiers": {"slow": {"share": 1.0, "compute": 1e30, "downlink": 8.0, "uplink": 1e30, "latency": 0.0}}
    }
    run = run_inline(adapted(cache, rounds=2, cohort=6, devices=slow, adapter=SENT_WHOLE), tmp_path / "run")
    first, second = (line["time/round_simulated_s"] for line in run.lines)
    assert second == pytest.approx(HEADER + 4 * TRAINED)
    assert first - second == pytest.approx(HEADER + 4 * BASE)


def test_buffered_rounds_bill_the_base_once(cache, tmp_path):
    buffered = {"name": "buffered", "buffer": 2, "concurrency": 3}
    run = run_inline(
        adapted(cache, rounds=4, cohort=2, schedule=buffered, adapter=SENT_WHOLE), tmp_path / "run"
    )
    line = run.lines[-1]
    assert line["comm/base_bytes_total"] <= 6 * (HEADER + 4 * BASE)
    messages = (line["comm/downlink_bytes_total"] - line["comm/base_bytes_total"]) / (HEADER + 4 * TRAINED)
    assert messages == int(messages) >= 8


def test_the_base_is_billed_to_clients_that_are_sent_a_part_of_the_adapters(cache, tmp_path):
    # FLASC sends half of the prunable floats: 128 of A and 20 of B, and 30 of the head, and 3 biases whole.
    flasc = {"name": "flasc", "down_sparsity": 0.5, "sparsity": 0.5}
    run = run_inline(
        adapted(cache, rounds=1, algorithm=flasc, adapter=SENT_WHOLE, cohort=4), tmp_path / "run"
    )
    (line,) = run.lines
    assert line["comm/base_bytes_total"] == 4 * (HEADER + 4 * BASE)
    messages = line["comm/downlink_bytes_total"] - line["comm/base_bytes_total"]
    assert 0 < messages < 4 * (HEADER + 4 * TRAINED)


@pytest.mark.parametrize("name", ["sparsyfed", "zerofl", "fixed_mask", "flash", "feddst", "fedef", "ssfl"])
def test_every_kind_of_method(cache, tmp_path, name):
    adapter = {**LORA, "b_init": 0.01}
    run = run_inline(
        adapted(cache, algorithm={"name": name, "sparsity": 0.5}, adapter=adapter), tmp_path / "run"
    )
    start, end = run.states[0].weights, run.state.weights
    for entry in run.driver.layout.prunable:
        assert not torch.equal(start[entry.span], end[entry.span]), entry.name
    line = run.lines[-1]
    assert line["flops/sparse"] <= line["flops/dense"]
    frozen = run.driver.federation.flops.frozen
    assert line["flops/sparse"] == pytest.approx(sum(line["flops/layers"]) + line["clients/samples"] * frozen)


def test_a_pass_through_the_module_is_billed_like_a_step():
    from tests.cluster.clients.test_billing import beside, loss_of

    federation = Federation.of(
        resolve("quickstart", ["model.name=mlp", "adapter.rank=2", "adapter.b_init=0.1"])
    )
    rows = torch.arange(5)
    parameters = lambda visit: [own for own in visit.module.parameters() if own.requires_grad]  # noqa: E731
    method = beside(lambda visit, compute: torch.autograd.grad(loss_of(visit, rows), parameters(visit)))
    trainer = trainer_of(method, model=copy.deepcopy(federation.model))
    trained = trainer.visit(0, np.arange(20), 0.0, broadcast_of(trainer, method, None, 1))
    # Three batches in each of two epochs, and before each step a pass over five samples.
    assert trained.measured.flops_dense == trainer.flops.dense(40 + 6 * 5)
    assert trained.measured.flops_frozen == (40 + 6 * 5) * trainer.flops.frozen
    assert trained.measured.flops_sparse_total <= trained.measured.flops_dense


# ------------------------------------------------------------------------------------------- what comes out


def test_merged_weights_reproduce_the_logged_metrics(cache, tmp_path):
    digits = {"data": {"name": "digits"}, "local": {"epochs": 3, "lr": 0.1}}
    config = adapted(
        cache, algorithm={"name": "sparsyfed", "sparsity": 0.5}, adapter={**LORA, "b_init": 0.05}, **digits
    )
    result = cluster.run(config, tmp_path / "run")
    dataset = Federation.of(config).dataset
    plain = build_model(config, dataset)
    merged, own = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("model", "adapter"))
    begun = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    plain.load_state_dict(merged, strict=True)
    logged = RunFolder(tmp_path / "run").rounds()[-1]["test/accuracy"]
    assert logged > 0.3
    assert accuracy(plain.eval(), dataset) == logged == result.summary["accuracy"]
    assert accuracy(result.model(), dataset) == logged
    # The base and the adapter's file give the model's file, as who loads both computes it.
    for layer in ("1", "3"):
        a, b = (own[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(merged[f"{layer}.weight"], begun[f"{layer}.weight"] + 4.0 * b @ a)
        assert torch.equal(merged[f"{layer}.bias"], begun[f"{layer}.bias"])
    assert torch.equal(merged["5.weight"], own["base_model.model.5.weight"])


def test_averages_are_exact_where_a_is_frozen(cache, tmp_path):
    def products(freeze_a):
        run = run_inline(
            adapted(cache, rounds=2, adapter={**LORA, "freeze_a": freeze_a}), tmp_path / str(freeze_a)
        )
        federation = run.driver.federation
        fixed = dict(federation.model.named_parameters())

        def product(weights):
            a = weights.get("1.lora_A.weight", fixed["1.lora_A.weight"].detach())
            return weights["1.lora_B.weight"].double() @ a.double()

        sizes = {client: int(federation.sizes[client]) for number, client in run.uploads if number == 2}
        of_clients = sum(size * product(run.uploads[2, client][0]) for client, size in sizes.items())
        return product(run.weights), of_clients / sum(sizes.values())

    torch.testing.assert_close(*products(True), atol=1e-7, rtol=1e-5)
    found, exact = products(False)
    assert float((found - exact).abs().max()) > 2e-5


def test_a_run_begins_with_the_weights_of_a_file(cache, tmp_path):
    base = cluster.run(tiny_federation(cache, model=MLP), tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    config = adapted(cache, rounds=1, model={**MLP, "weights": str(file)})
    federation = Federation.of(config)
    plain = base.model()
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(federation.model.eval()(x), plain(x))
    before = config.digest()
    cluster.run(config, tmp_path / "run")
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert torch.equal(found["1.bias"], load_file(file)["1.bias"])
    other = cluster.run(tiny_federation(cache, model=MLP, seed=4), tmp_path / "other").folder
    (other / "model.safetensors").replace(file)
    assert adapted(cache, rounds=1, model={**MLP, "weights": str(file)}).digest() != before


def test_interrupted_is_uninterrupted(cache, tmp_path):
    overrides = {"rounds": 5, "cohort": 2, "checkpoint_every": 2, "algorithm": {"name": "fixed_mask"}}
    federation = Federation.of(adapted(cache, **overrides))
    whole, cut = (RunFolder.create(tmp_path / name, federation.config) for name in ("whole", "cut"))
    drive(whole, federation)
    drive(cut, federation, killed_at=3)
    drive(cut, federation)
    assert_same_run(cut.path, whole.path)
    assert cut.adapter_file.read_bytes() == whole.adapter_file.read_bytes()
    installed = [load_checkpoint(latest(run.checkpoints)).driver["installed"] for run in (cut, whole)]
    assert installed[0] == installed[1]


def test_hosts_stand_on_the_base_that_they_are_given(cache):
    setup = Federation.of(adapted(cache)).setup()
    setup.base.flags.writeable = False
    hosts = [ClientHost(setup), ClientHost(setup)]
    found = {host._trainer.module[1].base_layer.weight.data_ptr() for host in hosts}
    assert found == {setup.base.ctypes.data}


def test_clients_are_judged_after_local_training(cache, tmp_path):
    run = run_inline(adapted(cache, evaluate_clients={"every": 1, "after": 3}), tmp_path / "run")
    assert run.lines[-1]["clients/accuracy_mean_after"] is not None


# ------------------------------------------------------------------------------------------ configuration


def test_the_default_is_no_adapter():
    plain = resolve("quickstart")
    assert plain.adapter is None
    assert resolve("quickstart", ["adapter=null"]).digest() == plain.digest()
    plain = resolve("quickstart", ["algorithm.name=topk"])
    one = resolve("quickstart", ["algorithm.name=topk", "adapter.rank=4"])
    assert one.adapter.name == "lora"
    assert one.adapter.options["alpha"] == 16.0
    assert len({plain.digest(), one.digest(), resolve(one.dump(), ["adapter.rank=5"]).digest()}) == 3
    assert resolve(one.dump(), ["adapter=null"]).digest() == plain.digest()
    assert resolve(one.resolved()).digest() == one.digest()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["adapter.name=lroa"], "adapter.name: 'lroa' is unknown; allowed are lora, .* did you mean lora?"),
        (["adapter.rnak=4"], "adapter.rnak: lora has no such field; .* did you mean rank?"),
        (["adapter=lora"], "adapter: a section of keys and values, found 'lora'; write adapter.name=lora"),
        (["adapter.rank=0"], "adapter.rank: 0 is out of range"),
        (["adapter.name=lora"], "adapter.b_init: 0, and sparsyfed trains no weight that is 0.*b_init=0.01"),
        (["adapter.name=lora", "algorithm.name=heterofl"], "adapter: heterofl cuts hidden layers to slices"),
        (["adapter.name=lora", "algorithm.name=splitmix"], "adapter: splitmix cuts hidden layers to slices"),
        (["adapter.name=lora", "algorithm.name=fedpm"], "adapter.b_init: 0, and fedpm trains no weight"),
        (
            ["adapter.name=lora", "algorithm.name=fiarse", "algorithm.sparsity=0.5"],
            "adapter.b_init: 0, and fiarse trains no weight",
        ),
        (["adapter.name=lora", "algorithm.name=ssfl"], "adapter.b_init: 0, and ssfl trains no weight"),
    ],
)
def test_refusals_are_one_line(overrides, says):
    with pytest.raises(ConfigError, match=says) as refused:
        resolve({"algorithm": {"name": "sparsyfed"}}, overrides)
    assert "\n" not in str(refused.value)
    resolve({"algorithm": {"name": "sparsyfed", "plain_layers": ["*lora_B"]}}, ["adapter.name=lora"])


def test_a_model_that_does_not_fit_ends_before_anything_starts(cache):
    with pytest.raises(ModelError, match=r"adapter.rank: 11 is more than layer '3' has"):
        Federation.of(adapted(cache, adapter={"name": "lora", "rank": 11}))


def test_describe_tells_of_the_base(capsys):
    assert main(["describe", "quickstart", "model.name=mlp", "adapter.rank=4", "algorithm.name=topk"]) == 0
    told = capsys.readouterr().out
    assert (
        "frozen      13,000 parameters, a message of 0.052 MB to each client before its first model" in told
    )
    assert "adapters    beside 1 layers; trained in full: 3" in told
    assert "the frozen base, once" in told
    assert "note        algorithm.name=topk at this sparsity would leave nothing of 1.lora_B" in told
