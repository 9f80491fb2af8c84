"""pFedGate by hand, against a naive reference, its limits and what it refuses."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from algorithms import ParameterLayout
from algorithms.core.local_optimizers import Sgd
from algorithms.pfedgate import PFedGate, PFedGateClient, blocks_of, looked_at
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_same, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

# ------------------------------------------------------------------------------------------- by hand


def line(*sizes):
    """Linear layers of so many weights."""
    return ParameterLayout.of(nn.Sequential(*(nn.Linear(size, 1, bias=False) for size in sizes)))


def kept_of(opening, sparsity, layout, **fields):
    method = PFedGate(sparsity=sparsity, **fields)
    kept, scales = method.scales(torch.tensor(opening), sparsity, method.blocks_of(layout))
    return kept.astype(int).tolist(), scales.tolist()


def test_blocks_by_hand():
    assert blocks_of(line(10), 5).sizes.tolist() == [2] * 5
    assert blocks_of(line(7), 5).sizes.tolist() == [2, 2, 2, 1]
    assert blocks_of(line(3), 5).sizes.tolist() == [1] * 3
    two = blocks_of(ParameterLayout.of(nn.Sequential(nn.Conv2d(1, 7, 1), nn.Linear(3, 1))), 5)
    assert two.first.astype(int).tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert two.linear.astype(int).tolist() == [0] * 4 + [1] * 3
    assert two.expand(torch.arange(7)).tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6]


def test_the_budget_by_hand():
    """Of ten weights the first two, and round(8 x (.5 - .2)) = 2 more: the best block, t .9."""
    opening = [0.1, 0.5, 0.6, 0.9, 0.4]
    kept, scales = kept_of(opening, 0.5, line(10))
    assert kept == [1, 0, 0, 1, 0]
    np.testing.assert_allclose(scales, [0.1, 0, 0, 0.9, 0], atol=1e-7)
    assert kept_of(opening, 0.5, line(10), scale=False)[1] == [1, 0, 0, 1, 0]
    assert kept_of(opening, 0.75, line(10))[0] == [1, 0, 0, 0, 0]  # round(8 x .05) = 0
    assert kept_of(opening, 0.0, line(10))[0] == [1] * 5
    assert kept_of(opening, 0.5, line(10), first_block_kept=False)[0] == [0, 0, 1, 1, 0]  # 5 of ten: 4 fit
    assert kept_of([0.5] * 5, 0.5, line(10))[0] == [1, 1, 0, 0, 0]  # ties go to the first
    assert kept_of([0.1, 0.19, 0.05, 0.1, 0.2], 0.5, line(10))[0] == [1, 1, 0, 0, 0]  # all below s_min tie


def test_a_block_that_does_not_fit_is_passed_over():
    """Blocks of 4, 4, 2 and 1, 1, 1: of 6 + 2 others round(8 x .3) = 2 fit."""
    layout = line(10, 3)
    assert kept_of([0.1, 0.9, 0.3, 0.1, 0.2, 0.8], 0.5, layout, blocks=3)[0] == [1, 0, 0, 1, 0, 1]
    # s_min is 1/3, and round(8 x (.5 - 1/3)) = 1: the others of 2 and 4 do not fit.
    assert kept_of([0.1, 0.9, 0.9, 0.1, 0.2, 0.3], 0.5, layout, blocks=3)[0] == [1, 0, 0, 1, 1, 0]


def test_groups_have_budgets_of_their_own():
    layout = ParameterLayout.of(nn.Sequential(nn.Conv2d(1, 10, 1, bias=False), nn.Linear(10, 1, bias=False)))
    assert kept_of([0.1, 0.1, 0.1, 0.1, 0.3, 0.1, 0.9, 0.9, 0.9, 0.9], 0.5, layout)[0] == [
        *(1, 0, 0, 0, 1),
        *(1, 1, 0, 0, 0),
    ]


def test_the_gates_gradient_by_hand():
    """W = (1, 2 | 3, 4), a gradient of ones: <., W> = 3 and 7; dt/da = 1/4; dr/dt = 1 + t = 1.5."""
    opening, both = torch.tensor([0.5, 0.5]), np.array([True, True])
    along = torch.tensor([3.0, 7.0]) * 0.25

    def gradient(sparsity, kept=both, **fields):
        return (along * PFedGate(**fields).slopes(opening, kept, sparsity)).tolist()

    assert gradient(0.5) == [1.125, 2.625]
    assert gradient(0.0) == [0.75, 1.75]  # nothing is dropped: W t, and no path through the choice
    assert gradient(0.5, np.array([True, False])) == [1.125, 0.0]
    assert gradient(0.5, scale=False) == [0.75, 1.75]
    assert gradient(0.0, scale=False) == [0.0, 0.0]
    assert gradient(0.5, blocks=2) == [0.75, 1.75]  # t is not above s_min = 1/2


def test_what_a_gate_of_images_sees():
    pictures = torch.rand(3, 2, 16, 16)
    seen = looked_at(pictures).view(3, 8, 8)
    patches = pictures[1].unfold(1, 2, 2).unfold(2, 2, 2)  # [2, 8, 8, 2, 2]
    means = patches.sum((0, 3, 4)) / 8
    torch.testing.assert_close(seen[1], (means - means.mean()) / (means.var(correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(seen.mean((1, 2)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.var((1, 2), correction=0), torch.ones(3), atol=1e-2, rtol=0)
    assert looked_at(torch.rand(3, 10)).shape == (3, 64)  # rows of a table
    one = PFedGate(gate="images").opening(torch.ones(4 * 66), looked_at(pictures[:1]))
    torch.testing.assert_close(one, torch.sigmoid(torch.ones(4)))  # one sample alone: its biases


# --------------------------------------------------------------------------------- a naive reference


class NaivePFedGate(NaiveFederation):
    """Gates by client, blocks by ``torch.chunk``, every gradient by autograd."""

    def __init__(self, config):
        super().__init__(config)
        self.gates, self.kept_once = {}, {}

    def pieces(self, name):
        return len(self.layers[name].weight.flatten().chunk(self.options.blocks))

    def begin(self, weights, visit):
        count = sum(self.pieces(name) for name in self.prunable)
        first = [torch.zeros(count)]
        if self.options.gate == "images":
            drawn = np.random.default_rng(0).uniform(-1 / 8, 1 / 8, (count, 64))
            first = [torch.from_numpy(drawn).float(), torch.ones(count), torch.zeros(count)]
        self.gate = self.gates.setdefault(visit.client, first)
        self.kept_once = {}

    def opened(self, gate, images):
        if self.options.gate == "scores":
            return torch.sigmoid(gate[0])
        flat = images.flatten(1)
        seen = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True, correction=0) + 1e-5) ** 0.5
        logits = F.batch_norm(F.linear(seen, gate[0]), None, None, gate[1], gate[2], training=True)
        return torch.sigmoid(logits).mean(0)

    def chosen(self, t, weights):
        """Indices of the blocks that are kept, one group after the other."""
        density = 1 - self.options.sparsity
        floor = min(max(1 / self.options.blocks, 0.1), density)
        table, number = [], 0
        for name in self.prunable:
            for place, piece in enumerate(weights[name].detach().flatten().chunk(self.options.blocks)):
                table.append((number, piece.numel(), place == 0, weights[name].dim() == 2))
                number += 1
        kept = {number for number, _, first, _ in table if first}
        for kind in (True, False):
            others = [(n, size) for n, size, first, linear in table if linear == kind and not first]
            room = round((density - floor) * sum(size for _, size in others))
            for n, size in sorted(others, key=lambda one: -max(t[one[0]].item(), floor)):
                if size <= room:
                    kept.add(n)
                    room -= size
        return kept, floor

    def gradients(self, weights, images, labels, visit):
        gate = [one.detach().requires_grad_() for one in self.gate]
        t = self.opened(gate, images if self.options.scope == "batch" else visit.images)
        kept, floor = self.chosen(t, weights)
        leaves = {name: weights[name].requires_grad_() for name in self.trained}
        hat, number = dict(weights), 0
        for name in self.prunable:
            parts = []
            for piece in weights[name].flatten().chunk(self.options.blocks):
                g = torch.clamp(t[number], min=floor)
                mask = 1 - g.detach() + g if number in kept else torch.tensor(0.0)
                parts.append(piece * mask * t[number])
                number += 1
            hat[name] = torch.cat(parts).view(weights[name].shape)
        loss = F.cross_entropy(functional_call(self.module, hat, (images,)), labels)
        found = torch.autograd.grad(loss, [*leaves.values(), *gate])
        epoch = visit.step // visit.steps_per_epoch
        own, turns = found[len(leaves) :], self.options.optimisation == "alternate"
        if not turns or epoch % 2 == 0:
            self.gate = [a.detach() - self.options.gate_lr * g for a, g in zip(gate, own, strict=True)]
        still = turns and epoch % 2 == 0
        if not still:
            self.kept_once.update(dict.fromkeys(kept))
        self.gates[visit.client] = self.gate
        return {name: g * (not still) for name, g in zip(leaves, found, strict=False)}

    def upload(self, weights, received, visit):
        change = {name: weights[name] - received[name] for name in weights}
        mask, number = {}, 0
        for name in self.prunable:
            parts = []
            for piece in weights[name].flatten().chunk(self.options.blocks):
                parts.append(torch.full((piece.numel(),), number in self.kept_once))
                number += 1
            mask[name] = torch.cat(parts).view(weights[name].shape)
        return self.masked(change, mask), mask

    def server(self, weights, uploads, masks, sizes, round_number):
        mean = self.mean(uploads, sizes)
        everyone = sum(len(self.partition.client(c)) for c in range(self.config.partition.clients))
        share = sum(sizes.values()) / everyone if self.options.average_over == "population" else 1.0
        return {name: weights[name] + share * mean[name] for name in weights}


@pytest.mark.parametrize(
    "more",
    [
        {"gate_lr": 2.0, "average_over": "population"},
        {"gate": "images", "sparsity": 0.6},
        {"gate": "images", "scope": "batch", "gate_lr": 1.0, "optimisation": "alternate"},
    ],
    ids=["scores", "images", "authors"],
)
def test_equals_the_naive_reference(cache, tmp_path, more):
    local = {"epochs": 2 if "optimisation" in more else 1}
    config = tiny_federation(cache, algorithm={"name": "pfedgate", **more}, rounds=3, local=local)
    run = run_inline(config, tmp_path / "run")
    naive = NaivePFedGate(config).run()
    assert_same(run, naive)
    for client, own in run.driver._schedule.kept.states.items():
        expected = torch.cat([one.flatten() for one in naive.gates[client]]).numpy()
        np.testing.assert_allclose(own.arrays["gate"], expected, atol=1e-5)
        # Of each of four tensors the first of five blocks, and what fits into the budget.
        assert 4 < np.count_nonzero(own.arrays["scales"]) < 20


def test_in_an_epoch_for_the_gate_nothing_moves_the_weights():
    """Neither decay nor the momentum of the epoch before, which waits."""
    seen = []

    class Watching(PFedGateClient):
        def after_step(self):
            super().after_step()
            seen.append(torch.cat([self.visit.weights, *self.visit.moments]))

    class Watched(PFedGate):
        client = Watching
        name = ""

    trainer = trainer_of(
        Watched(optimisation="alternate"), epochs=4, optimizer=Sgd(momentum=0.9), weight_decay=0.1
    )
    broadcast = broadcast_of(trainer, trainer.method, None, 1)
    trainer.visit(0, np.arange(20), 0.5, broadcast)
    size = trainer.layout.trained_size
    assert len(seen) == 12  # four epochs of three steps
    start = torch.cat([torch.from_numpy(broadcast.weights[:size]), torch.zeros(size)])
    assert all(torch.equal(after, start) for after in seen[:3])
    assert all(torch.equal(after, seen[5]) for after in seen[6:9])
    assert not torch.equal(seen[5], start)
    assert not torch.equal(seen[9], seen[5])


# -------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("fields", [{"sparsity": 0.0}, {"sparsity": 0.9, "blocks": 1, "gate_lr": 0.0}])
def test_gates_that_do_nothing_are_fedavg(cache, tmp_path, fields):
    """Up to what adding a difference to w_t rounds; with one block a tensor nothing is ever dropped."""
    own = {"name": "pfedgate", "scale": False, **fields}
    run = run_inline(tiny_federation(cache, algorithm=own, rounds=1), tmp_path / "own")
    plain = run_inline(tiny_federation(cache, rounds=1), tmp_path / "plain")
    torch.testing.assert_close(run.state.weights, plain.state.weights, atol=2e-7, rtol=0)


class NaiveHalf(NaiveFederation):
    """FedAvg of a model with a factor of 1/2 at every layer."""

    def effective(self, weights, visit):
        return {name: 0.5 * weights[name] for name in self.prunable}


def test_gates_that_stay_half_open_halve_every_layer(cache, tmp_path):
    config = tiny_federation(cache, algorithm={"name": "pfedgate", "sparsity": 0.0, "gate_lr": 0.0})
    run = run_inline(config, tmp_path / "run")
    for name, expected in NaiveHalf(config).run().history[-1].items():
        torch.testing.assert_close(run.weights[name], expected, atol=2e-6, rtol=1e-5)


def test_with_everybody_population_and_cohort_are_the_same(cache, tmp_path):
    ends = []
    for how in ("cohort", "population"):
        algorithm = {"name": "pfedgate", "average_over": how}
        config = tiny_federation(cache, algorithm=algorithm, cohort=6, rounds=1)
        ends.append(run_inline(config, tmp_path / how).state.weights)
    assert torch.equal(*ends)


def test_a_client_is_judged_with_its_own_gate(cache, tmp_path):
    """Every client keeps one block a tensor at the least; which one tells them apart."""
    algorithm = {"name": "pfedgate", "gate_lr": 2.0, "sparsity": 0.6}
    judged = {"evaluate_clients": {"every": 2, "after": 6}}
    run = run_inline(tiny_federation(cache, algorithm=algorithm, **judged), tmp_path / "run")
    assert run.lines[-1]["clients/accuracy_mean_after"] != run.lines[-1]["clients/accuracy_mean"]
    layout, method = run.driver.layout, PFedGate()
    scales = torch.rand(len(method.blocks_of(layout).sizes))
    w, place = torch.rand(layout.size), 0
    own = method.personal_weights(w.clone(), w, {"scales": scales}, layout)
    for entry in layout.prunable:
        for piece, before in zip(own[entry.span].chunk(5), w[entry.span].chunk(5), strict=True):
            torch.testing.assert_close(piece, before * scales[place])
            place += 1
    assert torch.equal(own[layout.prunable_size :], w[layout.prunable_size :])


def test_tiers_have_budgets_of_their_own(cache, tmp_path):
    tiers = {"few": {"share": 0.5, "sparsity": 0.75}, "many": {"share": 0.5, "sparsity": 0.0}}
    algorithm = {"name": "pfedgate", "sparsity": 0.0}
    config = tiny_federation(cache, algorithm=algorithm, devices={"tiers": tiers}, cohort=6)
    run = run_inline(config, tmp_path / "run")
    # 4 first blocks; of 200 x .05 = 10 more of convolutions and 345 x .05 = 17 linear ones a block each.
    held = [own.arrays["scales"] for own in run.driver._schedule.kept.states.values()]
    assert sorted({np.count_nonzero(one) for one in held}) == [6, 20]
    line = run.lines[-1]
    assert line["tiers/few/accuracy"] == line["tiers/many/accuracy"] == line["test/accuracy"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"algorithm": {"name": "pfedgate", "optimisation": "alternate"}},
            r"local.epochs: 1, but algorithm.optimisation=alternate trains the gate and the weights in turn",
        ),
        (
            {"algorithm": {"name": "pfedgate", "scope": "batch"}},
            r"algorithm.scope: batch, but algorithm.gate=scores looks at no samples",
        ),
    ],
)
def test_what_cannot_be_is_refused(cache, keys, says):
    with pytest.raises(ValueError, match=says):
        tiny_federation(cache, **keys)


def test_a_gate_of_images_looks_at_no_tokens():
    model, tokens = nn.Linear(3, 1), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"algorithm.gate: images looks at samples as numbers"):
        PFedGate(gate="images").lay_out(ParameterLayout.of(model), model, tokens)
    PFedGate().lay_out(ParameterLayout.of(model), model, tokens)
