"""What sites answer in plain data, checked before anybody reckons with it: a site may be wrong, or hostile."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CommonweightError, SiteError
from ..evaluate.metrics import Scores
from ..federation.messages import ChainTask, EvaluateTask, SampleTask, SumTask, Task
from ..privacy.secure_aggregation.shamir import SHARE_BYTES
from ..train.start import candidates
from ..wire.messages import parse_json
from ..wire.refusals import Refused

_MAX_STEPS = 10**9
_MAX_ROWS = 10**6
_MAX_GROUP = 64
_MAX_TEXT = 20_000
_MOST_CERTIFICATE = 1 << 14
#: two shares, sealed
_BOX_BYTES = 2 * SHARE_BYTES + 16
#: a row's summed loss, its tokens, a count of rows: nothing real comes near, and sums of them stay finite and exact
_MOST = 10**12
#: how a site's rows came to be examples, for the report (data/partition_report.py)
_COUNTS = (
    "rows",
    "skipped",
    "withheld",
    "unused",
    "truncated",
    "dropped",
    "train_examples",
    "train_groups",
    "train_tokens",
    "train_label_tokens",
    "heldout_examples",
    "heldout_tokens",
    "heldout_label_tokens",
)


def checked_facts(raw: bytes | None) -> dict[str, Any]:
    """What a site says of itself when it joins, as JSON. What is kept of it:

    `steps` a round; `groups`: the group of each held-out row, as a code; `data`: counts of rows, examples and tokens.

    Raises:
        SiteError: it is not that.
    """
    facts = _parsed(raw)
    steps, groups = facts.get("steps"), facts.get("groups")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= _MAX_STEPS:
        raise SiteError(f"it says that it takes {str(steps)[:40]} steps a round")
    if not isinstance(groups, list) or len(groups) > _MAX_ROWS or not all(map(_is_code, groups)):
        raise SiteError("its held-out groups are no list of codes")
    return {"steps": steps, "groups": groups, "data": {key: facts[key] for key in _COUNTS if _is_count(facts.get(key))}}


def checked_result(task: Task, raw: bytes | None) -> dict[str, Any]:
    """A site's answer to a task that is not training.

    Raises:
        SiteError: it does not answer the task.
    """
    result = _parsed(raw)
    match task:
        case EvaluateTask(sites=sites, starts=starts):
            return {site: _scored(result.get(site), starts.get(site)) for site in sites}
        case SampleTask(prompts=prompts):
            return {"answers": _answers(result.get("answers"), [site for site, _ in prompts])}
        case ChainTask():
            return _chain(task, result)
        case SumTask(step=step, sites=sites):
            return _of_sum(step, set(sites), result)
    return result


def _of_sum(step: str, sites: set[str], result: Mapping[str, Any]) -> dict[str, Any]:
    """A message of a secure sum; whether it is signed and what was asked for, the collector says."""
    match step:
        case "keys":
            certificate = result.get("certificate")
            if not isinstance(certificate, str) or len(certificate) > _MOST_CERTIFICATE:
                raise SiteError("its keys come without its certificate")
            keys = {name: _hex(result.get(name), 32) for name in ("channel", "pair", "commitment")}
            return {**keys, "signature": _hex(result.get("signature"), 64), "certificate": certificate}
        case "shares":
            return {"boxes": _by_site(result.get("boxes"), sites, _BOX_BYTES)}
        case "consent":
            return {"signature": _hex(result.get("signature"), 64)}
    return {kind: _by_site(result.get(kind), sites, SHARE_BYTES) for kind in ("own", "pair")}


def _by_site(value: Any, sites: set[str], num_bytes: int) -> dict[str, str]:
    if not isinstance(value, dict) or not set(value) <= sites:
        raise SiteError("its part in a secure sum is not by site")
    return {site: _hex(text, num_bytes) for site, text in value.items()}


def _hex(value: Any, num_bytes: int) -> str:
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{2 * num_bytes}}}", value):
        raise SiteError(f"its part in a secure sum is not {num_bytes} bytes in hex where it should be")
    return value


def _scored(value: Any, start: Mapping[str, Any] | None) -> dict[str, Any]:
    """Scores, with the cluster whose model was scored, if the site was to say it."""
    if start is None or not isinstance(value, dict):
        return _scores(value)
    cluster = value.get("cluster")
    if not isinstance(cluster, int) or isinstance(cluster, bool) or cluster not in candidates(start):
        raise SiteError(f"it says that it was scored with the model of cluster {str(cluster)[:40]}")
    return {**_scores({key: item for key, item in value.items() if key != "cluster"}), "cluster": cluster}


def _scores(value: Any) -> dict[str, Any]:
    try:
        if not isinstance(value, dict):
            raise SiteError("it gives no scores")
        scores = Scores.from_json(value)
        if not 1 <= len(scores) <= _MAX_ROWS or max(abs(scores.nll).max(), scores.tokens.max()) > _MOST:
            raise SiteError("it scored no row, or its figures are beyond any model's")
        return scores.to_json()
    except SiteError:
        raise
    except (CommonweightError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise SiteError(f"its scores cannot be used: {str(error)[:500]}") from error


def _answers(value: Any, sites: Sequence[str]) -> list[dict[str, str]]:
    keys = ("prompt", "reference", "answer")
    if not isinstance(value, list) or len(value) != len(sites):
        raise SiteError("its sample answers are no list of the right length")
    for answer in value:
        if not isinstance(answer, dict) or not all(isinstance(answer.get(key), str) for key in keys):
            raise SiteError("one of its sample answers is malformed")
    texts = [{key: answer[key][:_MAX_TEXT] for key in keys} for answer in value]
    return [{"site": site, **text} for site, text in zip(sites, texts, strict=True)]


def _chain(task: ChainTask, result: Mapping[str, Any]) -> dict[str, Any]:
    site = task.sites[0]
    final, best, rounds, seconds = (result.get(key) for key in ("final", "best", "rounds", "seconds"))
    if not isinstance(final, dict) or not isinstance(best, dict) or not isinstance(rounds, list):
        raise SiteError("its local model's figures are incomplete")
    known = {0, *(number for number, _, _ in task.rounds)}
    points = []
    for point in rounds[: len(known)]:
        number, losses = (point.get("round"), point.get("losses")) if isinstance(point, dict) else (None, None)
        if not isinstance(losses, dict) or not _is_number(losses.get(site)) or not _is_one_of(number, known):
            raise SiteError("its local model's curve is malformed")
        points.append({"round": number, "losses": {site: float(losses[site])}})
    if not _is_one_of(best.get("round"), known) or not _is_number(best.get("loss")) or not _is_number(seconds):
        raise SiteError("its local model's figures are malformed")
    return {
        "rounds": points,
        "final": {site: _scores(final.get(site))},
        "best": {"round": best["round"], "loss": float(best["loss"]), "scores": _scores(best.get("scores"))},
        "seconds": float(seconds),  # type: ignore[arg-type]  # checked to be a number
    }


def _parsed(raw: bytes | None) -> dict[str, Any]:
    try:
        return parse_json(raw or b"{}")
    except Refused as refused:
        raise SiteError(f"its answer cannot be used: {refused.message}") from refused


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST


def _is_one_of(value: Any, known: set[int]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in known


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _is_code(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_GROUP
