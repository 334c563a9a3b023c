"""metrics.json: every figure that the report shows, put together from the journal.

Losses are nats a held-out label token; a macro figure is the mean over sites.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluate.metrics import Scores, compare, macro, macro_interval, spread, summarise
from ..recipe.schema import Recipe
from .clusters import clusters_of, found, largest
from .journal import RunJournal
from .private_rounds import statement
from .tally import Sites

FORMAT = 1
BySite = dict[str, Scores]


class Record:
    """Reads a finished run's journal.

    Figures are of the sites that every arm could be evaluated on; `not_evaluated` names the others.
    """

    def __init__(self, recipe: Recipe, sites: Sites, journal: RunJournal) -> None:
        self.recipe, self.sites, self.journal = recipe, sites, journal
        self.evaluated = self._evaluated()

    def _evaluated(self) -> tuple[str, ...]:
        found = set(self.sites.names)
        for key in ("scores/base", "scores/federated", "scores/personal"):
            scores = self.journal.get(key)
            found &= set(scores["sites"]) if scores is not None else found
        local = {site for site in found if self._has_local(site)}
        return tuple(site for site in self.sites.names if site in (local or found))

    def _has_local(self, site: str) -> bool:
        """Whether a site's own model was scored, on the very rows that the federated one was scored on."""
        control, federated = self.journal.get(f"control/local/{site}"), self.journal.get("scores/federated")
        if control is None or federated is None or site not in federated["sites"]:
            return False
        tokens = federated["sites"][site]["tokens"]
        return bool(control["final"][site]["tokens"] == tokens == control["best"]["scores"]["tokens"])

    def metrics(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The whole of metrics.json; `facts` are those that the journal does not know (model, machine, times,
        partition)."""
        federated = self._scores("scores/federated")
        assert federated is not None
        arms: dict[str, Any] = {}
        base = self._scores("scores/base")
        if base is not None:
            arms["base"] = self._arm(base, self._seconds("scores/base"))
        arms["federated"] = {**self._arm(federated, facts["seconds"]["federated"]), "rounds": self._curve("federated")}
        personal = self._scores("scores/personal")
        if personal is not None:
            seconds = self._seconds("scores/personal")
            arms["personal"] = {**self._arm(personal, seconds), "rounds": self._curve("personal")}
        arms |= self._centralised()
        local, best = self._local()
        if local:
            arms["local"] = self._local_arm(local, best)
        commits = {n: r for n, r in self.journal.commits().items() if n > 0}
        rounds = [{"round": n, **_round(r)} for n, r in commits.items()]
        return {
            "format": FORMAT,
            "name": self.recipe.name,
            "seed": self.recipe.seed,
            "arms": arms,
            "gains": self._gains(federated, local, best),
            **({"personal": self._personal(personal, federated, local)} if personal is not None else {}),
            "rounds": rounds,
            "bytes": {
                "up": sum(r["bytes_up"] for r in rounds),
                "down": sum(r["bytes_down"] for r in rounds),
                "adapter": facts["model"]["adapter_bytes"],
                **_received(rounds),
                "codecs": _by_codec(commits),
                "sites": _by_site(commits),
            },
            "privacy": {
                **statement(self.recipe, list(self.journal.commits().values())),
                "secure_sums": self.recipe.privacy.summed,
                "homomorphic": self.recipe.privacy.secure_aggregation == "homomorphic",
                "secure_group_size": self.recipe.privacy.secure_group_size,
            },
            "samples": self._samples(),
            **_arrivals(rounds),
            "not_evaluated": [site for site in self.sites.names if site not in self.evaluated],
            "strategy": {
                "name": self.recipe.federation.strategy.name,
                "options": self.recipe.federation.strategy.options,
            },
            **self._clusters(arms["federated"]["sites"]),
            **facts,
        }

    def _clusters(self, scored: Mapping[str, Any]) -> dict[str, Any]:
        """Who is in which cluster, where there are several global models."""
        clusters = clusters_of(self.journal)
        if not clusters:
            return {}
        losses = {site: summary["loss"] for site, summary in scored.items()}
        return {"clusters": {"adapter": largest(clusters), "found": found(clusters, losses)}}

    def _scores(self, key: str) -> BySite | None:
        found = self.journal.get(key)
        if found is None:
            return None
        return {site: Scores.from_json(found["sites"][site]) for site in self.evaluated}

    def _seconds(self, key: str) -> float:
        found = self.journal.get(key)
        return float(found["seconds"]) if found else 0.0

    def _groups(self, site: str, scores: Scores) -> list[str]:
        """The group of each score. A site that gives its scores as totals gives one, which is a group of its own."""
        groups = self.sites.groups[site]
        return groups if len(groups) == len(scores.nll) else [str(k) for k in range(len(scores.nll))]

    def _options(self) -> dict[str, int]:
        return {"resamples": self.recipe.evaluation.resamples, "seed": self.recipe.seed}

    def _arm(self, scores: BySite, seconds: float) -> dict[str, Any]:
        groups, options = {site: self._groups(site, s) for site, s in scores.items()}, self._options()
        sites = {site: summarise(s, groups[site], **options) for site, s in scores.items()}
        found = {
            "macro_loss": macro(sites),
            "ci95": macro_interval({site: (s, groups[site]) for site, s in scores.items()}, **options),
            **spread(sites),
            "token_accuracy": macro(sites, "token_accuracy"),
            "seconds": seconds,
            "sites": sites,
        }
        for rate in ("exact_match", "choice_accuracy"):
            if all(rate in summary for summary in sites.values()):
                found[rate] = macro(sites, rate)
        return found

    def _curve(self, arm: str) -> list[dict[str, Any]]:
        points = []
        for number in range(self.recipe.federation.rounds + 1):
            sums = self.journal.get(f"curve/{arm}/{number:04d}")
            if sums is not None:
                losses = {site: nats / max(1, tokens) for site, (nats, tokens) in sums.items()}
                points.append({"round": number, "macro_loss": _mean(losses.values()), "sites": losses})
        return points

    def _centralised(self) -> dict[str, Any]:
        found = self.journal.get("control/centralised")
        if found is None:
            return {}
        scores = {site: Scores.from_json(s) for site, s in found["final"].items()}
        rounds = [
            {"round": point["round"], "macro_loss": _mean(point["losses"].values()), "sites": point["losses"]}
            for point in found["rounds"]
        ]
        return {"centralised": {**self._arm(scores, found["seconds"]), "rounds": rounds}}

    def _local(self) -> tuple[BySite, BySite]:
        """Each site's own model on its own rows: after its last round, and at its best on these very rows."""
        last, best = {}, {}
        for site in self.evaluated:
            found = self.journal.get(f"control/local/{site}") if self._has_local(site) else None
            if found is not None:
                last[site] = Scores.from_json(found["final"][site])
                best[site] = Scores.from_json(found["best"]["scores"])
        return last, best

    def _local_arm(self, last: BySite, best: BySite) -> dict[str, Any]:
        seconds, sites = 0.0, {}
        arm = self._arm(last, 0.0)
        for site, summary in arm["sites"].items():
            found = self.journal.get(f"control/local/{site}")
            assert found is not None
            seconds += found["seconds"]
            sites[site] = {
                **summary,
                "best_loss": float(best[site].nll.sum() / best[site].tokens.sum()),
                "best_round": found["best"]["round"],
                "everyone_loss": found.get("everyone_loss"),
                "rounds": [point["losses"][site] for point in found["rounds"]],
            }
        everywhere = [s["everyone_loss"] for s in sites.values()]
        return {
            **arm,
            "seconds": seconds,
            "best_macro_loss": _mean(s["best_loss"] for s in sites.values()),
            "everyone_macro_loss": _mean(everywhere) if None not in everywhere else None,
            "sites": sites,
        }

    def _gains(self, federated: BySite, local: BySite, best: BySite) -> dict[str, Any]:
        options = self._options()
        return {
            site: {
                "local": compare(federated[site], local[site], self._groups(site, local[site]), **options),
                "local_best": compare(federated[site], best[site], self._groups(site, local[site]), **options),
            }
            for site in local
        }

    def _personal(self, personal: BySite, federated: BySite, local: BySite) -> dict[str, Any]:
        """By site: its own model against the global one and against training alone, and the share that it chose."""
        found = self.journal.get("scores/personal")
        assert found is not None
        options, alphas = self._options(), found.get("alpha", {})
        return {
            site: {
                "federated": compare(scores, federated[site], self._groups(site, scores), **options),
                **({"local": compare(scores, local[site], self._groups(site, scores), **options)} if local else {}),
                **({"alpha": alphas[site]} if site in alphas else {}),
            }
            for site, scores in personal.items()
        }

    def _samples(self) -> list[dict[str, Any]]:
        """Prompts that were answered before and after; a networked site may have been away for one of them."""
        before, after = self.journal.get("samples/base"), self.journal.get("samples/federated")
        if before is None or after is None:
            return []
        later = {(answer["site"], answer["prompt"]): answer for answer in after["answers"]}
        pairs = [(b, later.get((b["site"], b["prompt"]))) for b in before["answers"]]
        return [
            {
                "site": b["site"],
                "prompt": b["prompt"],
                "reference": b["reference"],
                "before": b["answer"],
                "after": a["answer"],
            }
            for b, a in pairs
            if a is not None
        ]


def _arrivals(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of an asynchronous run: how many updates were how many versions behind, and each site's share of them."""
    updates = [update for one in rounds for update in one.get("updates", ())]
    if not updates:
        return {}
    staleness = Counter(update["staleness"] for update in updates)
    sites = Counter(update["site"] for update in updates)
    return {
        "arrivals": {
            "staleness": {str(versions): staleness[versions] for versions in sorted(staleness)},
            "shares": {site: sites[site] / len(updates) for site in sorted(sites)},
        }
    }


def _round(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("state", "codecs", "site_bytes")}


def _by_codec(commits: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Updates, and the bytes that they came in, by what made them small."""
    found: dict[str, dict[str, int]] = {}
    for record in commits.values():
        for codec, (updates, num_bytes) in record.get("codecs", {}).items():
            so_far = found.setdefault(codec, {"updates": 0, "bytes": 0})
            so_far["updates"] += updates
            so_far["bytes"] += num_bytes
    return found


def _by_site(commits: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Bytes that each site sent and fetched."""
    found: dict[str, dict[str, int]] = {}
    for record in commits.values():
        for site, (up, down) in record.get("site_bytes", {}).items():
            so_far = found.setdefault(site, {"up": 0, "down": 0})
            so_far["up"] += up
            so_far["down"] += down
    return {site: found[site] for site in sorted(found)}


def _received(rounds: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """What reached the coordinator, where relays make that less than what the sites sent."""
    received = [r["bytes_received"] for r in rounds if "bytes_received" in r]
    return {"received": sum(received)} if received else {}


def _mean(values: Any) -> float:
    found = list(values)
    return float(sum(found) / len(found))
