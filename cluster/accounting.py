"""What a sequence of noisy sums tells of one client: epsilon, composed by the library ``dp-accounting``.

Clients are drawn by independent coins, and neighbouring populations differ by one client, added or removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from cluster.references import UserError

Accountant = Literal["rdp", "pld"]

#: Orders of the Renyi divergences. Whole ones: series of fractional ones do not always converge.
_ORDERS = (*range(2, 65), *range(72, 257, 8), 384, 512, 1024)
#: Noise is calibrated to a ten-thousandth, above, so that no last bit of a library decides on a run's bits.
_STEP = 1e-4


class AccountingError(UserError):
    """Epsilon cannot be composed, or no noise keeps it; the message says what to do."""


@dataclass(frozen=True)
class Event:
    """Some releases of one kind.

    Attributes:
        noise: z, the deviation of the noise over what one client can move the sum by; 0: there is none.
        rate: q, the chance of each client to be asked.
        count: How many.
    """

    noise: float
    rate: float
    count: int = 1


def composed(events: Sequence[Event], more: Event) -> list[Event]:
    """The events and one more; like ones that follow each other are counted together."""
    if events and (events[-1].noise, events[-1].rate) == (more.noise, more.rate):
        last = events[-1]
        return [*events[:-1], Event(last.noise, last.rate, last.count + more.count)]
    return [*events, more]


def epsilon(events: Sequence[Event], delta: float, accountant: Accountant) -> float:
    """Epsilon of all of them together, at ``delta``.

    Raises:
        AccountingError: The library is not installed.
    """
    return _epsilon(tuple(events), delta, accountant) if events else 0.0


@cache
def _epsilon(events: tuple[Event, ...], delta: float, accountant: Accountant) -> float:
    library = _library()
    if accountant == "rdp":
        from dp_accounting.rdp import RdpAccountant

        composing = RdpAccountant(_ORDERS)
    else:
        from dp_accounting.pld import PLDAccountant

        composing = PLDAccountant()
    for event in events:
        release = library.GaussianDpEvent(event.noise)
        if event.rate < 1.0:
            release = library.PoissonSampledDpEvent(event.rate, release)
        composing.compose(release, event.count)
    return float(composing.get_epsilon(delta))


def least_noise(
    events: Callable[[float], Sequence[Event]], budget: float, delta: float, accountant: Accountant
) -> float:
    """The least noise multiplier, in ten-thousandths, with which ``events`` of it keep to ``budget``.

    Raises:
        AccountingError: The library is not installed, or not even a noise of 10,000 times does.
    """
    enough, most = 1, round(1e4 / _STEP)
    while epsilon(events(enough * _STEP), delta, accountant) > budget:
        enough *= 2
        if enough > most:
            raise AccountingError(f"privacy.dp.epsilon: no noise keeps to {budget:g} at delta {delta:g}")
    too_little = enough // 2  # 0, or not enough
    while enough - too_little > 1:
        middle = (enough + too_little) // 2
        if epsilon(events(middle * _STEP), delta, accountant) > budget:
            too_little = middle
        else:
            enough = middle
    return round(enough * _STEP, 4)


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise AccountingError(
            f"privacy.dp: composes epsilon with dp-accounting, which is not installed here ({error}); "
            "pip install 'sparsyfed[dp]'"
        ) from None
    return dp_accounting
