"""`dml recipes` and `dml config`: what can be trained, and a config in full."""

from pipelines.cli.arguments import Assignments, Json, load_config
from pipelines.cli.endings import exit_on_error, print_result


def recipes(as_json: Json = False) -> None:
    """List the recipes. Example: dml recipes"""
    from pipelines.config.recipe import describe_recipes

    descriptions = describe_recipes()
    print_result(as_json, descriptions, *(f"{name:<16} {text}" for name, text in descriptions.items()))


def config(arguments: Assignments = None, as_json: Json = False) -> None:
    """Print the full config of a recipe with key=value on top, checked. Example: dml config glyphs batch.images=8"""
    with exit_on_error():
        from pipelines.config.recipe import to_yaml

        loaded = load_config(arguments)
    print_result(as_json, loaded.model_dump(exclude_none=True), to_yaml(loaded).removesuffix("\n"))
