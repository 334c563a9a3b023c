"""What a stage of a codec is. There are three kinds, and a codec has at most one of each, in this order:

    Shortening   many numbers → fewer numbers, and bytes that say which
    Rounding     numbers → bytes, always so many for so many numbers
    Packing      bytes → fewer bytes, without loss

A stage works on a span (`chain.Span`): a stretch of at most a million elements of whole tensors, or of a part of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import UpdateRefused
from ..seeding import derive_seed

#: (rows, columns) of each tensor in a span, in order; a tensor that is no matrix has one column
Matrices = Sequence[tuple[int, int]]


class BadPayload(UpdateRefused):
    """Bytes that are not what the codec writes."""


@dataclass(frozen=True)
class Draw:
    """Random choices of one span in one update: the same at both ends, and never the same twice.

    Args:
        seed: of the update.
        span: its number.
    """

    seed: int
    span: int

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.value(purpose))

    def value(self, purpose: str) -> int:
        return derive_seed(self.seed, purpose, self.span)


class NoOptions(BaseModel):
    """For a stage that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Stage(ABC):
    """One stage. `rule`: what it does, in a line. `source`: whose it is."""

    name: ClassVar[str]
    rule: ClassVar[str]
    source: ClassVar[str] = ""
    Options: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options = options if options is not None else self.Options()


class Shortening(Stage):
    """Fewer numbers."""

    @abstractmethod
    def count(self, matrices: Matrices) -> int:
        """How many numbers are left of a span."""

    @abstractmethod
    def shorten(self, values: Tensor, matrices: Matrices, draw: Draw, *, unbiased: bool) -> tuple[bytes, Tensor]:
        """What says which numbers they are, and the numbers.

        Args:
            values: 1-D, float32.
            unbiased: whether the mean over many draws is to be the values themselves, where the stage can do that;
                otherwise the error of one draw is as small as can be, as error feedback needs it.
        """

    @abstractmethod
    def restore(self, which: bytes, kept: Tensor, matrices: Matrices, draw: Draw) -> Tensor:
        """The span, 1-D, float32, from what `shorten` gave.

        Raises:
            BadPayload: `which` is not what it writes.
        """

    @abstractmethod
    def most(self, matrices: Matrices) -> int:
        """The largest number of bytes that `which` may have."""


class Rounding(Stage):
    """Fewer bits a number. `stochastic`: the mean over many draws is the number itself."""

    @property
    @abstractmethod
    def stochastic(self) -> bool: ...

    @abstractmethod
    def num_bytes(self, count: int) -> int:
        """Bytes for so many numbers, exactly."""

    @abstractmethod
    def encode(self, values: Tensor, draw: Draw) -> bytes:
        """Args: values: 1-D, float32, finite."""

    @abstractmethod
    def decode(self, raw: bytes, count: int) -> Tensor:
        """1-D, float32. `raw` has `num_bytes(count)` bytes, any of which may be anything.

        Raises:
            BadPayload: they are none that `encode` writes, or would give numbers that are not finite.
        """

    @abstractmethod
    def bound(self, values: Tensor) -> Tensor:
        """1-D, float64: the largest error of each number, whatever was drawn."""


class Packing(Stage):
    """Fewer bytes, without loss."""

    @abstractmethod
    def pack(self, raw: bytes) -> bytes: ...

    @abstractmethod
    def unpack(self, packed: bytes, most: int) -> bytes:
        """What was packed.

        Raises:
            BadPayload: it is damaged, or more than `most` bytes; no more than that is ever held.
        """
