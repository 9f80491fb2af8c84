"""Masks that cancel: keys, streams and shares by known answers, sums with whoever is gone, wrong shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.transport import masking
from cluster.transport.masking import PRIME, Drawn, KeyRound, Shares, WrongShare
from cluster.transport.words import pack, signed, unpack


def test_keys_and_streams_by_published_vectors():
    # RFC 7748, section 6.1: Bob's key.
    secret = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert masking.public_half(secret).hex() == public
    # FIPS 197: AES-256 of a block of zeros under a key of zeros, the first block of its counter mode.
    words = np.zeros(3, np.uint64)
    masking.add_stream(words, bytes(32), 1)
    assert words[:2].tobytes() == bytes.fromhex("dc95c078a2408989ad48a21492842087")
    masking.add_stream(words, bytes(32), -1)
    assert not words.any()


def test_a_stream_goes_on_from_block_to_block():
    long, short = np.zeros((1 << 17) + 5, np.uint64), np.zeros(40, np.uint64)
    masking.add_stream(long, b"k" * 32, 1)
    masking.add_stream(short, b"k" * 32, 1)
    assert np.array_equal(long[:40], short)
    assert len(np.unique(long)) == len(long)


def test_both_of_a_pair_agree_in_a_round_of_its_own():
    keys = KeyRound.of(5, 3, [4, 9])
    one, other = keys.drawn(4), keys.drawn(9)
    assert masking.agreed(one.key, keys.public[9], 3) == masking.agreed(other.key, keys.public[4], 3)
    assert masking.agreed(one.key, keys.public[9], 4) != masking.agreed(other.key, keys.public[4], 3)
    assert Drawn.of(5, 3, 4) == one
    assert len({Drawn.of(*where).key for where in ((5, 3, 4), (6, 3, 4), (5, 4, 4), (5, 3, 5))}) == 4
    assert one.key != one.own


def test_shares_by_hand():
    # 5 + 3x + 2x^2 at 1, 2, 3 and 4; any three of them give the 5 back, two do not.
    points = [masking.polynomial([5, 3, 2], x) for x in (1, 2, 3, 4)]
    assert points == [10, 19, 32, 49]
    five = (5).to_bytes(32, "little")
    assert masking.joined({0: 10, 1: 19, 2: 32}) == five
    assert masking.joined({3: 49, 0: 10, 2: 32}) == five
    assert masking.joined({0: 10, 1: 19}) != five
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11))
    top = 2**256 - 1
    assert masking.joined({x - 1: masking.polynomial([top, PRIME - 1], x) for x in (2, 7)}) == b"\xff" * 32


@given(st.integers(2, 9), st.data())
@settings(max_examples=30, deadline=None)
def test_any_threshold_of_holders_recover_what_a_client_shared(threshold, data):
    holders = data.draw(st.lists(st.integers(0, 10**6), min_size=threshold, max_size=threshold, unique=True))
    drawn = Drawn.of(1, 2, 3)
    for which in ("key", "own"):
        shares = {holder: drawn.share(which, holder, threshold) for holder in holders}
        assert masking.joined(shares) == drawn.secret(which)
        assert all(0 <= share < PRIME for share in shares.values())
        holder, share = shares.popitem()
        assert masking.joined({**shares, holder: share + 1}) != drawn.secret(which)
        if len(shares) > 1:
            assert masking.joined(shares) != drawn.secret(which)


@given(st.integers(2, 8), st.sampled_from([64, 48, 32]), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_masked_sums_are_plain_sums_whoever_is_gone_and_however_wide_the_words(cohort, bits, count, seed):
    rng = np.random.default_rng(seed)
    clients = np.sort(rng.choice(1000, cohort, replace=False)).tolist()
    summed = [client for client in clients if rng.random() < 0.7] or clients[-1:]
    bound = 2 ** (bits - 1) // cohort
    plain = {client: rng.integers(-bound, bound, count) for client in clients}
    keys, total = KeyRound.of(7, seed, clients), np.zeros(count, np.uint64)
    for client in summed:
        words = plain[client].astype(np.uint64)
        keys.mask(words, client)
        total += unpack(pack(words, bits), bits, count).view(np.uint64)  # only the word's bits travel
    keys.unmask(total, summed, Shares(keys, tuple(rng.permutation(summed).tolist())))
    expected = sum((plain[client] for client in summed), np.zeros(count, np.int64))
    assert signed(total, bits).tolist() == expected.tolist()


def test_one_message_tells_nothing_and_neither_does_a_sum_that_is_not_unmasked():
    clients, keys = range(5), KeyRound.of(7, 1, range(5))
    sent = []
    for client in clients:
        words = np.zeros(4000, np.uint64)
        keys.mask(words, client)
        sent.append(words)
    for words in (*sent, sent[0] + sent[1], sum(sent[1:], sent[0])):
        bits = np.unpackbits(words.view(np.uint8))
        assert abs(bits.mean() - 0.5) < 0.005  # 256,000 fair coins: five deviations
    # All pairs cancel in the whole sum, and what is left are the clients' own masks.
    left = sum(sent[1:], sent[0])
    for client in clients:
        masking.add_stream(left, masking.own_seed(keys.drawn(client).own, 1), -1)
    assert not left.any()


@pytest.mark.parametrize(("which", "owner"), [("key", 2), ("own", 0)])
def test_a_wrong_share_fails_and_says_whose_secret_it_was(monkeypatch, which, owner):
    keys, words = KeyRound.of(7, 4, [0, 1, 2, 3]), np.zeros(6, np.uint64)
    for client in (0, 1, 3):
        keys.mask(words, client)
    share = Drawn.share

    def tampered(self, what, holder, threshold):
        wrong = what == which and holder == 3 and self == keys.drawn(owner)
        return share(self, what, holder, threshold) + wrong

    monkeypatch.setattr(Drawn, "share", tampered)
    with pytest.raises(
        WrongShare, match=rf"round 4: the shares of clients 0, 1, 3 .* of client {owner}: one"
    ):
        keys.unmask(words, [0, 1, 3], Shares(keys, (0, 1, 3)))
