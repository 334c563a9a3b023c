"""Next-token loss with logits formed only where there is a label, a piece at a time.

A language model's widest tensor is its logits: B·T·V floats, several copies of them in a plain training step. Here the
output layer is applied to the L labelled positions only, in pieces, and each piece's gradient is taken before the next
is formed: memory O(piece·V) instead of O(B·T·V).

Legend: B sequences, T positions, H hidden width, V vocabulary, L labelled positions in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..model.tensors import accumulator_dtype
from ..recipe.schema import TrainingSpec
from .batches import Batch

_PIECE_LOGITS = (
    4 * 1024 * 1024
)  # 16 MiB of float32: about what a core's cache and memory like; fewer, larger are no faster


class LanguageModel:
    """A causal language model as the loss sees it: hidden states first, the output layer where it is needed.

    Some architectures do more after the output layer (soft-capping, scaling). That is found out once, on a few tokens;
    for them the model's own logits are used, for all positions at once.

    Args:
        model: a transformers causal language model, or a peft model over one.
        autocast_dtype: arithmetic of the forward pass, or None for the weights' own.
    """

    def __init__(self, model: Any, *, autocast_dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.autocast_dtype = autocast_dtype
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head = inner.get_output_embeddings()
        self.device = next(inner.parameters()).device
        self.vocabulary = self.head.weight.shape[0] if self.head is not None else 0
        self.split_head = self.head is not None and self._head_is_last()

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which forward passes run."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    @torch.no_grad()
    def _head_is_last(self) -> bool:
        """Whether the model's logits are the output layer's own, and can be had from what goes into it."""
        training = self.model.training
        self.model.eval()
        ids = torch.arange(4, device=self.device).remainder(self.vocabulary)[None]
        whole = self._forward(ids, None).float()
        # a ramp shows what small logits do not: a cap of 30 changes a logit of 0.3 by 1e-5 only
        ramp = torch.linspace(-512, 512, self.vocabulary, device=self.device)
        with _replaced(self.head, lambda states: ramp.to(states.dtype).expand(*states.shape[:-1], -1)):
            capped = self._forward(ids, None).float()
        with passing_through(self.head):
            hidden = self._forward(ids, None)
        pieced = self.head(hidden).float()
        self.model.train(training)
        unchanged = torch.allclose(capped, ramp.expand_as(capped), rtol=1e-2)
        return unchanged and whole.shape == pieced.shape and torch.allclose(whole, pieced, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def keeps_packed_apart(self) -> bool:
        """Whether restarting positions keep the examples of a packed sequence from seeing each other."""
        training = self.model.training
        self.model.eval()
        ids = torch.arange(8, device=self.device).remainder(self.vocabulary)[None]
        positions = torch.arange(4, device=self.device).repeat(2)[None]
        try:
            packed = self._forward(ids, positions)[:, 4:].float()
        except TypeError:  # the architecture knows no positions
            return False
        alone = self._forward(ids[:, 4:], None).float()
        self.model.train(training)
        return float((packed - alone).abs().max()) <= 1e-3 * float(alone.abs().max())

    def _forward(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        extra = {} if positions is None else {"position_ids": positions}
        output: Tensor = self.model(input_ids=ids, use_cache=False, **extra).logits
        return output[:, -ids.shape[1] :]  # learned prompt tokens, if any, stand in front

    def at_labels(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(states, targets, examples) at the L labelled positions, in the order of the batch.

        `states` [L, H] are what the output layer gets (or, where that cannot be split off, the logits [L, V]);
        `targets` int64 [L]; `examples` int64 [L] says which example each belongs to.
        """
        with self.autocast(), passing_through(self.head if self.split_head else None):
            output = self._forward(batch.ids, batch.positions)
        ahead = batch.labelled[:, 1:]
        return output[:, :-1][ahead], batch.ids[:, 1:][ahead], batch.examples[:, 1:][ahead]

    def logits(self, states: Tensor) -> Tensor:
        """[L, V] from what `at_labels` gave, in float32 or wider."""
        if not self.split_head:
            return states.to(accumulator_dtype(states.dtype))
        with self.autocast():
            logits: Tensor = self.head(states)
        return logits.to(accumulator_dtype(logits.dtype))

    def pieces(self, num_rows: int) -> Iterator[slice]:
        """Slices of the L rows, each small enough that its logits fit the piece."""
        rows = max(1, _PIECE_LOGITS // max(1, self.vocabulary))
        return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))


def passing_through(head: Any | None) -> AbstractContextManager[None]:
    """Inside, an output layer hands on its input."""
    return nullcontext() if head is None else _replaced(head, lambda states: states)


@contextmanager
def _replaced(head: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, an output layer computes something else. Its own `forward` may be an instance's (accelerate's hooks)."""
    own = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def autocast_dtype(spec: TrainingSpec, device: torch.device) -> torch.dtype | None:
    """What `training.precision` means on a device: the dtype of autocast, or None."""
    half = spec.precision == "bfloat16" or (spec.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else None


def backward(language_model: LanguageModel, batch: Batch, scale: float | Tensor) -> float:
    """Add the gradient of Σ `scale` × nats over the batch's labels to the parameters' gradients; returns Σ nats.

    Args:
        scale: a number, or one for each label [L], in the order of the batch.
    """
    states, targets, _ = language_model.at_labels(batch)
    gradient = torch.empty_like(states)
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for piece in language_model.pieces(len(targets)):
        leaf = states[piece].detach().requires_grad_()
        logits = language_model.logits(leaf)
        if isinstance(scale, Tensor):
            each = functional.cross_entropy(logits, targets[piece], reduction="none")
            nats, scaled = each.sum(), (each * scale[piece]).sum()
        else:
            nats = functional.cross_entropy(logits, targets[piece], reduction="sum")
            scaled = nats * scale
        torch.autograd.backward(scaled)
        assert leaf.grad is not None
        gradient[piece] = leaf.grad
        total += nats.detach()
    if states.requires_grad:
        torch.autograd.backward(states, gradient)
    return float(total)


@torch.no_grad()
def score(language_model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(nats float64 [L], greedy-correct bool [L], examples int64 [L]) at the labelled positions."""
    states, targets, examples = language_model.at_labels(batch)
    nats = torch.empty(len(targets), dtype=torch.float64, device=targets.device)
    correct = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
    for piece in language_model.pieces(len(targets)):
        logits = language_model.logits(states[piece])
        nats[piece] = functional.cross_entropy(logits, targets[piece], reduction="none").double()
        correct[piece] = logits.argmax(-1) == targets[piece]
    return nats, correct, examples
