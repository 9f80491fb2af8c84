"""FedAlign: the last block's Lipschitz constant at part of its width shall equal that at full width.

Mendieta et al., "Local Learning Matters: Rethinking Data Heterogeneity in Federated Learning", CVPR 2022,
arXiv 2111.14213. Nothing pulls a client to w_t: local models that generalise are what the mean needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.parameters import prunable_layers

_TINY = 1e-12


class FedAlignClient(Client):
    """Notes how far the two constants are apart; the term itself is in the loss."""

    def begin(self) -> None:
        """From here on the part of the block that runs again is billed, layer by layer."""
        super().begin()
        self.module = self.visit.module

    def after_backward(self) -> None:
        """Log the gap of this batch."""
        super().after_backward()
        gap = getattr(self.module, "lipschitz_gap", None)
        if gap is not None:
            self.visit.measure("lipschitz_gap", gap)


@dataclass(frozen=True, kw_only=True)
class FedAlign(Algorithm):
    """FedAvg that regularises the last block, at its bytes and a few per cent more FLOPs; mu 0 is FedAvg."""

    name = "fedalign"
    paper = "Mendieta et al., CVPR 2022, arXiv 2111.14213"
    shares_support = True
    departures = (
        "The local optimizer is fresh each visit; in the authors' code its momentum survives from client to "
        "client and from round to round.",
        "No gradient is clipped; the authors clip its norm at 10: local.clip_norm=10.",
        "A model without a convolution has its last hidden layer for a block, of whose constant little is "
        "seen; the authors have ResNets.",
    )
    client = FedAlignClient
    #: What a recorded pass runs again would not be billed.
    recordable = False
    least_passes = 1.0

    mu: float = hyperparameter(
        0.45,
        "value of the term, in parts of the loss",
        low=0.0,
        high=10.0,
        log=True,
        search=(0.01, 1.0),
        source="the authors' code",
    )
    width: float = hyperparameter(
        0.25, "share of the block's channels that runs again", above=0.0, low=0.0, high=1.0, source="the code"
    )
    power_iterations: int = hyperparameter(
        10, "iterations for a sample's largest singular value", low=1, high=100, source="the authors' code"
    )
    block: tuple[str, ...] = hyperparameter(
        (), "name pattern of the block; none: from the last child with a convolution to the classifier"
    )

    def problems(self, config: Any) -> Iterator[str]:
        """A feature map's second dimension are its channels."""
        if config.model.name in ("transformer", "linear"):
            yield f"model.name: {config.model.name} has no block of channels for fedalign"

    def prepare(self, model: nn.Module) -> None:
        """Have the model return (logits, s of the block, s of its part) while it trains.

        Raises:
            ValueError: There is no such block, or a part of it cannot be cut out.
        """
        if self.mu == 0.0:
            return
        block = find_block(model, self.block)
        for name, layer in prunable_layers(nn.Sequential(*block)).items():
            if getattr(layer, "groups", 1) != 1:
                raise ValueError(f"algorithm.name: fedalign cannot narrow the grouped convolution {name}")
        ends: dict[str, Tensor] = {}
        block[0].register_forward_pre_hook(lambda layer, inputs: ends.update(first=inputs[0]))
        block[-1].register_forward_hook(lambda layer, inputs, output: ends.update(last=output))

        def with_constants(module: nn.Module, inputs: Any, logits: Tensor) -> Any:
            before, after = ends.pop("first"), ends.pop("last")
            if not module.training:
                return logits
            part_before = before.detach()[:, : narrowed(before.shape[1], self.width)]
            part_after = run_part(block, part_before, self.width)
            ends.clear()  # the part has passed the same hooks
            whole = lipschitz(before.detach(), after.detach(), self.power_iterations)
            part = lipschitz(part_before, part_after, self.power_iterations)
            module.lipschitz_gap = (part - whole).detach().abs().mean()
            return logits, whole, part

        model.register_forward_hook(with_constants)

    def loss(self, outputs: Any, targets: Tensor, objective: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The objective's value, with the gradient of loss + mu (loss / lip as numbers) lip."""
        if isinstance(outputs, Tensor):
            return super().loss(outputs, targets, objective)
        logits, whole, part = outputs
        loss = objective(logits, targets)
        lip = (part - whole).square().mean()
        value = lip.detach()
        scale = torch.where(value > _TINY, self.mu * loss.detach() / value.clamp(min=_TINY), 0.0)
        return loss + (scale * lip - scale * value)


def lipschitz(before: Tensor, after: Tensor, iterations: int) -> Tensor:
    """About the largest singular value of a block's transition matrix, of each sample, float32[B].

    A = mean over pixels of F0[:, p] F1[:, p]^T; power iteration from ones, which no map behind a ReLU is
    orthogonal to.

    Args:
        before: F0, [B, C0, ...]; averaged to the pixels of F1.
        after: F1, [B, C1, ...].
        iterations: Power iterations on A A^T.
    """
    if after.ndim == 4:
        before = F.adaptive_avg_pool2d(before, (after.shape[2], after.shape[3]))
    wide = torch.promote_types(after.dtype, torch.float32)
    before, after = (features.to(wide).reshape(*features.shape[:2], -1) for features in (before, after))
    matrix = before @ after.mT / after.shape[2]
    vector = torch.ones_like(matrix[:, :, :1])
    norm = vector
    for _ in range(iterations):
        image = matrix @ (matrix.mT @ vector)
        norm = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        vector = image / norm.clamp(min=_TINY)
    return norm.clamp(min=_TINY).sqrt().flatten()


def narrowed(channels: int, width: float) -> int:
    """Channels of a part: the multiple of 8 nearest to width x channels, at least 8 and 90 % of that."""
    wanted = width * channels
    found = max(8, int(wanted + 4) // 8 * 8)
    if found < 0.9 * wanted:
        found += 8
    return min(found, channels)


def run_part(block: Sequence[nn.Module], inputs: Tensor, width: float) -> Tensor:
    """The leading channels of a block, on those of its input; running statistics stay as they are."""
    for child in block:
        tensors = {name: _leading(t, width) for name, t in child.named_parameters()}
        tensors |= {name: _leading(t, width).clone() for name, t in child.named_buffers()}
        inputs = torch.func.functional_call(child, tensors, (inputs,))
    return inputs


def _leading(tensor: Tensor, width: float) -> Tensor:
    """Slices of the first two dimensions."""
    return tensor[tuple(slice(narrowed(size, width)) for size in tensor.shape[:2])]


def find_block(model: nn.Module, patterns: Sequence[str] = ()) -> list[nn.Module]:
    """The children of the model that run one after the other and make the last block.

    Args:
        model: The plain module.
        patterns: Name patterns of one module; by default the child with the last convolution (without any,
            the last hidden layer) and all that follow it before ``nn.Flatten`` or the last layer.

    Raises:
        ValueError: None or several are called so, or the model is a last layer alone.
    """
    children, layers = dict(model.named_children()), list(prunable_layers(model).values())
    if patterns:
        found = [m for name, m in model.named_modules() if any(fnmatchcase(name, p) for p in patterns)]
        if len(found) != 1:
            raise ValueError(
                f"algorithm.block: {list(patterns)} are the names of {len(found)} modules; one is needed, "
                f"such as one of {', '.join(children)}"
            )
        return found
    convolutions = [layer for layer in layers if not isinstance(layer, nn.Linear)]
    *_, last = [*layers[:-1], *convolutions] or [layers[-1]]
    block: list[nn.Module] = []
    for child in children.values():
        own = set(child.modules())
        if block and (isinstance(child, nn.Flatten) or layers[-1] in own):
            break
        if block or (last in own and layers[-1] not in own):
            block.append(child)
    if not block:
        raise ValueError(
            "algorithm.name: fedalign finds no block before this model's last layer; name one by "
            "algorithm.block"
        )
    return block
