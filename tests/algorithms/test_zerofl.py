"""ZeroFL: exact tiny cases, and properties of whatever a client trains and sends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from algorithms import Grid, Instructions, ParameterLayout, ServerState, Total, Visit
from algorithms.core.layers import pruned_layers
from algorithms.core.server_optimizers import ServerOptimizer
from algorithms.zerofl import ZeroFL, ZeroFLClient

UPLOADS = ("top_k_weights", "diff_on_top_k_weights", "top_k_weights_diff")


def two_layers(first: int = 2, second: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(1, first, bias=False), nn.Linear(first, second, bias=True))


def visiting(
    model: nn.Module, method: ZeroFL, received: Tensor, *, sparsity: float | None = None, steps: int = 9
) -> ZeroFLClient:
    """A client of ``method`` on ``model`` that has just received ``received``."""
    layout = ParameterLayout.of(model)
    method.prepare(model)
    flat = received.clone()
    layout.bind(model, flat)
    visit = Visit(
        layout=layout,
        instructions=Instructions(round=1, rounds=1),
        sparsity=method.sparsity if sparsity is None else sparsity,
        global_weights=received,
        mask=None,
        weights=flat[: layout.trained_size],
        model=flat,
        gradient=torch.zeros(layout.trained_size),
        prunings=pruned_layers(model),
        inputs=torch.empty(0),
        targets=torch.empty(0),
        rng=np.random.default_rng(0),
        lr=0.1,
        batch_size=1,
        epochs=1,
        steps_per_epoch=steps,
        steps=steps,
        workbench=None,
        chosen=torch.empty(0),
    )
    client = ZeroFLClient(method, visit)
    client.begin()
    return client


# ------------------------------------------------------------------------------------- worked by hand


# Eight prunable weights (0 and 1: the first layer), then four biases. s = .75 and mask_ratio = .125 upload
# round((1 - .75 + .125) 8) = 3 positions. Trained weights, received ones and their differences, all exact:
#   position    0      1      2      3      4      5      6      7   |   8     9    10    11
#   w_t         1.0   -0.5    0.25   2.0    0.5   -1.0    0.0    0.125| 0.5   0.0   1.0  -1.0
#   w_i         1.25  -0.5   -0.25   1.5    0.0   -1.25   0.75   0.125| 0.75  0.25  1.0  -1.0
#   w_i - w_t   0.25   0.0   -0.5   -0.5   -0.5   -0.25   0.75   0.0  | 0.25  0.25  0.0   0.0
RECEIVED = torch.tensor([1.0, -0.5, 0.25, 2.0, 0.5, -1.0, 0.0, 0.125, 0.5, 0.0, 1.0, -1.0])
TRAINED = torch.tensor([1.25, -0.5, -0.25, 1.5, 0.0, -1.25, 0.75, 0.125, 0.75, 0.25, 1.0, -1.0])
BIASES = [0.25, 0.25, 0.0, 0.0]
SENT = {
    # |w_i| is largest at 3 (1.5), 0 and 5 (1.25 each); the third position is 5, no tie at the edge.
    "top_k_weights": ([0, 3, 5], [1.25, 0, 0, 1.5, 0, -1.25, 0, 0, 0.75, 0.25, 1.0, -1.0]),
    "diff_on_top_k_weights": ([0, 3, 5], [0.25, 0, 0, -0.5, 0, -0.25, 0, 0, *BIASES]),
    # |w_i - w_t| is largest at 6 (.75); 2, 3 and 4 tie at .5 for two places: the lower indices win.
    "top_k_weights_diff": ([2, 3, 6], [0, 0, -0.5, -0.5, 0, 0, 0.75, 0, *BIASES]),
}


@pytest.mark.parametrize("upload", UPLOADS)
def test_what_is_sent(upload: str) -> None:
    method = ZeroFL(sparsity=0.75, mask_ratio=0.125, upload=upload)
    # 2 + 6 prunable weights; the second layer's biases and a parameter more are the four other ones.
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 3), nn.PReLU())
    client = visiting(model, method, RECEIVED)
    client.visit.weights.copy_(TRAINED)
    support = client.finish()
    positions, values = SENT[upload]
    assert support is not None
    assert torch.nonzero(support).flatten().tolist() == positions
    assert client.visit.model.tolist() == values
    cut = client.visit.prunable[~support]
    assert not torch.signbit(cut).any(), "cut positions are +0.0"


@pytest.mark.parametrize("upload", UPLOADS)
def test_what_the_server_makes_of_it(upload: str) -> None:
    # Two clients with 3 and 1 samples send values 4 and -8 at position 0 (mean 1), and one float buffer each,
    # 2 and 6 (mean 3). Differences are added to w_t = 10; the buffer takes the mean whatever w_t has there.
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    model.register_buffer("running", torch.zeros(1))
    layout = ParameterLayout.of(model)
    total = Total.zero(Grid(1024.0, 4), layout)
    total.fold(0, np.array([4.0, 2.0], np.float32), None, 3, layout)
    total.fold(1, np.array([-8.0, 6.0], np.float32), None, 1, layout)
    before = ServerState(round=4, weights=torch.tensor([10.0, 7.0]))
    after = ZeroFL(upload=upload).advance(before, total, ServerOptimizer(), layout)
    assert after.weights.tolist() == [1.0 if upload == "top_k_weights" else 11.0, 3.0]
    assert before.weights.tolist() == [10.0, 7.0]
    halved = ZeroFL(upload=upload).advance(before, total, ServerOptimizer(lr=0.5), layout)
    # Half the way from 10 to the clients' mean.
    assert halved.weights.tolist() == [5.5 if upload == "top_k_weights" else 10.5, 3.0]


@pytest.mark.parametrize(
    ("threshold", "second"),
    [
        # The first cut keeps 2 of 4 exactly; of the three weights of magnitude 2 the lower index wins.
        # Its threshold is 2: after regrowth -2.5, 2 and 3 pass (three of them), 1.5 does not.
        ("first_batch", [-2.5, 2.0, 0.0, 3.0]),
        ("first_batch_conv", [-2.5, 0.0, 0.0, 3.0]),  # linear layers are cut exactly every time
        ("every_batch", [-2.5, 0.0, 0.0, 3.0]),
    ],
)
def test_cut_in_place(threshold: str, second: list[float]) -> None:
    # The first layer's two weights stay; the second has 4 of them, s = .5 keeps 2. Biases are not prunable.
    method = ZeroFL(sparsity=0.5, threshold=threshold)
    client = visiting(
        two_layers(2, 2), method, torch.tensor([0.125, 0.0625, -2.0, 1.0, 2.0, -4.0, 0.5, 0.25]), steps=2
    )
    client.visit.weights[2] = 2.0  # ties with position 4
    client.before_forward()
    assert client.visit.model.tolist() == [0.125, 0.0625, 2.0, 0.0, 0.0, -4.0, 0.5, 0.25]
    client.visit.weights[2:6] = torch.tensor([-2.5, 2.0, 1.5, 3.0])
    client.visit.step = 1
    client.before_forward()
    assert client.visit.model.tolist() == [0.125, 0.0625, *second, 0.5, 0.25]
    # The first layer's density is the trainer's; the second's was measured at the last forward pass.
    expected = [0.25, np.count_nonzero(second) / 4]
    assert client.training_density(np.array([0.25, 0.125])).tolist() == expected


def test_a_layer_with_too_few_nonzeros_is_not_cut_again() -> None:
    # Three of four are wanted and one is nonzero: the threshold is 0, below which nothing lies.
    client = visiting(two_layers(2, 2), ZeroFL(sparsity=0.25), torch.tensor([1.0, 1, 0, 5, 0, 0, 0, 0]))
    client.before_forward()
    client.visit.weights[2:6] = torch.tensor([1e-30, 5.0, -1e-30, 1.0])
    regrown = client.visit.weights.clone()
    client.before_forward()
    assert torch.equal(client.visit.weights, regrown)


def test_a_diverged_client_stays_visible() -> None:
    client = visiting(two_layers(2, 2), ZeroFL(sparsity=0.5), torch.tensor([1.0, 1, 4, 3, 2, 1, 0, 0]))
    client.before_forward()
    client.visit.weights[2:4] = torch.tensor([float("nan"), float("inf")])
    client.before_forward()
    assert client.visit.weights[2:4].isnan().tolist() == [True, False]
    client.finish()
    assert not torch.isfinite(client.visit.weights).all()


def test_activations_are_pruned_with_the_fixed_density() -> None:
    # Second layer: input [1, -4, 2, 3] and s = .5 keep [0, -4, 0, 3] for the weight gradient, whatever the
    # weight's own zeros. One output with gradient 1: the weight gradient is the pruned input itself, and the
    # forward value is exact. The first layer's gradient is dense.
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False))
    client = visiting(model, ZeroFL(sparsity=0.5), torch.tensor([1.0, -4.0, 2.0, 3.0, 5.0, 6.0, 1.0, 1.0]))
    client.before_forward()  # cuts the second layer to [5, 6, 0, 0]
    output = model(torch.ones(1, 1))
    assert output.item() == 1.0 * 5.0 - 4.0 * 6.0
    first, second = torch.autograd.grad(output.sum(), list(model.parameters()))
    assert second.tolist() == [[0.0, -4.0, 0.0, 3.0]]
    assert first.flatten().tolist() == [5.0, 6.0, 0.0, 0.0]


@pytest.mark.parametrize(("applies_to", "density"), [("upload", 0.25), ("both", 0.5)])
def test_a_tier_has_its_own_sparsity(applies_to: str, density: float) -> None:
    # The tier asks for .75 where the method says .9; mask_ratio .25 lowers it to .5 for training as well.
    model = two_layers(4, 4)  # 4 + 16 prunable weights, 4 biases
    method = ZeroFL(sparsity=0.9, mask_ratio=0.25, mask_ratio_applies_to=applies_to)
    client = visiting(model, method, torch.linspace(1.0, 2.0, 24), sparsity=0.75)
    assert [pruning.density for pruning in pruned_layers(model).values()] == [density]
    client.before_forward()
    assert int(torch.count_nonzero(client.visit.prunable[4:])) == round(density * 16)
    support = client.finish()
    assert support is not None
    assert int(support.sum()) == round(0.5 * 20)


def test_float_noise_keeps_no_activation_more() -> None:
    # 1 - .9994 is .0006000000000000449 in floats: the ceiling of its 10,000-fold would be 7.
    model = two_layers(10_000, 1)
    client = visiting(model, ZeroFL(sparsity=0.9994), torch.linspace(1.0, 2.0, 20_001))
    client.before_forward()
    model(torch.ones(1, 1))
    assert pruned_layers(model)["1.weight"].kept == 0.0006


# ----------------------------------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(
    sparsity=st.floats(0.0, 0.9999),
    mask_ratio=st.floats(0.0, 1.0),
    applies_to=st.sampled_from(["upload", "both"]),
    upload=st.sampled_from(UPLOADS),
    threshold=st.sampled_from(["first_batch", "every_batch", "first_batch_conv"]),
    seed=st.integers(0, 2**31),
)
def test_properties(
    sparsity: float, mask_ratio: float, applies_to: str, upload: str, threshold: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    method = ZeroFL(
        sparsity=sparsity,
        mask_ratio=mask_ratio,
        mask_ratio_applies_to=applies_to,
        upload=upload,
        threshold=threshold,
    )
    # One decimal, so that ties and zeros are frequent.
    received = (torch.randn(3 + 21 + 7, generator=generator) * 3).round() / 10
    client = visiting(two_layers(3, 7), method, received, steps=1)
    visit = client.visit
    client.before_forward()
    assert torch.equal(visit.weights[:3], received[:3]), "the first layer is not cut"
    assert torch.equal(visit.weights[24:], received[24:]), "nor are biases"
    trained_at = max(0.0, sparsity - mask_ratio) if applies_to == "both" else sparsity
    count = math.ceil(round((1 - trained_at) * 21, 6))
    cut = visit.weights[3:24].clone()
    assert int(torch.count_nonzero(cut)) == min(count, int(torch.count_nonzero(received[3:24])))
    assert torch.equal(cut[cut != 0], received[3:24][cut != 0]), "survivors keep their value"
    if 0 < count < 21:
        dropped = received[3:24][cut == 0].abs()
        assert cut[cut != 0].abs().min() >= dropped.max() if len(dropped) and (cut != 0).any() else True

    visit.weights.add_((torch.randn(31, generator=generator) * 3).round() / 10)
    trained = visit.weights.clone()
    support = client.finish()
    assert support is not None
    assert int(support.sum()) == round((1 - max(0.0, sparsity - mask_ratio)) * 24), "exactly K positions"
    sent = trained - received if method.uploads_differences else trained
    assert torch.equal(visit.prunable[support], sent[:24][support])
    assert not visit.prunable[~support].any()
    assert not torch.signbit(visit.prunable[~support]).any()
    assert torch.equal(visit.weights[24:], sent[24:])
    scores = (sent if upload == "top_k_weights_diff" else trained)[:24].abs()
    if support.any() and not support.all():
        assert scores[support].min() >= scores[~support].max()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_differences_lose_at_most_their_roundings(data: st.DataObject) -> None:
    """w_t + mean(w_i - w_t) against mean(w_i) in float32.

    Four roundings to nearest differ: of each w_i - w_t, of the mean of these, of the sum with w_t, and of
    mean(w_i) itself, each half an ulp of its own result. All of these are at most B = max(|w_t|, |w_i|,
    |w_i - w_t|), so both agree within two ulp of B. One ulp *of the result* is no bound where the mean nearly
    cancels: w_t = 1 and w_i = 1e-9 give 1 + fl(1e-9 - 1) = 0.
    """
    values = st.floats(-4.0, 4.0, width=32)
    clients = data.draw(st.integers(1, 4))
    samples = data.draw(st.lists(st.integers(1, 50), min_size=clients, max_size=clients))
    column = st.lists(values, min_size=6, max_size=6).map(lambda v: np.array(v, np.float32))
    before = data.draw(column)
    trained = [data.draw(column) for _ in range(clients)]
    layout = ParameterLayout.of(nn.Sequential(nn.Linear(3, 2, bias=False)))

    def after(method: ZeroFL, updates: list[np.ndarray]) -> np.ndarray:
        total = Total.zero(Grid(16.0, sum(samples)), layout)
        for client, update in enumerate(updates):
            total.fold(client, update, None, samples[client], layout)
        state = ServerState(round=0, weights=torch.from_numpy(before.copy()))
        return method.advance(state, total, ServerOptimizer(), layout).weights.numpy()

    plain = after(ZeroFL(), trained)
    differences = [update - before for update in trained]
    summed = after(ZeroFL(upload="diff_on_top_k_weights"), differences)
    largest = np.max(np.abs([before, *trained, *differences]), axis=0)
    # 2**-80: this grid's resolution, coarser than float32 for values below 1e-17.
    assert (np.abs(summed.astype(np.float64) - plain) <= 2.0 * np.spacing(largest) + 2.0**-80).all()


def test_one_ulp_of_the_result_is_no_bound_for_differences() -> None:
    """The case of the docstring above: one client, w_t = 1, w_i = 1e-9."""
    before, after = np.float32(1.0), np.float32(1e-9)
    assert before + (after - before) == 0.0
