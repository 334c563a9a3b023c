"""Gradients of single examples, clipped and added up: one backward pass for many of them, through opacus's hooks.

A hook on each trained linear layer keeps what goes into it, aᵢ [T, in], and gets the gradient of what comes out, bᵢ
[T, out]; the gradient of example i is bᵢᵀaᵢ. LoRA's layers are narrow, so that these gradients are small: a forward
pass of B examples holds B copies of the adapter's gradient and no more. Against a plain step it takes 1.2 to 1.9 times
as long and a fifth more memory (`benchmarks/dp_sgd.py`, which also measures opacus's other ways: functorch, ghost
clipping).

Legend: B examples in a forward pass, one a row; T positions; gᵢ the gradient of example i over all trained tensors
together; C the bound.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ..errors import RecipeError
from ..model.tensors import NamedTensors
from ..model.trainables import Trainables
from .batches import Batch
from .loss import LanguageModel

#: adds the gradient of Σ scale·nats over a batch's labels to the gradients, scale one number a label; returns Σ nats
Backward = Callable[[LanguageModel, Batch, Tensor], float]
_PROBE_LENGTHS = (9, 5)
_PROBE_TOLERANCE = 1e-2


class Privacy(Protocol):
    """What makes a task's steps private: `privacy/example_level.py`."""

    @property
    def bound(self) -> float: ...
    @property
    def seed(self) -> int: ...

    def drawn(self, step: int, num_examples: int) -> list[int]:
        """The examples of a step's batch; perhaps none."""

    def release(self, total: NamedTensors, step: int) -> NamedTensors:
        """What the step uses in place of a gradient, of the sum of clipped ones, in place."""


class ExampleGradients:
    """A model whose backward passes tell each example's gradient; see `example_gradients`."""

    def __init__(self, language_model: LanguageModel, trainables: Trainables) -> None:
        self.language_model, self.trainables = language_model, trainables
        self.parameters = {n: p for n, p in language_model.model.named_parameters() if p.requires_grad}
        self.total = NamedTensors.zeros(trainables.values.layout, wide=True, device=language_model.device)

    def take(self, batch: Batch, backward: Backward) -> tuple[dict[str, Tensor], float]:
        """gᵢ of each example's mean loss a label token, [B, …] by parameter, and Σ nats of them all.

        Args:
            batch: an example a row.
        """
        for parameter in self.parameters.values():
            parameter.grad_sample = None
        nats = backward(self.language_model, batch, _shares(batch))
        found = {name: parameter.grad_sample for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad_sample = None
        return found, nats

    def add_clipped(self, batch: Batch, backward: Backward, bound: float) -> float:
        """Add min(1, C/‖gᵢ‖)·gᵢ of each example to `total`; returns Σ nats.

        A gradient that is not finite counts as zero: an error would tell of the example.
        """
        gradients, nats = self.take(batch, backward)
        squares = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in gradients.values()]
        norms = torch.linalg.vector_norm(torch.stack(squares), dim=0)
        finite = norms.isfinite()
        scales = torch.where(finite, (bound / norms).clamp(max=1.0), 0.0)
        for name, gradient in gradients.items():
            total = self.total[name]
            if not finite.all():
                gradient = torch.where(finite.view(-1, *[1] * total.dim()), gradient, 0)  # 0·∞ is no number
            total.add_(torch.tensordot(scales.to(total.dtype), gradient.to(total.dtype), dims=1))
        return nats

    def forget(self) -> None:
        """Begin a new sum."""
        for flat in self.total.flats.values():
            flat.zero_()


def _shares(batch: Batch) -> Tensor:
    """For each label of a batch, in its order, one over the number of its row's labels."""
    counts = batch.labelled[:, 1:].sum(1)
    return counts.double().reciprocal().repeat_interleave(counts)


@contextmanager
def example_gradients(language_model: LanguageModel, trainables: Trainables) -> Iterator[ExampleGradients]:
    """Inside, backward passes of a model in training mode leave each example's gradient behind."""
    from opacus.grad_sample import GradSampleHooks

    with warnings.catch_warnings():
        # of attributes that opacus looks at, and of the first layer, whose input has no gradient
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        hooks = GradSampleHooks(language_model.model, loss_reduction="sum")
        try:
            yield ExampleGradients(language_model, trainables)
        finally:
            hooks.cleanup()


def check_examples(language_model: LanguageModel, trainables: Trainables, backward: Backward) -> None:
    """Find out, on two made-up examples, whether each one's gradient in a batch is the one that it has alone.

    It is not where a layer mixes rows or is not called once for all of them (experts, layers that share weights), or
    where something is trained that is not a linear layer's weight.

    Raises:
        RecipeError: it is not, or cannot be known.
    """
    before, mode = trainables.values.clone(), language_model.model.training
    try:
        wrong = _first_wrong(language_model, trainables, backward)
    except Exception as error:  # opacus, and what it does to a model's code, may raise anything
        wrong = f"{type(error).__name__}: {error}"
    finally:
        trainables.values.copy_(before)
        trainables.zero_gradients()
        language_model.model.train(mode)
    if wrong:
        raise RecipeError(
            f"privacy.dp example: of this model and adapter the gradients of single examples cannot be told ({wrong})",
            hint="name linear layers in model.adapter.targets that every token passes through, neither the output "
            "layer nor an embedding, or use privacy.dp site",
        )


def _first_wrong(language_model: LanguageModel, trainables: Trainables, backward: Backward) -> str:
    """The first trained tensor whose gradients are not right, or nothing."""
    if language_model.head is not None and any(p.requires_grad for p in language_model.head.parameters()):
        return "the output layer is trained"
    draw = torch.Generator().manual_seed(0)
    for _, flat in trainables.values.floating():  # LoRA's B starts at zero, and A's gradient with it
        flat.copy_(torch.randn(flat.shape, generator=draw) * 0.05)
    # without dropout, which would differ from pass to pass; the hooks listen to layers in training mode only
    language_model.model.eval()
    for module in language_model.model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.training = True
    rows = [torch.randint(language_model.vocabulary, (n,), generator=draw) for n in _PROBE_LENGTHS]
    with example_gradients(language_model, trainables) as examples:
        together, _ = examples.take(_probe(rows, language_model.device), backward)
        missing = next((name for name, gradient in together.items() if gradient is None), None)
        if missing is not None:
            return missing
        together = {name: gradient.float() for name, gradient in together.items()}
    for row, ids in enumerate(rows):
        trainables.zero_gradients()
        batch = _probe([ids], language_model.device)
        backward(language_model, batch, _shares(batch))
        for name, gradient in trainables.gradients.items():
            alone, found = gradient.float(), together[name][row]
            if found.shape != alone.shape or float((found - alone).norm()) > _PROBE_TOLERANCE * float(alone.norm()):
                return name
    return ""


def _probe(rows: list[Tensor], device: torch.device) -> Batch:
    shape = (len(rows), max(map(len, rows)))
    ids, labelled, examples = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool), None
    for b, row in enumerate(rows):
        ids[b, : len(row)], labelled[b, 1 : len(row)] = row, True
    examples = torch.arange(len(rows))[:, None].expand(shape)
    return Batch(ids.to(device), labelled.to(device), examples.to(device), None)
