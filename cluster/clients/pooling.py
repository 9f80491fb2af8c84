"""Max pooling on a CPU without a branch a value.

Of images that lie channel by channel torch compares value by value, which a processor mispredicts again and
again; of such whose channels lie together it compares many at once. Both pick the same values and places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

#: Channels below which the copy costs more than it saves.
FEWEST_CHANNELS = 4


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value] * 2 if isinstance(value, int) else list(value)


class _ChannelsTogether(torch.autograd.Function):
    """``max_pool2d`` whose result, places and gradient lie channel by channel, as its inputs do."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, pool: nn.MaxPool2d) -> Tensor:
        together = inputs.contiguous(memory_format=torch.channels_last)
        shape = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        found, places = F.max_pool2d(together, *shape, ceil_mode=pool.ceil_mode, return_indices=True)
        ctx.save_for_backward(inputs, places.contiguous())
        ctx.shape, ctx.ceil_mode = [_pair(value) for value in shape], pool.ceil_mode
        return found.clone(memory_format=torch.contiguous_format)  # strides of a row of its own too

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        inputs, places = ctx.saved_tensors
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return backward(gradients[0].contiguous(), inputs, *ctx.shape, ctx.ceil_mode, places), None


class _MaxPool2d(nn.MaxPool2d):
    def forward(self, inputs: Tensor) -> Tensor:
        if _apart(inputs) and not _transformed():
            return _ChannelsTogether.apply(inputs, self)
        pooled: Tensor = super().forward(inputs)
        return pooled


def _apart(inputs: Tensor) -> bool:
    """Whether these are images that lie channel by channel, and of enough channels."""
    if inputs.dim() != 4 or inputs.shape[1] < FEWEST_CHANNELS or not inputs.is_contiguous():
        return False
    return not inputs.is_contiguous(memory_format=torch.channels_last)  # one pixel is both


def _transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work: they know torch's own pool alone."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def quicken_pools(model: nn.Module) -> None:
    """Swap the ``nn.MaxPool2d`` of a model on a CPU, in place; results and gradients stay bit for bit."""
    for module in model.modules():
        if type(module) is nn.MaxPool2d and not module.return_indices:
            module.__class__ = _MaxPool2d
