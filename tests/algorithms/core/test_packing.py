"""Packed totals: nothing but the zeros is left out, and sums of packed totals have the bits of plain ones."""

import pickle
import weakref

import numpy as np
import pytest

from algorithms import Entry, Grid, ParameterLayout, Total
from algorithms.core.packing import PackedTotal, combine, merge, pack, unpack

PRUNABLE, OTHER = 400, 9
LAYOUT = ParameterLayout(
    (Entry("a", (150,), 0, 150), Entry("b", (250,), 150, PRUNABLE)),
    (Entry("bias", (OTHER,), PRUNABLE, PRUNABLE + OTHER),),
    (),
)
GRID = Grid(8.0, 1000)


def folded(clients, density, *, seed=0, **kept):
    """A total of updates, each of which holds so many of the prunable positions."""
    total = Total.zero(GRID, LAYOUT, **kept)
    for client in clients:
        rng = np.random.default_rng((seed, client))
        values = rng.normal(size=PRUNABLE + OTHER).astype(np.float32)
        support = rng.random(PRUNABLE) < density
        values[:PRUNABLE][~support] = 0.0
        marks = rng.random(PRUNABLE) < density if kept.get("marks") else None
        total.fold(client, values, support, 3 + client, LAYOUT, marks=marks)
    return total


def same(first, second):
    arrays = ("high", "low", "votes", "layer_counts", "mask_samples", "marked")
    for name in arrays:
        one, other = getattr(first, name), getattr(second, name)
        if one is None:
            assert other is None
        else:
            assert one.dtype == other.dtype
            assert one.tobytes() == other.tobytes(), name
    assert (first.samples, first.clients, first.unclipped) == (
        second.samples,
        second.clients,
        second.unclipped,
    )


@pytest.mark.parametrize("kept", [{}, {"masked": True}, {"parts": True}, {"marks": True, "masked": True}])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.2, 0.9])
def test_what_was_packed_comes_out_as_it_was(density, kept):
    total = folded([4, 7], density, **kept)
    packed = pack(total)
    assert isinstance(packed, PackedTotal) == (density < 0.9)
    same(unpack(pickle.loads(pickle.dumps(packed))), total)
    assert packed.clients == [4, 7]


def test_the_positions_are_those_that_some_array_needs_by_hand():
    total = Total.zero(GRID, LAYOUT)
    values = np.zeros(PRUNABLE + OTHER, np.float32)
    values[5], values[PRUNABLE + 2] = 1.5, -0.25
    support = np.zeros(PRUNABLE, np.bool_)
    support[[5, 17]] = True  # a position that was sent as 0 counts as a vote
    total.fold(1, values, support, 2, LAYOUT)
    packed = pack(total)
    assert packed.positions.tolist() == [5, 17, PRUNABLE + 2]
    assert packed.columns["votes"].tolist() == [1, 1]
    assert (packed.columns["high"] + packed.columns["low"]).tolist() == [3.0, 0.0, -0.5]
    assert packed.sizes == {"high": PRUNABLE + OTHER, "low": PRUNABLE + OTHER, "votes": PRUNABLE}


@pytest.mark.parametrize("density", [0.02, 0.15, 0.7])
def test_any_tree_over_packed_totals_has_the_bits_of_one_total(density):
    rng = np.random.default_rng(1)
    whole = folded(range(24), density, masked=True)
    for _ in range(5):
        groups = np.array_split(rng.permutation(24), rng.integers(1, 12))
        parts = [pack(folded(sorted(group.tolist()), density, masked=True)) for group in groups]
        while len(parts) > 1:
            taken, parts = parts[:3], parts[3:]
            parts.append(combine(taken))
        same(unpack(parts[0]), whole)


@pytest.mark.parametrize("kept", [{}, {"masked": True}, {"parts": True}, {"marks": True, "masked": True}])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 0.9])
def test_what_is_combined_is_what_merging_whole_totals_gives(density, kept):
    totals = [folded(clients, density, **kept) for clients in ([3, 8], [1], [5, 6])]
    whole = totals[0].copy()
    for total in totals[1:]:
        whole.merge(total)
    parts = [pickle.loads(pickle.dumps(pack(total))) for total in totals]
    found = combine(iter(parts))
    assert isinstance(found, PackedTotal) == isinstance(pack(whole), PackedTotal)
    same(unpack(found), whole)
    for part, total in zip(parts, totals, strict=True):
        same(unpack(part), total)  # they may be read-only, in a store
    # Where some came whole and some packed, in any order.
    for mixed in ([totals[0], *parts[1:]], [*parts[:2], totals[2]], [parts[0], totals[1], parts[2]]):
        same(unpack(combine(mixed)), whole)
    same(unpack(combine(parts[:1])), totals[0])


def test_no_more_packed_totals_are_kept_than_a_whole_one_takes():
    parts = [pack(folded([client], 0.2)) for client in range(12)]
    asked, alive = 0, []

    def one_by_one():
        nonlocal asked
        for number in range(len(parts)):
            part = pickle.loads(pickle.dumps(parts[number]))
            alive.append(weakref.ref(part))
            asked += 1
            yield part
            del part
            held.append(sum(ref() is not None for ref in alive))

    held = []
    same(unpack(combine(one_by_one())), folded(range(12), 0.2))
    assert asked == 12
    room = parts[0].whole_nbytes // min(part.nbytes for part in parts)
    assert 1 < room < 8  # the test is of something
    assert max(held) <= room + 1
    assert held[-1] <= 1  # and then none


def test_updates_that_are_kept_travel_with_it():
    total = folded([1, 2], 0.05, updates=True)
    back = unpack(pickle.loads(pickle.dumps(pack(total))))
    assert list(back.updates) == [1, 2]
    assert all(np.array_equal(back.updates[c][0], total.updates[c][0]) for c in (1, 2))


def test_arrays_out_of_the_object_store_are_read_only_and_stay_as_they_are():
    packed = pack(folded([1], 0.05))
    for own in (packed.positions, *packed.columns.values(), packed.rest.layer_counts):
        own.flags.writeable = False
    total = unpack(packed)
    merge(total, packed)
    assert total.samples == 2 * packed.rest.samples
    assert total.layer_counts.tolist() == (2 * packed.rest.layer_counts).tolist()
