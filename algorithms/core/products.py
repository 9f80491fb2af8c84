"""Which trained matrices a forward pass multiplies with outside of any layer that methods can prune.

A linear layer in another form (the packed projection of ``nn.MultiheadAttention``, a ``Conv1D``, a parameter
that a module multiplies by itself) would stay dense, unseen by masks and counts of sparsity.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "convolution"})

#: Layers whose matrices are trained dense: tables, also where logits are products with them, and recurrences.
DENSE_LAYERS = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase)


class StrayProducts(TorchDispatchMode):
    """Collects, while it is entered, the names of trained matrices that are multiplied with as they are.

    Args:
        model: Their module.
        prunable: Its layers that methods prune.

    Attributes:
        found: The names, in the order in which they were met.
    """

    def __init__(self, model: nn.Module, prunable: Iterable[nn.Module]) -> None:
        super().__init__()
        known = {id(layer.weight) for layer in prunable}
        dense = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, DENSE_LAYERS)
            for parameter in module.parameters(recurse=False)
        }
        self._weights, self._others = [], []
        for name, parameter in model.named_parameters():
            if id(parameter) in known:
                self._weights.append(parameter)
            elif id(parameter) not in dense and parameter.requires_grad and parameter.ndim > 1:
                self._others.append((name, parameter))
        self.found: dict[str, None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, a second of CPU in every process, to keep away from this."""
        return False

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Look at the factors of a product, then compute it."""
        if operation.overloadpacket.__name__ in _PRODUCTS:
            factors = [factor for factor in arguments if isinstance(factor, Tensor)]
            # A learned query that meets the weight of a layer is no weight itself.
            if not any(_within(factor, weight) for factor in factors for weight in self._weights):
                for name, other in self._others:
                    if any(_within(factor, other) for factor in factors):
                        self.found[name] = None
        return operation(*arguments, **(options or {}))


def _within(view: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor begins inside a parameter's memory: it, its transpose or a part of it."""
    start = parameter.data_ptr()
    return start <= view.data_ptr() < start + parameter.numel() * parameter.element_size()
