"""Gradients of single examples, or of groups of them, clipped and added up: one backward pass for many of them.

A hook on each trained linear layer keeps what goes into it, a [B, T, in], and gets the gradient of what comes out, b
[B, T, out]; the gradient of unit u is the sum of bₜᵀaₜ over its tokens t. LoRA's layers are narrow, so that these
gradients are small: a forward pass of U units holds U copies of the adapter's gradient and no more. Against a plain
step it takes 1.2 to 1.4 times as long and up to a third more memory (`benchmarks/dp_sgd.py`, which also measures
opacus's ways: hooks, functorch, ghost clipping).

Legend: U units in a forward pass, each an example or a group of them; B sequences; T positions; gᵤ the gradient of unit
u over all trained tensors together; C the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..data.tokens import Tokens
from ..errors import RecipeError
from ..model.tensors import NamedTensors
from ..model.trainables import Trainables
from .batches import Batch, UnitBatch, unit_batches
from .loss import LanguageModel

#: adds the gradient of Σ scale·nats over a batch's labels to the gradients, scale one number a label; returns Σ nats
Backward = Callable[[LanguageModel, Batch, Tensor], float]
_PROBE_LENGTHS = (9, 7, 5, 4)
#: packed, the first three go into one sequence and the last into another
_PROBE_ROOM = 22
_PROBE_TOLERANCE = 1e-2


class Privacy(Protocol):
    """What makes a task's steps private: `privacy/example_level.py`."""

    @property
    def bound(self) -> float: ...
    @property
    def seed(self) -> int: ...

    def drawn(self, step: int) -> list[list[int]]:
        """The units of a step's batch, and the examples of each; perhaps none."""

    def release(self, total: NamedTensors, step: int) -> NamedTensors:
        """What the step uses in place of a gradient, of the sum of clipped ones, in place."""


class ExampleGradients:
    """A model whose backward passes tell each unit's gradient; see `example_gradients`."""

    def __init__(self, language_model: LanguageModel, trainables: Trainables) -> None:
        self.language_model, self.trainables = language_model, trainables
        self.names: list[str] = [n for n, p in language_model.model.named_parameters() if p.requires_grad]
        self.total = NamedTensors.zeros(trainables.values.layout, wide=True, device=language_model.device)
        self._units: UnitBatch | None = None
        self._found: dict[str, Tensor] = {}
        #: of the unit whose examples go on in the next batch
        self._open: dict[str, Tensor] = {}

    def take(self, units: UnitBatch, backward: Backward) -> tuple[dict[str, Tensor], float]:
        """gᵤ of each unit, as far as its examples are in the batch, [U, …] by parameter, and Σ nats of them all."""
        self._units, self._found = units, {}
        try:
            nats = backward(self.language_model, units.batch, units.weights)
            return {name: self._found[name] for name in self.names if name in self._found}, nats
        finally:
            self._units, self._found = None, {}

    def add_clipped(self, units: UnitBatch, backward: Backward, bound: float) -> float:
        """Add min(1, C/‖gᵤ‖)·gᵤ of each unit to `total`, once it is whole; returns Σ nats.

        A gradient that is not finite counts as zero: an error would tell of the unit.
        """
        gradients, nats = self.take(units, backward)
        for name, part in self._open.items():
            gradients[name][0] += part
        self._open = {name: gradient[-1].clone() for name, gradient in gradients.items()} if units.goes_on else {}
        whole = units.num_units - units.goes_on
        if whole:
            self._add({name: gradient[:whole] for name, gradient in gradients.items()}, bound)
        return nats

    def _add(self, gradients: dict[str, Tensor], bound: float) -> None:
        squares = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in gradients.values()]
        norms = torch.linalg.vector_norm(torch.stack(squares), dim=0)
        finite = norms.isfinite()
        scales = torch.where(finite, (bound / norms).clamp(max=1.0), 0.0)
        for name, gradient in gradients.items():
            total = self.total[name]
            if not finite.all():
                gradient = torch.where(finite.view(-1, *[1] * total.dim()), gradient, 0)  # 0·∞ is no number
            total.add_(torch.tensordot(scales.to(total.dtype), gradient.to(total.dtype), dims=1))

    def forget(self) -> None:
        """Begin a new sum."""
        for flat in self.total.flats.values():
            flat.zero_()

    def listen(self, name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A layer with the weight `name` is called: its gradients are taken when the backward pass comes by."""
        if self._units is not None and isinstance(output, Tensor) and output.requires_grad:
            heard = partial(self._heard, name, self._units, inputs[0].detach())
            output.register_hook(heard)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _heard(self, name: str, units: UnitBatch, a: Tensor, b: Tensor) -> None:
        """Args:
        a: [B, T, in].
        b: [B, T, out].
        """
        found = by_unit(a.to(b.dtype), b.detach(), units)
        self._found[name] = self._found[name] + found if name in self._found else found


def by_unit(a: Tensor, b: Tensor, units: UnitBatch) -> Tensor:
    """Σ bₜᵀaₜ over each unit's tokens, [U, out, in].

    Sequences of one example each are taken together; b is zero on their padding, on which no loss depends.
    """
    if len(units.pieces) > len(a):
        found = b.new_zeros(units.num_units, b.shape[-1], a.shape[-1])
        for row, start, stop, unit in units.pieces:
            found[unit].addmm_(b[row, start:stop].T, a[row, start:stop])
        return found
    of_rows = torch.einsum("bti,btj->bij", b, a)
    if units.num_units == len(of_rows):
        return of_rows
    found = of_rows.new_zeros(units.num_units, *of_rows.shape[1:])
    return found.index_add_(0, torch.tensor([piece[-1] for piece in units.pieces], device=a.device), of_rows)


@contextmanager
def example_gradients(language_model: LanguageModel, trainables: Trainables) -> Iterator[ExampleGradients]:
    """Inside, backward passes can tell each unit's gradient."""
    gradients = ExampleGradients(language_model, trainables)
    names = {id(p): name for name, p in language_model.model.named_parameters() if p.requires_grad}
    hooks = [
        module.register_forward_hook(partial(gradients.listen, names[id(module.weight)]))
        for module in language_model.model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in names
    ]
    try:
        yield gradients
    finally:
        for hook in hooks:
            hook.remove()


def check_examples(
    language_model: LanguageModel, trainables: Trainables, backward: Backward, *, packing: bool = False
) -> None:
    """Find out, on made-up examples, whether each one's gradient in a batch is the one that it has alone.

    It is not where a layer mixes rows or is not called once for all of them (experts), or where something is trained
    that is not a linear layer's weight.

    Args:
        packing: they share sequences. Then none may see another, in any bit.

    Raises:
        RecipeError: it is not, or cannot be known.
    """
    before, mode = trainables.values.clone(), language_model.model.training
    try:
        wrong = _first_wrong(language_model, trainables, backward, _PROBE_ROOM if packing else 0)
    except Exception as error:  # what hooks meet in a model's code may raise anything
        wrong = f"{type(error).__name__}: {error}"
    finally:
        trainables.values.copy_(before)
        trainables.zero_gradients()
        language_model.model.train(mode)
    if wrong:
        raise RecipeError(
            "differential privacy of examples or groups: of this model and adapter the gradients of single examples "
            f"cannot be told ({wrong})",
            hint="name linear layers in model.adapter.targets that every token passes through, neither the output "
            "layer nor an embedding, set training.packing to false, or use privacy.dp site",
        )


def _first_wrong(language_model: LanguageModel, trainables: Trainables, backward: Backward, room: int) -> str:
    """The first trained tensor whose gradients are not right, or nothing."""
    if language_model.head is not None and any(p.requires_grad for p in language_model.head.parameters()):
        return "the output layer is trained"
    draw = torch.Generator().manual_seed(0)
    for _, flat in trainables.values.floating():  # LoRA's B starts at zero, and A's gradient with it
        flat.copy_(torch.randn(flat.shape, generator=draw) * 0.05)
    language_model.model.eval()  # without dropout, which would differ from pass to pass
    tokens, device = _made_up(language_model.vocabulary, draw), language_model.device
    every = [[example] for example in range(len(tokens))]
    together, *alone = (
        next(unit_batches(tokens, units, len(units), device, room=room)) for units in (every, *([one] for one in every))
    )
    if room and not _apart(language_model, tokens, together, room):
        return "packed examples see each other"
    with example_gradients(language_model, trainables) as examples:
        gradients, _ = examples.take(together, backward)
    for name in examples.names:
        if name not in gradients:
            return name
    for row, one in enumerate(alone):
        trainables.zero_gradients()
        backward(language_model, one.batch, one.weights)
        for name, gradient in trainables.gradients.items():
            expected, found = gradient.float(), gradients[name][row].float()
            if found.shape != expected.shape or _norm(found - expected) > _PROBE_TOLERANCE * _norm(expected):
                return name
    return ""


def _made_up(vocabulary: int, draw: torch.Generator) -> Tokens:
    """Examples of the probe's lengths, the longest first."""
    ids = torch.randint(vocabulary, (sum(_PROBE_LENGTHS),), generator=draw)
    rows = [np.asarray(row, np.int32) for row in torch.split(ids, [*_PROBE_LENGTHS])]
    return Tokens.of([(row, np.arange(len(row)) > 0) for row in rows])


@torch.no_grad()
def _apart(language_model: LanguageModel, tokens: Tokens, packed: UnitBatch, room: int) -> bool:
    """Whether nothing at all changes at packed examples when another one becomes a different one."""
    states, _, examples = language_model.at_labels(packed.batch)
    for example in range(len(tokens)):
        ids = tokens.ids.copy()
        ids[tokens.bounds[example] : tokens.bounds[example + 1]] += 1
        changed = replace(tokens, ids=ids % language_model.vocabulary)
        every = [[e] for e in range(len(tokens))]
        (batch,) = unit_batches(changed, every, len(every), language_model.device, room=room)
        others = examples != example
        if not torch.equal(language_model.at_labels(batch.batch)[0][others], states[others]):
            return False
    return True


def _norm(tensor: Tensor) -> float:
    return float(tensor.norm())
