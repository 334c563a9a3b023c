"""Where a site's work starts from, as a task says it: the global model, a cluster's, or the best of several.

{"kind": "theta"}                             the one global model
{"kind": "cluster", "cluster": j}             cluster j's model
{"kind": "least-loss", "of": k, "rows": n}    of the models of clusters 0 … k − 1 the one with the least loss on n
                                              of the site's training rows (Ghosh 2020, arXiv:2006.04088)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.tokens import Tokens
from ..errors import SiteError, UpdateRefused

#: what a task says where there is one global model
FROM_THETA: Mapping[str, Any] = {"kind": "theta"}

_FIELDS = {"theta": set[str](), "cluster": {"cluster"}, "least-loss": {"of", "rows"}}
#: no strategy keeps more models than a frame has channels
_MAX_CLUSTERS = 16


def candidates(start: Mapping[str, Any]) -> range:
    """The clusters whose model it may turn out to be.

    Raises:
        SiteError: it is of a kind that is not known here, or its numbers make no sense.
    """
    numbers = {key: value for key, value in start.items() if key != "kind"}
    known = _FIELDS.get(str(start.get("kind"))) == set(numbers) and all(map(_is_count, numbers.values()))
    if not known or numbers.get("cluster", 0) >= _MAX_CLUSTERS or not 1 <= numbers.get("of", 1) <= _MAX_CLUSTERS:
        raise SiteError(
            f"the task says to start from {str(dict(start))[:200]}, which is not known here",
            hint="install the same version of commonweight as the coordinator's",
        )
    match start["kind"]:
        case "cluster":
            return range(start["cluster"], start["cluster"] + 1)
        case "least-loss":
            return range(start["of"])
    return range(1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**6


def rows_to_ask(start: Mapping[str, Any], tokens: Tokens) -> Tokens:
    """The training rows on which a choice is made: all, or as many as it says, spread evenly over them."""
    wanted = min(max(1, start["rows"]), len(tokens))
    return tokens.subset([place * len(tokens) // wanted for place in range(wanted)])


def least(losses: Sequence[float]) -> int:
    """The place of the least loss, the first among equals; one that is not a number is the worst."""
    return min(range(len(losses)), key=lambda place: (losses[place] != losses[place], losses[place], place))


def check_cluster(cluster: int, start: Mapping[str, Any], site: str, round: int) -> None:
    """Raises UpdateRefused: an update's cluster is none of those from which its task let the site start."""
    allowed = candidates(start)
    if cluster not in allowed:
        expected = f"{allowed[0]}" if len(allowed) == 1 else f"one of 0 to {allowed[-1]}"
        raise UpdateRefused(
            f"the update of site {site!r} for round {round} says that it started from the model of cluster {cluster}, "
            f"expected {expected}"
        )
