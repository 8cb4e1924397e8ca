"""`dml recipes` and `dml config`: what can be trained, and a config in full."""

import json

from pipelines.cli.arguments import Assignments, Json, config_of
from pipelines.cli.endings import exit_on_error


def recipes(as_json: Json = False) -> None:
    """List the recipes. Example: dml recipes"""
    from pipelines.config.recipe import RECIPES, recipe_names

    lines = {name: (RECIPES / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ") for name in recipe_names()}
    if as_json:
        print(json.dumps(lines))
    else:
        for name, line in lines.items():
            print(f"{name:<16} {line}")


def config(arguments: Assignments = None, as_json: Json = False) -> None:
    """Print the full config of a recipe with key=value on top, checked. Example: dml config glyphs batch.images=8"""
    with exit_on_error():
        from pipelines.config.recipe import to_yaml

        made = config_of(arguments)
    print(json.dumps(made.model_dump(exclude_none=True)) if as_json else to_yaml(made), end="\n" if as_json else "")
