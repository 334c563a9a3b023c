"""A leak audit in words and figures, for the report and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .text import counted, number, percent, sentence, span, whole

Audit = Mapping[str, Any]

#: the scores of membership inference, and what they are
SCORES = {
    "reference_loss": ("Loss against the base model’s", "how much less the text surprises the model than its base"),
    "min_k_plus_plus": ("Min-K%++", "the least likely fifth of its tokens, standardised; needs no base model"),
    "base_loss": ("Base model alone", "a control: the base has seen none of these rows, and should tell nothing"),
}
CONVERSE = "An attack that fails proves nothing: another may succeed. Only a bound above the claim is a finding."


def leaks(audit: Audit) -> dict[str, Any]:
    """What the report shows; empty without an audit."""
    if not audit:
        return {}
    rows = audit["membership"]["reference_loss"]
    return {
        "verdict": audit["verdict"],
        "sentence": verdict(audit),
        "converse": CONVERSE,
        "canaries": canary_facts(audit),
        "membership": membership_rows(audit),
        "counts": f"{whole(rows['members'])} rows trained on, and {whole(rows['others'])} held out by the same sites",
        "span": span_rows(audit),
        "span_why_not": audit["token_span"].get("why_not", ""),
        "span_explained": span_explained(audit),
    }


def verdict(audit: Audit) -> str:
    """One sentence: what the canaries say of the claim."""
    claim, found = audit["claim"], audit["canaries"]
    if found is None:
        return (
            "No canaries were planted, so that nothing bounds ε from below. A recipe asks for them by privacy.canaries."
        )
    bound = f"ε ≥ {number(found['epsilon_at_least'])} at 95\u202f% confidence (δ = {found['delta']:g})"
    if audit["verdict"] == "exceeded":
        return (
            f"FAILED: the canaries show {bound}, above the ε of {number(claim['epsilon'])} that is claimed for a row. "
            "The claim is wrong, or this is the one run in twenty that looks so by chance: repeat it with another seed."
        )
    if claim["epsilon"] is None:
        return f"The canaries show {bound}. The run claims no bound (ε = ∞)."
    return f"The canaries show {bound}, not above the ε of {number(claim['epsilon'])} that is claimed for a row."


def canary_facts(audit: Audit) -> list[tuple[str, str]]:
    found, claim = audit["canaries"], audit["claim"]
    if found is None:
        return []
    times = "once" if found["repeat"] == 1 else f"{whole(found['repeat'])} times"
    return [
        ("Canaries", f"{whole(found['count'])}, of which {whole(found['planted'])} planted, {times} each"),
        ("Guesses right", f"{whole(found['correct'])} of {whole(found['guesses'])}"),
        ("AUC", number(found["auc"], 3)),
        ("ε at least, with 95\u202f% confidence", number(found["epsilon_at_least"])),
        ("ε claimed for a row", "∞" if claim["epsilon"] is None else number(claim["epsilon"])),
        ("What is claimed", sentence(claim["why"])),
    ]


def membership_rows(audit: Audit) -> list[dict[str, Any]]:
    """One row a score: its AUC and its TPR at each FPR."""
    return [
        {
            "name": SCORES[key][0],
            "note": SCORES[key][1],
            "auc": number(one["auc"], 3),
            "auc_interval": span(one["auc_ci95"], 3),
            "tpr": [_rate(rate) for rate in one["tpr"].values()],
        }
        for key, one in audit["membership"].items()
    ]


def _rate(rate: Mapping[str, Any]) -> str:
    ends = rate["ci95"]
    between = f" ({number(100 * ends[0], 1)} to {number(100 * ends[1], 1)})" if ends else ""
    return f"{percent(rate['rate'], 1)}{between}"


def span_rows(audit: Audit) -> list[dict[str, str]]:
    found = audit["token_span"]
    rows = [{"name": sentence(what), "share": percent(share)} for what, share in found.get("recovered", {}).items()]
    return (
        [*rows, {"name": "By chance: random numbers in the update’s place", "share": percent(found["chance"])}]
        if rows
        else []
    )


def span_explained(audit: Audit) -> str:
    """What was looked at; empty if nothing was."""
    found = audit["token_span"]
    if "recovered" not in found:
        return ""
    return (
        f"A mean over {counted(found['texts'], 'text')} of {number(found['tokens'], 0)} different tokens, looked for "
        f"in a span of at most {whole(found['dimensions'])} dimensions. More steps, or more texts in one, blur it; "
        "that is no protection that anything could be proved of."
    )
