"""Sets of labels: sums by hand, against scikit-learn and autograd, limits."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss

from cluster.workload.multilabel import Multilabel
from cluster.workload.objectives import added


def test_sums_by_hand():
    # Found: {0}, {0, 1}, {}; held: {0}, {1}, {1}. Logits of +-ln 3: probabilities of 3/4 and 1/4.
    one = math.log(3.0)
    outputs = torch.tensor([[one, -one, -one], [one, one, -one], [-one, -one, -one]])
    targets = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=torch.uint8)
    objective = Multilabel()
    assert objective.shape(targets.numpy(), 3) == (3, 3)
    sums = objective.sums(outputs, targets)
    assert (sums["samples"], sums["exact"]) == (3, 1)
    assert sums["hits"].tolist() == [1, 1, 0]
    assert sums["missed"].tolist() == [0, 1, 0]
    assert sums["wrong"].tolist() == [1, 0, 0]
    loss = 7 * math.log(4 / 3) + 2 * math.log(4)  # seven are right, two wrong
    assert sums["loss"] == pytest.approx(loss)
    expected = {
        "micro_f1": 4 / 6,
        "macro_f1": (2 / 3 + 2 / 3 + 0) / 3,
        "exact_match": 1 / 3,
        "loss": loss / 9,
    }
    assert objective.metrics(sums) == pytest.approx(expected)
    assert float(objective.loss(outputs, targets)) == pytest.approx(loss / 9)
    parts = [objective.sums(outputs[row : row + 1], targets[row : row + 1]) for row in range(3)]
    assert objective.metrics(added(added(*parts[:2]), parts[2])) == pytest.approx(expected)
    assert (objective.selects.key, objective.selects.better) == ("micro_f1", "higher")
    assert objective.measures[-1].better == "lower"


def test_the_measures_are_those_of_scikit_learn():
    rng = np.random.default_rng(3)
    outputs = torch.from_numpy(rng.normal(size=(40, 6))).float()
    held = (rng.random((40, 6)) < 0.3).astype(np.uint8)
    held[:, 4] = 0  # no sample has the fifth label
    found = (outputs.numpy() > 0).astype(int)
    metrics = Multilabel().metrics(Multilabel().sums(outputs, torch.from_numpy(held)))
    for kind in ("micro", "macro"):
        wanted = f1_score(held, found, average=kind, zero_division=0)
        assert metrics[f"{kind}_f1"] == pytest.approx(wanted)
    assert metrics["exact_match"] == (held == found).all(axis=1).mean()
    chances = torch.sigmoid(outputs.double()).numpy()
    by_label = [log_loss(held[:, label], chances[:, label], labels=[0, 1]) for label in range(6)]
    assert metrics["loss"] == pytest.approx(np.mean(by_label))


def test_the_gradient_is_that_of_the_naive_loss():
    rng = np.random.default_rng(4)
    outputs = torch.from_numpy(rng.normal(size=(5, 3))).float().requires_grad_()
    held = torch.from_numpy((rng.random((5, 3)) < 0.5).astype(np.uint8))
    (gradient,) = torch.autograd.grad(Multilabel().loss(outputs, held), outputs)
    naive = torch.zeros(())
    for row, label in np.ndindex(5, 3):
        chance = 1 / (1 + torch.exp(-outputs[row, label]))
        naive = naive - torch.log(chance if held[row, label] else 1 - chance) / 15
    (wanted,) = torch.autograd.grad(naive, outputs)
    torch.testing.assert_close(gradient, wanted)


def test_limits():
    objective, none = Multilabel(), torch.zeros(2, 3, dtype=torch.uint8)
    found = objective.metrics(objective.sums(torch.zeros(2, 3), none))  # 0 is no label yet
    assert found == {"micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 1.0, "loss": pytest.approx(math.log(2))}
    sure = objective.metrics(objective.sums(torch.full((2, 3), 50.0), 1 - none))
    assert (sure["micro_f1"], sure["macro_f1"], sure["exact_match"]) == (1.0, 1.0, 1.0)
    assert math.isfinite(objective.loss(torch.full((2, 3), -1e4), 1 - none).item())
    assert math.isnan(objective.metrics(objective.sums(torch.full((2, 3), math.nan), none))["loss"])
