"""Masks that cancel in a sum: clients agree on one for each pair, and share what it takes to remove them.

Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017: client i
adds PRG(s_ij) for every j > i, subtracts it for every j < i, and adds PRG(b_i). The key behind the s_ij and
b_i are shared so that any ``threshold`` clients give one of them back: the key of a client that is gone, b_i
of one that is in the sum. Both are committed to beforehand, the key by its public half, so that a wrong share
shows.

X25519, HKDF-SHA256 and AES-256-CTR are those of ``cryptography``. What clients draw comes from the run's
seed, so that a run can be repeated, and is no secret from whoever knows that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from cluster import seeding

#: Shares are numbers modulo this prime, the first above all secrets of 32 bytes.
PRIME = 2**256 + 297

#: Bytes of a key, of a commitment, and of a share.
KEY_BYTES, SHARE_BYTES = 32, 33

#: Bytes of an encrypted message of two shares: AES-GCM adds a tag; its keys are used once, with a nonce of 0.
SHARES_MESSAGE_BYTES = 2 * SHARE_BYTES + 16

_BLOCK = 1 << 17  # words of a stream at once
_ZEROS = bytes(8 * _BLOCK)

#: What is shared: the secret half of a client's key, or the seed of its own mask.
Secret = Literal["key", "own"]


class WrongShare(Exception):
    """Shares give another secret than the one their owner committed to."""


@dataclass(frozen=True)
class Drawn:
    """What a client draws for a round.

    Attributes:
        key: The secret half of its key.
        own: The seed b_i of its own mask.
        polynomials: Bytes from which the coefficients of its shares follow.
    """

    key: bytes
    own: bytes
    polynomials: bytes

    @classmethod
    def of(cls, seed: int, round_number: int, client: int) -> Drawn:
        """Drawn from the run's seed, the round and the client."""
        rng = seeding.generator(seed, "masks", round_number, client)
        return cls(rng.bytes(KEY_BYTES), rng.bytes(KEY_BYTES), rng.bytes(KEY_BYTES))

    def secret(self, which: Secret) -> bytes:
        """One of the two that are shared."""
        return self.key if which == "key" else self.own

    def share(self, which: Secret, holder: int, threshold: int) -> int:
        """What it hands to another client: its polynomial at 1 + the holder's number."""
        material = hashlib.shake_256(self.polynomials + which.encode()).digest(40 * (threshold - 1))
        later = [int.from_bytes(material[i : i + 40], "little") for i in range(0, len(material), 40)]
        return polynomial([int.from_bytes(self.secret(which), "little"), *later], holder + 1)


def polynomial(coefficients: Iterable[int], x: int) -> int:
    """A polynomial at x modulo the prime, its constant coefficient first."""
    result = 0
    for coefficient in reversed(list(coefficients)):
        result = (result * x + coefficient) % PRIME
    return result


def joined(shares: Mapping[int, int]) -> bytes:
    """The secret of ``threshold`` shares by holder: Lagrange's polynomial at 0."""
    secret = 0
    for holder, share in shares.items():
        above = below = 1
        for other in shares:
            if other != holder:
                above = above * (other + 1) % PRIME
                below = below * (other - holder) % PRIME
        secret += share * above * pow(below, -1, PRIME)
    return (secret % PRIME).to_bytes(SHARE_BYTES, "little")[:KEY_BYTES]


def public_half(key: bytes) -> bytes:
    """The public half of a key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()


def commitment(which: Secret, secret: bytes) -> bytes:
    """What the server holds of a secret from the start."""
    return public_half(secret) if which == "key" else hashlib.sha256(secret).digest()


def agreed(key: bytes, other: bytes, round_number: int) -> bytes:
    """s_ij of two clients, from the secret half of either and the public half of the other."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    exchanged = X25519PrivateKey.from_private_bytes(key).exchange(X25519PublicKey.from_public_bytes(other))
    return _derived(exchanged, f"pair {round_number}")


def own_seed(own: bytes, round_number: int) -> bytes:
    """What a client's own mask is the stream of."""
    return _derived(own, f"own {round_number}")


def _derived(secret: bytes, purpose: str) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"sparsyfed masks, " + purpose.encode()
    return HKDF(SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def add_stream(words: np.ndarray, seed: bytes, sign: int) -> None:
    """Add (1) or subtract (-1) PRG(seed) in place, modulo 2**64; ``words`` are uint64[n]."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        drawn = np.frombuffer(stream.update(_ZEROS[: 8 * len(block)]), "<u8")
        if sign > 0:
            block += drawn
        else:
            block -= drawn


@dataclass(frozen=True)
class KeyRound:
    """What all clients of a round know of each other once keys are exchanged.

    Attributes:
        seed: The run's, from which clients draw.
        round: The round.
        public: The public half of every client's key, by client.
    """

    seed: int
    round: int
    public: Mapping[int, bytes]

    @classmethod
    def of(cls, seed: int, round_number: int, clients: Iterable[int]) -> KeyRound:
        """What the clients of a round send the server, which hands it on."""
        public = {c: public_half(_drawn(seed, round_number, c).key) for c in clients}
        return cls(seed, round_number, public)

    def drawn(self, client: int) -> Drawn:
        """What a client, and nobody else, knows."""
        return _drawn(self.seed, self.round, client)

    def mask(self, words: np.ndarray, client: int) -> None:
        """Client ``client`` masks what it sends, uint64[n], in place."""
        drawn = self.drawn(client)
        add_stream(words, own_seed(drawn.own, self.round), 1)
        for other, public in self.public.items():
            if other != client:
                add_stream(words, agreed(drawn.key, public, self.round), 1 if other > client else -1)

    def unmask(self, words: np.ndarray, summed: Iterable[int], asked: Shares) -> None:
        """The server takes the masks out of a sum, uint64[n], in place.

        Args:
            words: The sum of what some clients sent.
            summed: Those clients.
            asked: The shares that they hand over.

        Raises:
            WrongShare: Names the client whose secret was not recovered.
        """
        summed = sorted(summed)
        for client in summed:
            add_stream(words, own_seed(asked.recover("own", client), self.round), -1)
        for gone in sorted(self.public.keys() - set(summed)):
            key = asked.recover("key", gone)
            for client in summed:
                # What `client` added for `gone`, whose secret half gives the same s_ij as its own.
                seed = agreed(key, self.public[client], self.round)
                add_stream(words, seed, -1 if gone > client else 1)


@dataclass(frozen=True)
class Shares:
    """The shares that the clients of a sum hand over; they were dealt when keys were exchanged.

    Attributes:
        keys: The round's keys.
        holders: Who hands over, ``threshold`` of them.
    """

    keys: KeyRound
    holders: tuple[int, ...]

    def of(self, which: Secret, owner: int) -> dict[int, int]:
        """The shares of one secret by holder."""
        drawn, threshold = self.keys.drawn(owner), len(self.holders)
        return {holder: drawn.share(which, holder, threshold) for holder in self.holders}

    def recover(self, which: Secret, owner: int) -> bytes:
        """One secret from its shares, checked against what its owner committed to.

        Raises:
            WrongShare: It is another one.
        """
        secret = joined(self.of(which, owner))
        promised = self.keys.public[owner]
        if which == "own":
            promised = commitment(which, self.keys.drawn(owner).own)
        if commitment(which, secret) != promised:
            what = "key" if which == "key" else "seed of its own mask"
            raise WrongShare(
                f"round {self.keys.round}: the shares of clients {', '.join(map(str, self.holders))} do not "
                f"give the {what} of client {owner}: one of them is wrong, and the sum cannot be unmasked"
            )
        return secret


@lru_cache(maxsize=1 << 14)
def _drawn(seed: int, round_number: int, client: int) -> Drawn:
    return Drawn.of(seed, round_number, client)
