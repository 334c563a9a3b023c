"""The data as a run sees it: sites with tokens to train on and to test on.

    read → pass over rows without an example or a group → partition → hold out → take → template → tokenise → report

Only rows that are kept are rendered in full and tokenised (with `chunks`, all rows of the kept sites are).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from commonweight.errors import DataError, RecipeError
from commonweight.recipe.schema import DataSpec

from . import chunks
from .draws import rank, sample
from .formats import Row
from .holdout import Split, group_names, group_of_text, grouped_rows, hold_out
from .names import require_values
from .partition import partition, site_names
from .partition_report import SiteCounts, partition_report
from .readers import read
from .templates import Example, Template, template_for
from .tokens import Encoded, TokenCounts, Tokens, encode, leading_tokens, tokenise


@dataclass(frozen=True, eq=False)
class Site:
    """One data owner's examples.

    Args:
        name: unique among the sites.
        train: what it trains on, at least one example.
        heldout: what it is tested on, at least one example; no site trains on any group in it.
        heldout_examples: the texts of `heldout`, one each, in the same order.
        groups: the group of each of them (patient, disease …); without `holdout.by`, rows with the same text share
            one. With `chunks`: the group in which the piece begins, or the piece's own number.
        train_groups: the group of each training example, in the order of `train`; empty with `chunks`.
        aside: training examples that nothing is trained on (`keep_aside`).
        owners: whose each training example is, as numbers, where privacy is of groups; else empty.
    """

    name: str
    train: Tokens
    heldout: Tokens
    heldout_examples: list[Example]
    groups: list[str]
    train_groups: tuple[str, ...] = ()
    aside: Tokens | None = None
    owners: tuple[int, ...] = ()

    @property
    def units(self) -> list[list[int]]:
        """The training examples that privacy protects together: those of each owner, or each by itself."""
        if not self.owners:
            return [[example] for example in range(len(self.train))]
        found: dict[int, list[int]] = {}
        for example, owner in enumerate(self.owners):
            found.setdefault(owner, []).append(example)
        return list(found.values())


@dataclass(frozen=True)
class Job:
    """What turning rows into tokens needs.

    Args:
        owner: the field that says whose a row is, or None.
    """

    spec: DataSpec
    seed: int
    tokenizer: Any
    max_tokens: int
    template: Template
    owner: str | None = None


class Built(NamedTuple):
    """A site, and what was cut from its examples."""

    site: Site
    truncated: int
    dropped: int
    unused: int


def load_sites(
    spec: DataSpec, *, seed: int, tokenizer: Any, max_tokens: int, owner: str | None = None
) -> tuple[list[Site], dict[str, Any]]:
    """Read, partition, split and tokenise.

    Args:
        spec: the recipe's data section.
        seed: the recipe's seed; it decides the partition, the held-out split and what is taken.
        tokenizer: a transformers tokenizer.
        max_tokens: bound on an example's tokens.
        owner: the field that says whose a row is, for privacy of groups: every row that may be trained on has a value.

    Returns:
        The sites in natural order of their names, and the partition report (`partition_report.py`), with `digest`
        over all tokens: equal digests mean equal data; and `layout`, the template's kind.

    Raises:
        RecipeError: the recipe names a field that the data lacks, or its template cannot be read.
        DataError: the data cannot be read, divided, split or tokenised.
    """
    reading = read(spec, seed=seed)
    job = Job(spec, seed, tokenizer, max_tokens, template_for(spec, reading.rows, tokenizer), owner)
    usable, skipped = _usable(reading.rows, job)
    grouped = usable if spec.holdout.by is None else grouped_rows(usable, spec.holdout.by)
    placed = partition(grouped, spec.sites, seed)
    groups = _groups(placed, job)
    if owner is not None:
        require_values([row for rows in placed.values() for row in rows], owner, "privacy.by")
    built, counts = (_chunked_sites if spec.chunks else _row_sites)(placed, groups, job)
    by_site = Counter(site_names(skipped, spec.sites) or [])
    counts = {name: replace(count, skipped=by_site[name]) for name, count in counts.items()}
    sites = [one.site for one in built]
    num_groups = len({group for names in groups.values() for group in names})
    report = partition_report(
        sites, counts, path=spec.path, group_field=spec.holdout.by, num_groups=num_groups, seed=seed
    )
    facts = {
        "layout": job.template.kind,
        "rows_skipped": len(skipped),
        "rows_ungrouped": len(usable) - len(grouped),
        "paragraphs_unmatched": reading.unmatched,
    }
    return sites, report | facts


def _usable(rows: Sequence[Row], job: Job) -> tuple[list[Row], list[Row]]:
    """Rows that give an example, and the others."""
    usable: list[Row] = []
    skipped: list[Row] = []
    for row in rows:
        (skipped if job.template.key(row) is None else usable).append(row)
    if not usable:
        raise DataError(
            f"none of the {len(rows):,} rows of {job.spec.path} gives an example: read as {job.template.kind}, "
            "each has a null or missing field, or nothing to learn",
            hint="correct data.prompt and data.completion (or data.text, data.messages), or fill in the data",
        )
    return usable, skipped


def _groups(placed: dict[str, list[Row]], job: Job) -> dict[str, list[str]]:
    """The group of each row, by site."""
    rows = [row for site in placed.values() for row in site]
    if job.spec.holdout.by is None:
        names = [group_of_text(job.template.key(row) or "") for row in rows]
    else:
        names = group_names(rows, job.spec.holdout.by)
    groups, start = {}, 0
    for name, site in placed.items():
        groups[name] = names[start : start + len(site)]
        start += len(site)
    return groups


def _row_sites(
    placed: dict[str, list[Row]], groups: dict[str, list[str]], job: Job
) -> tuple[list[Built], dict[str, SiteCounts]]:
    """One example a row."""
    splits = hold_out(groups, job.spec.holdout, seed=job.seed)
    built = [_row_site(name, rows, groups[name], splits[name], job) for name, rows in placed.items()]
    return built, _counts(placed, splits, built)


def _counts(placed: dict[str, list[Row]], splits: dict[str, Split], built: Sequence[Built]) -> dict[str, SiteCounts]:
    return {
        one.site.name: SiteCounts(
            rows=len(placed[one.site.name]),
            withheld=len(splits[one.site.name].withheld),
            unused=one.unused,
            truncated=one.truncated,
            dropped=one.dropped,
        )
        for one in built
    }


def _row_site(name: str, rows: list[Row], groups: list[str], split: Split, job: Job) -> Built:
    taken = sample(split.train, job.spec.sites.take, seed=job.seed, purpose=("take", name))
    train, trained, cut = _tokenised([job.template.example(rows[i]) for i in taken], name, "training", job)
    by = job.spec.holdout.by
    examples = [replace(job.template.example(rows[i]), group=groups[i] if by else None) for i in split.heldout]
    heldout, kept, heldout_cut = _tokenised(examples, name, "held-out", job)
    site = Site(
        name,
        train,
        heldout,
        [examples[i] for i in kept],
        [groups[split.heldout[i]] for i in kept],
        tuple(groups[taken[i]] for i in trained),
        owners=_owners([rows[taken[i]] for i in trained], job),
    )
    truncated, dropped = cut.truncated + heldout_cut.truncated, cut.dropped + heldout_cut.dropped
    return Built(site, truncated, dropped, len(split.train) - len(taken))


def _owners(rows: list[Row], job: Job) -> tuple[int, ...]:
    """Whose each row is: owners are numbered as they come."""
    if job.owner is None:
        return ()
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(name, len(numbers)) for name in group_names(rows, job.owner, "privacy.by"))


def _tokenised(examples: list[Example], name: str, part: str, job: Job) -> tuple[Tokens, list[int], TokenCounts]:
    tokens, kept, counts = tokenise(
        examples, job.tokenizer, max_tokens=job.max_tokens, end_of_text=job.spec.end_of_text
    )
    if not kept:
        raise DataError(
            f"every {part} example of site {name!r} is longer than max_tokens {job.max_tokens:,} before its completion "
            "begins, so that nothing of it could be learned",
            hint="raise training.max_tokens, shorten data.prompt, or leave the site out with data.sites.only",
        )
    return tokens, kept, counts


def _chunked_sites(
    placed: dict[str, list[Row]], groups: dict[str, list[str]], job: Job
) -> tuple[list[Built], dict[str, SiteCounts]]:
    """Pieces of `max_tokens` cut from each site's joined rows."""
    if job.template.kind != "text":
        raise RecipeError(
            f"data.chunks joins plain text, but the rows of {job.spec.path} are read as {job.template.kind}",
            hint="set data.text, or data.chunks: false",
        )
    encoded = {name: _encoded(rows, job) for name, rows in placed.items()}
    sizes = {name: [len(ids) for ids, _ in rows] for name, rows in encoded.items()}
    length = chunks.text_per_piece(leading_tokens(job.tokenizer), job.max_tokens)
    splits = hold_out(groups, job.spec.holdout, seed=job.seed, sizes=sizes, size_of_example=length)
    built = [_chunked_site(name, rows, groups[name], splits[name], job) for name, rows in encoded.items()]
    return built, _counts(placed, splits, built)


def _encoded(rows: list[Row], job: Job) -> list[Encoded]:
    examples = [job.template.example(row) for row in rows]
    return list(encode(examples, job.tokenizer, end_of_text=job.spec.end_of_text, begin=False))


def _chunked_site(name: str, rows: list[Encoded], groups: list[str], split: Split, job: Job) -> Built:
    prefix = leading_tokens(job.tokenizer)
    pieces, _ = chunks.cut([rows[i] for i in split.train], prefix, job.max_tokens)
    taken = sample(range(len(pieces)), job.spec.sites.take, seed=job.seed, purpose=("take", name))
    heldout, starts = chunks.cut([rows[i] for i in split.heldout], prefix, job.max_tokens)
    heldout, starts = (
        heldout.subset(range(len(heldout))[: job.spec.holdout.examples]),
        starts[: job.spec.holdout.examples],
    )
    if not taken or not len(heldout):
        raise DataError(
            f"site {name!r} has too little text for one piece to train on and one held out",
            hint="leave small sites out with data.sites.min_rows, data.sites.largest or data.sites.only",
        )
    by = job.spec.holdout.by
    labels = [groups[split.heldout[start]] if by else f"{name}/piece-{i + 1}" for i, start in enumerate(starts)]
    texts = [job.tokenizer.decode(heldout.ids_of(i), skip_special_tokens=True) for i in range(len(heldout))]
    examples = [Example(((text, True),), label if by else None) for text, label in zip(texts, labels, strict=True)]
    site = Site(name, pieces.subset(taken), heldout, examples, labels)
    return Built(site, 0, 0, len(pieces) - len(taken))


def keep_aside(site: Site, share: float, *, seed: int) -> Site:
    """The site with a share of its training examples, one at least, kept out of training; drawn by the seed.

    Whole groups are kept aside, as whole groups are held out, as long as some are left to train on: a model that has
    seen a group would look better on the rest of it than on new ones.

    Raises:
        DataError: it has a single one.
    """
    total = len(site.train)
    if total < 2:
        raise DataError(
            f"site {site.name!r} has one training example, of which none can be kept aside to choose by",
            hint="give the strategy a fixed alpha, or leave small sites out with data.sites.min_rows",
        )
    count = min(total - 1, max(1, round(share * total)))
    drawn = _drawn_groups(site, count, seed) or sample(range(total), count, seed=seed, purpose=("aside", site.name))
    kept = sorted(set(range(total)).difference(drawn))
    groups = tuple(site.train_groups[i] for i in kept) if site.train_groups else ()
    owners = tuple(site.owners[i] for i in kept) if site.owners else ()
    aside = site.train.subset(drawn)
    return replace(site, train=site.train.subset(kept), train_groups=groups, owners=owners, aside=aside)


def _drawn_groups(site: Site, count: int, seed: int) -> list[int]:
    """Training examples of whole groups, until there are `count`; none if no example would be left."""
    drawn: set[int] = set()
    for group in sorted(set(site.train_groups), key=lambda group: rank(seed, f"aside/{site.name}", group)):
        if len(drawn) < count:
            drawn |= {i for i, name in enumerate(site.train_groups) if name == group}
    return sorted(drawn) if len(drawn) < len(site.train) else []
