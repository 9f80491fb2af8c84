"""Two clients on two parabolas: f1 = (x - 2)^2 / 2 and f2 = (x + 1)^2, least together at 0.

FedAvg with two local steps of 0.1 is drawn to 0.036364.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from algorithms import Algorithm, ServerState
from tests.algorithms import planted

SLOPES = (
    lambda w: torch.stack([w[0] - 2.0, torch.zeros(())]),
    lambda w: torch.stack([2.0 * (w[0] + 1.0), torch.zeros(())]),
)


@dataclass
class Round:
    """What a round left of x: the models sent, what clients keep, what is carried, the server's state, x."""

    sent: list[float]
    kept: list[dict[str, float]]
    carried: dict[str, float]
    state: ServerState
    x: float


def rounds(method: Algorithm, *cohorts: tuple[int, ...], lr: float = 0.1, steps: int = 2) -> list[Round]:
    """Train from 0; one cohort of clients a round."""
    return [
        Round(
            [values[0] for values in one.sent],
            [{name: values[0] for name, values in own.items()} for own in one.kept],
            {name: values[0] for name, values in one.carried.items()},
            one.state,
            one.weights[0],
        )
        for one in planted.rounds(method, SLOPES, *cohorts, lr=lr, steps=steps)
    ]
