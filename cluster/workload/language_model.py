"""Next-token language modelling: what is learned of text, see :mod:`cluster.workload.text`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from cluster.measures import Measure
from cluster.references import DataError
from cluster.workload.datasets import Dataset
from cluster.workload.objectives import Objective, Sums, Targets
from cluster.workload.text import PADDING

_LARGEST = math.log(1e300)  # the exponential of more is no float


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Objective):
    """The next token of a text, by cross-entropy; padding is neither learned nor counted.

    The loss of a batch is the mean over its tokens. A client weighs as many as it has samples, whatever part
    of them is padding. All measures are over the tokens of a split, each of which is foretold once.
    """

    name: ClassVar[str] = "language_model"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("perplexity", "perplexity", "", "Exponential of the mean cross-entropy of a token.", "lower"),
        Measure("loss", "loss", "nats", "Mean cross-entropy of a token, in float64.", "lower"),
        Measure("bits_per_token", "bits a token", "bits", "The same in bits: bits a byte where "
                "data.tokenizer is bytes.", "lower"),
        Measure("token_accuracy", "token accuracy", "share", "Share of the tokens that have the largest "
                "logit.", "higher"),
    )  # fmt: skip
    takes_text: ClassVar[bool] = True
    targets: ClassVar[Targets] = "tokens"
    outputs_are: ClassVar[str] = "logits at each place, one for each of the {count} tokens of the vocabulary"

    def count(self, dataset: Dataset) -> int:
        """See :class:`Objective`: a logit for each token of the vocabulary."""
        if not dataset.vocabulary:
            raise DataError(f"objective.name: language_model, but data.name = {dataset.name!r} holds no text")
        return len(dataset.vocabulary)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Objective`: mean cross-entropy of the tokens; 0 of nothing but padding."""
        summed = F.cross_entropy(
            outputs.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="sum"
        )
        return summed / (targets != PADDING).sum().clamp(min=1)

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Tokens, those with the largest logit, and summed cross-entropy in float64."""
        seen = targets != PADDING
        logits, wanted = outputs[seen], targets[seen]
        return {
            "tokens": len(wanted),
            "correct": int((logits.argmax(-1) == wanted).sum()),
            "loss": float(F.cross_entropy(logits.double(), wanted, reduction="sum")),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """See :class:`Objective`."""
        tokens = max(sums["tokens"], 1)
        loss = sums["loss"] / tokens
        return {
            "perplexity": math.inf if loss > _LARGEST else math.exp(loss),
            "loss": loss,
            "bits_per_token": loss / math.log(2.0),
            "token_accuracy": sums["correct"] / tokens,
        }
