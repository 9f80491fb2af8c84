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
    welch_p_value,
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


@given(st.lists(accuracies, min_size=1, max_size=6))
def test_the_expected_best_is_the_mean_over_all_orders(values):
    orders = list(itertools.permutations(values))
    for draws, expected in enumerate(expected_best(values), start=1):
        mean = sum(max(order[:draws]) for order in orders) / len(orders)
        assert expected == pytest.approx(mean, abs=1e-12)


def test_welchs_test_of_two_against_two():
    # Means 2 and 6, variances 2 over 2 each: t = 4 / sqrt 2 with 2 degrees of freedom, closed as above.
    t = 4 / math.sqrt(2)
    assert welch_p_value([1, 3], [5, 7]) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-12)


def test_the_tests_agree_with_scipy():
    first, second = [0.612, 0.634, 0.598, 0.641, 0.620], [0.590, 0.601, 0.603, 0.611, 0.588]
    assert paired_p_value(first, second) == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)
    for other in (second, second[:2]):
        expected = stats.ttest_ind(first, other, equal_var=False).pvalue
        assert welch_p_value(first, other) == pytest.approx(expected, rel=1e-9)
    interval = stats.t.interval(0.95, 4, loc=np.mean(first), scale=stats.sem(first))
    assert mean_interval(first)[1:] == pytest.approx(interval, rel=1e-9)


def test_welchs_test_without_spread_or_values():
    assert welch_p_value([1, 1], [2, 2, 2]) == 0.0
    assert welch_p_value([2, 2], [2, 2, 2]) == 1.0
    assert math.isnan(welch_p_value([1], [2, 3]))
