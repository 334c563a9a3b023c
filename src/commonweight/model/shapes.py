"""Sites that hold less of a LoRA adapter than the global one: a lower rank, another scale, fewer modules.

The global tensors have the adapter's rank r and all its modules. A site's shape is a part of them: the first rᵢ rows of
A and columns of B, in the modules that it holds. What it is handed is that part, with B times s/sᵢ, so that the effect
sᵢBᵢAᵢ is the one that was meant by s·BA.

A site of another shape works in the whole adapter's memory, where everything beyond its part is zero. A row of A and
the column of B that are both zero have no effect and get a gradient of exactly zero, and SGD and AdamW leave them so,
weight decay too: the work is that of an adapter of the site's own shape.

Legend: s = α/r (rslora: α/√r), the adapter's scale; sᵢ a site's.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..recipe.schema import AdapterSpec, SiteAdapterSpec
from .tensors import Layout, NamedTensors
from .trainables import has_part


def matrices(layout: Layout) -> dict[str, tuple[str, str]]:
    """LoRA pairs by the name of their module: (name of A, r × in; name of B, out × r).

    Names are peft's: `….lora_A.weight` and `….lora_B.weight`, or `….lora_A.default.weight` with an adapter's name in
    between, which then ends the key (`….default`): a module may have several. Only matrices whose product exists are
    pairs: a convolution's factors or a bias are not.
    """
    found: dict[str, dict[str, str]] = {}
    for name, entry in layout.by_name.items():
        for letter in "AB":
            module, mark, tail = name.partition(f".lora_{letter}.")
            if mark and tail.split(".")[-1] == "weight" and len(entry.shape) == 2:
                found.setdefault(".".join([module, *tail.split(".")[:-1]]), {})[letter] = name
    shapes = {name: entry.shape for name, entry in layout.by_name.items()}
    return {
        key: (pair["A"], pair["B"])
        for key, pair in found.items()
        if len(pair) == 2 and shapes[pair["A"]][0] == shapes[pair["B"]][1]
    }


@dataclass(frozen=True)
class Shape:
    """What a site holds of the global adapter.

    Args:
        rank: rᵢ, of every module that it holds.
        scale: sᵢ.
        ratio: sᵢ/s.
        layout: of the site's own tensors, by the global ones' names: A is rᵢ × in, B is out × rᵢ.
    """

    rank: int
    scale: float
    ratio: float
    layout: Layout

    @cached_property
    def num_parameters(self) -> int:
        return sum(self.layout.numels.values())

    @cached_property
    def modules(self) -> frozenset[str]:
        """Names of the modules that it holds."""
        return frozenset(map(_module, matrices(self.layout)))

    def holds(self, name: str) -> bool:
        """Whether the site has this tensor, or a part of it."""
        return name in self.layout.by_name

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Where the site's own tensor lies in a whole one of this name: a view."""
        return tensor[tuple(slice(size) for size in self.layout.by_name[name].shape)]

    def handed(self, name: str, tensor: Tensor) -> Tensor:
        """What the site starts from, of a global tensor that it holds: its part, with B times s/sᵢ."""
        part = self.part(name, tensor)
        return part / self.ratio if self.ratio != 1 and has_part(name, "lora_B") else part

    def start(self, theta: NamedTensors) -> NamedTensors:
        """All that the site starts from, in the whole adapter's layout, zero beyond its part; a copy."""
        start = NamedTensors.zeros(theta.layout)
        for name in self.layout.by_name:
            self.part(name, start[name]).copy_(self.handed(name, theta[name]))
        return start

    def own(self, tensors: NamedTensors) -> NamedTensors:
        """The site's part of whole tensors, in its own layout; a copy."""
        own = NamedTensors.empty(self.layout)
        for name, tensor in own.items():
            tensor.copy_(self.part(name, tensors[name]))
        return own

    def facts(self, layout: Layout) -> dict[str, Any]:
        """What the site holds of an adapter of this layout, for people."""
        return {
            "r": self.rank,
            "scale": self.scale,
            "modules": len(self.modules),
            "of_modules": len(matrices(layout)),
            "parameters": self.num_parameters,
            "bytes": self.layout.num_bytes,
        }

    def beyond(self, tensors: NamedTensors) -> str | None:
        """The name of the first of these whole tensors that is not zero beyond the site's part, or None."""
        for name, tensor in tensors.items():
            inside = int(self.part(name, tensor).count_nonzero()) if self.holds(name) else 0
            if int(tensor.count_nonzero()) != inside:
                return name
        return None


@contextmanager
def worn(model: Any, shape: Shape | None) -> Iterator[None]:
    """Inside, a peft model has a site's scale, and the modules that the site does not hold are off: they have no
    effect, cost nothing and draw no dropout. The values are whoever's calls this. None: nothing changes."""
    if shape is None:
        yield
        return
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    scales = {name: dict(layer.scaling) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.scaling.update(dict.fromkeys(layer.scaling, shape.scale))
            if name not in shape.modules:
                layer.enable_adapters(False)
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling.update(scales[name])
            if name not in shape.modules:
                layer.enable_adapters(True)
        # peft makes what it enables trainable, and it may have rested before
        for parameter, was in trained.items():
            parameter.requires_grad_(was)


def shapes_of(spec: AdapterSpec, layout: Layout) -> dict[str, Shape]:
    """The shape of each site that `model.adapter.sites` or `model.adapter.budget` names; any other site holds the whole
    adapter.

    Args:
        layout: of the global tensors.

    Raises:
        RecipeError: a site's modules or blocks are not in the adapter, its budget is too small for anything, or the
            adapter has tensors that no rank can be cut from.
    """
    if not spec.shaped:
        return {}
    found = matrices(layout)
    odd = layout.by_name.keys() - {name for pair in found.values() for name in pair}
    if odd:
        raise RecipeError(
            f"model.adapter.sites and budget cut the pairs A, B of linear layers, and {min(odd)!r} is in no pair",
            hint="leave embeddings and convolutions out of model.adapter.targets, or give all sites one shape",
        )
    cutter = _Cutter(spec, layout, found)
    return {
        **{site: cutter.stated(site, own) for site, own in spec.sites.items()},
        **{site: cutter.within(site, share) for site, share in spec.budget.items()},
    }


@dataclass(frozen=True)
class _Cutter:
    """Makes shapes of one adapter; `found` are its pairs."""

    spec: AdapterSpec
    layout: Layout
    found: Mapping[str, tuple[str, str]]

    def stated(self, site: str, own: SiteAdapterSpec) -> Shape:
        """As the recipe says."""
        where, held = f"model.adapter.sites.{site}", list(self.found)
        for target in own.targets or ():
            if not any(_is_target(key, target) for key in held):
                known = sorted({_module(key).rpartition(".")[2] for key in held})
                near = difflib.get_close_matches(target, known, n=1)
                raise RecipeError(
                    f"{where}.targets names {target!r}, which is no module of the adapter",
                    hint=(f"did you mean {near[0]!r}? " if near else "")
                    + f"model.adapter.targets gives it: {', '.join(known)}",
                )
        if own.targets is not None:
            held = [key for key in held if any(_is_target(key, target) for target in own.targets)]
        blocks = {_block(key) for key in held}
        for block in own.layers or ():
            if block not in blocks:
                raise RecipeError(
                    f"{where}.layers names block {block}, in which the site would have no module of the adapter",
                    hint=f"blocks count from 0; it has modules in {', '.join(map(str, sorted(blocks - {_NO_BLOCK})))}",
                )
        if own.layers is not None:
            held = [key for key in held if _block(key) in own.layers]
        rank = own.r or self.spec.r
        return self._shape(held, rank, self.spec.scale if own.alpha is None else self.spec.scale_of(own.alpha, rank))

    def within(self, site: str, share: float) -> Shape:
        """The largest shape within a share of the adapter's parameters.

        The rank falls first. Where it would be less than 1, blocks are left out at rank 1, the first ones first: no
        gradient need be computed in front of the first module that is trained.
        """
        rank = math.floor(share * self.spec.r + 1e-9)
        if rank >= 1:
            return self._shape(self.found, rank, self.spec.scale)
        whole, held = self.spec.r * self._size(self.found), list[str]()
        for block in sorted({_block(key) for key in self.found}, reverse=True):
            wider = [key for key in self.found if _block(key) >= block]
            if self._size(wider) > share * whole + 1e-9:
                break
            held = wider
        if not held:
            last = max(_block(key) for key in self.found)
            least = self._size(key for key in self.found if _block(key) == last) / whole
            raise RecipeError(
                f"model.adapter.budget.{site} is {share:g}, which is less than rank 1 in the last block takes",
                hint=f"give it at least {math.ceil(least * 10_000) / 10_000:g}",
            )
        return self._shape(held, 1, self.spec.scale)

    def _size(self, keys: Iterable[str]) -> int:
        """Parameters at rank 1."""
        return sum(self.layout.by_name[name].numel for key in keys for name in self.found[key]) // self.spec.r

    def _shape(self, held: Iterable[str], rank: int, scale: float) -> Shape:
        own = {}
        for name_a, name_b in (self.found[key] for key in held):
            a, b = self.layout.by_name[name_a], self.layout.by_name[name_b]
            # of no memory: a layout needs names, dtypes and sizes only
            own[name_a] = torch.empty(rank, a.shape[1], dtype=a.dtype, device="meta")
            own[name_b] = torch.empty(b.shape[0], rank, dtype=b.dtype, device="meta")
        return Shape(rank, scale, scale / self.spec.scale, Layout.of(own))


_NO_BLOCK = -1


def _module(key: str) -> str:
    """A pair's module: its key without the adapter's name."""
    return key.rpartition(".")[0]


def _is_target(key: str, target: str) -> bool:
    """Whether peft finds a module by this target: its whole name, or whole parts at its end."""
    return f".{_module(key)}".endswith(f".{target}")


def _block(key: str) -> int:
    """The transformer block of a module, the first number in its name (`….layers.3.self_attn.q_proj`), or -1."""
    match = re.search(r"\.(\d+)\.", key)
    return int(match.group(1)) if match else _NO_BLOCK
