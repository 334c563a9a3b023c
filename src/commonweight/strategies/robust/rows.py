"""What robust rules do with a round's updates, one a row: inner products, distances, means, sorted columns.

Rows are n × d; n up to 100 or so, d up to many millions. One pass over them, a stretch of columns at a time, gives
⟨xᵢ,xⱼ⟩ of all rows in float64. Distances come from these, ‖xᵢ − xⱼ‖² = ⟨xᵢ,xᵢ⟩ + ⟨xⱼ,xⱼ⟩ − 2⟨xᵢ,xⱼ⟩, and so does
everything about combinations Σ cᵢxᵢ; a huge hostile row spoils its own distances only. The rest is done to n × k values
of one stretch, float64, and in place: a heap from which megabytes are taken and given back for each stretch may grow
to the size of all rows (glibc does not find the hole that an aligned block leaves). A mean of equal float32 rows is
that row, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..side_by_side import SideBySide, Stretch, elements_at_once, stretches

# float64 sums of millions of products leave this much of ‖xᵢ‖² + ‖xⱼ‖² where two rows are equal
_CANCELLED = 1e-13


@dataclass(frozen=True)
class Survey:
    """What one pass over n rows has shown.

    Args:
        products: ⟨xᵢ,xⱼ⟩, n × n, float64; of a survey that was not `pairwise` the diagonal alone, beside zeros.
        samples: the values of the columns that were asked for, n × k for each set of them, float64.
    """

    products: Tensor
    samples: tuple[Tensor, ...] = ()


def survey(
    table: SideBySide,
    slots: Sequence[str] = (),
    *,
    pairwise: bool = True,
    columns: Sequence[Sequence[int]] = (),
) -> Survey:
    """Read every row once.

    Args:
        slots: of the state: further rows after the updates'.
        columns: sets of columns to be sampled, each in ascending order; all floating values of an update are numbered
            through, one dtype after the other.
    """
    num_rows = len(table.updates) + len(slots)
    products = torch.zeros(num_rows, num_rows, dtype=torch.float64)
    wanted = torch.tensor(sorted({column for chosen in columns for column in chosen}), dtype=torch.long)
    found, passed = [torch.empty(num_rows, 0, dtype=torch.float64)], 0
    for _, rows in all_rows(table, slots):
        if pairwise:
            products.addmm_(rows, rows.T)
        else:
            products.diagonal().add_(torch.stack([row @ row for row in rows]))
        first, last = torch.searchsorted(wanted, torch.tensor([passed, passed + rows.shape[1]])).tolist()
        found.append(rows[:, wanted[first:last] - passed])
        passed += rows.shape[1]
    sampled = torch.cat(found, dim=1)
    return Survey(products, tuple(sampled[:, torch.searchsorted(wanted, torch.tensor(chosen))] for chosen in columns))


def all_rows(table: SideBySide, slots: Sequence[str] = ()) -> Iterator[tuple[Stretch, Tensor]]:
    """Each stretch of columns, and the rows there: n × k, float64; they may be changed, and are good until the next."""
    num_rows = len(table.updates) + len(slots)
    memory = torch.empty(num_rows * elements_at_once(num_rows), dtype=torch.float64)
    for stretch in stretches(table.layout, num_rows):
        rows = memory[: num_rows * stretch.numel].view(num_rows, stretch.numel)
        for row, values in zip(rows, [*table.sent(stretch), *(table.held(s, stretch) for s in slots)], strict=True):
            row.copy_(values)
        yield stretch, rows


def num_columns(table: SideBySide) -> int:
    """d, the floating values of an update."""
    return sum(numel for dtype, numel in table.layout.numels.items() if dtype.is_floating_point)


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


@dataclass(frozen=True)
class Prepared:
    """What is done to rows before a rule combines them: xᵢ ← sᵢxᵢ, and then each becomes the mean of some of them.

    Args:
        scales: s, (n,), float64.
        mixed: 1 where row j is in the mean that row i becomes, else 0: n × n, float64. None: rows are not mixed.
    """

    scales: Tensor
    mixed: Tensor | None = None

    def products(self, products: Tensor) -> Tensor:
        """The inner products of the rows after it, from those before."""
        found = products * self.scales[:, None] * self.scales
        # the square of a huge float64 row overflows; of nothing of it nothing is left
        none = self.scales == 0
        found[none[:, None] | none] = 0
        if self.mixed is None:
            return found
        counts = self.mixed.sum(1)
        found = (self.mixed @ found @ self.mixed.T).div_(counts[:, None] * counts)
        return (found + found.T) / 2

    def rows_(self, rows: Tensor) -> Tensor:
        """The rows after it, n × k, in place."""
        rows.mul_(self.scales[:, None])
        if self.mixed is not None:
            counts = self.mixed.sum(1)[:, None]
            for part in torch.split(rows, max(1, rows.shape[1] // 8), dim=1):
                part.copy_((self.mixed @ part).div_(counts))
        return rows


def scales_within(products: Tensor, bound: float) -> Tensor:
    """min(1, bound/‖xᵢ‖), from the rows' inner products: (n,), float64."""
    norms = products.diagonal().sqrt()
    return torch.where(norms > bound, bound / norms, 1.0)


def nearest_rows(products: Tensor, f: int) -> Tensor:
    """1 where row j is among the n − f nearest of row i, itself among them, else 0: n × n, float64.

    That is nearest-neighbour mixing (Allouah et al. 2023, arXiv:2302.01772). Of rows equally near the first is taken.

    Raises:
        ValueError: f is not between 0 and n − 1.
    """
    kept = len(products) - f
    if not 0 < kept <= len(products):
        raise ValueError(f"f = {f} of {len(products)} rows leaves none to mix, or is negative")
    distances = squared_distances(products).fill_diagonal_(-1)
    order = distances.argsort(dim=1, stable=True)[:, :kept]
    return torch.zeros_like(distances).scatter_(1, order, 1)


def mean_of(rows: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
    """The mean of the chosen rows of n × k, float64, or of all: (k,)."""
    counts = torch.ones(len(rows), dtype=torch.float64)
    if chosen is not None:
        counts.zero_()[list(chosen)] = 1
    # divided after the sum, which is exact for float32: equal rows give themselves
    return (counts @ rows).div_(counts.sum())


def sort_columns_(rows: Sequence[Tensor]) -> list[Tensor]:
    """The k columns' n values in ascending order, n tensors of (k,), the smallest first: in place, in the rows' memory.

    A network of comparisons between whole rows: about ten times as fast as sorting column by column.

    Args:
        rows: n of (k,).
    """
    ordered = list(rows)
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
    """The median of columns in ascending order: for an even number of rows the mean of the middle two."""
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]).div_(2)
