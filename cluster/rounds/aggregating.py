"""What becomes of a round's total before the method advances: colluding attackers, then the rule."""

from __future__ import annotations

from algorithms import ServerState, Total
from algorithms.core.robust import settled
from cluster.federation import Federation
from cluster.simulation.byzantine import Byzantine


class Aggregating:
    """Applies the rule of ``aggregation.name`` to a round's updates.

    Args:
        federation: The experiment.
    """

    def __init__(self, federation: Federation) -> None:
        self._rule, self._layout = federation.config.rule, federation.layout
        self._byzantine = Byzantine(federation.config)

    def settle(self, state: ServerState, total: Total) -> Total:
        """The total whose mean is what the rule makes of the updates; the same one where it is ``mean``.

        Args:
            state: The state before the round.
            total: The sum of the accepted updates.
        """
        total = self._byzantine.collude(total, self._layout.trained_size)
        if not self._rule.keeps_updates:
            return total
        assert total.updates is not None
        updates = [values for values, _ in total.updates.values()]
        received = state.weights.numpy()[: self._layout.up_size]
        return settled(total, self._rule.rows(updates, received, self._layout.trained_size))
