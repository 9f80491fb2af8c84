"""FedAvg: dense local training, weighted mean (McMahan et al. 2017, arXiv 1602.05629)."""

from __future__ import annotations

from dataclasses import dataclass

from algorithms.core.algorithm import Algorithm


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Dense training and the mean of the clients' models, weighted by their numbers of samples."""

    name = "fedavg"
    paper = "McMahan et al., AISTATS 2017, arXiv 1602.05629"
    asynchronous = True
