"""Intervals, paired tests, Holm's correction and the best of k trials, against numbers worked by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cluster.statistics import (
    expected_best,
    holm,
    mean_interval,
    paired_differences,
    paired_p_value,
)

accuracies = st.floats(0.0, 1.0, allow_subnormal=False)


def test_the_interval_of_four_values():
    # mean 3, s = sqrt(10 / 3), t_3(.975) = 3.182446: half width 3.182446 * 1.825742 / 2.
    mean, low, high = mean_interval([1.0, 2.0, 4.0, 5.0])
    assert mean == 3.0
    assert high - mean == pytest.approx(2.905162, abs=1e-6)
    assert mean - low == pytest.approx(high - mean)


def test_one_value_has_no_interval():
    mean, low, high = mean_interval([0.5])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_the_paired_t_test_of_three_pairs():
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom, whose distribution
    # function is closed: p = 1 - t / sqrt(2 + t^2).
    t = 2 * math.sqrt(3)
    assert paired_p_value([2, 4, 6], [1, 2, 3]) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-12)


def test_pairs_without_spread():
    assert paired_p_value([1, 2, 3], [1, 2, 3]) == 1.0
    assert paired_p_value([2, 3, 4], [1, 2, 3]) == 0.0
    assert math.isnan(paired_p_value([1], [2]))


def test_holm_worked_by_hand():
    # Ascending .01 .02 .03 .04 times 4 3 2 1 is .04 .06 .06 .04; made monotone .04 .06 .06 .06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    untested = holm([math.nan, 0.02, 0.04])  # two tests, not three
    assert math.isnan(untested[0])
    assert untested[1:] == [0.04, 0.04]


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferroni(p_values):
    adjusted = holm(p_values)
    for p, corrected in zip(p_values, adjusted, strict=True):
        assert p <= corrected <= min(1.0, p * len(p_values)) or corrected == pytest.approx(p)


def test_differences_are_paired_by_seed():
    # Means differ by .01 while seeds differ by .2: unpaired nothing could be told.
    values = {"a": [0.5, 0.7, 0.9], "b": [0.509, 0.71, 0.911], "c": [0.5, 0.7, 0.9]}
    differences = paired_differences(values, "a")
    assert list(differences) == ["b", "c"]
    assert differences["b"].interval.mean == pytest.approx(0.01)
    assert differences["b"].distinguishable
    assert differences["b"].adjusted == pytest.approx(2 * differences["b"].p_value)
    assert not differences["c"].distinguishable
    with pytest.raises(ValueError, match="has 1 values, a has 2: they are not paired"):
        paired_differences({"a": [1.0, 2.0], "b": [1.0]}, "a")
    assert not paired_differences({"a": [1.0], "b": [2.0]}, "a")["b"].distinguishable


def test_the_interval_of_a_difference_is_at_the_level_of_its_test():
    # Differences from a: b 1, 2, 3 (t = 3.46), c 9, 10, 11 (t = 17.3), d -1, 0, 1: tested at 5 % / 3, 2, 1.
    base = [50.0, 60.0, 70.0]
    values = {
        "a": base,
        "b": [51.0, 62.0, 73.0],
        "c": [59.0, 70.0, 81.0],
        "d": [49.0, 60.0, 71.0],
    }
    found = paired_differences(values, "a")
    halves = {name: each.interval.high - each.interval.mean for name, each in found.items()}
    standard_error = 1 / math.sqrt(3)
    assert halves["c"] == pytest.approx(stats.t.ppf(1 - 0.05 / 6, 2) * standard_error)
    # b, the second, is not told apart at 5 % over 2 (3.46 < t_2 = 6.2): d is not tested any more.
    assert halves["b"] == pytest.approx(stats.t.ppf(1 - 0.05 / 4, 2) * standard_error)
    assert halves["d"] == pytest.approx(halves["b"])
    assert [each.distinguishable for each in found.values()] == [False, True, False]


@given(st.lists(st.lists(st.integers(-60, 60), min_size=4, max_size=4), min_size=1, max_size=6))
def test_no_verdict_contradicts_its_interval(shifts):
    base = [500.0, 310.0, 470.0, 660.0]
    values = {str(n): [b + s for b, s in zip(base, own, strict=True)] for n, own in enumerate(shifts)}
    for difference in paired_differences({"base": base} | values, "base").values():
        low, high = difference.interval[1:]
        assert difference.distinguishable == (not low <= 0.0 <= high)


@given(st.lists(accuracies, min_size=1, max_size=6))
def test_the_expected_best_is_the_mean_over_all_orders(values):
    orders = list(itertools.permutations(values))
    for draws, expected in enumerate(expected_best(values), start=1):
        mean = sum(max(order[:draws]) for order in orders) / len(orders)
        assert expected == pytest.approx(mean, abs=1e-12)


def test_the_tests_agree_with_scipy():
    first, second = [0.612, 0.634, 0.598, 0.641, 0.620], [0.590, 0.601, 0.603, 0.611, 0.588]
    assert paired_p_value(first, second) == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)
    interval = stats.t.interval(0.95, 4, loc=np.mean(first), scale=stats.sem(first))
    assert mean_interval(first)[1:] == pytest.approx(interval, rel=1e-9)
