"""What a sweep searches: spaces of tune_spaces or of a user's file, and points of them."""

import importlib.util
import itertools
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform

from dml_core import base_losses
from pipelines.config.methods import METHODS
from pipelines.config.recipe import with_values
from pipelines.config.schema import Config
from tune_spaces import base, iaa, namr, sgar

SPACES = {"base": base.SPACE, "iaa": iaa.SPACE, "sgar": sgar.SPACE, "namr": namr.SPACE}

Space = dict[str, Domain]  # dotted config key to what its value is drawn from

Point = dict[str, Any]  # dotted config key to a value


def load_space(names: str, config: Config) -> tuple[Config, Space]:
    """Load the space that is searched.

    Args:
        names: Names of SPACES, "all" or a FILE.py with a SPACE, joined by "+".
        config: What the sweep starts from.

    Returns:
        The config, with the methods switched on that the space has settings of, and the space.

    Raises:
        ValueError: There is no such space, or a value at the end of one of its ranges cannot act.
    """
    if not names:
        raise ValueError(f"--space NAME is needed: {', '.join(SPACES)}, all, joined by +; or FILE.py")
    space: Space = {}
    for name in names.split("+"):
        for single in SPACES if name == "all" else (name,):
            space |= _load_single_space(single, names, config.loss.name)
    searched = {key.partition(".")[0] for key in space}
    config = with_values(config, {"method": [m for m in METHODS if m in config.method or m in searched]})
    for point in _extreme_points(space):
        try:
            with_values(config, point)
        except ValueError as error:
            raise ValueError(f"--space {names}: {error}") from None
    return config, space


def _load_single_space(name: str, names: str, loss: str) -> Space:
    if name in SPACES:
        return SPACES[name] | (base.LOSSES.get(loss, {}) if name == "base" else {})
    if not name.endswith(".py"):
        raise ValueError(f"--space {names}: {name!r} is none of {', '.join(SPACES)}, all, FILE.py")
    spec = importlib.util.spec_from_file_location("space_of_a_file", name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise ValueError(f"--space {names}: {name}: no such file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        where = next(
            (f":{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[::-1] if f.filename == name), ""
        )
        raise ValueError(f"--space {names}: {name}{where}: {type(error).__name__}: {error}") from error
    space = getattr(module, "SPACE", None)
    if not isinstance(space, dict) or not space or not all(isinstance(d, Domain) for d in space.values()):
        raise ValueError(f"--space {names}: {name} has no SPACE of dotted keys and Ray Tune's domains")
    return space


def _spread_values(domain: Domain, count: int) -> list[Any]:
    """Return `count` values spread over a range, its ends among them; of a choice all values."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    assert isinstance(domain, Float | Integer)
    spread = np.geomspace if isinstance(domain.get_sampler(), LogUniform) else np.linspace
    if isinstance(domain, Float):
        return [min(max(v, domain.lower), domain.upper) for v in spread(domain.lower, domain.upper, count).tolist()]
    return sorted({round(v) for v in spread(domain.lower, domain.upper - 1, count).tolist()})


def most_epochs(space: Space, config: Config) -> int:
    """Return the epochs of the longest training in a space."""
    return int(max(_spread_values(space["epochs"], 2))) if "epochs" in space else config.epochs


def _extreme_points(space: Space) -> Iterator[Point]:
    """Yield points at each range's ends and each choice, one key after the other, the rest at its first value."""
    ends = {key: _spread_values(domain, 2) for key, domain in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    for key, values in ends.items():
        for value in values:
            yield first | {key: value}


def config_point(config: Config, space: Space) -> Point | None:
    """Return the config's own settings as a point of the space; None: they lie outside."""
    known = {
        f"loss.{key}": value for key, value in base_losses.default_arguments(config.loss.name).items()
    } | config.flat()
    point = {key: known.get(key) for key in space}
    for key, domain in space.items():
        value = point[key]
        if value is None and not isinstance(domain, Categorical):
            return None
        if not domain.is_valid(value):
            return None
    return point


def draw_points(space: Space, search: str, samples: int, config: Config) -> list[Point]:
    """Draw all points of a search that does not depend on scores; the same for the same seed of the config.

    Args:
        space: What the points are of.
        search: "random": the config's own point, then random ones. "grid": all combinations of values.
        samples: Points of a random search; of a grid, values of each range.
        config: What the sweep starts from.
    """
    if search == "grid":
        values = [_spread_values(domain, samples) for domain in space.values()]
        return [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*values)]
    random = np.random.RandomState(config.seed)
    own = config_point(config, space)
    points = [] if own is None else [own]
    while len(points) < samples:
        drawn = {key: domain.sample(random_state=random) for key, domain in space.items()}
        points.append({k: v.item() if isinstance(v, np.generic) else v for k, v in drawn.items()})
    return points
