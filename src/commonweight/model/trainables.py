"""A model's trainable part as flat memory: parameters and gradients that are views of one buffer for each dtype."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..errors import ModelError
from .tensors import NamedTensors


def has_part(name: str, part: str) -> bool:
    """Whether a parameter's dotted name has this part: `lora_A` in `….q_proj.lora_A.default.weight`, or several in a
    row: `layers.3`."""
    return f".{part}." in f".{name}."


class Trainables:
    """The trainable tensors of a model, moved into flat buffers; the model goes on using them.

    Args:
        personal: parts of dotted names; the tensors that have one are trained as the others are, but belong to a site
            alone. As an attribute: views of their values.
        values: the parameters' values, by parameter name.
        gradients: their gradients, of the same layout. They are accumulated in place by backward passes, so they must
            be zeroed with `zero_gradients`, never set to None.
        shared, shared_gradients: views of those that are sent and averaged: all, or a prefix of each flat.
    """

    def __init__(self, model: Any, personal: Sequence[str] = ()) -> None:
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ModelError("nothing in the model is trainable", hint="check model.adapter")
        own = _named_by(personal, parameters)
        self.values = NamedTensors.of(parameters, last=own)
        self.gradients = NamedTensors.empty(self.values.layout, next(iter(parameters.values())).device)
        self.shared, self.personal = self.values.split(own)
        self.shared_gradients, _ = self.gradients.split(own)
        self.zero_gradients()
        for name, parameter in parameters.items():
            parameter.data = self.values[name]
            parameter.grad = self.gradients[name]
        self.flat_parameters = [self._flat_parameter(dtype) for dtype in self.values.flats]

    def _flat_parameter(self, dtype: torch.dtype) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(self.values.flats[dtype])
        parameter.grad = self.gradients.flats[dtype]
        return parameter

    @property
    def num_parameters(self) -> int:
        return sum(self.values.layout.numels.values())

    def zero_gradients(self) -> None:
        for flat in self.gradients.flats.values():
            flat.zero_()


def _named_by(personal: Sequence[str], names: Collection[str]) -> set[str]:
    """The tensors that have one of these parts in their names.

    Raises:
        ModelError: none has this part, or nothing is left to share.
    """
    found: set[str] = set()
    for part in personal:
        own = {name for name in names if has_part(name, part)}
        if not own:
            raise ModelError(
                f"no trainable tensor has {part!r} in its name, which is to stay at its site",
                hint=f"a name that one has: {min(names)}; parts of it may be named in federation.personal",
            )
        found |= own
    if len(found) == len(names):
        raise ModelError(
            f"all trainable tensors are to stay at their sites ({', '.join(personal)}): nothing is left to share",
            hint="name fewer in federation.personal",
        )
    return found
