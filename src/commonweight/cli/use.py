"""Commands that use a run's result: evaluate, chat, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RecipeError
from .terminal import JsonOption, RunArgument, SetOption, number, options, print_json, table

RoundOption = Annotated[int | None, typer.Option("--round", help="Use the global adapter after this round.", min=1)]
BaseOption = Annotated[bool, typer.Option("--base", help="Use the base model, without the adapter.")]


def evaluate(
    run: RunArgument,
    set_: SetOption = None,
    round: RoundOption = None,
    base: BaseOption = False,
    exact_match: Annotated[
        bool, typer.Option("--exact-match", help="Also generate answers and count exact matches.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Score a run's model on its sites' held-out rows, or on other data (`--set data.path=…`)."""
    options.json = json
    from ..result import open_result, score

    result = open_result(run, set_ or (), round=round, base=base)
    sites = score(result, exact_match=exact_match)
    macro = sum(site["loss"] for site in sites.values()) / len(sites)
    if json:
        print_json({"run": str(run), "round": round, "base": base, "macro_loss": macro, "sites": sites})
        return
    extra = [key for key in ("exact_match", "choice_accuracy") if all(key in site for site in sites.values())]
    rows = [
        (
            name,
            str(site["examples"]),
            number(site["loss"]),
            "–" if not site["ci95"] else f"{site['ci95'][0]:.3f} … {site['ci95'][1]:.3f}",
            number(site["perplexity"], 1),
            number(site["token_accuracy"]),
            *(number(site[key]) for key in extra),
        )
        for name, site in sites.items()
    ]
    columns = (
        "site",
        "rows",
        "loss",
        "95 % interval",
        "perplexity",
        "token accuracy",
        *(k.replace("_", " ") for k in extra),
    )
    table(columns, rows, right=(1, 2, 4, *range(5, len(columns))))
    typer.echo(f"\nmean over sites {macro:.4f} nats a token")


def chat(
    run: RunArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and end.")] = None,
    round: RoundOption = None,
    base: BaseOption = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the text to the model as it is, without the recipe's prompt.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length bound of an answer.")] = 128,
    json: JsonOption = False,
) -> None:
    """Ask a run's model."""
    options.json = json
    if prompt is None and (json or not sys.stdin.isatty()):
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise RecipeError("there is nothing to ask: standard input is empty", hint="give a question by --prompt")
    from ..result import Conversation, open_result

    talk = Conversation(open_result(run, (), round=round, base=base), raw=raw, max_new_tokens=max_new_tokens)
    if prompt is not None:
        answer = talk.ask(prompt)
        print_json({"prompt": prompt, "answer": answer}) if json else typer.echo(answer)
        return
    typer.echo("Ask; an empty line ends.")
    while line := _line():
        typer.echo(talk.ask(line))


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
    json: JsonOption = False,
) -> None:
    """Write a run's adapter, or with --merge the whole model, for other programs to open."""
    options.json = json
    from ..result import export_result

    facts: dict[str, Any] = export_result(run, output, merge=merge, round=round)
    if json:
        print_json(facts)
    else:
        typer.echo(f"wrote {facts['kind']} ({facts['bytes'] / 1e6:.1f} MB) to {output}")
