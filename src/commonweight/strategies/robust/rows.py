"""What robust rules do with a round's updates, one a row: norms, inner products, sums, sorted columns.

Rows are n × d, float32 or float64; n up to 100 or so, d up to many millions. Everything is taken a stretch of columns
at a time and summed in float64, so beside the rows a rule needs a few MB and n × n numbers. Distances come from the
inner products, ‖xᵢ − xⱼ‖² = ⟨xᵢ,xᵢ⟩ + ⟨xⱼ,xⱼ⟩ − 2⟨xᵢ,xⱼ⟩: one pass over the rows gives all of them, and a huge hostile
row spoils its own distances only. A mean of equal float32 rows is that row, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

# elements of all rows together that are worked on at once: 2 MiB in float64, which stay in cache
_ELEMENTS = 1 << 18

# float64 sums of millions of products leave this much of ‖xᵢ‖² + ‖xⱼ‖² where two rows are equal
_CANCELLED = 1e-13


def stretches(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices that cover the columns, each of as many as may be worked on at once."""
    step = max(1, _ELEMENTS // max(1, num_rows))
    return (slice(start, start + step) for start in range(0, num_columns, step))


def inner_products(*blocks: Tensor) -> Tensor:
    """⟨xᵢ,xⱼ⟩ of all rows of the blocks (each k × d, equal d), one block after the other: n × n, float64."""
    num_rows = sum(len(block) for block in blocks)
    products = torch.zeros(num_rows, num_rows, dtype=torch.float64)
    for columns in stretches(num_rows, blocks[0].shape[1]):
        piece = torch.cat([block[:, columns].double() for block in blocks])
        products.addmm_(piece, piece.T)
    return products


def squared_distances(products: Tensor) -> Tensor:
    """‖xᵢ − xⱼ‖² from the rows' inner products: n × n, float64, zero on the diagonal and between equal rows."""
    squares = products.diagonal()
    sums = squares[:, None] + squares
    distances = sums - products - products.T  # alike both ways, to the bit: equal scores stay equal
    distances[distances <= _CANCELLED * sums] = 0
    return distances.fill_diagonal_(0)


def distances_to(products: Tensor, coefficients: Tensor) -> Tensor:
    """‖xᵢ − Σ cⱼxⱼ‖ from the rows' inner products and the coefficients c: (n,), float64."""
    along = products @ coefficients
    return (products.diagonal() - 2 * along + coefficients @ along).clamp_(min=0).sqrt_()


def norms(rows: Tensor) -> Tensor:
    """‖xᵢ‖: (n,), float64."""
    squares = torch.zeros(len(rows), dtype=torch.float64)
    for columns in stretches(*rows.shape):
        squares += rows[:, columns].double().square().sum(1)
    return squares.sqrt_()


def combination(coefficients: Tensor, *blocks: Tensor) -> Tensor:
    """Σ cᵢxᵢ over all rows of the blocks, one after the other: (d,), in the first block's dtype."""
    found = torch.empty(blocks[0].shape[1], dtype=blocks[0].dtype)
    for columns in stretches(len(coefficients), len(found)):
        found[columns] = coefficients @ torch.cat([block[:, columns].double() for block in blocks])
    return found


def mean_of(rows: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
    """The mean of the chosen rows, or of all: (d,)."""
    counts = torch.ones(len(rows), dtype=torch.float64)
    if chosen is not None:
        counts.zero_()[list(chosen)] = 1
    found = torch.empty(rows.shape[1], dtype=rows.dtype)
    for columns in stretches(*rows.shape):
        # divided after the sum, which is exact for float32: equal rows give themselves
        found[columns] = (counts @ rows[:, columns].double()).div_(counts.sum())
    return found


def clip_rows_(rows: Tensor, bound: float) -> Tensor:
    """Scale rows longer than `bound` down to it, in place."""
    for row, norm in zip(rows, norms(rows).tolist(), strict=True):
        if norm > bound:
            row.mul_(bound / norm)
    return rows


def mix_nearest_(rows: Tensor, f: int) -> Tensor:
    """Replace each row by the mean of its n − f nearest, itself among them, in place (Allouah et al. 2023,
    arXiv:2302.01772). Of rows equally near the first is taken.

    Raises:
        ValueError: f is not between 0 and n − 1.
    """
    kept = len(rows) - f
    if not 0 < kept <= len(rows):
        raise ValueError(f"f = {f} of {len(rows)} rows leaves none to mix, or is negative")
    distances = squared_distances(inner_products(rows)).fill_diagonal_(-1)
    nearest = distances.argsort(dim=1, stable=True)[:, :kept]
    counts = torch.zeros_like(distances).scatter_(1, nearest, 1)
    for columns in stretches(*rows.shape):
        rows[:, columns] = (counts @ rows[:, columns].double()).div_(kept)
    return rows


def sorted_columns(rows: Tensor) -> list[Tensor]:
    """Each column's n values in ascending order: n tensors of (d,), the smallest first.

    A network of comparisons between whole rows: about ten times as fast as sorting column by column.
    """
    ordered = list(rows.clone())
    if not ordered:
        return []
    spare = torch.empty_like(ordered[0])
    for low, high in _network(len(ordered)):
        torch.minimum(ordered[low], ordered[high], out=spare)
        torch.maximum(ordered[low], ordered[high], out=ordered[high])
        ordered[low], spare = spare, ordered[low]
    return ordered


@cache
def _network(n: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort of n values, as pairs whose smaller value goes to the first (Batcher 1968)."""
    pairs: list[tuple[int, int]] = []
    run = 1
    while run < n:
        step = run
        while step:
            for start in range(step % run, n - step, 2 * step):
                for low in range(start, min(start + step, n - step)):
                    # only within the same two runs that are being merged
                    if low // (2 * run) == (low + step) // (2 * run):
                        pairs.append((low, low + step))
            step //= 2
        run *= 2
    return tuple(pairs)


def middle(ordered: Sequence[Tensor]) -> Tensor:
    """The median of columns in ascending order, float64: for an even number of rows the mean of the middle two."""
    n = len(ordered)
    return (ordered[(n - 1) // 2].double() + ordered[n // 2]).div_(2)
