"""Arguments and options that several commands share."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.config.schema import Config

Run = Annotated[str, typer.Argument(help="An MLflow run id, a checkpoint folder, or models:/NAME@ALIAS")]

KeyValues = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)]

Assignments = Annotated[list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", show_default=False)]

Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]


def split_arguments(arguments: list[str] | None) -> tuple[str, list[str]]:
    """Return RECIPE (default glyphs) and the key=value that stand before and after it."""
    recipes = [argument for argument in arguments or [] if "=" not in argument]
    if len(recipes) > 1:
        raise ValueError(f"one recipe, not {len(recipes)}: {', '.join(recipes)}")
    return recipes[0] if recipes else "glyphs", [argument for argument in arguments or [] if "=" in argument]


def load_config(arguments: list[str] | None) -> "Config":
    """Read the config that RECIPE (default glyphs) and key=value, in any order, stand for."""
    from pipelines.config.recipe import load_recipe

    return load_recipe(*split_arguments(arguments))
