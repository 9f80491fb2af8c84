"""MOON: each step also pulls a batch's representations to the global model's, away from the last local one's.

Li, He, Song, "Model-Contrastive Federated Learning", CVPR 2021, arXiv 2103.16257.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.parameters import ParameterLayout, prunable_layers


class MoonClient(Client):
    """Adds mu l to the loss of a batch; keeps the model that it trained last.

    A representation z is what the last layer is given. z of the model in training has a gradient; z_g of w_t
    and z_b of the client's last model have none and are computed in evaluation mode.
    """

    method: Moon

    def begin(self) -> None:
        """Take the last model from the last visit; before the first there is none, and l is 0."""
        super().begin()
        self.last = self.visit.kept.get("model")
        self._seen: list[Tensor] = []

    def gradient(self, compute: Callable[[], Tensor]) -> Tensor:
        """d(loss + mu l)/dw; two forward passes more than FedAvg's step."""
        visit, method = self.visit, self.method
        if method.mu == 0.0 or self.last is None:
            return super().gradient(compute)
        inputs = visit.batch  # an attack on it passes the hook as well
        *_, head = prunable_layers(visit.module).values()
        handle = head.register_forward_pre_hook(lambda layer, inputs: self._seen.append(inputs[0]))
        try:
            visit.forward(visit.global_weights, inputs)
            visit.forward(self.last, inputs)
            towards, away = self._seen
            self.before_forward()
            found = visit.compute(
                lambda outputs, targets, objective: (
                    method.loss(outputs, targets, objective)
                    + method.mu * self._noted(contrast(self._seen[-1], towards, away, method.temperature))
                )
            )
        finally:
            handle.remove()
            self._seen.clear()
        self.after_backward()
        return found

    def finish(self) -> Tensor | None:
        """Keep what was trained, running statistics included."""
        self.visit.kept["model"] = self.visit.model[: self.visit.layout.model_size].clone()
        return super().finish()

    def _noted(self, contrast: Tensor) -> Tensor:
        self.visit.measure("contrast", contrast)
        return contrast


def contrast(own: Tensor, towards: Tensor, away: Tensor, temperature: float) -> Tensor:
    """-log(e^(cos(z, z_g)/tau) / (e^(cos(z, z_g)/tau) + e^(cos(z, z_b)/tau))), mean over a batch; eq. 3.

    Args:
        own: z, [B, ...].
        towards: z_g, [B, ...].
        away: z_b, [B, ...].
        temperature: tau.
    """
    near, far = (F.cosine_similarity(own.flatten(1), z.flatten(1)) for z in (towards, away))
    return F.softplus((far - near) / temperature).mean()


@dataclass(frozen=True, kw_only=True)
class Moon(Algorithm):
    """FedAvg with a model-contrastive term, at about 1.7 times its FLOPs; mu 0 is FedAvg."""

    name = "moon"
    paper = "Li et al., CVPR 2021, arXiv 2103.16257"
    shares_support = True
    departures = (
        "The representation is what the last layer is given, whatever the model; the authors put a "
        "projection of two linear layers before it, 256 wide, which model.projection adds to small_cnn. All "
        "methods of a comparison should run on the same model.",
        "A client's first visit has no last model, and no term; in the authors' code a client that is first "
        "asked late has a random one.",
    )
    client = MoonClient

    mu: float = hyperparameter(
        1.0,
        "weight of the contrastive term",
        low=0.0,
        high=100.0,
        log=True,
        search=(0.01, 10.0),
        source="the authors' code; 5 on CIFAR-10, 1 on CIFAR-100, as its README has them",
    )
    temperature: float = hyperparameter(
        0.5,
        "tau of the contrastive term",
        low=0.01,
        high=10.0,
        log=True,
        search=(0.1, 1.0),
        source="section 4.1",
    )

    @property
    def least_passes(self) -> float:
        """One; a client's first visit has no more."""
        return 1.0

    def keeps(self, layout: ParameterLayout) -> Mapping[str, int]:
        """The last local model."""
        return {"model": layout.model_size}
