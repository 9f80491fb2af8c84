"""A fuzzer of the wire: hostile messages with right checksums, against a reader that shares no code.

``python -m tests.fuzz_wire --minutes 10 [--seed 0]`` before a release; the tests run a short one. A message
is mutated, mostly sealed again (lengths and checksum made right), and then read by the product and by
:func:`read_naively`, a byte at a time from the format's description. What both take is folded. A violation is
a warning, an exception other than ``WireError``, a message that only one of them takes, another value, an
allocation that neither the vector nor the message accounts for, a refused update that leaves a trace in the
total, and a mean that is not that of the updates taken. The first one ends the run and says what repeats it.
"""

from __future__ import annotations

import argparse
import itertools
import struct
import sys
import time
import tracemalloc
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import zstandard

from algorithms.core.aggregation import Grid, Total
from algorithms.core.parameters import Entry, ParameterLayout
from cluster.transport.uplink import Uplink
from cluster.transport.wire import Message, Shape, WireError, decode, encode
from tests.naive_wire import FORMATS, HEADER, ITEM, checksum, read_naively

#: (offset, struct code) of every field of the header but the magic.
FIELDS = [*((place, "B") for place in (4, 5, 6, 7)), *((place, "I") for place in range(8, 32, 4)), (32, "Q")]
EDGES = (0, 1, 2, 3, 4, 5, 7, 8, 127, 128, 254, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
POISON = [
    np.array(value, np.float32).tobytes()
    for value in (np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38, -3.4e38, 1e20)
] + [b"\x01\x00\x80\x7f", b"\x80\x80\x80\x80", b"\x00\x7c\x00\xfc"]
#: Bytes that reading may take beside 40 for every float and a few for every byte that came.
SPARE = 2**16


class Violation(AssertionError):
    """What must not happen, with what repeats it."""


@dataclass(frozen=True)
class Case:
    """A message that is right, and what its receiver knows."""

    data: bytes
    shape: Shape
    held: np.ndarray | None
    known: np.ndarray | None
    runs: list[int]  # cut positions before each one that is kept


# ------------------------------------------------------------------------------------------ right messages


def make_case(rng: np.random.Generator) -> Case:
    """A message of any shape, layout and format."""
    prunable = int(
        rng.choice([0, 1, 7, 8, 60, 600, 3000, 70_000], p=[0.03, 0.03, 0.1, 0.1, 0.3, 0.3, 0.1, 0.04])
    )
    trained = prunable + int(rng.integers(0, 5))
    size = trained + int(rng.integers(0, 5))
    cuts = sorted(rng.integers(0, trained + 1, int(rng.integers(0, 4))).tolist())
    shape = Shape(prunable, trained, size, tuple(itertools.pairwise([0, *cuts, trained])))
    support = rng.random(prunable) < rng.choice([0.0, 0.001, 0.01, 0.1, 0.5, 1.0])
    held = [None, support.copy(), support | (rng.random(prunable) < 0.1), rng.random(prunable) < 0.3]
    kept_by = held[int(rng.integers(0, 4))]
    values = rng.standard_normal(size).astype(np.float32)
    other = rng.standard_normal(trained).astype(np.float32)
    known = [None, None, values[:trained].copy(), other][int(rng.integers(0, 4))]
    data = encode(
        values,
        support,
        shape,
        held=kept_by,
        known=known,
        value_format=FORMATS[int(rng.integers(0, 4))],
    )
    runs = (np.diff(np.flatnonzero(support), prepend=-1) - 1).tolist()
    return Case(data, shape, kept_by, known, runs)


# ------------------------------------------------------------------------------------------------ mutations


def seal(head: bytes | bytearray, where: bytes, content: bytes) -> bytes:
    """The message with the lengths and the checksum that its parts should have."""
    head = bytearray(head)
    head[28:32] = struct.pack("<I", len(where))
    head[32:40] = struct.pack("<Q", HEADER + len(where) + len(content))
    return checked(bytes(head[:40]) + bytes(4) + where + content)


def checked(data: bytes) -> bytes:
    """The message with the checksum that its bytes should have."""
    return data[:40] + struct.pack("<I", checksum(data[:40] + data[HEADER:])) + data[HEADER:]


def frames(rng: np.random.Generator, runs: list[int]) -> tuple[int, bytes]:
    """Code of the layout and a frame, more or less, of the run lengths."""
    layout = int(rng.choice([4, 4, 5]))
    content = bytearray(b"".join(b"\xff" * (run // 255) + bytes([run % 255]) for run in runs))
    if layout == 5:
        width = int(rng.choice([2, 4]))
        content = bytearray(run >> 8 * plane & 255 for plane in range(width) for run in runs)
    for _ in range(int(rng.choice([0, 0, 1, 2]))):
        _scramble(rng, content)
    text, junk = bytes(content), rng.bytes(int(rng.integers(1, 9)))
    plain = zstandard.ZstdCompressor(level=1)
    frame = plain.compress(text)
    skippable = struct.pack("<II", 0x184D2A50 + int(rng.integers(0, 16)), len(junk)) + junk
    flagged = bytearray(frame)
    flagged[4] ^= 1 << int(rng.integers(0, 8))
    half = len(text) // 2
    choices = [
        lambda: frame,
        lambda: frame + junk,
        lambda: frame + frame,
        lambda: plain.compress(text[:half]) + plain.compress(text[half:]),
        lambda: skippable + frame,
        lambda: frame + skippable,
        lambda: plain.compress(b"") + junk,
        lambda: plain.compress(b"") + frame,
        lambda: zstandard.ZstdCompressor(write_content_size=False).compress(text),
        lambda: zstandard.ZstdCompressor(write_checksum=True).compress(text),
        lambda: zstandard.ZstdCompressor(
            dict_data=zstandard.ZstdCompressionDict(
                b"0123456789" * 9, dict_type=zstandard.DICT_TYPE_RAWCONTENT
            )
        ).compress(text),
        lambda: bytes(flagged),
        lambda: frame[: int(rng.integers(0, len(frame)))],
        lambda: plain.compress(bytes(int(rng.choice([10_000, 2_000_000])))),
        lambda: frame[:4] + b"\xa0" + struct.pack("<I", int(rng.choice(EDGES))) + frame[6:],
        lambda: frame[:4] + b"\xe0" + struct.pack("<Q", 2**63 + int(rng.choice(EDGES))) + frame[6:],
        lambda: text,
    ]
    return layout, bytes(choices[int(rng.integers(0, len(choices)))]())


def _scramble(rng: np.random.Generator, data: bytearray) -> None:
    """Change, insert, delete, repeat or append a few bytes in place."""
    place, kind = int(rng.integers(0, len(data) + 1)), int(rng.integers(0, 6))
    if kind == 0 and place < len(data):
        data[place] ^= 1 << int(rng.integers(0, 8))
    elif kind == 1 and place < len(data):
        data[place] = int(rng.choice([0, 1, 127, 128, 254, 255]))
    elif kind == 2:
        data[place:place] = rng.bytes(int(rng.integers(1, 6)))
    elif kind == 3:
        del data[place : place + int(rng.integers(1, 6))]
    elif kind == 4:
        data[place:place] = data[place : place + int(rng.integers(1, 20))]
    else:
        data += bytes(rng.choice(np.array([0, 255], np.uint8), int(rng.integers(1, 5))))


def mutate(rng: np.random.Generator, case: Case, other: Case) -> bytes:
    """A message that its sender never wrote, most often with right lengths and checksum."""
    head, cut = bytearray(case.data[:HEADER]), HEADER + struct.unpack_from("<I", case.data, 28)[0]
    where, content = case.data[HEADER:cut], bytearray(case.data[cut:])
    kind = int(rng.integers(0, 9))
    if kind == 0:  # as damage comes: no checksum is made right
        damaged = bytearray(case.data)
        for _ in range(int(rng.integers(1, 4))):
            _scramble(rng, damaged)
        return bytes(damaged)
    if kind == 1:
        data = bytearray(case.data)
        for _ in range(int(rng.integers(1, 4))):
            _scramble(rng, data)
        return checked(bytes(data)) if len(data) > HEADER else bytes(data)
    if kind == 2:  # a field of the header
        for _ in range(int(rng.integers(1, 3))):
            place, code = FIELDS[int(rng.integers(0, len(FIELDS)))]
            old = struct.unpack_from(f"<{code}", head, place)[0]
            new = int(
                rng.choice([int(rng.choice(EDGES)), old + 1, old - 1, 2 * old])
            ) % 256 ** struct.calcsize(code)
            struct.pack_into(f"<{code}", head, place, new)
        return checked(bytes(head) + case.data[HEADER:])
    if kind == 3:  # another layout or format for the same bytes, and the count that would fit
        head[5], head[6] = int(rng.integers(0, 7)), int(rng.choice([head[6], rng.integers(0, 5)]))
        struct.pack_into("<I", head, 8, int(rng.integers(0, case.shape.prunable + 2)))
        return seal(head, where, bytes(content))
    if kind == 4:
        for _ in range(int(rng.integers(1, 4))):
            value, place = (
                POISON[int(rng.integers(0, len(POISON)))],
                4 * int(rng.integers(0, len(content) // 4 + 1)),
            )
            content[place : place + 4] = value[: len(content) - place]
        return seal(head, where, bytes(content))
    if kind == 5:  # one message's support, another one's values
        theirs = HEADER + struct.unpack_from("<I", other.data, 28)[0]
        return seal(head, other.data[HEADER:theirs], bytes(content))
    if kind == 6:
        bits = bytearray(where)
        _scramble(rng, bits)
        return seal(head, bytes(bits), bytes(content))
    # Another frame for the support, with as many values as it then has, or nearly so.
    head[5], where = frames(rng, case.runs)
    item = ITEM[head[6]]
    kept = max(0, len(case.runs) + int(rng.choice([0, 0, 1, -1])))
    struct.pack_into("<II", head, 8, kept, case.shape.prunable)
    struct.pack_into("<I", head, 24, 0)
    content += bytes(item * max(0, kept - len(case.runs)))
    return seal(head, where, bytes(content))


# ----------------------------------------------------------------------------------- reading and folding


class Receiver:
    """Reads and folds hostile messages of one shape, by the product and by hand."""

    def __init__(self, case: Case, limit: float | None) -> None:
        self.case, self.limit = case, limit
        size, prunable, trained = case.shape.size, case.shape.prunable, case.shape.trained
        spans = [(0, prunable)], [(prunable, trained)], [(trained, size)]
        entries = [tuple(Entry(str(a), (b - a,), a, b) for a, b in part) for part in spans]
        self.layout = ParameterLayout(*entries)
        weights = np.linspace(-1, 1, size, dtype=np.float32)
        self.grid = Grid.for_round(weights, 10**6)
        self.weights = weights
        self.uplink = Uplink(self.layout, "float32", differences=False, max_update_norm=limit)
        self.total = Total.zero(self.grid, self.layout)
        self.sum, self.samples = np.zeros(size), 0

    def take(self, data: bytes) -> str:
        """What became of a message: "refused", "not folded" or "folded"."""
        shape, held, known = self.case.shape, self.case.held, self.case.known
        message: Message | None
        tracemalloc.start()
        try:
            message = decode(data, shape, held=held, known=known)
        except WireError:
            message = None
        finally:
            asked = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        if asked > 40 * shape.size + 4 * len(data) + SPARE:
            raise Violation(f"reading {len(data)} bytes for {shape.size} floats took {asked} bytes")
        expected = read_naively(data, shape, held, known)
        if (message is None) != (expected is None):
            raise Violation(
                f"the product {'refuses' if message is None else 'takes'} it, the naive reader does not"
            )
        if message is None or expected is None:
            return "refused"
        values, positions = expected
        same = np.array_equal(values, message.values, equal_nan=True)
        if not same or (np.signbit(values) != np.signbit(message.values))[~np.isnan(values)].any():
            raise Violation("other values")
        found = None if message.support is None else np.flatnonzero(message.support).tolist()
        if found != positions or (positions is not None and message.positions.tolist() != positions):
            raise Violation("another support")
        return self._fold(message, values)

    def _fold(self, message: Message, values: np.ndarray) -> str:
        samples = 1 + self.samples % 7
        marks = self.total.high.tobytes(), self.total.low.tobytes(), self.total.votes.tobytes()
        reason = self.uplink.fold(self.total, 0, message, samples, self.weights)
        trained = self.case.shape.trained
        exact = values.astype(np.float64)
        good = bool(np.isfinite(exact).all() and (np.abs(exact) <= self.grid.limit).all())
        if self.limit is not None and good:
            away = exact[:trained] - self.weights[:trained]
            good = float(np.sqrt(sum(x * x for x in away.tolist()))) <= self.limit
        if good != (reason is None):
            raise Violation(f"an update that is {'good' if good else 'bad'}: {reason}")
        if reason is not None:
            if marks != (self.total.high.tobytes(), self.total.low.tobytes(), self.total.votes.tobytes()):
                raise Violation("a refused update is in the total")
            return "not folded"
        self.sum, self.samples = self.sum + samples * exact, self.samples + samples
        if not np.allclose(
            self.total.mean(), self.sum / self.samples, rtol=1e-6, atol=1e-9 * self.grid.limit / 2**20
        ):
            raise Violation("the mean is not that of the updates")
        return "folded"


def fuzz(seed: int, messages: int, deadline: float = float("inf")) -> Counter[str]:
    """Try so many messages, or until ``deadline`` (of ``time.monotonic``); counts what became of them.

    Raises:
        Violation: With the seed and the number of the message.
    """
    counts: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in range(-(-messages // 50)):
            if time.monotonic() >= deadline:
                break
            rng = np.random.default_rng([seed, batch])
            case, other = make_case(rng), make_case(rng)
            receiver = Receiver(case, limit=[None, 50.0][batch % 2])
            if receiver.take(case.data) == "refused":
                raise Violation(f"seed {seed}, batch {batch}: a right message is refused")
            for turn in range(50):
                data = mutate(rng, case, other)
                try:
                    counts[receiver.take(data)] += 1
                except Exception as error:
                    where = f"seed {seed}, batch {batch}, message {turn} of {case.shape}"
                    raise Violation(f"{where}: {error!r}: {data.hex()}") from error
    return counts


def main() -> int:
    """Fuzz for some minutes; 1 where anything was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        counts = fuzz(arguments.seed, 10**12, started + 60 * arguments.minutes)
    except Violation as found:
        print(found)
        return 1
    total, seconds = sum(counts.values()), time.monotonic() - started
    print(f"seed {arguments.seed}: {total} messages in {seconds:.0f} s, no violation; {dict(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
