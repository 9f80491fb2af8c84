"""A small decoder of tokens: plain torch, pre-norm, causal.

The projections of attention and the feed-forward layers are linear layers, which methods prune; embeddings
and norms are trained dense. The products of queries with keys and of their softmax with values have no
weights: they are exact under every method, and no part of the FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from algorithms.core.hyperparameters import hyperparameter
from cluster.workload.architecture import Architecture
from cluster.workload.models import ModelError


class CausalAttention(nn.Module):
    """Every place looks at itself and those before it (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same shape."""
        split = (x.shape[0], x.shape[1], self.heads, -1)
        query, key, value = (
            layer(x).view(split).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        # The fused kernels of GPUs add gradients up in no fixed order.
        with sdpa_kernel(SDPBackend.MATH):
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Attention and two feed-forward layers, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), CausalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed1, self.feed2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed2(F.gelu(self.feed1(self.norm2(x))))


class Decoder(nn.Module):
    """See :class:`Transformer`."""

    def __init__(
        self, vocabulary: int, length: int, layers: int, width: int, heads: int, hidden: int, tied: bool
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] to the next ones' logits [B, T, vocabulary]."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        x = self.norm(self.blocks(x))
        return x @ self.tokens.weight.t() if self.head is None else self.head(x)


@dataclass(frozen=True, kw_only=True)
class Transformer(Architecture):
    """A decoder of tokens, pre-norm, with learned places; as long as the samples are (`data.length`).

    Of a vocabulary of 257 bytes and 64 places it has 471,000 weights, 426,000 of them prunable.
    """

    initialised_here = True

    layers: int = hyperparameter(2, "blocks of attention and feed-forward layers", low=1)
    width: int = hyperparameter(128, "width of embeddings and blocks; a multiple of the heads", low=1)
    heads: int = hyperparameter(4, "heads of attention", low=1)
    hidden: int | None = hyperparameter(
        None, "width of the feed-forward layer; null: four times the width", low=1
    )
    tied: bool = hyperparameter(
        False, "logits by the tokens' embeddings, which are not prunable, instead of a layer of their own"
    )

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide the width {self.width}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """See :class:`Architecture`."""
        if len(input_shape) != 1:
            shape = list(input_shape)
            raise ModelError(f"model.name = 'transformer' takes tokens [T], samples have shape {shape}")
        hidden = self.hidden or 4 * self.width
        return Decoder(classes, input_shape[0], self.layers, self.width, self.heads, hidden, self.tied)
