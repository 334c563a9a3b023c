"""What a run's metrics say, in rows and in sentences: read by the report and by the command line.

Every function takes the run's `metrics.json` as a dict (losses in nats a token) and copes with missing arms: controls
are optional, and a run that stopped early has fewer rounds. Missing figures are None in rows and left out of sentences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from .metrics import perplexity, spread
from .text import count, counted, finite, listed, number, percent, sentence, significant, size, span, surprise

Metrics = Mapping[str, Any]
Row = dict[str, Any]

ARMS = {
    "base": "Base model, untouched",
    "local_everyone": "Each site alone, on everyone’s text",
    "local": "Each site alone",
    "local_best": "Each site alone, at its best",
    "federated": "Together (federated)",
    "personal": "Each site’s own model, from together",
    "centralised": "All data pooled",
}
RATES = ("token_accuracy", "exact_match", "choice_accuracy")
VERDICTS = ("gains", "loses", "unclear")


def dig(data: Any, *path: str) -> Any:
    """The value at `path` in nested dicts, or None where the path ends early."""
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def site_losses(metrics: Metrics, arm: str) -> dict[str, float]:
    """Finite loss by site of one arm of `ARMS`; empty where the arm was not run."""
    key = {"local_everyone": "everyone_loss", "local_best": "best_loss"}.get(arm, "loss")
    sites = dig(metrics, "arms", arm.split("_")[0], "sites") or {}
    known = {name: finite(dig(summary, key)) for name, summary in sites.items()}
    return {name: loss for name, loss in known.items() if loss is not None}


def macro_loss(metrics: Metrics, arm: str) -> float | None:
    """Mean loss over sites of one arm of `ARMS`, or None where it was not run."""
    key = {"local_everyone": "everyone_macro_loss", "local_best": "best_macro_loss"}.get(arm, "macro_loss")
    return finite(dig(metrics, "arms", arm.split("_")[0], key))


def starting_loss(metrics: Metrics) -> float | None:
    """Mean loss before training: the base arm's, or else the federated curve's at round 0."""
    base = macro_loss(metrics, "base")
    return finite(_round_zero(metrics).get("macro_loss")) if base is None else base


def starting_losses(metrics: Metrics) -> dict[str, float]:
    """Finite loss by site before training, from the same places as `starting_loss`."""
    known = {name: finite(loss) for name, loss in (_round_zero(metrics).get("sites") or {}).items()}
    return site_losses(metrics, "base") or {name: loss for name, loss in known.items() if loss is not None}


def _round_zero(metrics: Metrics) -> Metrics:
    rounds = dig(metrics, "arms", "federated", "rounds") or []
    return rounds[0] if rounds and rounds[0].get("round") == 0 else {}


def controls_table(metrics: Metrics) -> list[Row]:
    """One row an arm that was run, in the order of `ARMS`.

    Keys: `arm`, `label`, `macro_loss`, `ci95`, `perplexity` (e to the macro loss), `token_accuracy`, `exact_match`,
    `choice_accuracy`, `worst_site`, `worst_loss`, `loss_std` (`metrics.spread`). `local_best` (each site's best round,
    chosen on the test rows) and `local_everyone` (each site's model on all sites' test rows, the mean of means) have
    neither interval nor rates.
    """
    return [_control(metrics, arm) for arm in ARMS if macro_loss(metrics, arm) is not None]


def _control(metrics: Metrics, arm: str) -> Row:
    loss = macro_loss(metrics, arm)
    losses = {name: {"loss": loss} for name, loss in site_losses(metrics, arm).items()}
    apart = spread(losses) if losses else dict.fromkeys(("worst_site", "worst_loss", "loss_std"))
    return {
        "arm": arm,
        "label": ARMS[arm],
        "macro_loss": loss,
        "ci95": dig(metrics, "arms", arm, "ci95"),
        "perplexity": None if loss is None else perplexity(loss),
        **{rate: finite(dig(metrics, "arms", arm, rate)) for rate in RATES},
        **apart,
    }


def gains(metrics: Metrics) -> list[Row]:
    """One row a site: its loss in every arm, and federated against local-only; the largest gain first.

    Keys: `site`; a loss or None for each of `ARMS` (`base`: before training); `ci95` of the federated loss;
    `difference`, `difference_ci95`, `verdict` against local-only after the last round, and the same three with the
    prefix `best_` against local-only at its best. A difference is federated minus local, below 0 where training
    together is better. The verdict is None where there is nothing to compare, and "unclear" where there is no interval.
    """
    losses = {arm: site_losses(metrics, arm) for arm in ARMS} | {"base": starting_losses(metrics)}
    names = losses["federated"] or dict.fromkeys(name for by_site in losses.values() for name in by_site)
    rows = [_gain(metrics, name, {arm: by_site.get(name) for arm, by_site in losses.items()}) for name in names]
    return sorted(rows, key=lambda row: (row["difference"] is None, row["difference"] or 0.0, row["site"]))


def _gain(metrics: Metrics, site: str, losses: dict[str, float | None]) -> Row:
    row: Row = {"site": site, **losses, "ci95": dig(metrics, "arms", "federated", "sites", site, "ci95")}
    for prefix, arm in (("", "local"), ("best_", "local_best")):
        together, alone = losses["federated"], losses[arm]
        found = dig(metrics, "gains", site, arm) or {}
        measured = None if together is None or alone is None else together - alone
        difference = finite(found.get("difference", measured))
        row[f"{prefix}difference"] = difference
        row[f"{prefix}difference_ci95"] = found.get("ci95")
        verdict = found.get("verdict")
        row[f"{prefix}verdict"] = None if difference is None else verdict if verdict in VERDICTS else "unclear"
    return row


def tally(metrics: Metrics, arm: str = "local") -> dict[str, int]:
    """How many sites gain, lose and are unclear against `local` or `local_best`; empty where nothing was compared."""
    key = "best_verdict" if arm == "local_best" else "verdict"
    found = Counter(row[key] for row in gains(metrics) if row[key] is not None)
    return {verdict: found[verdict] for verdict in VERDICTS} if found else {}


def num_sites(metrics: Metrics) -> int:
    """Number of sites in the run."""
    return len(metrics.get("sites") or dig(metrics, "arms", "federated", "sites") or {})


def num_seen(metrics: Metrics) -> int:
    """Held-out examples that are identical, token for token, to one that some site trains on."""
    return int(finite(dig(metrics, "partition", "heldout_seen_in_training")) or 0)


def share_of_pooling(metrics: Metrics) -> float | None:
    """Federated's improvement over base as a share of centralised's; None unless centralised improves."""
    base, together, pooled = (macro_loss(metrics, arm) for arm in ("base", "federated", "centralised"))
    if base is None or together is None or pooled is None or base - pooled <= 0:
        return None
    return (base - together) / (base - pooled)


def headline(metrics: Metrics) -> str:
    """The run in one sentence."""
    sites, verdicts = num_sites(metrics), tally(metrics)
    if not verdicts or sites < 2:
        return _headline_uncompared(metrics, sites)
    total, won, lost = sum(verdicts.values()), verdicts["gains"], verdicts["loses"]
    if won == total:
        return f"Training together helped {_every(total)} sites."
    if won:
        others = count(lost) if lost else "none"
        return f"Training together helped {count(won)} of {count(total)} sites, and set back {others}."
    if lost:
        return f"Training together helped no site, and set back {count(lost)} of {count(total)}."
    return f"For none of {count(total)} sites is it clear whether training together helped."


def _headline_uncompared(metrics: Metrics, sites: int) -> str:
    text = f"{sentence(counted(sites, 'site'))} trained one model{' together' if sites > 1 else ''}"
    before, after = starting_loss(metrics), macro_loss(metrics, "federated")
    if before is None or after is None:
        return f"{text}."
    moved = "fell" if after < before else "rose"
    return f"{text}; its perplexity {moved} from {surprise(perplexity(before))} to {surprise(perplexity(after))}."


def plain_summary(metrics: Metrics) -> list[str]:
    """The run in sentences for readers who do not train models; whatever was not measured is left out."""
    return [text for paragraph in summary_paragraphs(metrics) for text in paragraph]


def summary_paragraphs(metrics: Metrics) -> list[list[str]]:
    """The sentences of `plain_summary` in three paragraphs: the outcome, the comparison, what left and how safely."""
    parts: tuple[tuple[Callable[[Metrics], str], ...], ...] = (
        (_who, _clusters, _losses, _perplexity),
        (_verdicts, _personal, _pooling),
        (_what_left, _missing_answers, _arrivals, _privacy, _sums, _canaries, _simulation),
    )
    written = [[text for part in group if (text := part(metrics))] for group in parts]
    return [paragraph for paragraph in written if paragraph]


def _who(metrics: Metrics) -> str:
    sites, rounds = num_sites(metrics), metrics.get("rounds") or []
    if not sites:
        return ""
    together = "together " if sites > 1 else ""
    who, how_long = sentence(counted(sites, "site")), counted(len(rounds), "round")
    text = f"{who} trained one language model {together}for {how_long}"
    invited = [len(one.get("cohort") or []) for one in rounds]
    if invited and max(invited) < sites:
        text += f", about {count(round(sum(invited) / len(invited)))} of them in each round"
    return f"{text}."


def _clusters(metrics: Metrics) -> str:
    found = dig(metrics, "clusters", "found") or []
    if not found:
        return ""
    sizes = [f"{len(one['sites']):,}" for one in found]
    if len(found) == 1:
        return "All sites fell into one cluster, and share its model."
    return (
        f"They fell into {count(len(found))} clusters, of {listed(sizes)} sites, each with a model of its own: below, "
        "“the shared model” is a site’s cluster’s."
    )


def _losses(metrics: Metrics) -> str:
    together = macro_loss(metrics, "federated")
    if together is None:
        return ""
    ci95 = dig(metrics, "arms", "federated", "ci95")
    sure = f" (95\u202f% interval {span(ci95)})" if ci95 else ""
    several = num_sites(metrics) > 1
    alone = "when each site trains alone" if several else "when the site trains outside the federation"
    others = ((macro_loss(metrics, "local"), alone), (starting_loss(metrics), "before training"))
    against = [f"{number(loss)} {words}" for loss, words in others if loss is not None]
    where = "On text that none of them trained on" if several and not num_seen(metrics) else "On held-out text"
    text = f"{where}, the shared model’s mean loss is {number(together)} nats per token{sure}"
    return text + (f", against {listed(against)}; lower is better." if against else "; lower is better.")


def _perplexity(metrics: Metrics) -> str:
    before, after = starting_loss(metrics), macro_loss(metrics, "federated")
    if after is None:
        return ""
    new = surprise(perplexity(after))
    evenly = number(perplexity(after), 0 if perplexity(after) >= 3 else 1)
    meaning = f"it is as unsure of each next token as if it chose evenly among {evenly} of them"
    if before is None:
        return f"Its perplexity is {new}: {meaning}."
    moves = "falls" if after < before else "rises"
    return f"Its perplexity {moves} from {surprise(perplexity(before))} before training to {new}: {meaning}."


def _verdicts(metrics: Metrics) -> str:
    last, best = tally(metrics), tally(metrics, "local_best")
    if not last or num_sites(metrics) < 2:
        return ""
    text = f"Compared with training alone, {_tallied(last)}"
    if best:
        text += f"; against each site’s best round alone, {_tallied(best)}"
    return f"{text}."


def personal_gains(metrics: Metrics) -> list[Row]:
    """One row a site that has a model of its own: its loss beside the shared model's, the largest gain first.

    Keys: `site`, `federated` and `personal` losses, `difference`, `ci95`, `verdict` (the own against the shared one),
    `alone` (the verdict against local-only, or None), `alpha` (the share of its own that the site has chosen, or None).
    """
    shared, own = site_losses(metrics, "federated"), site_losses(metrics, "personal")
    rows = []
    for site, found in (metrics.get("personal") or {}).items():
        against = found["federated"]
        row: Row = {"site": site, "federated": shared.get(site), "personal": own.get(site), **against}
        rows.append({**row, "alone": dig(found, "local", "verdict"), "alpha": finite(found.get("alpha"))})
    return sorted(rows, key=lambda row: (row["difference"], row["site"]))


def _personal(metrics: Metrics) -> str:
    loss, rows = macro_loss(metrics, "personal"), personal_gains(metrics)
    if loss is None or not rows:
        return ""
    text = f"With a model of its own beside the shared one, a site’s mean loss is {number(loss)}"
    if len(rows) < 2:
        return f"{text}."
    counted_by = [("the shared model", "verdict"), ("training alone", "alone")]
    told = []
    for what, key in counted_by:
        found = Counter(row[key] for row in rows if row[key] is not None)
        if found:
            told.append(f"compared with {what}, {_tallied({verdict: found[verdict] for verdict in VERDICTS})}")
    return f"{text}: {'; '.join(told)}."


def _every(total: int) -> str:
    return "both" if total == 2 else f"all {count(total)}"


def _tallied(verdicts: dict[str, int]) -> str:
    total = sum(verdicts.values())
    words = {"gains": ("gains", "gain"), "loses": ("loses", "lose"), "unclear": ("is unclear", "are unclear")}
    parts: list[str] = []
    for verdict, found in verdicts.items():
        verb = words[verdict][found > 1]
        if found == total:
            return f"{_every(total)} sites {verb}"
        if found:
            named = any(not part.startswith("none") for part in parts)
            parts.append(f"{count(found) if named else counted(found, 'site')} {verb}")
        elif verdict != "unclear":
            parts.append(f"none {verb}")
    return listed(parts)


def _pooling(metrics: Metrics) -> str:
    pooled, share = macro_loss(metrics, "centralised"), share_of_pooling(metrics)
    if pooled is None:
        return ""
    text = f"Pooling everyone’s data in one place reaches {number(pooled)}"
    if share is None:
        return f"{text}."
    if share >= 1:
        return f"{text}; training together does no worse without pooling."
    if share <= 0:
        return f"{text}; training together does not reach any of that gain."
    return f"{text}; training together reaches {percent(share)} of that gain without pooling."


def _missing_answers(metrics: Metrics) -> str:
    rounds = metrics.get("rounds") or []
    asked = sum(len(one.get("cohort") or []) for one in rounds)
    failed = sum(len(one.get("failed") or {}) for one in rounds)
    late = sum(len(one.get("late") or []) for one in rounds)
    if not failed + late:
        return ""
    why = listed([f"{count(n)} {word}" for n, word in ((failed, "failed"), (late, "came too late")) if n])
    return f"Of {count(asked)} answers asked of the sites, {why}; those rounds went on without them."


def _arrivals(metrics: Metrics) -> str:
    """Of an asynchronous run: how stale updates were, and who brought most of them."""
    staleness, shares = dig(metrics, "arrivals", "staleness"), dig(metrics, "arrivals", "shares")
    if not staleness or not shares:
        return ""
    total = sum(staleness.values())
    mean = sum(int(versions) * found for versions, found in staleness.items()) / total
    most, least = max(shares.values()), min(shares.values())
    text = (
        f"The {count(total)} updates were made from a model that was {number(mean, 1)} versions behind on average, "
        f"{count(max(map(int, staleness)))} at most"
    )
    absent = num_sites(metrics) - len(shares)
    if absent > 0:
        return f"{text}; the busiest site brought {percent(most)} of them, and {counted(absent, 'site')} none."
    return f"{text}; the busiest site brought {percent(most)} of them, the least busy {percent(least)}."


def _what_left(metrics: Metrics) -> str:
    sent = finite(dig(metrics, "bytes", "up"))
    if sent is None:
        return "No row of data left its site."
    answers = sum(len(one.get("answered") or []) for one in metrics.get("rounds") or [])
    each = f", {size(sent / answers)} for each site and round" if answers > 1 else ""
    received = finite(dig(metrics, "bytes", "received"))
    relayed = "" if received is None else f" Relays added updates up: {size(received)} reached the coordinator."
    return f"No row of data left its site. What left: {size(sent)} of adapter updates{each}.{relayed}"


def _privacy(metrics: Metrics) -> str:
    kind, epsilon = dig(metrics, "privacy", "dp") or "none", finite(dig(metrics, "privacy", "epsilon"))
    if kind == "none" or epsilon is None:
        return "Differential privacy: off (ε = ∞), so nothing bounds what the updates themselves may reveal."
    delta = finite(dig(metrics, "privacy", "delta"))
    unit = kind if kind != "group" else f"group (all rows of one {dig(metrics, 'privacy', 'by')})"
    said = f"Differential privacy: {unit}, ε = {number(epsilon)}" + (f", δ = {significant(delta)}." if delta else ".")
    if kind in ("example", "group"):
        said += f" That is what the site pays whose {kind}s pay most; each site adds the noise itself, before it sends."
        planned, sites = finite(dig(metrics, "privacy", "rounds_planned")), dig(metrics, "privacy", "sites") or {}
        took_part = max((site.get("rounds", 0) for site in sites.values()), default=0)
        if planned is not None and took_part < planned:
            said += (
                f" The noise was planned for {count(int(planned))} rounds; the busiest site took part in "
                f"{count(took_part)}, and paid for those."
            )
    assumed = dig(metrics, "privacy", "assumed")
    if assumed:
        said += f" It counts on this: {assumed}."
    compared = [arm for arm in ("local", "centralised") if dig(metrics, "arms", arm)]
    return said + (f" The {' and the '.join(compared)} control trained without it." if compared else "")


def _sums(metrics: Metrics) -> str:
    secure = dig(metrics, "privacy", "secure_sums")
    if not isinstance(secure, bool):
        return ""
    if not secure:
        return "Secure sums: off; whoever combined the updates saw each of them."
    size = finite(dig(metrics, "privacy", "secure_group_size"))
    if size is None and dig(metrics, "privacy", "homomorphic"):
        return "Secure sums: on, of encrypted updates; whoever combined them could open none, and any site could."
    if size is None:
        at_sites = dig(metrics, "privacy", "mechanism") == "distributed-discrete"
        noisy = ", with the noise of the sites in it" if at_sites else ""
        return f"Secure sums: on; of each round's updates the coordinator learnt the weighted sum alone{noisy}."
    return (
        f"Secure sums: on, in random groups of at least {counted(int(size), 'site')}; of each group's updates the "
        "coordinator learnt the weighted sum alone."
    )


def _canaries(metrics: Metrics) -> str:
    planted = finite(dig(metrics, "canaries", "planted"))
    if planted is None:
        return ""
    times = int(finite(dig(metrics, "canaries", "repeat")) or 1)
    each = "" if times == 1 else f", {count(times)} times each"
    return f"{sentence(counted(int(planted), 'made-up row'))} were planted among the training rows{each}, for an audit."


def _simulation(metrics: Metrics) -> str:
    if metrics.get("engine", "in-process") != "in-process":
        return ""
    pooled = macro_loss(metrics, "centralised") is not None
    return f"This was a simulation on one machine{', where the pooled comparison read every row' if pooled else ''}."
