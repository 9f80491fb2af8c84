"""Language modelling: sums by hand, a run against a naive evaluation and after an interruption."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import cluster
from cluster.configuration.config import resolve
from cluster.measures import from_values
from cluster.records.run_folder import RunFolder, comparable
from cluster.workload.language_model import LanguageModel
from cluster.workload.objectives import added
from cluster.workload.transformer import Transformer
from tests.tiny_experiment import run_inline

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_sums_by_hand():
    # Softmax of (0, ln 3) is (1/4, 3/4); the second row's only token and the first row's two.
    one = math.log(3.0)
    outputs = torch.tensor([[[0.0, one], [0.0, one], [5.0, 0.0]], [[one, 0.0], [0.0, 0.0], [9.0, 9.0]]])
    targets = torch.tensor([[1, 0, -100], [0, -100, -100]])
    objective = LanguageModel()
    assert objective.shape(targets.numpy(), 2) == (2, 3, 2)
    sums = objective.sums(outputs, targets)
    loss = math.log(4 / 3) + math.log(4) + math.log(4 / 3)
    assert sums == {"tokens": 3, "correct": 2, "loss": pytest.approx(loss)}
    assert float(objective.loss(outputs, targets)) == pytest.approx(loss / 3)
    found = objective.metrics(sums)
    assert found == pytest.approx(
        {
            "perplexity": (4 / 3 * 4 * 4 / 3) ** (1 / 3),
            "loss": loss / 3,
            "bits_per_token": loss / 3 / math.log(2),
            "token_accuracy": 2 / 3,
        }
    )
    parts = [objective.sums(outputs[row : row + 1], targets[row : row + 1]) for row in range(2)]
    assert objective.metrics(added(*parts)) == pytest.approx(found)  # tokens weigh the same, not samples


def test_limits():
    objective = LanguageModel()
    outputs = torch.zeros(1, 2, 4, requires_grad=True)
    assert objective.loss(outputs, torch.full((1, 2), -100)).item() == 0.0
    uniform = objective.metrics(objective.sums(outputs.detach(), torch.tensor([[1, 3]])))
    assert (uniform["perplexity"], uniform["bits_per_token"]) == pytest.approx((4.0, 2.0))
    wrong = torch.tensor([[[0.0, 5000.0]]])
    assert objective.metrics(objective.sums(wrong, torch.tensor([[0]])))["perplexity"] == math.inf
    assert math.isnan(objective.metrics(objective.sums(wrong * math.nan, torch.tensor([[0]])))["loss"])
    assert objective.selects.key == "perplexity"
    assert objective.selects.better == "lower"


class Noting(nn.Module):
    """Notes what it is given."""

    given: set = set()  # noqa: RUF012

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, tokens):
        self.given.add((tokens.dtype, tokens.ndim))
        return self.inner(tokens)


def noting(*, input_shape, classes):
    return Noting(Transformer(layers=1, width=8, heads=2).build(input_shape, classes))


def experiment(cache, *more, **sections):
    tree = {
        "rounds": 3,
        "cohort": 3,
        "execution": "inline",
        "checkpoint_every": 1,
        "objective": {"name": "language_model"},
        "data": {"name": "tiny_text", "length": 16, "cache": str(cache)},
        "model": {"name": "transformer", "layers": 1, "width": 16, "heads": 2},
        "partition": {"name": "natural", "clients": 6, "min_samples": 60},
        "local": {"epochs": 1, "batch_size": 16, "lr": 0.3},
        "algorithm": {"name": "sparsyfed", "sparsity": 0.5},
        "tracking": {"enabled": False},
    }
    return resolve({**tree, **sections}, more)


def test_a_run_logs_what_its_model_foretells_and_never_sees_a_float(cache, tmp_path):
    name = "tests.cluster.workload.test_language_model:noting"
    Noting.given.clear()
    run = run_inline(
        experiment(
            cache,
            model={"name": name},
            data={"name": "tiny_text", "length": 16, "validation": 0.1, "cache": str(cache)},
        ),
        tmp_path / "run",
    )
    assert Noting.given == {(torch.int64, 2)}
    federation = run.driver.federation
    assert federation.dataset.train.inputs.dtype == np.int16
    assert federation.selection_metric == "val/perplexity"
    assert federation.sizes.min() >= 50
    weights = run.driver.federation.config.method.effective_weights(
        run.state.weights.clone(), federation.layout
    )
    federation.layout.bind(federation.model, weights)
    test, loss, hits, tokens = federation.dataset.test, 0.0, 0, 0
    with torch.no_grad():
        outputs = federation.model.eval()(torch.from_numpy(test.inputs.astype(np.int64))).double().numpy()
    for row, place in np.ndindex(*test.targets.shape):
        target, logits = test.targets[row, place], outputs[row, place]
        if target == -100:
            continue
        loss -= logits[target] - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        hits += int(logits.argmax() == target)
        tokens += 1
    line = run.lines[-1]
    assert line["test/perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    assert line["test/bits_per_token"] == pytest.approx(loss / tokens / math.log(2), rel=1e-5)
    assert line["test/token_accuracy"] == pytest.approx(hits / tokens, abs=1e-3)
    assert line["test/perplexity"] < run.lines[0]["test/perplexity"] < 257


def lines(folder):
    return [comparable(line) for line in RunFolder(folder).rounds()]


def test_it_learns_is_summed_up_and_resumes_to_the_same_bits(cache, tmp_path):
    config = experiment(cache)
    cluster.run(config, tmp_path / "whole")
    found = lines(tmp_path / "whole")
    assert found[-1]["test/perplexity"] < found[0]["test/perplexity"]
    summary = RunFolder(tmp_path / "whole").result()
    assert summary["perplexity"] == found[-1]["test/perplexity"]
    assert from_values(summary["objective"]["metrics"])[0].key == "perplexity"
    cluster.run(experiment(cache, "stop_after=2"), tmp_path / "cut")
    cluster.resume(tmp_path / "cut", ["stop_after=null"])
    assert lines(tmp_path / "cut") == found
    model = "model.safetensors"
    assert (tmp_path / "cut" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
