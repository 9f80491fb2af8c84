"""FLASH: both stages worked by hand, the naive reference, its limits, frozen zeros, tiers, moments."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import Entry, Grid, ParameterLayout, ServerOptimizer, ServerState, Total
from algorithms.flash import Flash, FlashClient
from cluster import seeding
from tests.algorithms.masked import NaiveMasked, bools, play, share_out
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation


class NaiveFlash(NaiveMasked):
    """Both kinds of stage 1, SPDST and JMWST."""

    def is_dense(self, visit) -> bool:
        return visit.notes["mask"] is None

    def explores(self, round_number: int) -> bool:
        interval = self.options.refresh_interval
        return round_number == 0 or (self.mask is not None and interval > 0 and round_number % interval == 0)

    def initial(self, weights):
        if self.options.stage1 == "magnitude":
            return weights
        rng = seeding.generator(self.config.seed, "server")
        keep = self.kept_count(self.options.sparsity)
        self.mask = self.draw(share_out(keep, self.sizes(), self.sizes()), rng)
        later = np.random.default_rng(rng.integers(2**63 - 1))
        start = self.masked(weights, self.mask)
        clients = self.config.partition.clients
        chosen = seeding.generator(self.config.seed, "cohort", 0).choice(
            clients, size=max(1, round(self.options.init_fraction * clients)), replace=False
        )
        masks, sizes = {}, {}
        for client in sorted(int(c) for c in chosen):
            values, masks[client] = self.train_client(start, client, 0)
            sizes[client] = len(self.partition.client(client))
            self.uploads[0, client] = (values, masks[client])
        self.mask = self.draw(self.mean_counts(masks, sizes), later)
        return self.masked(weights, self.mask)

    def mean_counts(self, masks, sizes):
        shares = [sum(sizes[c] * int(masks[c][name].sum()) for c in masks) for name in self.prunable]
        return share_out(self.kept_count(self.options.sparsity), shares, self.sizes())

    def local_epochs(self, round_number):
        if round_number == 0:
            return self.options.init_epochs
        return (self.mask is None and self.options.warmup_epochs) or self.config.local.epochs

    def change_gradients(self, weights, gradients, visit):
        super().change_gradients(weights, gradients, visit)
        if self.options.freeze_zero_parameters:
            for name in self.trained:
                frozen = visit.received[name] == 0
                if name in self.prunable and not self.is_dense(visit):
                    frozen &= self.mask[name]  # what has grown may move
                gradients[name] = torch.where(frozen, torch.zeros(()), gradients[name])

    def after_step(self, weights, visit):
        super().after_step(weights, visit)
        if not self.explores(visit.round):
            return
        steps = visit.epochs * visit.steps_per_epoch
        if visit.epochs == 1:
            due = visit.step == steps // 2
        else:
            due = visit.step % visit.steps_per_epoch == 0 and visit.step < steps
        if due:
            self.explore(
                weights, visit, Fraction(str(self.options.prune_rate)) * (steps - visit.step) / steps
            )

    def explore(self, weights, visit, rate):
        mask = visit.notes["mask"]
        counts = self.counts(mask)
        drops = [min(round(rate * c), s - c) for c, s in zip(counts, self.sizes(), strict=True)]
        if not sum(drops):
            return
        strength = [
            sum(abs(v) for v in weights[name][mask[name]].tolist()) / max(1, count)
            for name, count in zip(self.prunable, counts, strict=True)
        ]
        left = [c - d for c, d in zip(counts, drops, strict=True)]
        kept = self.tops({n: weights[n].detach() for n in self.prunable}, left, [mask])
        room = [s - c for s, c in zip(self.sizes(), left, strict=True)]
        outside = {n: ~kept[n] for n in self.prunable}
        grown = self.tops(self.uniform(visit.rng), share_out(sum(drops), strength, room), [outside])
        for name in self.prunable:
            weights[name][~kept[name]] = 0.0
        visit.notes["mask"] = {n: kept[n] | grown[n] for n in self.prunable}

    def upload(self, weights, received, visit):
        if self.is_dense(visit):
            mask = self.largest(weights, self.kept_count(self.options.sparsity))
            return self.sent(weights, mask)
        return self.sent(weights, visit.notes["mask"])

    def server(self, weights, uploads, masks, sizes, round_number):
        masked = self.options.averaging == "masked"
        mean = self.masked_mean(uploads, masks, sizes) if masked else self.mean(uploads, sizes)
        stepped = self.server_step(weights, mean)
        if self.mask is None or self.explores(round_number):
            ranked = mean if self.mask is None else stepped
            self.mask = self.tops(ranked, self.mean_counts(masks, sizes), [self.union(masks)])
        self.change_mask(self.mask)
        return self.masked(stepped, self.mask)


# ------------------------------------------------------------------------------------------------ by hand


def test_two_rounds_worked_by_hand():
    # Round 1, dense, W = 0, p = 1/2, K = 2 of 4. Client 0, class 0, x = (1, 1/2): [[.5, .25], [-.5, -.25]];
    # .5 and -.5 remain. Client 1, three of class 1, x = (1/2, 1): [[-.25, -.5], [.25, .5]].
    method = Flash(sparsity=0.5)
    start = ServerState(round=0, weights=torch.zeros(4))
    clients = [([1.0, 0.5], 0, 1), ([0.5, 1.0], 1, 3)]
    sent, after = play(method, start, clients)
    assert [s.values.tolist() for s in sent] == [[0.5, 0.0, -0.5, 0.0], [0.0, -0.5, 0.0, 0.5]]
    # Means (absent is 0): .5/4 = .125 in the first column, 1.5/4 = .375 in the second; K remain.
    assert after.weights.tolist() == [0.0, -0.375, 0.0, 0.375]
    assert after.mask.tolist() == [False, True, False, True]
    assert after.mask_version == 1

    # Round 2, inside the mask. x = (1, 0) sees no weight: p = 1/2, and only gradients outside: nothing moves.
    sent, later = play(method, after, [([1.0, 0.0], 0, 2)])
    assert sent[0].values.tolist() == [0.0, -0.375, 0.0, 0.375]
    assert sent[0].support.tolist() == after.mask.tolist()
    assert later.mask is after.mask
    assert later.mask_version == 1


def layout_of(*shapes: tuple[int, ...]) -> ParameterLayout:
    entries, start = [], 0
    for index, shape in enumerate(shapes):
        entries.append(Entry(f"{index}.weight", shape, start, start + int(np.prod(shape))))
        start = entries[-1].stop
    return ParameterLayout(tuple(entries), (), ())


def total_of(layout, uploads, *, masked: bool = False) -> Total:
    """The total of (samples, values, support) triples."""
    total = Total.zero(Grid(2.0**20, 100), layout, masked=masked)
    for client, (samples, values, support) in enumerate(uploads):
        total.fold(client, np.float32(values), bools(support).numpy(), samples, layout)
    return total


def test_each_layer_keeps_the_mean_density_of_its_clients():
    # Layers of 4 and 6 weights, K = 5 of 10. Client 0 (n = 1) keeps 1 and 4, client 1 (n = 4) keeps 3 and 2:
    # mean counts (1 + 12)/5 = 2.6 and (4 + 8)/5 = 2.4, so 3 and 2 remain.
    layout = layout_of((2, 2), (2, 3))
    uploads = [
        (1, [9, 0, 0, 0, 5, 5, 5, 5, 0, 0], "1000 111100"),
        (4, [0, 1, 2, 3, 0, 0, 0, 1, 0, 2], "0111 000101"),
    ]
    total = total_of(layout, uploads)
    start = ServerState(round=0, weights=torch.ones(10))
    after = Flash(sparsity=0.5).advance(start, total, ServerOptimizer(), layout)
    # Means: 9/5, 4/5, 8/5, 12/5 | 1, 1, 1, (5 + 4)/5, 0, 8/5: the largest three and two.
    assert after.mask.tolist() == bools("1011 000101").tolist()
    np.testing.assert_allclose(after.weights, [1.8, 0, 1.6, 2.4, 0, 0, 0, 1.8, 0, 1.6], rtol=1e-6)
    # Over the holders alone: 9, 1, 2, 3 | 5, 5, 5, 9/5, 0, 2: other weights win.
    total = total_of(layout, uploads, masked=True)
    after = Flash(sparsity=0.5, averaging="masked").advance(start, total, ServerOptimizer(), layout)
    assert after.mask.tolist() == bools("1011 110000").tolist()
    np.testing.assert_allclose(after.weights, [9, 0, 2, 3, 5, 5, 0, 0, 0, 0], rtol=1e-6)


def test_the_first_mask_ranks_the_mean_and_not_the_stepped_weights():
    # Means 1.5, 1, .5, .25; a server learning rate of 1/2 steps to .75, .5, 3.75,
    # 4.125, as w_0 was 0, 0, 7, 8.
    layout = layout_of((1, 4))
    total = total_of(layout, [(1, [3, 2, 0, 0], "1100"), (1, [0, 0, 1, 0.5], "0011")])
    start = ServerState(round=0, weights=torch.tensor([0.0, 0.0, 7.0, 8.0]))
    after = Flash(sparsity=0.5).advance(start, total, ServerOptimizer(lr=0.5), layout)
    assert after.mask.tolist() == [True, True, False, False]
    assert after.weights.tolist() == [0.75, 0.5, 0.0, 0.0]


def test_a_refresh_scales_the_mean_densities_to_the_target():
    # Two clients of a smaller budget hold 2 + 1 of 4 + 4 weights each; K = 4: 8/3 and 4/3, so 3 and 1.
    layout = layout_of((2, 2), (2, 2))
    state = ServerState(round=5, weights=torch.ones(8), mask=bools("1100 1100"), mask_version=3)
    total = total_of(
        layout, [(1, [4, 1, 0, 0, 0, 0, 0, 6], "1100 0001"), (1, [0, 2, 2, 0, 0, 0, 0, 0], "0110 0100")]
    )
    after = Flash(sparsity=0.5, refresh_interval=3).advance(state, total, ServerOptimizer(), layout)
    assert after.mask.tolist() == bools("1110 0001").tolist()
    assert after.weights.tolist() == [2.0, 1.5, 1.0, 0.0, 0.0, 0.0, 0.0, 3.0]
    assert after.mask_version == 4
    # In round 7 (not a third one) the mask stays.
    later = Flash(sparsity=0.5, refresh_interval=3).advance(after, total, ServerOptimizer(), layout)
    assert later.mask is after.mask


def test_after_the_sensitivity_stage_the_model_starts_anew():
    layout = layout_of((4, 5), (4, 10))
    initial = torch.arange(1.0, 61.0)
    method = Flash(sparsity=0.75, stage1="sensitivity", init_fraction=0.1, init_epochs=7)
    assert method.first_round == 0
    state = method.initial_state(initial, layout, np.random.default_rng(1))
    assert state.round == -1
    # K = 15 of 60, 5 and 10 of the layers' 20 and 40.
    assert [int(state.mask[:20].sum()), int(state.mask[20:].sum())] == [5, 10]
    assert torch.equal(state.weights, initial * state.mask)
    told = method.instruct(state, 100, 30)
    assert (told.round, told.phase, told.epochs, told.cohort) == (0, "sensitivity", 7, 3)
    # One client moved its weights to 12 and 3; its values do not matter.
    support = torch.zeros(60, dtype=torch.bool)
    support[:12] = support[40:43] = True
    total = Total.zero(Grid(2.0**20, 100), layout)
    total.fold(0, np.full(60, 9.0, np.float32) * support.numpy(), support.numpy(), 2, layout)
    after = method.advance(state, total, ServerOptimizer(momentum=0.9), layout)
    assert after.round == 0
    assert [int(after.mask[:20].sum()), int(after.mask[20:].sum())] == [12, 3]
    assert torch.equal(after.weights, initial * after.mask)  # the common initialisation under a new mask
    assert (after.moments, dict(after.arrays), after.mask_version) == ((), {}, 1)
    assert not torch.equal(after.mask, support)
    assert method.instruct(after, 100, 30).phase == "train"


@pytest.mark.parametrize(
    ("epochs", "samples", "expected"),
    [
        # Four epochs of two steps: after 2, 4 and 6 of 8 steps; the rate falls from 1/4 by 1/32 a step.
        (4, 4, [0.1875, 0.125, 0.0625]),
        # One epoch of five steps: after the second, 1/4 (1 - 2/5).
        (1, 10, [0.15]),
        # One step: there is no half-way.
        (1, 2, []),
    ],
)
def test_when_clients_explore_and_at_which_rate(monkeypatch, epochs, samples, expected):
    rates = []
    explore = FlashClient._explore

    def recorded(self, rate):
        if rate > 0:
            rates.append(rate)
        explore(self, rate)

    monkeypatch.setattr(FlashClient, "_explore", recorded)
    state = ServerState(round=0, weights=torch.zeros(40), mask=torch.arange(40) < 20)
    method = Flash(sparsity=0.5, refresh_interval=1)
    sent, _ = play(method, state, [([1.0] * 10, 0, samples)], classes=4, epochs=epochs, batch_size=2)
    assert rates == pytest.approx(expected)
    assert int(sent[0].support.sum()) == 20
    assert (sent[0].values[~sent[0].support].view(np.uint32) == 0).all()
    assert np.array_equal(sent[0].support, state.mask.numpy()) == (not expected)


# -------------------------------------------------------------------------------------- whole federations


@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        ({}, {"local": {"weight_decay": 0.01, "proximal": 0.1}}),
        ({"warmup_epochs": 3}, {"server": {"name": "fedadam"}}),
        ({}, {"model": {"name": "tests.tiny_experiment:tiny_model"}}),
        ({"averaging": "masked"}, {"server": {"name": "fedavg", "momentum": 0.9}}),
        ({"freeze_zero_parameters": True}, {"local": {"weight_decay": 0.01}}),
        ({"refresh_interval": 2}, {}),
        ({"refresh_interval": 2, "averaging": "masked", "prune_rate": 0.6}, {"local": {"epochs": 3}}),
        (
            {"refresh_interval": 1},
            {"server": {"name": "fedavg", "momentum": 0.9}, "local": {"proximal": 0.1, "weight_decay": 0.01}},
        ),
        ({"refresh_interval": 1, "freeze_zero_parameters": True}, {"local": {"epochs": 2}}),
        ({"stage1": "sensitivity", "init_epochs": 3, "init_fraction": 0.5}, {}),
        (
            {"stage1": "sensitivity", "init_epochs": 1, "init_fraction": 0.3, "refresh_interval": 2},
            {"server": {"name": "fedyogi"}},
        ),
    ],
    ids=[
        "spdst",
        "warm-up, adam",
        "batch norm",
        "masked, momentum",
        "frozen zeros",
        "jmwst",
        "jmwst, masked",
        "jmwst, momentum",
        "jmwst, frozen zeros",
        "sensitivity",
        "sensitivity, jmwst, yogi",
    ],
)
def test_equals_the_naive_reference(tmp_path, algorithm, overrides):
    config = tiny_federation(
        tmp_path, **{"algorithm": {"name": "flash", "sparsity": 0.7, **algorithm}, "rounds": 4, **overrides}
    )
    run = run_inline(config, tmp_path / "run")
    assert_same(run, NaiveFlash(config).run())
    prunable = run.driver.layout.prunable_size
    for state in run.states:
        if state.mask is not None:
            assert int(state.mask.sum()) == round(0.3 * prunable)
            for vector in (state.weights, *state.moments):
                assert not vector[:prunable][~state.mask].any()
    versions = [state.mask_version for state in run.states]
    if algorithm.get("stage1") == "sensitivity":
        assert run.lines[0]["round"] == 0
        assert run.lines[0]["clients/trained"] == round(6 * algorithm["init_fraction"])
        assert versions[:2] == [0, 1]
    if not algorithm.get("refresh_interval"):
        assert versions[-1] == 1
        assert all(line["masks/regrowth"] == 0 for line in run.lines if line["round"] > 0)


def test_at_sparsity_0_with_a_warm_up_of_the_local_epochs_it_is_fedavg_bit_for_bit(tmp_path):
    common = {"local": {"epochs": 2}, "rounds": 3, "model": {"name": "tests.tiny_experiment:tiny_model"}}
    fedavg = run_inline(tiny_federation(tmp_path, **common), tmp_path / "f")
    for number, options in enumerate([{"warmup_epochs": 2}, {"refresh_interval": 1, "averaging": "masked"}]):
        algorithm = {"name": "flash", "sparsity": 0.0, **options}
        run = run_inline(tiny_federation(tmp_path, algorithm=algorithm, **common), tmp_path / f"{number}")
        assert_identical(run, fedavg)


def test_frozen_zeros_never_move(tmp_path):
    options = {"name": "flash", "sparsity": 0.6, "freeze_zero_parameters": True}
    local = {"weight_decay": 0.01, "proximal": 0.1}
    run = run_inline(tiny_federation(tmp_path, algorithm=options, local=local, rounds=3), tmp_path / "run")
    layout = run.driver.layout
    shifts = [e for e in layout.other if not run.states[0].weights[e.span].any()]
    assert shifts  # biases and norm shifts start at 0
    for state in run.states[1:]:
        assert all(not state.weights[e.span].any() for e in shifts)
        for previous in run.states[1 : state.round]:
            zeros = previous.weights[: layout.trained_size] == 0
            assert not state.weights[: layout.trained_size][zeros].any()
    free = run_inline(
        tiny_federation(tmp_path, algorithm={"name": "flash", "sparsity": 0.6}, rounds=3), tmp_path / "free"
    )
    assert all(free.state.weights[e.span].any() for e in shifts)


def test_a_round_without_any_update_is_a_warm_up_again():
    method = Flash(sparsity=0.5, warmup_epochs=4, refresh_interval=1)
    # The driver counts a refused round and leaves the state: still no mask in round 2.
    told = method.instruct(ServerState(round=1, weights=torch.zeros(4)), 10, 10)
    assert (told.phase, told.epochs) == ("warm-up", 4)


# -------------------------------------------------------------------------------------------------- tiers


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1]), st.sampled_from(["plain", "masked"]))
@settings(max_examples=25, deadline=None)
def test_tiers_explore_within_their_budget_and_the_mask_keeps_its_size(seed, refresh, averaging):
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.permutation(40) < 20)
    weights = torch.from_numpy(rng.normal(size=40).astype(np.float32)).masked_fill(~mask, 0.0)
    state = ServerState(round=3, weights=weights, mask=mask, mask_version=2)
    sparsities = [0.5, 0.6, 0.8]
    clients = [(rng.normal(size=10).tolist(), int(rng.integers(4)), 6) for _ in sparsities]
    sent, after = play(
        Flash(sparsity=0.5, refresh_interval=refresh, averaging=averaging),
        state,
        clients,
        classes=4,
        lr=0.1,
        epochs=3,
        batch_size=2,
        proximal=0.2,
        sparsities=sparsities,
    )
    for trained, sparsity in zip(sent, sparsities, strict=True):
        assert int(trained.support.sum()) == round((1 - sparsity) * 40)
        assert (trained.values[~trained.support].view(np.uint32) == 0).all()
        if not refresh:
            assert not (trained.support & ~mask.numpy()).any()
    if not refresh:  # without exploration the tiers' masks are nested
        assert not (sent[1].support & ~sent[0].support).any()
        assert not (sent[2].support & ~sent[1].support).any()
        assert after.mask is mask
    assert int(after.mask.sum()) == 20
    assert not after.weights[~after.mask].any()
