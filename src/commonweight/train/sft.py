"""Supervised fine-tuning: next-token loss on the completion's tokens, weighted token by token."""

from __future__ import annotations

from torch import Tensor

from .batches import Batch
from .local import GradientObjective
from .loss import LanguageModel, backward


class SupervisedFineTuning(GradientObjective):
    """−Σ log p(token | tokens before it) over the labelled tokens of a batch, divided by their number.

    The division is by the whole batch's labels, however it is cut into micro-batches, so that each token weighs the
    same.
    """

    name = "sft"
    of_examples = True
    source = "Ouyang 2022, arXiv:2203.02155, section 3"

    def backward(self, language_model: LanguageModel, batch: Batch, scale: float | Tensor) -> float:
        return backward(language_model, batch, scale)
