"""What a sweep searches: spaces of tune_spaces or of a user's file, and points of them."""

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform

from dml_core import base_losses
from pipelines.config.recipe import with_values
from pipelines.config.schema import METHODS, Config
from tune_spaces import base, iaa, namr, sgar

SPACES = {"base": base.SPACE, "iaa": iaa.SPACE, "sgar": sgar.SPACE, "namr": namr.SPACE}

Space = dict[str, Domain]

Point = dict[str, Any]


def space_of(names: str, config: Config) -> tuple[Config, Space]:
    """The space, and the config with the methods that it is of. ValueError for a space or a key that there is not."""
    space: Space = {}
    for name in names.split("+"):
        for part in SPACES if name == "all" else (name,):
            space |= _module_space(part, names, config.loss.name)
    searched = {key.partition(".")[0] for key in space}
    config = with_values(config, {"method": [m for m in METHODS if m in config.method or m in searched]})
    for corner in _corners(space):
        try:
            with_values(config, corner)
        except ValueError as error:
            raise ValueError(f"--space {names}: {error}") from None
    return config, space


def _module_space(part: str, names: str, loss: str) -> Space:
    if part in SPACES:
        return SPACES[part] | (base.LOSSES.get(loss, {}) if part == "base" else {})
    if not part.endswith(".py"):
        raise ValueError(f"--space {names}: {part!r} is none of {', '.join(SPACES)}, all, FILE.py")
    spec = importlib.util.spec_from_file_location("space_of_a_file", part)
    if spec is None or spec.loader is None or not Path(part).is_file():
        raise ValueError(f"--space {names}: {part}: no such file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    space = getattr(module, "SPACE", None)
    if not isinstance(space, dict) or not space or not all(isinstance(d, Domain) for d in space.values()):
        raise ValueError(f"--space {names}: {part} has no SPACE of dotted keys and Ray Tune's domains")
    return space


def _levels(domain: Domain, count: int) -> list[Any]:
    """So many values of a range, its ends among them; of a choice all values."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    assert isinstance(domain, Float | Integer)
    spread = np.geomspace if isinstance(domain.get_sampler(), LogUniform) else np.linspace
    if isinstance(domain, Float):
        return [min(max(v, domain.lower), domain.upper) for v in spread(domain.lower, domain.upper, count).tolist()]
    return sorted({round(v) for v in spread(domain.lower, domain.upper - 1, count).tolist()})


def _corners(space: Space) -> Iterator[Point]:
    """Each range's ends and each choice, one after the other, the rest at its first value."""
    ends = {key: _levels(domain, 2) for key, domain in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    for key, values in ends.items():
        for value in values:
            yield first | {key: value}


def own_point(config: Config, space: Space) -> Point | None:
    """The config's own settings as a point of the space; None where they lie outside."""
    known = {f"loss.{key}": value for key, value in base_losses.arguments(config.loss.name).items()} | config.flat()
    point = {key: known.get(key) for key in space}
    for key, domain in space.items():
        value = point[key]
        if value is None and not isinstance(domain, Categorical):
            return None
        if not domain.is_valid(value):
            return None
    return point


def points(space: Space, search: str, samples: int, config: Config) -> list[Point]:
    """So many of a random search, the config's own first; of a grid, so many on each range. By the config's seed."""
    if search == "grid":
        values = [_levels(domain, samples) for domain in space.values()]
        return [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*values)]
    random = np.random.RandomState(config.seed)
    own = own_point(config, space)
    found = [] if own is None else [own]
    while len(found) < samples:
        drawn = {key: domain.sample(random_state=random) for key, domain in space.items()}
        found.append({k: v.item() if isinstance(v, np.generic) else v for k, v in drawn.items()})
    return found
