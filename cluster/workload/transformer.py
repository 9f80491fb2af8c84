"""A small decoder of tokens and a small vision transformer: plain torch, pre-norm.

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


class Attention(nn.Module):
    """Every place looks at all (Vaswani et al., arXiv 1706.03762); causal: at itself and those before."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
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
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Attention and two feed-forward layers, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.feed1, self.feed2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed2(F.gelu(self.feed1(self.norm2(x))))


class Trunk(nn.Module):
    """Tokens and places embedded, and all blocks."""

    def __init__(
        self, vocabulary: int, length: int, layers: int, width: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def features(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] to what is known at each place, [B, T, width]."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x))


class Decoder(Trunk):
    """See :class:`Transformer`."""

    def __init__(self, vocabulary: int, *form: int, tied: bool) -> None:
        super().__init__(vocabulary, *form)
        self.head = None if tied else nn.Linear(self.norm.weight.numel(), vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] to the next ones' logits [B, T, vocabulary]."""
        x = self.features(tokens)
        return x @ self.tokens.weight.t() if self.head is None else self.head(x)


class Reader(Trunk):
    """See :class:`TransformerClassifier`."""

    def __init__(self, vocabulary: int, *form: int, outputs: int, pooling: str) -> None:
        super().__init__(vocabulary, *form)
        self.padding, self.pooling = vocabulary - 1, pooling
        self.head = nn.Linear(self.norm.weight.numel(), outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T], padding last, to the texts' outputs [B, outputs]."""
        read = tokens != self.padding
        if self.pooling == "last":
            read = read & ~F.pad(read[:, 1:], (0, 1))
        x = (self.features(tokens) * read.unsqueeze(2)).sum(1)
        return self.head(x / read.sum(1, keepdim=True).clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class _OfTokens(Architecture):
    """What both have."""

    initialised_here = True

    layers: int = hyperparameter(2, "blocks of attention and feed-forward layers", low=1)
    width: int = hyperparameter(128, "width of embeddings and blocks; a multiple of the heads", low=1)
    heads: int = hyperparameter(4, "heads of attention", low=1)
    hidden: int | None = hyperparameter(
        None, "width of the feed-forward layer; null: four times the width", low=1
    )

    def __post_init__(self) -> None:
        _check_heads(self.heads, self.width)

    def _form(self, input_shape: tuple[int, ...]) -> tuple[int, int, int, int, int]:
        """Length, layers, width, heads and hidden width."""
        if len(input_shape) != 1:
            raise ModelError(
                f"model.name: a transformer takes tokens [T], samples have shape {list(input_shape)}"
            )
        return input_shape[0], self.layers, self.width, self.heads, self.hidden or 4 * self.width


@dataclass(frozen=True, kw_only=True)
class Transformer(_OfTokens):
    """A decoder of tokens, pre-norm, with learned places; as long as the samples are (`data.length`).

    Of a vocabulary of 257 bytes and 64 places it has 471,000 weights, 426,000 of them prunable.
    """

    tied: bool = hyperparameter(
        False, "logits by the tokens' embeddings, which are not prunable, instead of a layer of their own"
    )

    def build(self, input_shape: tuple[int, ...], classes: int, vocabulary: int = 0) -> nn.Module:
        """See :class:`Architecture`."""
        if vocabulary not in (0, classes):
            raise ModelError(
                "model.name = 'transformer' foretells the next token; one answer for a text is given by "
                "model.name=transformer_classifier"
            )
        return Decoder(classes, *self._form(input_shape), tied=self.tied)


@dataclass(frozen=True, kw_only=True)
class TransformerClassifier(_OfTokens):
    """The same decoder with one answer for a whole text: a linear layer on its last token, or on the mean.

    As of GPT (Radford et al. 2018): attention is causal, so that the last token has seen the whole text, and
    padding, which follows it, is seen by none of its tokens and enters neither pooling.
    """

    pooling: str = hyperparameter(
        "last", "what the answer is read from: the last token, or the mean of all", choices=("last", "mean")
    )

    def build(self, input_shape: tuple[int, ...], classes: int, vocabulary: int = 0) -> nn.Module:
        """See :class:`Architecture`."""
        form = self._form(input_shape)
        if not vocabulary:
            raise ModelError("model.name = 'transformer_classifier' takes a text's tokens; these are of none")
        return Reader(vocabulary, *form, outputs=classes, pooling=self.pooling)


class ViT(nn.Module):
    """See :class:`VisionTransformer`."""

    def __init__(
        self, depth: int, patches: int, classes: int, patch: int, layers: int, width: int, heads: int,
        hidden: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(depth, width, patch, stride=patch)
        # The class token and its place are one vector: nothing but their sum is ever used.
        self.places = nn.Embedding(1 + patches, width)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to logits [B, classes]."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = F.pad(patches, (0, 0, 1, 0)) + self.places.weight
        return self.head(self.norm(self.blocks(x)[:, 0]))


@dataclass(frozen=True, kw_only=True)
class VisionTransformer(Architecture):
    """A transformer of image patches with a class token (ViT: Dosovitskiy et al. 2021, arXiv 2010.11929).

    On 32x32 images of three channels and ten classes it has 809,226 weights, 793,856 of them prunable.
    """

    initialised_here = True

    patch: int = hyperparameter(4, "pixels a side of a patch; divides height and width", low=1)
    layers: int = hyperparameter(4, "blocks of attention and feed-forward layers", low=1)
    width: int = hyperparameter(128, "width of patches and blocks; a multiple of the heads", low=1)
    heads: int = hyperparameter(4, "heads of attention", low=1)
    hidden: int | None = hyperparameter(
        None, "width of the feed-forward layer; null: four times the width", low=1
    )

    def __post_init__(self) -> None:
        _check_heads(self.heads, self.width)

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """See :class:`Architecture`."""
        if len(input_shape) != 3:
            raise ModelError(f"model.name = 'vit' takes images, samples have shape {list(input_shape)}")
        depth, height, width = input_shape
        if height % self.patch or width % self.patch:
            raise ModelError(f"model.patch = {self.patch} does not divide images of {height}x{width} pixels")
        patches = (height // self.patch) * (width // self.patch)
        hidden = self.hidden or 4 * self.width
        return ViT(depth, patches, classes, self.patch, self.layers, self.width, self.heads, hidden)


def _check_heads(heads: int, width: int) -> None:
    if width % heads:
        raise ValueError(f"heads: {heads} do not divide the width {width}")
