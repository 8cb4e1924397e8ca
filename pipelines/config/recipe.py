"""Read a config from a recipe in YAML with key=value on top; bad input is an error of one line."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.config import sections
from pipelines.config.methods import METHODS
from pipelines.config.schema import Config, flatten
from pipelines.config.sections import Data

RECIPES = Path(__file__).parent / "recipes"

Tree = dict[str, Any]  # keys as YAML has them, nested: a value is of any type, or again a tree


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def describe_recipes() -> dict[str, str]:
    """Return what each recipe is for, by its name: the first line of its file."""
    return {name: (RECIPES / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ") for name in recipe_names()}


def load_recipe(recipe: str, assignments: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Load a recipe and put the user's values on top.

    Args:
        recipe: Name of a recipe of the package, or a YAML file.
        assignments: key=value in texts, or {"data.root": "PICTURES", "epochs": 5}.

    Raises:
        ValueError: One line that names the key, the value and what is allowed.
    """
    tree = _read(_recipe_file(recipe))
    overrides = parse_assignments(assignments)
    config = parse_config(_merge(_drop_overridden_settings(tree, overrides), overrides))
    config.require_slices()
    return config


def data_section(name: str, assignments: list[str]) -> Data:
    """Return the data section of a set, with key=value on top; the keys need no `data.` here."""
    keys = [a if a.startswith("data.") else f"data.{a}" for a in assignments]
    return parse_config(parse_assignments([*keys, f"data.name={name}"])).data


def parse_assignments(assignments: Sequence[str] | Mapping[str, Any]) -> Tree:
    """Return key=value, in texts or as a dictionary, as a tree; dots in a key make the levels.

    Raises:
        ValueError: A text is not key=value, or a key has a value where another needs a level.
    """
    tree: Tree = {}
    if isinstance(assignments, Mapping):
        for key, value in assignments.items():
            _assign(tree, key.split("."), value, f"{key}={value}")
        return tree
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise ValueError(f"{assignment!r} is not key=value")
        _assign(tree, key.split("."), read_yaml(value), assignment)
    return tree


def parse_config(tree: Tree) -> Config:
    """Return the validated config of a tree.

    Raises:
        ValueError: One line that names the key, the value and what is allowed.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(_describe(error)[:3])) from None


def parse_stored_config(tree: Tree) -> Config:
    """Return the config of a tree that a run or a checkpoint has stored, perhaps one of an earlier version.

    Those stored every default, also of keys that did not act beside others, which are refused today: such are left out.

    Raises:
        ValueError: As of parse_config.
    """
    data = dict(tree.get("data", {}))
    is_frozen = tree.get("backbone", {}).get("frozen", False)
    without_effect = {
        "augment": is_frozen or data.get("augment") == "crop",
        "folds": data.get("fold") is None,
        "validation_fraction": data.get("fold") is not None or data.get("validation_fraction") == 0.2,
        "on_bad_image": data.get("name") == "glyphs",
        "loader": data.get("name") == "glyphs",
        "loader_processes": data.get("loader") == "ray",
    }
    return parse_config({**tree, "data": {key: value for key, value in data.items() if not without_effect.get(key)}})


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a config with values at dotted keys, checked anew; None takes a value away.

    Raises:
        ValueError: As of parse_config.
    """
    tree = config.model_dump(exclude_none=True)
    for method in {*METHODS} - {*values.get("method", METHODS)}:
        tree.pop(method, None)
    for key, value in values.items():
        _assign(tree, key.split("."), value, f"{key}={value}")
    return parse_config(tree)


def read_yaml(text: str) -> Any:
    """Return the value of a text in YAML 1.2, of any type.

    Raises:
        ValueError: It is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Yaml12)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {text.strip()[:80]!r} ({str(error).splitlines()[0]})") from None


def to_yaml(config: Config) -> str:
    """Return a config as a recipe; what is not set is left out."""
    return yaml.safe_dump(config.model_dump(exclude_none=True), sort_keys=False)


class _Yaml12(yaml.SafeLoader):
    """YAML 1.2 scalars: 1:3 is no sexagesimal number, 1e-4 is a float, yes and no are words."""


_Yaml12.yaml_implicit_resolvers = {}

for _tag, _pattern, _first in (
    ("bool", r"true|True|false|False", "tTfF"),
    ("null", r"~|null|", "~n"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.nan", "-+.0123456789"),
):
    _Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _recipe_file(recipe: str) -> Path:
    if recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise ValueError(f"recipe file {recipe}: no such file")
        return Path(recipe)
    if recipe not in recipe_names():
        raise ValueError(f"recipe {recipe!r}: there is none of that name{sections.nearest(recipe, recipe_names())}")
    return RECIPES / f"{recipe}.yaml"


def _read(file: Path) -> Tree:
    """Return a recipe on top of those of the package that it extends, the later over the earlier."""
    tree = read_yaml(file.read_text())
    if not isinstance(tree, dict):
        raise ValueError(f"recipe {file}: not a mapping of keys to values")
    below: Tree = {}
    for name in tree.pop("extends", []):
        if not (RECIPES / f"{name}.yaml").is_file():
            raise ValueError(f"recipe {file}: it extends {name}, which is not there")
        below = _merge(below, _read(RECIPES / f"{name}.yaml"))
    return _merge(below, tree)


def _assign(tree: Tree, path: list[str], value: Any, assignment: str) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{assignment}: {part} has a value of its own already")
    tree[path[-1]] = value


def _merge(tree: Tree, overrides: Tree) -> Tree:
    merged = dict(tree)
    for key, value in overrides.items():
        is_level = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if is_level else value
    return merged


def _drop_overridden_settings(tree: Tree, overrides: Tree) -> Tree:
    """Return a recipe without the settings that belong to a choice (a method, a loss, ...) that the user has made
    otherwise. The user's own settings are not looked at, and refused later if they cannot act."""
    tree = dict(tree)
    methods = overrides.get("method", tree.get("method")) or []
    for method in METHODS:
        if method not in methods:
            tree.pop(method, None)
    for section, choice, kept in (
        ("loss", "name", ()),
        ("data", "name", ("limit_classes", "split_seed", "validation_fraction")),
        ("optimizer", "schedule", None),
        ("optimizer", "name", None),
    ):
        settings, chosen = tree.get(section), (overrides.get(section) or {})
        if not isinstance(settings, dict) or not isinstance(chosen, dict) or choice not in chosen:
            continue
        if chosen[choice] == settings.get(choice):
            continue
        if kept is None:
            dependent = {"schedule": ("milestones", "gamma"), "name": ("momentum",)}[choice]
            tree[section] = {k: v for k, v in settings.items() if k not in dependent}
        else:
            tree[section] = {k: v for k, v in settings.items() if k in kept}
    data, chosen = tree.get("data"), flatten(overrides)
    if isinstance(data, dict):
        dropped = set[str]()
        dropped |= {"augment"} if chosen.get("backbone.frozen") is True else set()
        dropped |= {"validation_fraction"} if chosen.get("data.fold") is not None else set()
        dropped |= {"fold", "folds"} if chosen.get("data.validation_fraction") is not None else set()
        dropped |= {"loader_processes"} if chosen.get("data.loader") == "ray" else set()
        tree["data"] = {k: v for k, v in data.items() if k not in dropped}
    return tree


def _describe(error: ValidationError) -> list[str]:
    """Return each error of a validation in words: key, value, what is allowed."""
    lines = []
    for details in error.errors():
        path = [str(part) for part in details["loc"] if not str(part).startswith(("function-", "constrained-"))]
        path = [part for part in path if part not in ("int", "str")] if path[:1] == ["workers"] else path
        key, message = ".".join(path), details["msg"].removeprefix("Value error, ")
        if details["type"] == "extra_forbidden":
            section: type[BaseModel] = Config
            for part in path[:-1]:
                section = _section_of(section.model_fields[part].annotation)
            prefix = "".join(f"{part}." for part in path[:-1])
            lines.append(f"unknown key {key}{sections.nearest(key, [prefix + name for name in section.model_fields])}")
        elif details["type"] == "value_error":
            lines.append(f"{key}: {message}" if key else message)
        else:
            lines.append(f"{key}={details['input']}: {message}")
    return lines


def _section_of(annotation: object) -> type[BaseModel]:
    """Return Sgar of `Sgar | None`."""
    options = getattr(annotation, "__args__", (annotation,))
    return next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
