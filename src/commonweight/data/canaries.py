"""Canaries: made-up rows planted among the real ones, so that an audit can ask which of them the model has seen.

A canary has the shape of a training row drawn from its site: its length, its special tokens and what of it is learned;
every other token is drawn evenly from the vocabulary. A fair coin of its own decides whether it is planted. All is
drawn from the recipe's seed. Canaries are never held out, and what is said of the data does not count them. Where
privacy is of groups, each, with its copies, is a group of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import DataError
from ..recipe.schema import CanariesSpec
from .draws import generator
from .names import require_sites
from .sites import Site
from .tokens import Ids, Tokens, concatenate

#: the list in a run's folder; whoever has it and the model can tell how well it remembers, so it stays with its owner
FILE = "canaries.json"
#: tokens that are learned and not special; with fewer, canaries would resemble each other
_MIN_TOKENS = 4


@dataclass(frozen=True, eq=False)
class Canaries:
    """The canaries of a run.

    Args:
        tokens: of each.
        sites: the site of each.
        planted: how the coin of each fell.
        repeat: how often a planted one is among its site's rows.
    """

    tokens: Tokens
    sites: tuple[str, ...]
    planted: tuple[bool, ...]
    repeat: int

    def __len__(self) -> int:
        return len(self.sites)

    def facts(self) -> dict[str, int]:
        """What a run's metrics say of them."""
        return {"count": len(self), "planted": sum(self.planted), "repeat": self.repeat}

    def to_json(self, tokenizer: Any) -> dict[str, Any]:
        """Plain data, with each canary's text for people to look at."""
        rows = [
            {
                "site": site,
                "planted": planted,
                "ids": self.tokens.ids_of(i).tolist(),
                "labelled": self.tokens.labelled_of(i).astype(int).tolist(),
                "text": tokenizer.decode(self.tokens.ids_of(i).tolist()),
            }
            for i, (site, planted) in enumerate(zip(self.sites, self.planted, strict=True))
        ]
        return {"repeat": self.repeat, "canaries": rows}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Canaries:
        """Raises KeyError, TypeError, ValueError: it is not what `to_json` gave."""
        rows = value["canaries"]
        encoded = [(np.array(row["ids"], np.int32), np.array(row["labelled"], np.bool_)) for row in rows]
        planted = tuple(bool(row["planted"]) for row in rows)
        return cls(Tokens.of(encoded), tuple(str(row["site"]) for row in rows), planted, int(value["repeat"]))


def plant(sites: Sequence[Site], spec: CanariesSpec, *, seed: int, tokenizer: Any) -> tuple[list[Site], Canaries]:
    """Draw canaries, deal them to the sites in turn, and put those whose coin says so among the training rows.

    Returns:
        The sites, those with canaries changed, and all canaries, planted or not.

    Raises:
        RecipeError: `sites` names one that there is not.
        DataError: a site has no row with enough learned tokens to take a shape from.
    """
    names = [site.name for site in sites]
    wanted = names if spec.sites == "all" else list(spec.sites)
    require_sites(wanted, names, "privacy.canaries.sites")
    by_name = {site.name: site for site in sites}
    owners = tuple(wanted[j % len(wanted)] for j in range(spec.count))
    words = _words(tokenizer)
    shapes = {name: _shapes(by_name[name], words) for name in dict.fromkeys(owners)}
    drawn = [_draw(by_name[owner].train, shapes[owner], words, seed, j) for j, owner in enumerate(owners)]
    coins = generator(seed, "canaries", "coins").random(spec.count) < 0.5
    canaries = Canaries(Tokens.of(drawn), owners, tuple(coins.tolist()), spec.repeat)
    return [_with(site, canaries) for site in sites], canaries


def _words(tokenizer: Any) -> Ids:
    """The vocabulary without special tokens."""
    special = set(tokenizer.all_special_ids)
    return np.array([token for token in range(len(tokenizer)) if token not in special], np.int32)


def _shapes(site: Site, words: Ids) -> list[int]:
    """The training rows that a canary may take its shape from."""
    train = site.train
    free = np.isin(train.ids, words) & train.labelled
    found = [i for i in range(len(train)) if free[train.bounds[i] : train.bounds[i + 1]].sum() >= _MIN_TOKENS]
    if not found:
        raise DataError(
            f"no training row of site {site.name!r} has {_MIN_TOKENS} learned tokens: too short for canaries",
            hint="name other sites by privacy.canaries.sites, or leave privacy.canaries out",
        )
    return found


def _draw(train: Tokens, shapes: list[int], words: Ids, seed: int, number: int) -> tuple[Ids, Any]:
    draw = generator(seed, "canaries", str(number))
    like = shapes[int(draw.integers(len(shapes)))]
    ids = train.ids_of(like).copy()
    free = np.isin(ids, words)
    ids[free] = draw.choice(words, size=int(free.sum()))
    return ids, train.labelled_of(like).copy()


def _with(site: Site, canaries: Canaries) -> Site:
    own = [
        i
        for i, (name, planted) in enumerate(zip(canaries.sites, canaries.planted, strict=True))
        if planted and name == site.name
    ]
    if not own:
        return site
    rows = [i for i in own for _ in range(canaries.repeat)]
    train = concatenate([site.train, canaries.tokens.subset(rows)])
    groups = (*site.train_groups, *(f"canary/{i}" for i in rows)) if site.train_groups else ()
    owners = (*site.owners, *(len(site.owners) + i for i in rows)) if site.owners else ()
    return replace(site, train=train, train_groups=groups, owners=owners)
