"""HeteroFL: a client trains the first units of every layer, as many as it has room for.

Diao, Ding and Tarokh, "HeteroFL: Computation and communication efficient federated learning for heterogeneous
clients", ICLR 2021, arXiv 2010.01264.
"""

from __future__ import annotations

from dataclasses import dataclass

from algorithms.core.widths import Slices


@dataclass(frozen=True, kw_only=True)
class HeteroFL(Slices):
    """Prefixes of every hidden layer's units, and the mean of each weight over the clients that hold it."""

    name = "heterofl"
    paper = "Diao et al., ICLR 2021, arXiv 2010.01264"
    departures = (
        "A budget is a share of the weights; in the paper it is the ratio of widths: share_of=width.",
        "No scaler: before a norm it cancels, and without norms training and evaluation would differ.",
        "No masked cross-entropy: all clients train all rows of the classifier.",
        "No statistics are asked for after training; a model with running statistics is refused.",
    )
    weighting = "equal"
