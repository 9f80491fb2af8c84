"""Rounds without an update: counted, and three in a row end the run, the model as it was before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.exchange import ClientError, ClientReport
from cluster.references import UserError

#: Rounds in a row in which every update was refused, or every client failed, after which a run ends.
LIMIT = 3


class DivergedError(UserError):
    """Every update was refused in several rounds in a row; the model is as it was before them."""

    status = 1


class Setbacks:
    """Counts rounds in a row that left the model as it was.

    Attributes:
        refused: Rounds in a row in which every update that came was refused.
        failed: Rounds in a row in which every client failed and was skipped.
    """

    def __init__(self) -> None:
        self.refused = self.failed = 0

    @property
    def too_many(self) -> bool:
        """Whether the run is to end."""
        return max(self.refused, self.failed) >= LIMIT

    def clear(self) -> None:
        """A round had an update."""
        self.refused = self.failed = 0

    def count(self, round_number: int, reports: Sequence[ClientReport]) -> None:
        """A round had none: nobody's update was accepted, or arrived in time.

        Raises:
            ClientError, DivergedError: It was the stage before round 1, which a run cannot be without.
        """
        # A client that failed says nothing of the model, one that was late might have been accepted.
        answered = [report for report in reports if not report.skipped]
        failed = bool(reports) and not answered
        refused = bool(answered) and all(report.refused is not None for report in answered)
        if round_number < 1:
            reasons = _in_words((r.client, r.refused) for r in reports if r.refused is not None)
            if failed:
                raise ClientError(f"every client of the stage before round 1 failed: {reasons}")
            raise DivergedError(
                "no update of the stage before round 1 was accepted: "
                + (f"{reasons}. A smaller local.lr is the usual cure." if refused else "no client answered.")
            )
        self.failed = self.failed + 1 if failed else 0
        self.refused += refused

    def check(self, line: Mapping[str, Any], lr: float) -> None:
        """End a run that had too many of them.

        Args:
            line: The last round's line.
            lr: The last round's learning rate, for the message.

        Raises:
            DivergedError: Every update of three rounds in a row was refused.
            ClientError: Every client of three rounds in a row failed and was skipped.
        """
        reasons = _in_words(line["clients/refused_list"])
        if self.failed >= LIMIT:
            raise ClientError(
                f"every client failed in {LIMIT} rounds in a row, last in round {line['round']}: {reasons}. "
                "The global model is as it was before them."
            )
        if self.refused >= LIMIT:
            raise DivergedError(
                f"every update was refused in {LIMIT} rounds in a row, last in round {line['round']}: "
                f"{reasons}. The global model is unharmed. A smaller local.lr (now {lr:g}) is the usual cure."
            )


def _in_words(refused: Iterable[tuple[int, str]]) -> str:
    return "; ".join(f"client {client}: {reason}" for client, reason in refused)
