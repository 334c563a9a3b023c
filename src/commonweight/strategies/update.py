"""What a site answers, and what is checked before any of it reaches the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UpdateRefused
from ..model.tensors import Layout, NamedTensors, first_non_finite


@dataclass(frozen=True)
class Update:
    """One site's answer to one round's task.

    Args:
        site: who answers.
        round: the round that it answers.
        channels: named tensors by channel, all of the global state's layout. `delta` is θᵢ − θ; a strategy may ask for
            more (SCAFFOLD: `control`). Views that may be reused once the update has been folded.
        weight: its weight in the mean (examples, label tokens, or 1), as the recipe's `federation.weighting` says.
        num_examples, num_label_tokens, num_steps: what it trained on and for how long.
        metrics: figures for people (`loss`: mean nats a label token over the local work; `seconds`), and `first_loss`,
            that of the first step, from which some strategies weigh; it does not leave a networked site.
        cluster: of which cluster's model it is an update; 0 where there is one model.
        num_bytes: in how many it was sent, if that was not as it is here (a codec, a secure sum); 0: as it is.
        codec: what made it so, by name.
    """

    site: str
    round: int
    channels: Mapping[str, NamedTensors]
    weight: float
    num_examples: int
    num_label_tokens: int
    num_steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    cluster: int = 0
    num_bytes: int = 0
    codec: str = ""

    @property
    def delta(self) -> NamedTensors:
        return self.channels["delta"]


# float32 must hold a weight and the sum of a cohort's; a count of examples or tokens lies well inside
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e15


def check(update: Update, *, round: int, layout: Layout, channels: tuple[str, ...]) -> None:
    """Refuse an update that breaks its contract.

    Raises:
        UpdateRefused: another round's, missing channels, other names, shapes or dtypes, a weight that is not
            between 1e-6 and 1e15, or a tensor with NaN or infinity, which is named.
    """
    where = f"the update of site {update.site!r} for round {update.round}"
    if update.round != round:
        raise UpdateRefused(f"{where} answers another round: round {round} is open")
    if set(update.channels) != set(channels):
        raise UpdateRefused(f"{where} carries {sorted(update.channels)}, expected {sorted(channels)}")
    check_weight(update.weight, update.site, update.round)
    for channel, tensors in update.channels.items():
        if tensors.layout is not layout and tensors.layout != layout:
            raise UpdateRefused(f"{where} does not fit in {channel!r}: {mismatch(tensors.layout, layout)}")
        bad = first_non_finite(tensors)
        if bad is not None:
            raise UpdateRefused(
                f"{where} holds NaN or infinity in {bad!r} ({channel})",
                hint="lower training.lr, or set training.clip_norm; the model was not touched by it",
            )


def check_weight(weight: float, site: str, round: int) -> None:
    """Raises UpdateRefused: an update's weight is not between 1e-6 and 1e15."""
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise UpdateRefused(
            f"the update of site {site!r} for round {round} has weight {weight}; it must lie between {MIN_WEIGHT:g} "
            f"and {MAX_WEIGHT:g}"
        )


def mismatch(got: Layout, expected: Layout) -> str:
    """How one layout differs from another, in words."""
    missing = expected.by_name.keys() - got.by_name.keys()
    extra = got.by_name.keys() - expected.by_name.keys()
    if missing or extra:
        return f"missing tensors {sorted(missing)[:3]}, unknown tensors {sorted(extra)[:3]}"
    for name, entry in expected.by_name.items():
        other = got.by_name[name]
        if (entry.shape, entry.dtype) != (other.shape, other.dtype):
            return f"{name!r} is {other.dtype} {list(other.shape)}, expected {entry.dtype} {list(entry.shape)}"
    return "the order of its tensors differs"
