"""Commands that use a run's result: evaluate, chat, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RecipeError
from .folders import whole_or_nothing
from .terminal import JsonOption, RunArgument, SetOption, begin, interval, number, print_json, say, table

RoundOption = Annotated[
    int | None, typer.Option("--round", help="Use the global adapter after this round.", min=1, metavar="N")
]
SiteOption = Annotated[
    str | None,
    typer.Option("--site", help="Use this site's model, where sites have different ones.", metavar="NAME"),
]
BaseOption = Annotated[bool, typer.Option("--base", help="Use the base model, without the adapter.")]


def evaluate(
    run: RunArgument,
    set_: SetOption = None,
    round: RoundOption = None,
    site: SiteOption = None,
    base: BaseOption = False,
    exact_match: Annotated[
        bool, typer.Option("--exact-match", help="Also generate answers and count exact matches.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Score a run's model on its sites' held-out rows, or on other data.

    The rows are those that the run's recipe gives; `--set data.path=other.jsonl` reads others by the same rules. Where
    the run has clusters, each site is scored with its own cluster's model; with --site all are scored with that one's.
    A site that has a model of its own is scored with it on its own rows.
    """
    begin(json)
    _check_choice(round, base, site)
    from ..result import score_run

    sites = score_run(run, set_ or (), round=round, base=base, site=site, exact_match=exact_match)
    macro = sum(site["loss"] for site in sites.values()) / len(sites)
    if json:
        print_json({"run": str(run), "round": round, "site": site, "base": base, "macro_loss": macro, "sites": sites})
        return
    extra = [key for key in ("exact_match", "choice_accuracy") if all(key in site for site in sites.values())]
    columns = ("site", "rows", "loss", "95 % interval", "perplexity", "tokens right")
    rows = [_scores(name, site, extra) for name, site in sites.items()]
    right = (1, 2, *range(4, len(columns) + len(extra)))
    table((*columns, *(key.replace("_", " ") for key in extra)), rows, right=right)
    say(f"\nmean over sites {macro:.4f} nats a token")


def _scores(name: str, site: dict[str, Any], extra: list[str]) -> tuple[str, ...]:
    return (
        name,
        str(site["examples"]),
        number(site["loss"]),
        interval(site["ci95"]),
        number(site["perplexity"], 1),
        *(number(site[key]) for key in ("token_accuracy", *extra)),
    )


def _check_choice(round: int | None, base: bool, site: str | None) -> None:
    if base and round is not None:
        raise RecipeError("--base and --round exclude each other", hint="the base model is the same in every round")
    if base and site is not None:
        raise RecipeError("--base and --site exclude each other", hint="the base model is the same for every site")


def chat(
    run: RunArgument,
    set_: SetOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and end.", metavar="TEXT")] = None,
    round: RoundOption = None,
    site: SiteOption = None,
    base: BaseOption = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the text to the model as it is, without the recipe's prompt.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Length bound of an answer.", metavar="N")
    ] = 128,
    json: JsonOption = False,
) -> None:
    """Ask a run's model.

    On a terminal, question by question; else the question is what standard input holds, or --prompt.
    """
    begin(json)
    _check_choice(round, base, site)
    prompt = _question(prompt, json)
    from ..result import Conversation, open_result

    result = open_result(run, set_ or (), round=round, base=base, site=site)
    talk = Conversation(result, raw=raw, max_new_tokens=max_new_tokens)
    if prompt is not None:
        answer = talk.ask(prompt)
        print_json({"prompt": prompt, "answer": answer}) if json else say(answer)
        return
    say("Ask; an empty line ends.")
    while line := _line():
        say(talk.ask(line) or "(nothing)")


def _question(prompt: str | None, json: bool) -> str | None:
    """What --prompt or standard input asks; None on a terminal."""
    if prompt is None and not json and sys.stdin.isatty():
        return None
    asked = sys.stdin.read() if prompt is None else prompt
    if not asked.strip():
        where = "standard input" if prompt is None else "--prompt"
        raise RecipeError(f"there is nothing to ask: {where} is empty", hint="give a question by --prompt")
    return asked.strip() if prompt is None else asked


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def export(
    run: RunArgument,
    output: Annotated[Path, typer.Argument(help="Folder to write: new or empty.", metavar="DIR")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold the adapter into the base and write full weights.")
    ] = False,
    round: RoundOption = None,
    site: SiteOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Write a run's adapter, or with --merge the whole model, for other programs."""
    begin(json)
    _check_choice(round, False, site)
    from ..evaluate.text import size
    from ..result import export_result

    with whole_or_nothing(output):
        facts: dict[str, Any] = export_result(run, output, set_ or (), merge=merge, round=round, site=site)
    if json:
        print_json(facts)
    else:
        say(f"wrote {facts['kind']} ({size(facts['bytes'])}) to {output}")
