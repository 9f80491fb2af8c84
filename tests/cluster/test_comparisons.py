"""Multiple comparisons with the best: worked by hand, against a naive reference, and how often they err."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from cluster.statistics import p_worse_than_best, seeds_to_tell, two_way_error

REPEATS = 4000


def test_three_methods_on_three_seeds_by_hand():
    # Means 11, 8, 2; seeds 6, 7, 8. Left beside both: 0 0 0, 0 1 -1, 0 -1 1, so 4 / (2 * 2) = 1.
    values = np.array([[10.0, 7.0, 1.0], [11.0, 9.0, 1.0], [12.0, 8.0, 4.0]])
    assert two_way_error(values) == pytest.approx(1.0)
    # The last: t = 9 / sqrt(2 / 3 * 2), t^2 = 60.75; then the other two, a paired t test with t^2 = 27. With
    # two degrees of freedom p = 1 - t / sqrt(2 + t^2).
    last, second = 1 - math.sqrt(60.75 / 62.75), 1 - math.sqrt(27 / 29)
    assert p_worse_than_best(values) == pytest.approx([1.0, second, last])
    assert p_worse_than_best(values[:, [2, 0, 1]]) == pytest.approx([last, 1.0, second])


def test_nobody_is_worse_than_one_that_stays():
    # b alone is worse than a (p = .035), but c, below both, varies so much that nothing is told.
    values = np.array([[10.0, 7.0, -30.0], [11.0, 9.0, 40.0], [12.0, 8.0, 5.0]])
    best, second, last = p_worse_than_best(values)
    assert stats.ttest_rel(values[:, 0], values[:, 1]).pvalue == pytest.approx(0.035, abs=1e-3)
    assert best == 1.0
    assert second == last > 0.3


def naive(values):
    """The rule by least squares on dummy variables and the F distribution, one table."""
    left, adjusted, highest = list(range(values.shape[1])), {}, 0.0
    while len(left) > 1:
        seeds, methods = len(values), len(left)
        own = values[:, left]
        design = np.array(
            [np.r_[np.eye(seeds)[s], np.eye(methods)[m]] for s in range(seeds) for m in range(methods)]
        )
        fitted = design @ np.linalg.lstsq(design, own.reshape(-1), rcond=None)[0]
        mean_square = ((own.reshape(-1) - fitted) ** 2).sum() / ((seeds - 1) * (methods - 1))
        lowest = min(left, key=lambda method: values[:, method].mean())
        gap = own.mean(0).max() - values[:, lowest].mean()
        ratio = seeds * gap**2 / 2 / mean_square / (methods - 1)
        highest = max(highest, stats.f.sf(ratio, 1, seeds - 1))
        adjusted[lowest] = highest
        left.remove(lowest)
    adjusted[left[0]] = 1.0
    return [adjusted[method] for method in range(values.shape[1])]


def test_many_tables_at_once_equal_one_after_the_other():
    rng = np.random.default_rng(3)
    for seeds, methods in ((2, 2), (2, 5), (3, 4), (7, 3)):
        tables = rng.normal(size=(10, seeds, methods)) - 3.0 * np.arange(methods)
        expected = [naive(table) for table in tables]
        np.testing.assert_allclose(p_worse_than_best(tables), expected, rtol=1e-7)


def test_two_methods_are_a_paired_t_test():
    values = np.array([[0.612, 0.590], [0.634, 0.601], [0.598, 0.603], [0.641, 0.611]])
    assert p_worse_than_best(values)[1] == pytest.approx(stats.ttest_rel(*values.T).pvalue)


def test_methods_without_spread():
    assert p_worse_than_best(np.array([[0.1, 0.2], [0.2, 0.3]])).tolist() == [0.0, 1.0]  # but for rounding
    assert p_worse_than_best(np.array([[0.3, 0.1 + 0.2], [0.3, 0.1 + 0.2]])).tolist() == [1.0, 1.0]
    assert p_worse_than_best(np.full((3, 4), 0.5)).tolist() == [1.0] * 4


def noise(kind, seeds, methods, rng):
    """Errors of one kind beside a large effect of the seed, float64[REPEATS, seeds, methods]."""
    own = rng.normal(size=(REPEATS, seeds, methods))
    scales = {
        "equal": np.ones(methods),
        "one ten times": np.r_[10.0, np.ones(methods - 1)],
        "half ten times": np.where(np.arange(methods) % 2, 10.0, 1.0),
        "doubling": 2.0 ** np.arange(methods),
        "one alone": np.r_[1.0, np.full(methods - 1, 1e-3)],
    }
    if kind in scales:
        return own * scales[kind]
    # Poor methods suffer most from a hard seed: the same for all, but for its strength.
    return 3.0 * rng.normal(size=(REPEATS, seeds, 1)) * np.linspace(0, 1, methods) + 0.3 * own


KINDS = ("equal", "one ten times", "half ten times", "doubling", "one alone", "answers to a seed")


def of_seeds(rng, seeds):
    return 20.0 * rng.normal(size=(REPEATS, seeds, 1))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_methods_are_called_worse_in_at_most_5_percent_of_tables(kind, seeds):
    rng = np.random.default_rng([seeds, KINDS.index(kind)])
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / REPEATS)  # three standard errors of the simulation
    for methods in range(2, 10):
        p_values = p_worse_than_best(of_seeds(rng, seeds) + noise(kind, seeds, methods, rng))
        assert np.mean(p_values.min(-1) <= 0.05) <= allowed, methods


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_stay_where_others_are_worse(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    allowed = 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / REPEATS)
    for methods, best, apart in itertools.product((3, 7), (1, 2), (1.0, 10.0, 100.0)):
        below = np.maximum(0, np.arange(methods) - best + 1) * apart
        p_values = p_worse_than_best(of_seeds(rng, 3) + noise(kind, 3, methods, rng) - below)
        assert np.mean(p_values[:, :best].min(-1) <= 0.05) <= allowed, (methods, best, apart)


def power(seeds, methods, below, error=1.0):
    """How often one of otherwise equal methods is found worse."""
    rng = np.random.default_rng([seeds, methods])
    values = of_seeds(rng, seeds) + error * rng.normal(size=(REPEATS, seeds, methods))
    values[..., 0] -= below
    return float(np.mean(p_worse_than_best(values)[:, 0] <= 0.05))


#: Seeds, methods, and how many times the error one method is below the others.
FOUND = [(2, 2, 17), (2, 5, 31), (3, 2, 4.7), (3, 5, 8), (3, 7, 9.5), (5, 2, 2.5), (5, 5, 3.8), (5, 9, 5.1)]


@pytest.mark.parametrize(("seeds", "methods", "below"), [*FOUND, (10, 5, 2.2)])
def test_one_method_that_is_worse_is_found(seeds, methods, below):
    # In four tables of five, and with half of the difference in about half of them at most.
    assert 0.9 > power(seeds, methods, below) >= 0.8 > 0.52 > power(seeds, methods, below / 2)


def test_the_seeds_that_a_difference_takes():
    # Two methods, error .7: the paired t test on differences of mean 3 and deviation .7 sqrt 2.
    rng = np.random.default_rng(0)
    differences = 3 + 0.7 * math.sqrt(2) * rng.normal(size=(REPEATS, 4))
    found = {n: np.mean(stats.ttest_1samp(differences[:, :n], 0, axis=1).pvalue <= 0.05) for n in (3, 4)}
    assert found[3] < 0.8 <= found[4]
    assert seeds_to_tell(3.0, 0.7, 2) == 4
    assert seeds_to_tell(3.0, 0.0, 2) == 2
    assert seeds_to_tell(3.0, 1e4, 2) is None
    for methods, error in ((3, 1.5), (5, 1.0), (7, 0.7)):  # nine in ten or more, as the best of many is high
        assert power(seeds_to_tell(3.0, error, methods), methods, 3.0, error) >= 0.8
        assert power(seeds_to_tell(3.0, error, methods) - 3, methods, 3.0, error) < 0.8
