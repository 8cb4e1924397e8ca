"""Arguments and options that several commands share."""

from typing import Annotated, Any

import typer


def config_of(arguments: list[str] | None) -> Any:
    """RECIPE (default glyphs) and key=value in any order."""
    from pipelines.config.recipe import load_recipe

    arguments = arguments or []
    named = [a for a in arguments if "=" not in a]
    if len(named) > 1:
        raise ValueError(f"one recipe, not {len(named)}: {', '.join(named)}")
    return load_recipe(named[0] if named else "glyphs", [a for a in arguments if "=" in a])


Run = Annotated[str, typer.Argument(help="An MLflow run id, a checkpoint folder, or models:/NAME@ALIAS")]

KeyValues = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)]


Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]

Assignments = Annotated[list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", show_default=False)]
