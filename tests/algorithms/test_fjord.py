"""FjORD: every step is one of a narrower network, billed as such; widths are drawn among the levels held."""

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.core.attacks import Pgd
from algorithms.fjord import Fjord, FjordClient
from tests.algorithms.test_submodels import half
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")
ROWS = np.arange(20)


class Noting(FjordClient):
    """Notes what is computed with and what its gradient is."""

    seen: list = []  # noqa: RUF012

    def gradient(self, compute):
        loss = super().gradient(compute)
        self.seen.append((self.visit.model.clone(), self.visit.gradient.clone(), self.visit.weights.clone()))
        return loss


def visited(budget, *, levels=4, **settings):
    """A client's steps: trainer, what was noted, the visit's result."""
    method = type("Own", (Fjord,), {"client": Noting, "name": ""})(levels=levels, share_of="width")
    Noting.seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    trainer = trainer_of(method, model=model, weight_decay=0.0, epochs=10, **settings)
    broadcast, part = (
        half(method, trainer) if budget == 0.5 else (broadcast_of(trainer, method, None, 1), None)
    )
    return trainer, method, trainer.visit(0, ROWS, 1 - budget, broadcast, part=part)


@pytest.mark.parametrize(("budget", "widths"), [(1.0, {2, 4, 6, 8}), (0.5, {2, 4})])
def test_each_step_is_one_of_a_narrower_network(budget, widths):
    trainer, _, trained = visited(budget)
    layout, flops, drawn = trainer.layout, 0.0, []
    assert len(Noting.seen) == 30  # batches of 8, 8 and 4
    for number, (model, gradient, weights) in enumerate(Noting.seen):
        used = layout.split(model, layout.trained)
        width = int((used["1.weight"] != 0).any(dim=1).sum())
        drawn.append(width)
        # What is computed with are the first units' weights as they are, the others' are 0.
        mine = {name: tensor.clone() for name, tensor in layout.split(weights, layout.trained).items()}
        assert torch.equal(used["1.weight"][:width], mine["1.weight"][:width])
        assert torch.equal(used["3.weight"][:, :width], mine["3.weight"][:, :width])
        for tensor in (used["1.weight"][width:], used["1.bias"][width:], used["3.weight"][:, width:]):
            assert not tensor.any()
        slopes = layout.split(gradient, layout.trained)
        assert not slopes["1.weight"][width:].any()
        assert not slopes["3.weight"][:, width:].any()
        assert slopes["1.weight"][:width].any()
        # First layer: forward and weight gradient; the second one's input gradient on top.
        flops += (8, 8, 4)[number % 3] * 2 * (2 * 64 * width + 3 * 3 * width)
    assert set(drawn) == widths
    assert trained.measured.flops_dense == pytest.approx(flops, rel=1e-9)
    assert trained.measured.flops_sparse.sum() == pytest.approx(flops, rel=1e-6)
    if budget == 0.5:
        values = layout.split(torch.from_numpy(trained.values.copy()))
        assert not values["1.weight"][4:].any()


def test_an_attack_is_as_narrow_as_its_step():
    """Of each run forward pass and input gradient, of the first layer too."""
    (_, _, plain), (_, _, attacked) = visited(1.0), visited(1.0, attack=Pgd(epsilon=0.1, steps=3))
    runs = 0.0
    for number, (model, _, _) in enumerate(Noting.seen):
        width = int((model[: 64 * 8].view(8, 64) != 0).any(dim=1).sum())
        runs += 3 * (8, 8, 4)[number % 3] * 2 * 2 * (64 + 3) * width
    for more in (
        attacked.measured.flops_dense - plain.measured.flops_dense,
        attacked.measured.flops_sparse.sum() - plain.measured.flops_sparse.sum(),
    ):
        assert more == pytest.approx(runs, rel=1e-6)


def test_inner_units_are_trained_most_and_tiers_are_judged(cache, tmp_path):
    tiers = {"all": {"share": 0.5, "sparsity": 0.0}, "half": {"share": 0.5, "sparsity": 0.5}}
    algorithm = {"name": "fjord", "share_of": "width", "levels": 2}
    run = run_inline(tiny_federation(cache, algorithm=algorithm, devices={"tiers": tiers}), tmp_path / "run")
    assert {"tiers/all/accuracy", "tiers/half/accuracy"} <= run.lines[-1].keys()
    assert run.lines[0]["tiers/all/accuracy"] == run.lines[0]["test/accuracy"]
