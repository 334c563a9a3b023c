"""What goes with what: one table, asked before anything starts.

A row is a strategy, a column a feature that a recipe may ask for. A column knows when a recipe asks for it, which
strategies it goes with, and the one sentence that refuses the others and names one that would work. `commonweight
methods`, the page of methods and the refusals are all made from this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from ..registry import resolve
from .schema import PAIRED_KINDS, Recipe


@dataclass(frozen=True)
class Feature:
    """A column.

    Args:
        name: as it stands over the column.
        asked: whether a recipe, carried out over a network or not, asks for it.
        goes_with: whether a strategy's class may be paired with it.
        because: why another may not, as the end of a sentence; where strategies differ in that, what says it of one.
        instead: what to do, as a sentence.
    """

    name: str
    asked: Callable[[Recipe, bool], bool]
    goes_with: Callable[[type[Any]], bool]
    because: str | Callable[[type[Any]], str]
    instead: str

    def reason(self, strategy: type[Any]) -> str:
        """Why this strategy does not go with it."""
        return self.because if isinstance(self.because, str) else self.because(strategy)


def _is(strategy: type[Any], attribute: str) -> Any:
    """A class of somebody's own may leave out what it is not."""
    return getattr(strategy, attribute, None)


def _no_group_means(strategy: type[Any]) -> str:
    if _is(strategy, "of_weighted_sum") and not _is(strategy, "asynchronous"):
        return "the sum of all is enough for it, and hides each site among more than a group's sums would"
    return "it is no rule that tells honest rows from hostile ones, and works on single sites' updates"


FEATURES = (
    Feature(
        "runs over a network",
        lambda recipe, network: network,
        lambda strategy: _is(strategy, "not_networked") == "",
        lambda strategy: _is(strategy, "not_networked") or "it does not say that a coordinator can run it",
        "Use another strategy, such as fedavg, or carry the recipe out by `commonweight run`",
    ),
    Feature(
        "adapters other than lora, rslora",
        lambda recipe, network: recipe.model.adapter.kind not in PAIRED_KINDS,
        lambda strategy: not _is(strategy, "pairs"),
        "it works on the pairs A, B of LoRA, which this adapter has not or has more than",
        "Use model.adapter.kind lora or rslora, or the strategy fedavg",
    ),
    Feature(
        "sites of different shapes",
        lambda recipe, network: bool(recipe.model.adapter.shaped),
        lambda strategy: bool(_is(strategy, "mixed_shapes")),
        "it combines tensors of one shape, and model.adapter.sites or model.adapter.budget gives some sites another",
        "Use the strategy flora, flexlora or hetlora, or give all sites the whole adapter",
    ),
    Feature(
        "quantized bases",
        lambda recipe, network: recipe.model.quantization != "none",
        lambda strategy: not _is(strategy, "moves_base"),
        "its rounds add to the weights of the base, and into rounded ones a small change cannot be added",
        "Set model.quantization to none, or use the strategy flexlora or fedavg",
    ),
    Feature(
        "runs without a virtual clock",
        lambda recipe, network: not network and not recipe.federation.clock.runs,
        lambda strategy: not _is(strategy, "asynchronous"),
        "it is asynchronous, and in a simulation only a clock says which site is faster (over a network updates count "
        "in the order in which they really arrive, and no two runs give the same bits)",
        "Give the sites speeds, such as federation.clock: {slowest: 1, fastest: 10}, or use the strategy fedavg",
    ),
    Feature(
        "personal parts",
        lambda recipe, network: bool(recipe.federation.personal),
        lambda strategy: (
            not (
                _is(strategy, "pairs")
                or _is(strategy, "own_model")
                or _is(strategy, "asynchronous")
                or _is(strategy, "clustered")
            )
        ),
        "it works on LoRA's pairs as a whole, keeps a model at each site or several side by side, or has no rounds",
        "Leave federation.personal out, or use it with the strategy fedavg",
    ),
    Feature(
        "deadlines, over-selection",
        lambda recipe, network: recipe.federation.deadline_s is not None or recipe.federation.over_selection > 1,
        lambda strategy: not _is(strategy, "asynchronous"),
        "an asynchronous strategy has no rounds that wait for their slowest site",
        "Leave federation.deadline_s and federation.over_selection out, or use the strategy fedavg",
    ),
    Feature(
        "differential privacy of sites",
        lambda recipe, network: recipe.privacy.dp == "site",
        lambda strategy: bool(_is(strategy, "of_plain_mean")),
        "noise is added to the sum of clipped updates that all count alike, and this strategy does not work on that "
        "sum alone",
        "Use a strategy that does, such as fedavg or fedadam, or privacy.dp none",
    ),
    Feature(
        "secure sums",
        lambda recipe, network: recipe.privacy.summed and recipe.privacy.secure_group_size is None,
        lambda strategy: bool(_is(strategy, "of_weighted_sum")) and not _is(strategy, "asynchronous"),
        "the coordinator learns the weighted sum of a round's updates alone, and this strategy needs more than that, "
        "or has no rounds",
        "Use a strategy that needs no more, such as fedavg or fedadam, give a robust one privacy.secure_group_size, or "
        "set privacy.secure_aggregation to off",
    ),
    Feature(
        "secure sums in groups",
        lambda recipe, network: recipe.privacy.secure_group_size is not None,
        lambda strategy: bool(_is(strategy, "of_group_means")),
        _no_group_means,
        "Use a robust strategy such as trimmed-mean or median, or leave privacy.secure_group_size out",
    ),
    Feature(
        "error feedback",
        lambda recipe, network: recipe.compression.keeps_errors,
        lambda strategy: not (_is(strategy, "asynchronous") or _is(strategy, "in_turn") or _is(strategy, "clustered")),
        "what a site could not send in one round is added to its next, which must be of the same tensors of the same "
        "model, and this strategy changes them from round to round, or has no rounds",
        "Set compression.error_feedback to false, or use the strategy fedavg",
    ),
    Feature(
        "small downloads",
        lambda recipe, network: recipe.compression.down.has_stages,
        lambda strategy: (
            not (
                _is(strategy, "asynchronous")
                or _is(strategy, "clustered")
                or _is(strategy, "moves_base")
                or _is(strategy, "mixed_shapes")
                or _is(strategy, "broadcast_channels")
            )
        ),
        "sites are sent small differences of the one model that all of them hold, and this strategy sends them more "
        "than one model, other parts of it or other factors of it from round to round, or has no rounds",
        "Leave compression.down out, or use the strategy fedavg",
    ),
    Feature(
        "differential privacy of examples, groups",
        lambda recipe, network: recipe.privacy.noisy_steps,
        lambda strategy: (
            not (_is(strategy, "own_model") or _is(strategy, "asynchronous") or _is(strategy, "asks_losses"))
        ),
        "a site gives away noisy gradients alone, as often as the rounds say, and this strategy wants to know losses "
        "on its rows, keeps a model of its own there, or has no rounds",
        "Use a strategy that only combines updates, such as fedavg or fedadam, or privacy.dp none",
    ),
    Feature(
        "relays",
        lambda recipe, network: bool(recipe.federation.relays),
        lambda strategy: _is(strategy, "needs") == "sum" and not _is(strategy, "asynchronous"),
        "a relay passes on the sum of its sites' updates in a round, and this strategy needs each of them or no rounds",
        "Leave federation.relays out, or use a strategy with needs = sum, such as fedavg",
    ),
)


def personal_parts(recipe: Recipe) -> tuple[str, ...]:
    """Parts of the names of tensors that stay at their sites: the recipe's, or those that its strategy keeps there.

    A site need not have the code of a strategy, which runs at the coordinator: if it keeps something at the sites, the
    layouts then differ, and the handshake says so.
    """
    try:
        strategy = resolve("strategy", recipe.federation.strategy.name)
    except RecipeError:
        return tuple(recipe.federation.personal)
    return (*(_is(strategy, "personal") or ()), *recipe.federation.personal)


def secure_sums(recipe: Recipe, num_sites: int | None) -> tuple[bool, str]:
    """Whether updates are summed securely over a network, and if not, why not, as a sentence.

    Args:
        num_sites: that the run is for; None: whoever joins, of whom there may be any number.
    """
    spec = recipe.federation
    if recipe.privacy.secure_aggregation == "homomorphic":
        return False, "homomorphic encryption is for simulations alone"
    if recipe.privacy.secure_aggregation != "auto":
        on = recipe.privacy.secure_aggregation == "on"
        return on, "" if on else "the recipe turns them off"
    feature = next(feature for feature in FEATURES if feature.name == "secure sums")
    strategy = resolve("strategy", spec.strategy.name)
    if not feature.goes_with(strategy):
        return False, f"the strategy {spec.strategy.name} needs more than a round's sum, or has no rounds"
    if recipe.not_summed:
        return False, recipe.not_summed
    if recipe.compression.active:
        return False, "what `compression` has made small is summed only where privacy.secure_aggregation is on"
    if num_sites is None:
        num_sites = max(spec.min_sites, spec.cohort.count or 0)
    if spec.cohort.size(num_sites) < 3:
        return False, "a round may have fewer than 3 sites"
    if spec.over_selection >= 1.5:
        return False, "federation.over_selection invites so many that those who answer are too few of them"
    return True, ""


def keeps_state(recipe: Recipe, strategy: object) -> bool:
    """Whether each site keeps something of its own from round to round."""
    return bool(_is(type(strategy), "site_state") or personal_parts(recipe) or recipe.compression.keeps_errors)


def pairings(strategy: type[Any]) -> dict[str, bool]:
    """A strategy's row: for each feature whether they go together."""
    return {feature.name: feature.goes_with(strategy) for feature in FEATURES}


def check_pairings(recipe: Recipe, *, network: bool) -> None:
    """Refuse a recipe that pairs its strategy with something that does not go with it.

    Args:
        network: whether it is to be carried out over a network.

    Raises:
        RecipeError: a cell of the table says no; the sentence says why, and what would work.
    """
    name = recipe.federation.strategy.name
    strategy = resolve("strategy", name)
    for feature in FEATURES:
        if feature.asked(recipe, network) and not feature.goes_with(strategy):
            raise RecipeError(
                f"federation.strategy {name!r} does not go with {feature.name}: {feature.reason(strategy)}",
                hint=feature.instead,
            )
