"""Commands that begin something: demo, init, validate, run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RecipeError, StateError
from .folders import choose_output, tidy
from .terminal import JsonOption, SetOption, begin, options, print_json, say

OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The run's folder. Default: runs/NAME, numbered if taken.", metavar="DIR"),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with a run that was stopped, from its last committed round.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]
RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a built-in recipe (demo).", metavar="RECIPE")
]


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: OutputOption = None,
    resume: ResumeOption = False,
    ledger: Annotated[
        Path | None,
        typer.Option(
            "--ledger",
            help="Charge what the run costs its sites to the ledger in this file; its budget may end the run.",
            metavar="FILE",
        ),
    ] = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Carry out a recipe: federated training, its control arms, evaluation and report.

    Paths in a recipe are relative to the folder that you are in.
    """
    begin(json)
    from ..recipe.load import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    _run(loaded, choose_output(output, loaded.name, resume=resume), resume=resume, quiet=quiet, ledger=ledger)


def demo(
    set_: SetOption = None,
    output: OutputOption = None,
    resume: ResumeOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Run the built-in example: six sites, a small model, about a minute."""
    begin(json)
    from ..recipe.load import load_recipe

    loaded = load_recipe("demo", set_ or ())
    _run(loaded, choose_output(output, loaded.name, resume=resume), resume=resume, quiet=quiet)


def _run(recipe: Any, output: Path, *, resume: bool, quiet: bool, ledger: Path | None = None) -> None:
    from .progress import Progress, print_result

    if resume and (output / "metrics.json").exists():
        raise StateError(f"the run in {output} has ended", hint=f"see it by: commonweight report {output}")
    progress = Progress(quiet=quiet or options.json)
    with tidy(output), progress:
        from ..launch import run as launch

        metrics = launch(recipe, output, resume=resume, listeners=(progress.listen,), ledger=ledger)
    if options.json:
        print_json({"folder": str(output), "report": str(output / "report.html"), **metrics})
    else:
        print_result(metrics, output)


def init(
    directory: Annotated[Path, typer.Argument(help="Folder to write to.", metavar="DIR")] = Path(),
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="What your data is: instruction (rows with instruction and output), chat (rows with messages) or "
            "text (plain text files); or demo, the built-in example.",
            metavar="KIND",
        ),
    ] = "instruction",
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
) -> None:
    """Write a commented recipe to start from, and its JSON Schema for editors.

    The files are recipe.yaml and recipe.schema.json.
    """
    import json as json_module

    from ..federation.folder import write_text
    from ..recipe.docs import json_schema
    from ..recipe.starters import starter

    text = starter(kind)
    target = directory / "recipe.yaml"
    if target.exists() and not force:
        raise RecipeError(f"{target} exists already", hint="choose another folder, or replace it by --force")
    write_text(target, text)
    write_text(directory / "recipe.schema.json", json_module.dumps(json_schema(), indent=1) + "\n")
    say(f"wrote {target} and {directory / 'recipe.schema.json'}")
    say(f"next: edit it, then `commonweight validate {target} --data`, then `commonweight run {target}`")


def validate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    data: Annotated[bool, typer.Option("--data", help="Also read the data and show how it falls to sites.")] = False,
    network: Annotated[
        bool, typer.Option("--network", help="Check it for `submit` and `sandbox`: not everything works there.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check a recipe without running it."""
    begin(json)
    from ..federation.asynchronous import check_asynchronous
    from ..recipe.load import check_methods, load_recipe
    from ..recipe.resolved import recipe_digest

    loaded = load_recipe(recipe, set_ or ())
    check_methods(loaded, network=network)
    check_asynchronous(loaded, None)
    partition = _partition(loaded) if data else None
    if json:
        print_json(
            {
                "valid": True,
                "digest": recipe_digest(loaded),
                "recipe": loaded.model_dump(mode="json"),
                "partition": partition,
            }
        )
        return
    rounds, strategy = loaded.federation.rounds, loaded.federation.strategy.name
    plural = "" if rounds == 1 else "s"
    say(f"{recipe} is valid: {rounds} round{plural} of {strategy}, digest {recipe_digest(loaded)[:12]}")
    if partition is not None:
        from .progress import print_partition

        print_partition(partition)


def _partition(recipe: Any) -> dict[str, Any]:
    from ..data.sites import load_sites
    from ..federation.asynchronous import check_asynchronous
    from ..federation.cohort import check_cohort, check_separation
    from ..model.base import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    sites, partition = load_sites(
        recipe.data,
        seed=recipe.seed,
        tokenizer=tokenizer,
        max_tokens=recipe.training.max_tokens,
        owner=recipe.privacy.by,
    )
    check_cohort(len(sites), recipe.federation)
    check_separation(len(sites), recipe)
    check_asynchronous(recipe, len(sites))
    return partition
