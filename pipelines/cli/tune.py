"""`dml tune`: a search of settings."""

from functools import partial
from typing import Annotated

import typer

from pipelines.cli.arguments import Assignments, Json, split_arguments
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.cli.tables import describe_sweep
from pipelines.console import messages


def tune(
    arguments: Assignments = None,
    space: Annotated[str | None, typer.Option(help="base, iaa, sgar, namr, all, joined by +; or FILE.py")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Points to try; of a grid, points on each range.")] = 32,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at a time. Default: as many as fit.")] = None,
    search: Annotated[
        str | None, typer.Option(help="optuna (TPE), random or grid", show_default="optuna; with pbt random")
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="asha: what falls behind is ended early; none; pbt: settings change on the way")
    ] = "asha",
    folds: Annotated[int, typer.Option(min=1, help="Train each point with so many choices of validation classes.")] = 1,
    final_seeds: Annotated[
        int, typer.Option(min=0, help="Tested runs of the winner, and of the defaults; 0: search only.")
    ] = 5,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Go on with a sweep that was interrupted.")] = None,
    as_json: Json = False,
) -> None:
    """Search settings on validation classes; then test the winner and the defaults once, over the same seeds.

    Example: dml tune grocery --space namr --samples 32 data.root=GroceryStoreDataset name=sweep
    """
    with exit_on_error():
        from pipelines.sweeps.records import SweepOptions
        from pipelines.sweeps.sweep import resume_sweep, start_sweep

        if resume:
            run = partial(resume_sweep, resume, storage_of_sweep(resume, arguments, space), messages)
            hint = f"dml tune --resume {resume} goes on"
        else:
            options = SweepOptions(space or "", samples, concurrent, search, schedule, folds, final_seeds)
            run = partial(start_sweep, *split_arguments(arguments), options, messages)
            hint = "dml tune --resume NAME goes on, NAME being the sweep's"
    with exit_on_error(hint):
        outcome = run()
    print_result(as_json, outcome.to_json(), *describe_sweep(outcome))


def storage_of_sweep(name: str, arguments: list[str] | None, space: str | None) -> str:
    """Return the FOLDER of storage=FOLDER, all that may go with --resume."""
    recipe_or_values = arguments or ["storage=runs"]
    storage = recipe_or_values[0].removeprefix("storage=")
    if space or recipe_or_values != [f"storage={storage}"]:
        raise ValueError(f"--resume {name} takes all else from the sweep; only storage=FOLDER may go with it")
    return storage
