"""Read a config from a recipe in YAML with key=value on top; bad input is an error of one line."""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipelines.config import sections
from pipelines.config.methods import METHODS
from pipelines.config.schema import Config, flatten
from pipelines.config.sections import Data
from pipelines.config.values import annotation_of, assign, read_tree, read_value, section_of, write_yaml

RECIPES = Path(__file__).parent / "recipes"

Tree = dict[str, Any]  # keys as YAML has them, nested: a value is of any type, or again a tree

# What keys are called in other programs.
NAMES_ELSEWHERE = {
    **dict.fromkeys(
        ("batch_size", "batchsize", "bs", "batch.size"), "batch.classes and batch.images, whose product is the batch"
    ),
    **dict.fromkeys(("learning_rate", "base_lr"), "optimizer.lr"),
    **dict.fromkeys(("dataset", "data_name", "dataset_name"), "data.name"),
    **dict.fromkeys(("data_root", "data_dir", "data_path", "path", "dir", "folder", "images_dir"), "data.root"),
    **dict.fromkeys(("csv", "dataframe", "annotations"), "data.table"),
    **dict.fromkeys(("model", "arch", "architecture", "network", "encoder"), "backbone.name"),
    **dict.fromkeys(("pretrained", "weights"), "backbone.weights"),
    **dict.fromkeys(("freeze", "freeze_backbone"), "backbone.frozen"),
    **dict.fromkeys(("dim", "embedding_size", "emb_dim", "out_dim", "feat_dim"), "embedding_dim"),
    **dict.fromkeys(("criterion", "loss_name"), "loss.name"),
    **dict.fromkeys(("margin", "scale", "temperature"), "loss.margin, loss.scale, ... (arguments of loss.name)"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "optimizer.schedule"),
    **dict.fromkeys(("wd", "decay"), "optimizer.weight_decay"),
    **dict.fromkeys(("grad_clip", "clip_grad", "max_grad_norm"), "optimizer.clip_norm"),
    **dict.fromkeys(("amp", "fp16", "bf16", "dtype"), "precision"),
    **dict.fromkeys(("img_size", "input_size", "resolution"), "data.image_size"),
    **dict.fromkeys(("num_epochs", "max_epochs", "n_epochs"), "epochs"),
    **dict.fromkeys(("random_seed", "random_state"), "seed"),
    **dict.fromkeys(("gpu", "gpus", "cuda", "device"), "use_gpu"),
    **dict.fromkeys(("num_gpus", "world_size", "nproc_per_node"), "workers"),
    **dict.fromkeys(("num_workers", "dataloader_workers"), "workers (that train) or data.loader_processes (that read)"),
    **dict.fromkeys(("output_dir", "out", "output", "save_dir", "log_dir"), "storage"),
    **dict.fromkeys(("run_name", "resume"), "name"),
}


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

    Of a key that is a text the value is what was typed, see values.read_value; others are in YAML.

    Raises:
        ValueError: A text is not key=value, or a key has a value where another needs a level.
    """
    tree: Tree = {}
    if isinstance(assignments, Mapping):
        for key, value in assignments.items():
            _assign(tree, key, value)
        return tree
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise ValueError(f"{assignment!r} is not key=value")
        try:
            value = read_value(text, annotation_of(Config, key.split(".")))
        except ValueError as error:
            raise ValueError(f"{assignment}: {error}") from None
        _assign(tree, key, value)
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
    They counted the epochs before IAA's first estimate, whose share is set today.

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
    tree = {**tree, "data": {key: value for key, value in data.items() if not without_effect.get(key)}}
    if "start_epoch" in (tree.get("iaa") or {}):
        iaa = dict(tree["iaa"])
        tree["iaa"] = {"start": iaa.pop("start_epoch") / tree["epochs"], **iaa}
    return parse_config(tree)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a config with values at dotted keys, checked anew; None takes a value away.

    Raises:
        ValueError: As of parse_config.
    """
    tree = config.model_dump(exclude_none=True)
    for method in {*METHODS} - {*values.get("method", METHODS)}:
        tree.pop(method, None)
    for key, value in values.items():
        _assign(tree, key, value)
    return parse_config(tree)


def read_stored_config(text: str) -> Config:
    """Return the config that to_yaml has written.

    Raises:
        ValueError: As of parse_config.
    """
    return parse_stored_config(read_tree(text, Config))


def to_yaml(config: Config) -> str:
    """Return a config as a recipe; what is not set is left out."""
    return write_yaml(config.model_dump(exclude_none=True))


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
    try:
        tree = read_tree(file.read_text(encoding="utf-8"), Config)
    except UnicodeDecodeError:
        raise ValueError(f"recipe {file}: not a text in UTF-8") from None
    except ValueError as error:
        raise ValueError(f"recipe {file}: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"recipe {file}: not a mapping of keys to values")
    below: Tree = {}
    extended = tree.pop("extends", [])
    for name in [extended] if isinstance(extended, str) else extended:
        if not (RECIPES / f"{name}.yaml").is_file():
            hint = sections.nearest(str(name), recipe_names())
            raise ValueError(f"recipe {file}: it extends {name}, which is not there{hint}")
        below = _merge(below, _read(RECIPES / f"{name}.yaml"))
    return _merge(below, tree)


def _assign(tree: Tree, key: str, value: Any) -> None:
    try:
        assign(tree, key.split("."), _without_paths(value))
    except ValueError as error:
        raise ValueError(f"{key}={value}: {error}") from None


def _without_paths(value: Any) -> Any:
    """Return a value, or a tree of values, in which a Path is a text."""
    if isinstance(value, dict):
        return {key: _without_paths(below) for key, below in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


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
        key, message, value = ".".join(path), details["msg"].removeprefix("Value error, "), _show(details["input"])
        section = section_of(annotation_of(Config, path)) if path else None
        if details["type"] == "extra_forbidden":
            below = details["input"]
            unknown = [*flatten(below, f"{key}.")] if isinstance(below, dict) and below else [key]
            lines += [f"unknown key {name}{nearest_key(name)}" for name in unknown]
        elif details["type"] == "value_error":
            is_shown = isinstance(details["input"], str) and not sections.SECRET.search(details["input"])
            names_a_key = not key or message.startswith(f"{key}.")
            prefix = "" if names_a_key else f"{key}={value}: " if is_shown else f"{key}: "
            lines.append(f"{prefix}{message}")
        elif section is not None:
            keys = [f"{key}.{name}" for name in section.model_fields]
            example = f"{key}.name={value}" if "name" in section.model_fields else ", ".join(keys)
            lines.append(f"{key}={value}: {key} has keys of its own: {example}")
        else:
            lines.append(f"{key}={value}: {message}")
    return lines


def _show(value: object) -> str:
    """Return a value as it is written in a config, on one line."""
    text = {True: "true", False: "false", None: "null"}.get(value) if isinstance(value, bool | None) else str(value)
    return text if text and text.isprintable() and text == text.strip() else repr(value)


def nearest_key(key: str) -> str:
    """Return the end of the message on an unknown key: the keys that were probably meant, or where all are listed."""
    keys = [*_keys(Config)]
    sections_ = {known.rpartition(".")[0] for known in keys}
    section, _, name = key.rpartition(".")
    beside = {known.rpartition(".")[2]: known for known in keys if known.rpartition(".")[0] == section}
    of_that_name = [known for known in keys if known.rpartition(".")[2] == name]
    if close := difflib.get_close_matches(name, beside, 1, 0.7):
        meant = [beside[close[0]]]
    elif elsewhere := NAMES_ELSEWHERE.get(key, NAMES_ELSEWHERE.get(name)):
        meant = [elsewhere]
    elif of_that_name and len(of_that_name) < 4:
        meant = of_that_name
    else:
        meant = [known for known in keys if all(map(_are_close, key.rpartition("."), known.rpartition(".")))][:1]
    if meant:
        return f"; did you mean {' or '.join(meant)}?"
    if section in sections_ and section:
        return f"; allowed: {', '.join(beside.values())}"
    return "; `dml config` prints the keys of a recipe, and docs/config.md describes all"


def _are_close(word: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, word, other).ratio() >= 0.7


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys."""
    for name, field in section.model_fields.items():
        below = section_of(field.annotation)
        yield from _keys(below, f"{prefix}{name}.") if below else [f"{prefix}{name}"]
