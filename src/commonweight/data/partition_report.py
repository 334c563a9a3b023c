"""How the data fell to sites, in figures: what a reader needs to judge every later figure.

Per site: `rows` that it had; `skipped` ones that gave no example (natural sites only); `withheld` ones, neither trained
nor tested on, as their group is held out; `unused` ones beyond `take`; then what the model sees: examples, tokens
and label tokens, for training and held out; `truncated` at max_tokens; `dropped`, as nothing learned was within it.

Over sites: `size_gini`, the Gini coefficient of training examples (0: all alike, towards 1: one site has all);
`largest_over_smallest` of them; with `holdout.by`, the number of `groups` and of those held out; `heterogeneity`: the
mean over sites of the Jensen-Shannon divergence, in bits and so in [0, 1], between the site's distribution of
training tokens and the pooled one (Lin 1991, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf.
Theory 37(1), with equal weights). Small sites diverge by chance alone, so `heterogeneity_iid` gives the same
figure after dealing the same training examples at random to sites of the same sizes.

`heldout_seen_in_training` counts held-out examples of which some site trains on an identical one, token for token:
0 when rows are grouped by their own text and uncut; above it, held-out figures flatter memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .draws import generator
from .tokens import Tokens, concatenate

if TYPE_CHECKING:
    from .sites import Site

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SiteCounts:
    """What became of one site's rows (and, after tokenising, examples); see the module's text."""

    rows: int
    skipped: int = 0
    withheld: int = 0
    unused: int = 0
    truncated: int = 0
    dropped: int = 0


def partition_report(
    sites: Sequence[Site],
    counts: Mapping[str, SiteCounts],
    *,
    path: str,
    group_field: str | None,
    num_groups: int,
    seed: int,
) -> dict[str, Any]:
    """All of it as one JSON-able dict; `sites` has one entry a site, in the sites' order.

    Args:
        sites: the final sites, at least one.
        counts: by site name.
        path: `data.path`, for the reader.
        group_field: `holdout.by`.
        num_groups: different groups in the sites' rows.
        seed: decides the reference reshuffle.
    """
    per_site = {site.name: {**asdict(counts[site.name]), **_token_counts(site)} for site in sites}
    totals = {key: sum(entry[key] for entry in per_site.values()) for key in per_site[sites[0].name]}
    trained = np.array([len(site.train) for site in sites], np.int64)
    divergence, by_chance = heterogeneity([site.train for site in sites], seed)
    return {
        "path": path,
        "digest": data_digest(sites),
        "num_sites": len(sites),
        "sites": per_site,
        "totals": totals,
        "group_field": group_field,
        "groups": num_groups if group_field else None,
        "groups_heldout": len({group for site in sites for group in site.groups}) if group_field else None,
        "size_gini": gini(trained),
        "largest_over_smallest": float(trained.max() / trained.min()),
        "heterogeneity": divergence,
        "heterogeneity_iid": by_chance,
        "heldout_seen_in_training": seen_in_training(sites),
    }


def _token_counts(site: Site) -> dict[str, int]:
    return {
        "train_examples": len(site.train),
        **({"train_groups": len(site.units)} if site.owners else {}),
        "train_tokens": len(site.train.ids),
        "train_label_tokens": site.train.num_label_tokens,
        "heldout_examples": len(site.heldout),
        "heldout_tokens": len(site.heldout.ids),
        "heldout_label_tokens": site.heldout.num_label_tokens,
    }


def data_digest(sites: Sequence[Site]) -> str:
    """SHA-256, in hexadecimal, over every site's name, tokens, labels and bounds, in order; and over whose the training
    examples are, where that is known."""
    digest = hashlib.sha256()
    for site in sites:
        parts = [site.name.encode(), *_bytes_of(site.train), *_bytes_of(site.heldout)]
        if site.owners:
            parts.append(np.array(site.owners, "<i8").tobytes())
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _bytes_of(tokens: Tokens) -> tuple[bytes, bytes, bytes]:
    ids, bounds = tokens.ids.astype("<i4"), tokens.bounds.astype("<i8")
    return ids.tobytes(), tokens.labelled.astype(np.uint8).tobytes(), bounds.tobytes()


def gini(sizes: Ints) -> float:
    """Gini coefficient of non-negative sizes [K], not all 0: half the mean absolute difference over the mean."""
    ascending = np.sort(sizes).astype(np.float64)
    places = np.arange(1, len(ascending) + 1)
    return float(
        2 * (places * ascending).sum() / (len(ascending) * ascending.sum()) - (len(ascending) + 1) / len(ascending)
    )


def heterogeneity(parts: Sequence[Tokens], seed: int) -> tuple[float, float]:
    """Mean divergence of sites from the pool in bits, and the same after a random reshuffle of the examples."""
    pool = concatenate(parts)
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    shuffled = generator(seed, "report", "iid reference").permutation(owners)
    return _mean_divergence(pool, owners), _mean_divergence(pool, shuffled)


def _mean_divergence(pool: Tokens, owners: Ints) -> float:
    """Over sites, from the tokens of all examples and the owner of each example [N]."""
    words, which = np.unique(pool.ids, return_inverse=True)
    owner_of_token = np.repeat(owners, pool.lengths)
    order = np.argsort(owner_of_token, kind="stable")
    edges = np.searchsorted(owner_of_token[order], np.arange(owners.max() + 2))
    pooled = np.bincount(which, minlength=len(words))
    by_site = [np.bincount(which[order[a:b]], minlength=len(words)) for a, b in pairwise(edges)]
    return float(np.mean([js_divergence(site, pooled) for site in by_site]))


def js_divergence(p: Ints, q: Ints) -> float:
    """Jensen-Shannon divergence of two count vectors [V], in bits: 0 alike, 1 disjoint."""
    p_V, q_V = p / p.sum(), q / q.sum()
    value = _entropy((p_V + q_V) / 2) - (_entropy(p_V) + _entropy(q_V)) / 2
    return min(1.0, max(0.0, value))


def _entropy(p_V: Floats) -> float:
    seen = p_V[p_V > 0]
    return float(-(seen * np.log2(seen)).sum())


def seen_in_training(sites: Sequence[Site]) -> int:
    """Held-out examples whose tokens are exactly those of a training example, at any site."""
    trained = {site.train.ids_of(i).tobytes() for site in sites for i in range(len(site.train))}
    return sum(site.heldout.ids_of(i).tobytes() in trained for site in sites for i in range(len(site.heldout)))
