"""Layers that prune activations for the weight gradient, and the Powerpropagation re-parameterisation.

Modules always compute with *effective* weights theta, views into one flat vector. Powerpropagation therefore
is no layer but a map between flat vectors, w -> theta before a step and dL/dtheta -> dL/dw after it: once a
step for the whole model, on the nonzero weights alone, and the plain module stays loadable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from algorithms.core.masks import cut_to_top_k, drop_below, kth_largest, nonzero_mask
from algorithms.core.parameters import prunable_layers

#: In floats 0.07 * 100 is 7.000000000000001, whose ceiling would keep one too many.
_JUST_BELOW_ONE = 1.0 - 2.0**-50


class ActivationPruning:
    """How one layer prunes its saved input; its threshold lives for one client's local training.

    The largest ``ceil(density * numel)`` entries by magnitude over the whole batch tensor are kept, the rest
    is zero in the weight gradient (forward and input gradient stay exact). Entries equal to the threshold are
    all kept. SparsyFed, section 3.2 and appendix; SWAT (NeurIPS 2020) for ZeroFL.

    Attributes:
        density: Fixed density, or None for the density of the layer's own weight.
        every_batch: Draw the threshold anew from each batch instead of reusing the first batch's.
        minimum_density: Lower bound of the density.
        on_device: Keep the threshold in a tensor that stays in its place and read nothing back, as a CUDA
            graph needs it; the same numbers.
        drawn: Whether this client's threshold is there.
    """

    def __init__(self, *, density: float | None, every_batch: bool, minimum_density: float = 0.0) -> None:
        self.density = density
        self.every_batch = every_batch
        self.minimum_density = minimum_density
        self.on_device = False
        self._threshold: float | Tensor = 0.0
        self._kept: float | Tensor = 1.0
        self.reset()

    def reset(self) -> None:
        """Forget the last client's threshold."""
        self.drawn = False
        if isinstance(self._kept, Tensor):
            self._kept.fill_(1.0)
        else:
            self._kept = 1.0

    @property
    def kept(self) -> float:
        """Density measured on the batch the last threshold was drawn from (1 where nothing was pruned)."""
        return float(self._kept)

    @property
    def draws(self) -> bool:
        """Whether the next batch draws a threshold."""
        return self.every_batch or not self.drawn

    def threshold(self, inputs: Tensor, weight: Tensor) -> float | Tensor:
        """The magnitude below which entries of ``inputs`` are dropped; 0 prunes nothing."""
        if self.draws:
            inputs, weight = inputs.detach(), weight.detach()
            if self.on_device:
                self._draw_on_device(inputs, weight)
            else:
                self._threshold = self._draw(inputs, weight)
            self.drawn = True
        return self._threshold

    def _draw(self, inputs: Tensor, weight: Tensor) -> float:
        density = self.density
        if density is None:
            density = int(torch.count_nonzero(weight)) / weight.numel()
        density = max(density, self.minimum_density)
        if density >= 1.0:
            self._kept = 1.0
            return 0.0
        magnitudes = inputs.abs()
        count = max(1, math.ceil(density * inputs.numel() * _JUST_BELOW_ONE))
        threshold = kth_largest(magnitudes, count)
        if not math.isfinite(threshold):
            # A diverged client: prune nothing, so that its update stays visibly non-finite.
            return 0.0
        self._kept = int(torch.count_nonzero(magnitudes >= threshold if threshold > 0 else magnitudes)) / (
            inputs.numel()
        )
        return threshold

    def _draw_on_device(self, inputs: Tensor, weight: Tensor) -> None:
        """What ``_draw`` does, without a number that the host would wait for."""
        size = inputs.numel()
        if not isinstance(self._threshold, Tensor) or not isinstance(self._kept, Tensor):
            self._threshold = torch.zeros((), device=inputs.device)
            self._kept = torch.ones((), dtype=torch.float64, device=inputs.device)
        if self.density is None:
            density = torch.count_nonzero(weight).double() / weight.numel()
        else:
            density = torch.full((), self.density, dtype=torch.float64, device=inputs.device)
        density = density.clamp(min=self.minimum_density)
        count = torch.ceil(density * size * _JUST_BELOW_ONE).clamp(1, size).long()
        magnitudes = inputs.abs().reshape(-1).float()
        # torch.kthvalue of one long row uses one block of the GPU, and k would have to be known here.
        threshold = magnitudes.sort(descending=True).values.index_select(0, count.reshape(1) - 1)[0]
        nothing = (density >= 1.0) | ~torch.isfinite(threshold)
        threshold = threshold.masked_fill(nothing, 0.0)
        kept = torch.count_nonzero(torch.where(threshold > 0, magnitudes >= threshold, magnitudes != 0))
        self._kept.copy_((kept.double() / size).masked_fill(nothing, 1.0))
        self._threshold.copy_(threshold)


class WeightPruning:
    """Cuts one layer's weights in place to their largest ``keep`` by magnitude, before each forward pass.

    The first cut is exact (ties go to the lower index) and its smallest survivor is the threshold of the next
    ones, for one client's local training: what regrew above it stays, so that the count drifts. A layer with
    fewer than ``keep`` nonzeros has threshold 0 and is not cut again. SWAT (NeurIPS 2020), for ZeroFL.

    Attributes:
        weights: The layer's weights, a view into the flat vector, float32[n].
        keep: Number of weights that the exact cut keeps, 1 to n.
        every_batch: Cut exactly every time instead of reusing the first threshold.
    """

    def __init__(self, weights: Tensor, keep: int, *, every_batch: bool) -> None:
        self.weights, self.keep, self.every_batch = weights, keep, every_batch
        self._threshold: float | None = None

    def cut(self) -> None:
        """Zero the small weights."""
        if self._threshold is None or self.every_batch:
            kept = self.weights[cut_to_top_k(self.weights, self.keep)]
            self._threshold = float(kept.abs().min())
        elif 0.0 < self._threshold < math.inf:
            drop_below(self.weights, self._threshold, out=self.weights)

    def density(self) -> float:
        """Share of nonzeros now."""
        return int(torch.count_nonzero(self.weights)) / self.weights.numel()


def draws_every_batch(threshold: str, *, linear: bool) -> bool:
    """Whether a layer draws its threshold from every batch, by the field ``threshold`` of the methods.

    ``first_batch`` and ``every_batch`` hold for all layers; with ``first_batch_conv`` convolutions reuse the
    first batch's threshold and linear layers do not.
    """
    return linear if threshold == "first_batch_conv" else threshold == "every_batch"


class _PrunedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: _ConvNd,
        threshold: float | Tensor,
    ) -> Tensor:
        ctx.save_for_backward(drop_below(inputs, threshold), weight)
        ctx.layer, ctx.has_bias = layer, bias is not None
        return layer._conv_forward(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> Any:
        pruned, weight = ctx.saved_tensors
        layer = ctx.layer
        gradients = torch.ops.aten.convolution_backward(
            output_gradient,
            pruned,
            weight,
            [weight.shape[0]] if ctx.has_bias else None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0] * len(layer.stride),
            layer.groups,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias],
        )
        return (*gradients, None, None)


class _PrunedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, threshold: float | Tensor
    ) -> Tensor:
        ctx.save_for_backward(drop_below(inputs, threshold), weight)
        ctx.has_bias = bias is not None
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> Any:
        pruned, weight = ctx.saved_tensors
        flat_gradient = output_gradient.reshape(-1, output_gradient.shape[-1])
        input_gradient = output_gradient @ weight if ctx.needs_input_grad[0] else None
        weight_gradient = flat_gradient.t() @ pruned.reshape(-1, pruned.shape[-1])
        bias_gradient = flat_gradient.sum(0) if ctx.has_bias else None
        return input_gradient, weight_gradient, bias_gradient, None


def _in_autocast_type(
    inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a plain layer computes with where autocast is on: a custom function has to cast by itself."""
    kind = inputs.device.type
    if not torch.is_autocast_enabled(kind):
        return inputs, weight, bias
    chosen = torch.get_autocast_dtype(kind)
    return inputs.to(chosen), weight.to(chosen), None if bias is None else bias.to(chosen)


class PrunedConv(_ConvNd):
    """A convolution whose weight gradient sees a pruned input while training; see :func:`prune_inputs`."""

    pruning: ActivationPruning

    def forward(self, inputs: Tensor) -> Tensor:
        """Exact forward; the saved input is pruned."""
        inputs, weight, bias = _in_autocast_type(inputs, self.weight, self.bias)
        threshold = self.pruning.threshold(inputs, self.weight) if self.training else 0.0
        if isinstance(threshold, float) and threshold == 0.0:
            return self._conv_forward(inputs, weight, bias)
        return _PrunedConvolution.apply(inputs, weight, bias, self, threshold)


class PrunedLinear(nn.Linear):
    """A linear layer whose weight gradient sees a pruned input while training."""

    pruning: ActivationPruning

    def forward(self, inputs: Tensor) -> Tensor:
        """Exact forward; the saved input is pruned."""
        inputs, weight, bias = _in_autocast_type(inputs, self.weight, self.bias)
        threshold = self.pruning.threshold(inputs, self.weight) if self.training else 0.0
        if isinstance(threshold, float) and threshold == 0.0:
            return F.linear(inputs, weight, bias)
        return _PrunedLinear.apply(inputs, weight, bias, threshold)


def prune_inputs(model: nn.Module, choose: Callable[[str, nn.Module], ActivationPruning | None]) -> None:
    """Swap layers of ``model`` in place for ones that prune their saved input; names and weights stay.

    Args:
        model: The plain module.
        choose: Called with the name and module of each convolution and linear layer that is trained, in order
            of definition; returns how it prunes, or None to leave the layer alone. Transposed convolutions
            and those padded with other than zeros are left alone: their weight gradient does not see the
            input as it is.
    """
    for name, layer in prunable_layers(model).items():
        if not layer.weight.requires_grad:
            continue
        if isinstance(layer, _ConvNd) and not layer.transposed and layer.padding_mode == "zeros":
            base: type = PrunedConv
        elif isinstance(layer, nn.Linear):
            base = PrunedLinear
        else:
            continue
        pruning = choose(name, layer)
        if pruning is not None:
            if isinstance(getattr(layer, "padding", None), str):
                raise ValueError(f"{name}: padding={layer.padding!r} by name is not supported, give numbers")
            # A subclass of both keeps the layer's own ``_conv_forward`` and its pickled name.
            layer.__class__ = type(base.__name__, (base, type(layer)), {})
            layer.pruning = pruning


def pruned_layers(model: nn.Module) -> dict[str, ActivationPruning]:
    """The pruning of every swapped layer, by the name of its weight."""
    return {
        f"{name}.weight": layer.pruning
        for name, layer in model.named_modules()
        if isinstance(layer, (PrunedConv, PrunedLinear))
    }


class Powerpropagation:
    """theta = sign(w) |w|^beta on a flat vector (Schwarz et al. 2021, arXiv 2110.00296), span by span.

    A weight that is exactly 0 gets gradient 0 where beta > 1, so it stays 0 during local training: powers are
    computed on the weights that are nonzero at the start, and on all of a span with beta = 1.

    Args:
        weights: w, float32[prunable], read before each step.
        effective: theta, float32[prunable], written by :meth:`refresh`.
        exponents: ``(span, beta)`` pairs that cover the prunable span in order.
    """

    def __init__(self, weights: Tensor, effective: Tensor, exponents: Iterable[tuple[slice, float]]) -> None:
        self._weights, self._effective = weights, effective
        merged: list[tuple[slice, float]] = []
        for span, beta in exponents:
            if merged and merged[-1][1] == beta and merged[-1][0].stop == span.start:
                merged[-1] = (slice(merged[-1][0].start, span.stop), beta)
            else:
                merged.append((span, beta))
        self._parts: list[tuple[slice, float, Tensor | None]] = []
        for span, beta in merged:
            positions: Tensor | None = None
            if beta != 1.0:
                positions = torch.nonzero(nonzero_mask(weights[span])).reshape(-1)
                # Gathering pays only where most weights are zero.
                positions = (
                    positions + span.start if len(positions) < 0.5 * (span.stop - span.start) else None
                )
            self._parts.append((span, beta, positions))
        self._factor = torch.zeros_like(weights)
        effective.zero_()

    def refresh(self) -> None:
        """Write theta, and remember dtheta/dw = beta |w|^(beta - 1) for :meth:`chain`."""
        for span, beta, positions in self._parts:
            if beta == 1.0:
                self._effective[span] = self._weights[span]
                self._factor[span] = 1.0
            elif positions is None:
                weights = self._weights[span]
                power = weights.abs().pow_(beta - 1.0)
                torch.mul(weights, power, out=self._effective[span])
                torch.mul(power, beta, out=self._factor[span])
            else:
                # index_select and index_copy_ take half the time of fancy indexing (bench_steps.py).
                weights = self._weights.index_select(0, positions)
                power = weights.abs().pow_(beta - 1.0)
                self._effective.index_copy_(0, positions, weights.mul_(power))
                self._factor.index_copy_(0, positions, power.mul_(beta))

    def chain(self, gradient: Tensor) -> None:
        """Turn dL/dtheta into dL/dw in place, float32[prunable]."""
        gradient.mul_(self._factor)


def inverse_power(effective: Tensor, beta: float) -> Tensor:
    """w = sign(theta) |theta|^(1/beta): the weights whose effective value is ``effective``."""
    return effective.sign() * effective.abs().pow(1.0 / beta)


def power(weights: Tensor, beta: float) -> Tensor:
    """theta = sign(w) |w|^beta, as :class:`Powerpropagation` computes it."""
    return weights * weights.abs().pow(beta - 1.0) if beta != 1.0 else weights.clone()


def spectral_exponent(weight: Tensor, iterations: int = 20, mean_over: str = "entries") -> float:
    """beta = 1 + mean(|W| / sigma(|W|)), sigma the largest singular value of |W| as (out, rest) matrix.

    The mean is over all ``entries`` of W or over its ``nonzeros``.

    SparsyFed's hyperparameter-free variant (section 3.1). |W| has no negative entry, so the power iteration
    started from ones cannot be orthogonal to the leading singular vector.
    """
    matrix = weight.detach().abs().reshape(weight.shape[0], -1)
    vector = torch.ones(matrix.shape[1], device=matrix.device)
    norm = 0.0
    for _ in range(iterations):
        left = matrix @ vector
        norm = float(left.norm() / vector.norm()) if float(vector.norm()) else 0.0
        vector = matrix.t() @ left
        scale = float(vector.norm())
        if not math.isfinite(scale) or scale == 0.0:
            break
        vector = vector / scale
    if not (norm > 0 and math.isfinite(norm)):
        return 1.0
    mean = float(matrix.mean())
    if mean_over == "nonzeros":
        mean *= matrix.numel() / int(torch.count_nonzero(matrix))
    return 1.0 + mean / norm
