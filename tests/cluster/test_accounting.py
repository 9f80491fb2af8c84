"""Epsilon against published and recomputed figures, calibrated noise, and composition in parts."""

import sys

import pytest

from cluster.accounting import AccountingError, Event, composed, epsilon, least_noise

pytest.importorskip("dp_accounting", reason="epsilon is composed by dp-accounting, the extra dp")


@pytest.mark.parametrize(
    ("noise", "rate", "rounds", "delta", "rdp", "pld"),
    [
        (1.0, 0.1, 100, 1e-5, 7.97, 7.05),
        (1.0, 1 / 3, 30, 1e-5, 15.4, 12.9),
        (2.0, 0.1, 100, 1e-5, 2.59, 2.34),
        (1.0, 0.01, 100, 1e-5, 1.22, 0.718),  # 1.2248; published as 1.23, of other orders
        (0.6, 0.001, 100, 1e-6, 2.86, 1.39),
        (1.0, 1.0, 1, 1e-5, 4.75, 4.38),
    ],
)
def test_figures_of_both_accountants_to_three_digits(noise, rate, rounds, delta, rdp, pld):
    events = [Event(noise, rate, rounds)]
    assert float(f"{epsilon(events, delta, 'rdp'):.3g}") == rdp
    assert float(f"{epsilon(events, delta, 'pld'):.3g}") == pld


def test_cohorts_of_a_fixed_size_would_cost_ten_times_as_much():
    """Replacing one client moves a sum by 2 C, so that the noise counts half: why coins are required."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    def fixed(noise):
        neighbours = dp_accounting.NeighboringRelation.REPLACE_ONE
        accountant = RdpAccountant(range(2, 65), neighbours)
        release = dp_accounting.GaussianDpEvent(noise)
        accountant.compose(dp_accounting.SampledWithoutReplacementDpEvent(100, 10, release), 100)
        return accountant.get_epsilon(1e-5)

    assert float(f"{fixed(0.5):.3g}") == 83.9
    assert float(f"{fixed(1.0):.3g}") == 14.1
    assert float(f"{epsilon([Event(1.0, 1.0, 100)], 1e-5, 'rdp'):.3g}") == 110


def test_the_least_noise_for_a_budget():
    def events(noise):
        return [Event(noise, 0.1, 100)]

    found = least_noise(events, 8.0, 1e-5, "rdp")
    assert found == 0.9979  # 0.9937 with the library's fractional orders, some of which do not converge
    assert epsilon(events(found), 1e-5, "rdp") <= 8.0 < epsilon(events(found - 1e-4), 1e-5, "rdp")


def test_a_budget_that_no_noise_keeps():
    with pytest.raises(AccountingError, match=r"privacy\.dp\.epsilon: no noise keeps to 1e-09"):
        least_noise(lambda noise: [Event(noise, 1.0)], 1e-9, 1e-12, "rdp")


def test_events_in_parts_come_to_what_they_do_at_once():
    events = []
    for rate in [0.5, *[0.1] * 40]:
        events = composed(events, Event(1.0, rate))
    assert events == [Event(1.0, 0.5), Event(1.0, 0.1, 40)]
    stored = composed([Event(1.0, 0.5), Event(1.0, 0.1, 17)], Event(1.0, 0.1, 23))
    assert stored == events
    assert composed(events, Event(2.0, 0.1)) == [*events, Event(2.0, 0.1)]
    single = [Event(1.0, 0.5), *[Event(1.0, 0.1)] * 40]
    assert epsilon(single, 1e-5, "rdp") == pytest.approx(epsilon(events, 1e-5, "rdp"), rel=1e-12)
    assert epsilon([], 1e-5, "rdp") == 0.0


def test_a_library_that_is_absent_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(AccountingError, match=r"not installed here.*pip install 'sparsyfed\[dp\]'"):
        epsilon([Event(1.0, 0.123)], 1e-5, "rdp")
