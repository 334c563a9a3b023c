"""The token-span test: which tokens a site has trained on, read off the update of its LoRA adapter.

A linear layer with W + s·B·A gets inputs x_t, one a token, and gradients g_t of its outputs. Then

    ∂L/∂A = s · Σ_t (Bᵀ g_t) x_tᵀ,    ∂L/∂B = s · Σ_t g_t (A x_t)ᵀ

so that every row of A's gradient is a combination of the x_t, and every row of B's one of the A x_t. In the first
block of a model without positions in its embeddings (Llama and its like), the x_t of the attention's projections are
the normalised embeddings of single tokens, which anyone who has the base model can compute for the whole vocabulary. A
token of the text has its x_t in the span of the rows, as long as these have more dimensions than the text has
different tokens (r for each layer that shares the input: 3·r for queries, keys and values together); any other token
has not (Petrov et al., DAGER, NeurIPS 2024, arXiv:2405.15586, for whole weights and LoRA). While B is 0, as before
round 1, A's gradient is 0 and only B's rows are there, in r dimensions of each layer's own.

Several steps, several sequences, or an optimizer that rescales each element blur the span; they are no protection that
anything could be proved of.

Shapes: V candidate tokens, H inputs of a layer, r rank, K rows of an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..model.tensors import NamedTensors

_A, _B = ".lora_A.", ".lora_B."
#: what of the largest singular value counts as noise: the rounding of a float32 update, and of one step of AdamW, which
#: keeps little of a gradient but its signs. By trial on two small models
ROUNDING, SIGNS = 1e-4, 1e-1
_PROBE = 6


@dataclass(frozen=True)
class FirstLayers:
    """The adapted layers whose input depends on the token alone.

    Args:
        layers: names of their adapters' tensors, A and B.
        inputs: x of each candidate token, float64 [V, H], one for all layers that share it.
        candidates: token ids [V].
    """

    layers: tuple[tuple[str, str], ...]
    inputs: Tensor
    candidates: NDArray[np.int64]


@torch.no_grad()
def first_layers(model: Any, names: Sequence[str], candidates: NDArray[np.int64]) -> FirstLayers | None:
    """Find, in a peft model, the layers whose input is a function of a single token, and that input for candidates.

    Args:
        names: of the adapter's tensors (`….q_proj.lora_A.default.weight`).
        candidates: token ids, at least `_PROBE` of them.

    Returns:
        None: there are no such layers; the embeddings have positions, or nothing there is adapted.
    """
    model.eval()
    device = next(model.parameters()).device
    modules = {name: name.split(_A)[0] for name in names if _A in name}
    ids = torch.from_numpy(candidates).to(device)
    together = _inputs(model, modules.values(), ids[None, :_PROBE])
    alone = _inputs(model, modules.values(), ids[:_PROBE, None])
    layers: list[tuple[str, str]] = []
    first: Tensor | None = None
    for name, module in modules.items():
        if not _of_positions(together.get(module), 1, _PROBE) or not _of_positions(alone.get(module), _PROBE, 1):
            continue
        x = alone[module][:, 0]
        scale = 1e-4 * float(x.abs().max())
        fits = first is None or (x.shape == first.shape and torch.allclose(x, first, atol=scale))
        if fits and torch.allclose(together[module][0], x, atol=scale):
            layers.append((name, name.replace(_A, _B)))
            first = x
    if not layers:
        return None
    module = modules[layers[0][0]]
    inputs = [_inputs(model, [module], piece[:, None])[module][:, 0].double().cpu() for piece in torch.split(ids, 4096)]
    return FirstLayers(tuple(layers), torch.cat(inputs), candidates)


def _of_positions(inputs: Tensor | None, sequences: int, positions: int) -> bool:
    """Whether a module was there and got one input a position; an expert of a mixture gets what is sent to it."""
    return inputs is not None and inputs.dim() == 3 and inputs.shape[:2] == (sequences, positions)


def _inputs(model: Any, modules: Any, ids: Tensor) -> dict[str, Tensor]:
    """What goes into some modules while the model reads `ids`, [sequences, positions, H]."""
    caught: dict[str, Tensor] = {}
    named = dict(model.named_modules())

    def catch(name: str) -> Any:
        return lambda module, arguments: caught.__setitem__(name, arguments[0].detach())

    hooks = [named[name].register_forward_pre_hook(catch(name)) for name in set(modules)]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return caught


def distances(
    update: NamedTensors | Mapping[str, Tensor],
    first: FirstLayers,
    *,
    base: Mapping[str, Tensor],
    floor: float = ROUNDING,
) -> NDArray[np.float64]:
    """How far each candidate's input is from the span of an update's rows, [V]: 0 inside, 1 at right angles to it.

    Args:
        update: θᵢ − θ, by tensor name.
        base: θ.
        floor: directions with less than this share of the largest singular value count as noise.
    """
    pairs = [(a, b) for a, b in first.layers if a in update]
    rows = [update[a].double().cpu() for a, _ in pairs]
    if pairs and any(bool(row.any()) for row in rows):
        return _outside(torch.cat(rows), first.inputs, floor).numpy()
    # a token has to lie in the span of each layer's B alone: these have different A, and so no common coordinates
    seen = [
        _outside(update[b].double().cpu(), first.inputs @ base[a].double().cpu().T, floor)
        for a, b in first.layers
        if b in update
    ]
    if not seen:
        return np.ones(len(first.candidates))
    worst: NDArray[np.float64] = torch.stack(seen).amax(dim=0).numpy()
    return worst


def _outside(rows_KH: Tensor, inputs_VH: Tensor, floor: float) -> Tensor:
    """The share of each input's square that lies outside the span of the rows, directions counted as far as they stand
    out of the noise: 1 − Σ_j (u_j·x)²·s_j²/(s_j² + f²), u_j and s_j the singular vectors and values, f the noise."""
    if not bool(rows_KH.any()):
        return torch.ones(len(inputs_VH), dtype=torch.float64)
    _, s_K, u_KH = torch.linalg.svd(rows_KH, full_matrices=False)
    noise = (floor * float(s_K[0])) ** 2
    unit_VH = inputs_VH / inputs_VH.norm(dim=1, keepdim=True).clamp_min(1e-300)
    outside_V: Tensor = 1 - ((unit_VH @ u_KH.T) ** 2 * (s_K**2 / (s_K**2 + noise))).sum(dim=1)
    return outside_V


def recovered(distances_V: NDArray[np.float64], candidates: NDArray[np.int64], tokens: set[int]) -> float:
    """Of the candidates nearest to the span, as many as the text has different tokens, the share that is in the text.

    By chance it is about the number of different tokens over the number of candidates; but embeddings are not spread
    evenly, and frequent tokens may be near to any span: random rows in the update's place tell what chance is.
    """
    nearest = candidates[np.argsort(distances_V, kind="stable")[: len(tokens)]]
    return len(tokens.intersection(nearest.tolist())) / len(tokens)
