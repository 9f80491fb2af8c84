"""What a visit costs: FLOPs of every pass over data, and what happened to the mask."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from algorithms import Client, ParameterLayout
from cluster.flops import LayerFlops
from cluster.simulation.clock import Device


@dataclass
class Bill:
    """The passes of one visit.

    Attributes:
        flops: FLOPs of the model's layers.
        held: Share of each layer that the client holds, float64[layers]; None for all of it.
        first: Samples of the first pass, which meets the weights as received.
        samples: Samples of the local steps' passes, the first included.
        first_attacked: Samples of the attack on the first batch, once for each of its runs.
        attacked: Those of the attacks on all batches, the first included.
        extra: Samples of each further pass, those of the attack before it, and the share of nonzeros of each
            layer that both met, float64[layers].
        own_dense: FLOPs that the method caused through the model by itself, float64[layers].
        own_sparse: The ideal sparse ones.
        own_frozen: FLOPs that it caused in layers that are not trained.
        spared: FLOPs that steps left out which computed with less than the client holds, float64[layers].
    """

    flops: LayerFlops
    held: np.ndarray | None = None
    first: int = 0
    samples: int = 0
    first_attacked: int = 0
    attacked: int = 0
    extra: list[tuple[int, int, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.held is not None:
            self.flops = self.flops.of_part(self.held)
        self.own_dense = np.zeros(len(self.flops.forward))
        self.own_sparse = np.zeros(len(self.flops.forward))
        self.own_frozen = 0.0
        self.spared = np.zeros(len(self.flops.forward))

    def step(self, samples: int, share: np.ndarray | None = None) -> None:
        """Note a pass of a local step, and with how much of what the client holds it was, float64[layers]."""
        self.first = self.first or samples
        self.samples += samples
        if share is not None:
            absent = 1.0 - share
            self.spared += self.flops.sparse(samples, absent, np.ones(len(share)), absent)

    def attack(self, samples: int, share: np.ndarray | None = None) -> None:
        """Note the attack on the batch of the next step's pass: its samples, once for each of its runs."""
        if not self.first:
            self.first_attacked = samples
        self.attacked += samples
        if share is not None:
            self.spared += self.flops.attack(samples, 1.0 - share)

    def more(self, samples: int, nonzeros: np.ndarray, attacked: int = 0) -> None:
        """Note a pass beside the steps, and the attack before it."""
        self.extra.append((samples, attacked, nonzeros))

    def own(self, layer: int | None, dense: float, sparse: float) -> None:
        """Note FLOPs of one layer, None for any that is frozen, in a pass that the method ran by itself."""
        if layer is None:
            self.own_frozen += dense
        else:
            self.own_dense[layer] += dense if self.held is None else dense * self.held[layer]
            self.own_sparse[layer] += sparse

    def _in_whole_passes(self) -> tuple[int, int]:
        """Samples of all training passes and of all attacks that are billed as a whole."""
        samples = self.samples + sum(samples for samples, _, _ in self.extra)
        return samples, self.attacked + sum(attacked for _, attacked, _ in self.extra)

    def planned(self, samples: int) -> float:
        """Dense-equivalent FLOPs of a training pass over so many samples."""
        return self.flops.dense(samples)

    def dense(self) -> float:
        """Dense-equivalent FLOPs of all passes."""
        samples, attacked = self._in_whole_passes()
        attacks = float(self.flops.attack(attacked, np.ones(len(self.own_dense))).sum())
        in_frozen = self.flops.attack_frozen(attacked) + self.own_frozen
        made = self.flops.dense(samples) - float(self.spared.sum())
        return made + attacks + float(self.own_dense.sum()) + in_frozen

    def frozen(self) -> float:
        """Those of them in layers that are not trained."""
        samples, attacked = self._in_whole_passes()
        return samples * self.flops.frozen + self.flops.attack_frozen(attacked) + self.own_frozen

    def sparse(
        self, client: Client, received: np.ndarray, trained: np.ndarray, activations: np.ndarray
    ) -> np.ndarray:
        """Ideal sparse FLOPs of each trained layer, float64[layers]; arguments are float64[layers].

        Args:
            client: The method's client half, which knows what of the weights and gradients it uses.
            received: Share of nonzeros that the first pass met.
            trained: Share of nonzeros at the end of local training.
            activations: Density of the saved activations.
        """
        received, trained = self._of_held(received), self._of_held(trained)
        training = client.training_density(trained)
        first, later = client.gradient_density(received), client.gradient_density(trained)
        total = self.flops.sparse(self.first, received, activations, first) + self.flops.sparse(
            self.samples - self.first, training, activations, later
        )
        total = total + self.flops.attack(self.first_attacked, received)
        total = total + self.flops.attack(self.attacked - self.first_attacked, training)
        for samples, attacked, met in self.extra:
            nonzeros = self._of_held(met)
            # A weight of the mask costs its FLOPs while its value is 0. All of the gradient is asked for.
            density = np.maximum(client.training_density(nonzeros), nonzeros)
            total = total + self.flops.sparse(samples, density, activations, np.ones(len(density)))
            total = total + self.flops.attack(attacked, density)
        return np.maximum(total - self.spared, 0.0) + self.own_sparse

    def _of_held(self, shares: np.ndarray) -> np.ndarray:
        """Shares of what the client holds of each layer, from shares of the whole layers."""
        if self.held is None:
            return shares
        return np.divide(shares, self.held, out=np.zeros_like(shares), where=self.held > 0)


def seconds_of_weights(
    device: Device, flops: LayerFlops, layout: ParameterLayout, samples: int, *, spares: bool
) -> np.ndarray:
    """What one kept weight of each prunable layer costs a visit, and what all the rest does: seconds.

    A weight is four bytes each way and, where zeros spare the device time, its training FLOPs; the rest is
    latency, everything else that travels, and the FLOPs that zeros do not spare.

    Args:
        device: The client's device.
        flops: FLOPs of the model's layers.
        layout: The model's layout.
        samples: Samples of the planned local steps.
        spares: Whether zeros take no time.

    Returns:
        float32[layers + 1].
    """
    a_float = 32 / device.downlink + 32 / device.uplink
    training = samples * flops.forward * (2.0 + flops.needs_input_gradient) / device.compute
    sizes = np.array([entry.size for entry in layout.prunable])
    weights = a_float + (training / sizes if spares else 0.0 * training)
    rest = device.latency + a_float * (layout.model_size - layout.prunable_size)
    return np.append(weights, rest if spares else rest + training.sum()).astype(np.float32)
