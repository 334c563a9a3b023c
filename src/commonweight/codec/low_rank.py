"""Fewer numbers, of matrices: the two thin factors of the nearest product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .stage import BadPayload, Draw, Matrices, Shortening


class LowRankOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(1, ge=1, le=256, description="Columns of the factors.")
    iterations: int = Field(2, ge=1, le=16, description="Power iterations, each with a product more either way.")


class LowRank(Shortening):
    """Of each matrix M, P and Q with PQᵀ near the best approximation of their rank, by power iterations from a random
    start; both are sent, so nothing is orthogonal to anything at the other end, and a matrix that its factors would not
    make smaller is sent as it is. Wrong in the mean, so it needs error feedback."""

    name, rule = "low-rank", "M ≈ PQᵀ: P = orth(MQ), Q = MᵀP, repeated; P, Q of `rank` columns"
    source = "Vogels et al., PowerSGD, NeurIPS 2019, without its warm start"
    Options = LowRankOptions
    options: LowRankOptions

    def count(self, matrices: Matrices) -> int:
        return sum(self._size(rows, columns) for rows, columns in matrices)

    def shorten(self, values: Tensor, matrices: Matrices, draw: Draw, *, unbiased: bool) -> tuple[bytes, Tensor]:
        generator, parts, start = draw.generator("factors"), [], 0
        for rows, columns in matrices:
            matrix = values[start : start + rows * columns]
            start += rows * columns
            parts.append(self._factors(matrix.view(rows, columns), generator) if self._thin(rows, columns) else matrix)
        return b"", torch.cat(parts) if parts else values

    def _factors(self, matrix: Tensor, generator: torch.Generator) -> Tensor:
        size = float(matrix.abs().max())
        if size == 0:
            return torch.zeros(self._size(*matrix.shape))
        scaled = matrix.double() / size
        q = torch.randn(matrix.shape[1], self.options.rank, generator=generator, dtype=torch.float64)
        for _ in range(self.options.iterations):
            p = torch.linalg.qr(scaled @ q).Q
            q = scaled.T @ p
        # of equal size, so that a rounding which gives both one scale does justice to both; M's own size is in both
        balance = (q.square().mean() / p.square().mean()).sqrt().sqrt()
        if balance == 0:
            return torch.zeros(self._size(*matrix.shape))
        return torch.cat([(p * (balance * size**0.5)).reshape(-1), (q * (size**0.5 / balance)).reshape(-1)]).float()

    def restore(self, which: bytes, kept: Tensor, matrices: Matrices, draw: Draw) -> Tensor:
        if which:
            raise BadPayload("places of numbers that are all there")
        parts = [self._product(part, rows, columns) for part, rows, columns in self._parts(kept, matrices)]
        return torch.cat(parts) if parts else kept

    def _product(self, part: Tensor, rows: int, columns: int) -> Tensor:
        if not self._thin(rows, columns):
            return part
        cut = rows * self.options.rank
        # in float64, which no product of numbers in float32 leaves
        product: Tensor = part[:cut].view(rows, -1).double() @ part[cut:].view(columns, -1).double().T
        return product.reshape(-1).clamp(-_MOST, _MOST).float()

    def most(self, matrices: Matrices) -> int:
        return 0

    def _parts(self, kept: Tensor, matrices: Matrices) -> Iterator[tuple[Tensor, int, int]]:
        start = 0
        for rows, columns in matrices:
            size = self._size(rows, columns)
            yield kept[start : start + size], rows, columns
            start += size

    def _thin(self, rows: int, columns: int) -> bool:
        return self.options.rank * (rows + columns) < rows * columns

    def _size(self, rows: int, columns: int) -> int:
        return self.options.rank * (rows + columns) if self._thin(rows, columns) else rows * columns


_MOST = torch.finfo(torch.float32).max
