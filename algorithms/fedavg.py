"""FedAvg: dense local training, weighted mean (McMahan et al. 2017, arXiv 1602.05629).

A round of the simplest method, with the file of each step::

    w = initial model                                  # cluster/federation.py
    for t in 1 .. rounds:                              # cluster/rounds/driver.py
        S = cohort of the clients available            # cluster/rounds/synchronous.py, simulation/samplers.py
        send w to S, as real bytes                     # cluster/transport/downlink.py
        for i in S, on any actor:                      # cluster/clients/client.py, actors/ray_round.py
            w_i = w                                    # cluster/clients/local_training.py
            for batch of client i's data:              # cluster/clients/local_steps.py
                g = gradient of the loss at w_i        # algorithms/core/client.py: Client.train, gradient
                w_i = w_i - lr g                       # algorithms/core/local_optimizers.py
            send w_i, as real bytes                    # cluster/transport/uplink.py
        w = sum n_i w_i / sum n_i                      # algorithms/core/aggregation.py, algorithm.py: advance
        evaluate w, log, checkpoint                    # cluster/rounds/metrics.py, records/
"""

from __future__ import annotations

from dataclasses import dataclass

from algorithms.core.algorithm import Algorithm


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Dense training and the mean of the clients' models, weighted by their numbers of samples."""

    name = "fedavg"
    paper = "McMahan et al., AISTATS 2017, arXiv 1602.05629"
    shares_support = True
    asynchronous = True
