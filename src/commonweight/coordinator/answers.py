"""What sites answer in plain data, checked before anybody reckons with it: a site may be wrong, or hostile."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..errors import CommonweightError, SiteError
from ..evaluate.metrics import Scores
from ..federation.messages import ChainTask, EvaluateTask, SampleTask, Task

_MAX_STEPS = 10**9
_MAX_ROWS = 10**6
_MAX_TEXT = 20_000


def checked_facts(facts: Any) -> dict[str, Any]:
    """What a site says of itself when it joins: `steps` a round, and the group of each held-out row as a code.

    Raises:
        SiteError: it is not that.
    """
    if not isinstance(facts, dict):
        raise SiteError("its facts are no object")
    steps, groups = facts.get("steps"), facts.get("groups")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= _MAX_STEPS:
        raise SiteError(f"it says that it takes {str(steps)[:40]} steps a round")
    if not isinstance(groups, list) or len(groups) > _MAX_ROWS or not all(isinstance(g, str) for g in groups):
        raise SiteError("its held-out groups are no list of codes")
    return facts


def checked_result(task: Task, raw: bytes | None) -> dict[str, Any]:
    """A site's answer to a task that is not training.

    Raises:
        SiteError: it does not answer the task.
    """
    try:
        result = json.loads(raw or b"{}")
    except ValueError as error:
        raise SiteError("its answer is no JSON") from error
    if not isinstance(result, dict):
        raise SiteError("its answer is no object")
    match task:
        case EvaluateTask(sites=sites):
            return {site: _scores(result.get(site)) for site in sites}
        case SampleTask(prompts=prompts):
            return {"answers": _answers(result.get("answers"), len(prompts))}
        case ChainTask():
            return _chain(task, result)
    return result


def _scores(value: Any) -> dict[str, Any]:
    try:
        if not isinstance(value, dict):
            raise SiteError("it gives no scores")
        return Scores.from_json(value).to_json()
    except SiteError:
        raise
    except (CommonweightError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise SiteError(f"its scores cannot be used: {error}") from error


def _answers(value: Any, count: int) -> list[dict[str, str]]:
    keys = ("site", "prompt", "reference", "answer")
    if not isinstance(value, list) or len(value) > count:
        raise SiteError("its sample answers are no list of the right length")
    for answer in value:
        if not isinstance(answer, dict) or not all(isinstance(answer.get(key), str) for key in keys):
            raise SiteError("one of its sample answers is malformed")
    return [{key: answer[key][:_MAX_TEXT] for key in keys} for answer in value]


def _chain(task: ChainTask, result: Mapping[str, Any]) -> dict[str, Any]:
    site = task.sites[0]
    final, best, rounds, seconds = (result.get(key) for key in ("final", "best", "rounds", "seconds"))
    if not isinstance(final, dict) or not isinstance(best, dict) or not isinstance(rounds, list):
        raise SiteError("its local model's figures are incomplete")
    points = []
    for point in rounds:
        losses = point.get("losses") if isinstance(point, dict) else None
        if not isinstance(losses, dict) or not _is_number(losses.get(site)) or not _is_number(point.get("round")):
            raise SiteError("its local model's curve is malformed")
        points.append({"round": int(point["round"]), "losses": {site: float(losses[site])}})
    if not _is_number(best.get("round")) or not _is_number(best.get("loss")) or not _is_number(seconds):
        raise SiteError("its local model's figures are malformed")
    return {
        "rounds": points,
        "final": {site: _scores(final.get(site))},
        "best": {"round": int(best["round"]), "loss": float(best["loss"]), "scores": _scores(best.get("scores"))},
        "seconds": float(seconds),  # type: ignore[arg-type]  # checked to be a number
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
