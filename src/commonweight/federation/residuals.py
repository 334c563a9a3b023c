"""What a run's rounds have added to the frozen base: one file of thin factors a round, in the run's folder.

Each file names the digest of the one before it. So the digest of the last, which the journal has, vouches for all of
them and for their order, and the base is built again from them to the bit. A round that adds nothing has an empty file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..errors import StateError
from ..model.lora_files import read_pairs, scale_of, write_pairs
from ..strategies.lora.factors import Factors, capped, stacked
from .folder import DAMAGED, load_tensors, save_tensors, sha256_of

Residual = Mapping[str, Factors]


class Residuals:
    """A run's residuals, by round from 1. Factors have scale 1; their product times the adapter's own scale is what is
    added.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "residuals"

    def file(self, round: int) -> Path:
        return self.folder / f"{round:04d}.safetensors"

    def write(self, round: int, residual: Residual) -> dict[str, Any]:
        """Keep a round's residual, after those of the rounds before it; its digest and size for the journal."""
        tensors = {f"{m}/{part}": getattr(f, part).contiguous() for m, f in residual.items() for part in "BA"}
        previous = sha256_of(self.file(round - 1)) if round > 1 else ""
        digest = save_tensors(self.file(round), tensors, {"previous": previous})
        return {"sha256": digest, "bytes": sum(t.numel() * t.element_size() for t in tensors.values())}

    def check(self, last: int, sha256: str | None = None) -> None:
        """Whether the files of rounds 1 to `last` are there, as they were written.

        Args:
            sha256: the last one's digest, if it is known.

        Raises:
            StateError: one is missing or damaged.
        """
        for round in range(last, 0, -1):
            path = self.file(round)
            if not path.exists():
                raise StateError(f"{path} is missing", hint=DAMAGED)
            if sha256 is not None and sha256_of(path) != sha256:
                raise StateError(f"{path} is damaged: its digest is not the one that was noted", hint=DAMAGED)
            try:
                with safe_open(path, framework="pt") as opened:
                    sha256 = (opened.metadata() or {})["previous"]
            except Exception as error:  # not safetensors, or not a residual
                raise StateError(f"{path} is damaged: {error}", hint=DAMAGED) from error

    def read(self, last: int) -> Iterator[dict[str, Factors]]:
        """The residuals of rounds 1 to `last`, in order."""
        for round in range(1, last + 1):
            yield _factors(load_tensors(self.file(round)))

    def total(self, last: int) -> dict[str, Factors]:
        """The sum of rounds 1 to `last`, float64, by module: the rounds' factors side by side, `capped`."""
        parts: dict[str, list[Factors]] = {}
        for residual in self.read(last):
            for module, factors in residual.items():
                parts.setdefault(module, []).append(factors)
        return {module: capped(stacked(found, [1.0] * len(found))) for module, found in sorted(parts.items())}


def save_residual(residuals: Residuals, last: int, adapter: Path) -> None:
    """Write what rounds 1 to `last` have added into an adapter's folder, as `residual/`: a LoRA adapter of scale 1 that
    has the moved base's effect on the loaded one. There is none if they added nothing."""
    found = _changes(residuals, last, adapter)
    if found:
        write_pairs(adapter / "residual", {m: (one.B, one.A) for m, one in found.items()}, like=adapter)


def save_combined(residuals: Residuals, last: int, adapter: Path, output: Path) -> None:
    """Write a LoRA adapter of scale 1 that has the effect of another and of all that rounds 1 to `last` have added."""
    scale, found = scale_of(adapter), _changes(residuals, last, adapter)
    pairs = {}
    for module, (B, A) in read_pairs(adapter).items():
        parts = [Factors(B, A, scale), *([found[module]] if module in found else [])]
        both = capped(stacked(parts, [1.0] * len(parts)))
        pairs[module] = (both.B, both.A)
    write_pairs(output, pairs, like=adapter)


def _changes(residuals: Residuals, last: int, adapter: Path) -> dict[str, Factors]:
    """The sum of rounds 1 to `last` by the name of the module, without that of the adapter in it; with the adapter's
    scale."""
    scale = scale_of(adapter)
    return {m.removesuffix(".default"): Factors(f.B, f.A * scale) for m, f in residuals.total(last).items()}


def _factors(tensors: Mapping[str, Any]) -> dict[str, Factors]:
    modules = sorted({key.rpartition("/")[0] for key in tensors})
    return {module: Factors(tensors[f"{module}/B"], tensors[f"{module}/A"]) for module in modules}
