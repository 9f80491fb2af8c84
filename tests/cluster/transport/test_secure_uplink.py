"""Messages of words and their sum: opened, it is the total of the updates, to the last bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import Entry, Grid, ParameterLayout
from algorithms.fedavg import FedAvg
from algorithms.feddst import FedDST
from algorithms.fixed_mask import FixedMask
from algorithms.flash import Flash
from algorithms.topk import TopK
from cluster.transport.masking import KeyRound, Shares
from cluster.transport.secure_uplink import SecureUplink
from cluster.transport.uplink import Sending, Withheld
from cluster.transport.wire import WireError

LAYERS = (Entry("v", (10,), 0, 10), Entry("w", (30,), 10, 40))
LAYOUT = ParameterLayout(LAYERS, (Entry("b", (3,), 40, 43),), ())
HELD = np.arange(40) % 5 == 0
HEADER = 16  # 4 magic, 1 bits, 3 pad, 4 number of words, 4 checksum


@pytest.mark.parametrize(
    ("method", "bits", "shared", "words"),
    [
        (FedAvg(), None, True, 2 * 43 + 1),  # two words a value, and n_i
        (FedAvg(), 32, True, 43 + 1),
        (TopK(), 48, False, 43 + 1),  # dense: where a weight is missing is hidden
        (FixedMask(), 64, True, 8 + 3 + 1),  # the mask's values alone
        (FixedMask(), None, True, 2 * (8 + 3) + 1),
        (FedDST(), 32, False, 43 + 40 + 1),  # and n_i m_i, which it divides by
        (Flash(), None, False, 2 * 43 + 40 + 1),
    ],
)
def test_bytes_by_hand(method, bits, shared, words):
    held = None if isinstance(method, FedAvg) else HELD
    uplink, grid = SecureUplink(LAYOUT, method, bits), Grid(16.0, 9, bits)
    support = held if shared else np.arange(40) < 4
    values = np.zeros(43, np.float32)
    posted = uplink.encode(values, support, held, sending=Sending(0, 9, grid, shared))
    size = HEADER + words * (bits or 64) // 8
    assert len(posted.message) == size == uplink.message_bytes(held, shared=shared)
    travelling = 11 if shared and held is not None else 43
    assert (posted.nonzero_bytes, posted.density) == (4 * travelling, (travelling - 3) / 40)
    assert uplink.decode(posted.message, held)[-1] == 9


@given(
    st.sampled_from([None, 64, 48, 32]),
    st.sampled_from([FedAvg(), FixedMask(), Flash(averaging="masked"), Flash(), FedDST()]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None)
def test_an_opened_sum_is_the_total_of_its_updates(bits, method, shared, masked, seed):
    rng = np.random.default_rng(seed)
    cohort = int(rng.integers(2, 8))
    samples = rng.integers(1, 900, cohort).tolist()
    held = None if isinstance(method, FedAvg) else rng.random(40) < 0.4
    grid = Grid.for_round(np.array([0.7], np.float32), sum(samples), bits)
    uplink, plain = SecureUplink(LAYOUT, method, bits), method.zero(grid, LAYOUT)
    keys = KeyRound.of(3, 1, range(cohort)) if masked else None
    sealed = [uplink.zero(held, shared=shared) for _ in range(2)]
    gone = int(rng.integers(cohort)) if cohort > 2 else None
    for client in range(cohort):
        support = held if shared else rng.random(40) < 0.5
        values = (rng.normal(size=43) * 10.0 ** rng.integers(-7, 1, 43)).astype(np.float32)
        if support is not None:
            values[:40][~support] = 0.0
        if client == gone:
            continue
        words = values if bits is None else grid.words(values, samples[client])[0]
        plain.fold(client, words, support, samples[client], LAYOUT)
        sending = Sending(client, samples[client], grid, shared, keys)
        message = uplink.encode(values, support, held, sending=sending).message
        uplink.take(sealed[client % 2], client, message, 0, None, held)
    total = sealed[1].copy().merge(sealed[0])
    if keys is not None:
        keys.unmask(total.words, total.clients, Shares(keys, tuple(total.clients)))
    opened = uplink.open(total, held, grid, shared=shared)
    assert opened.mean().tobytes() == plain.mean().tobytes()
    if bits is None:
        assert opened.high.tobytes() == (plain.high + 0.0).tobytes()
        assert opened.low.tobytes() == (plain.low + 0.0).tobytes()
    assert (opened.samples, opened.clients) == (plain.samples, plain.clients)
    if shared:
        assert opened.votes.tolist() == plain.votes.tolist()
    else:
        assert len(opened.votes) == 0
    if shared or method.masked or method.reads_supports:
        assert opened.held.tolist() == plain.held.tolist()
        assert opened.layer_counts.tolist() == plain.layer_counts.tolist()
    if method.masked:
        assert opened.mask_samples.tolist() == plain.mask_samples.tolist()
        assert opened.masked_mean().tobytes() == plain.masked_mean().tobytes()


def test_two_words_of_the_exact_grid_are_the_pair_to_the_last_bit():
    """Seven clients, 1,000 values over seven decades."""
    layout = ParameterLayout((Entry("w", (1000,), 0, 1000),), (), ())
    rng, method = np.random.default_rng(8), FedAvg()
    samples = rng.integers(1, 2000, 7).tolist()
    grid = Grid.for_round(np.ones(1), sum(samples))
    uplink, plain = SecureUplink(layout, method, None), method.zero(grid, layout)
    keys, sealed = KeyRound.of(0, 1, range(7)), uplink.zero(None, shared=True)
    for client, n in enumerate(samples):
        values = (rng.normal(size=1000) * 10.0 ** rng.uniform(-6, 1, 1000)).astype(np.float32)
        plain.fold(client, values, None, n, layout)
        message = uplink.encode(values, None, None, sending=Sending(client, n, grid, True, keys)).message
        assert uplink.take(sealed, client, message, n, None, None) is None
    keys.unmask(sealed.words, range(7), Shares(keys, (6, 2, 4)))
    opened = uplink.open(sealed, None, grid, shared=True)
    for name in ("high", "low"):
        assert getattr(opened, name).tobytes() == getattr(plain, name).tobytes(), name


def test_what_cannot_be_averaged_is_withheld():
    values = np.ones(43, np.float32)
    for value, bits, reason in (
        (np.nan, 48, "not finite"),
        (np.inf, None, "exceeds"),
        (17.0, None, "exceeds 16"),
    ):
        values[3] = value
        with pytest.raises(Withheld, match=reason):
            SecureUplink(LAYOUT, FedAvg(), bits).encode(
                values, None, None, sending=Sending(0, 2, Grid(16.0, 2, bits), True)
            )
    posted = SecureUplink(LAYOUT, FedAvg(), 48).encode(
        values, None, None, sending=Sending(0, 2, Grid(16.0, 2, 48), True)
    )
    assert posted.clamped == 1


def test_a_method_that_breaks_its_promise_is_told():
    uplink, values = SecureUplink(LAYOUT, FixedMask(), 64), np.zeros(43, np.float32)
    sending = Sending(0, 1, Grid(16.0, 1, 64), True)
    for support, held in ((HELD ^ (np.arange(40) == 7), HELD), (HELD, None)):
        with pytest.raises(ValueError, match=r"FixedMask\.sends_mask promises"):
            uplink.encode(values, support, held, sending=sending)


def test_damaged_and_foreign_messages_are_refused():
    uplink, values = SecureUplink(LAYOUT, FedAvg(), 48), np.ones(43, np.float32)
    message = uplink.encode(values, None, None, sending=Sending(0, 1, Grid(16.0, 1, 48), True)).message
    other = SecureUplink(LAYOUT, FedAvg(), 32)
    for wrong in (message[:10], message[:-1], message + b"x", message[:-1] + b"\1", b"SpFd" + message[4:]):
        with pytest.raises(WireError):
            uplink.decode(wrong, None)
    with pytest.raises(WireError, match="48 bits"):
        other.decode(message, None)
    with pytest.raises(WireError, match="44 words in a round of 12"):
        uplink.take(SecureUplink(LAYOUT, FixedMask(), 48).zero(HELD, shared=True), 0, message, 1, None, None)
