"""Population-based training: settings that change while a run goes on.

Jaderberg et al., "Population Based Training of Neural Networks", 2017. What a trial ends with is a config with
`changes`: the run that trains by it from the start repeats the trial bit for bit. But:
- A value that is drawn anew or moved stays in its range; Ray Tune's may leave it.
- What cannot change in a run that goes on (a learning rate, how many statistics are kept) is drawn once, and a trial
  that goes on from another's checkpoint takes it from there.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search.sample import Categorical, Float, Integer

from pipelines.config.schema import Config
from pipelines.models import run_folder
from pipelines.models.checkpoint import read_config, read_state
from pipelines.models.run_folder import checkpoint_name, keep_checkpoint, newest_checkpoint
from pipelines.sweeps.spaces import Point, Space

TURNS = 5  # stretches that a training has


def changeable(space: Space, config: Config) -> Space:
    """The part of the space that a run can change. ValueError where there is none."""
    found = {
        key: domain
        for key, domain in space.items()
        if config.may_change(key) and not (isinstance(domain, Categorical) and None in domain.categories)
    }
    if not found:
        raise ValueError(f"--schedule pbt: a run cannot change {', '.join(space)} on the way; asha or none can search")
    return found


def pbt_scheduler(space: Space, config: Config, clock: str, score: str) -> PopulationBasedTraining:
    """`clock`, `score`: what trials report. ValueError for a training too short to change anything in."""
    every = config.evaluate_every * max(1, config.epochs // (TURNS * config.evaluate_every))
    if every >= config.epochs:
        raise ValueError(f"--schedule pbt: epochs={config.epochs} with evaluate_every={every} leave nothing to change")
    random.seed(config.seed)  # Ray Tune draws from both
    np.random.seed(config.seed)
    changed = changeable(space, config)

    def within(drawn: dict[str, Any]) -> dict[str, Any]:
        point = dict(drawn["point"])
        for key, domain in changed.items():
            if isinstance(domain, Float | Integer):
                last = domain.upper - 1 if isinstance(domain, Integer) else domain.upper
                number = int if isinstance(domain, Integer) else float
                point[key] = number(min(max(point[key], domain.lower), last))
        return drawn | {"point": point}

    mutations = {key: d.categories if isinstance(d, Categorical) else d for key, d in changed.items()}
    return PopulationBasedTraining(
        time_attr=clock,
        metric=score,
        mode="max",
        perturbation_interval=every,
        hyperparam_mutations={"point": mutations},
        custom_explore_fn=within,
        log_config=False,
    )


def settings_after(given: tune.Checkpoint, point: Point) -> Point:
    """The settings of a run that goes on from a checkpoint, its own or another's, with those of `point`."""
    with given.as_directory() as folder:
        before, epoch = read_config(Path(folder)), read_state(Path(folder)).epoch
    first, held = before.flat(), before.at(epoch).flat()
    changed = {key: value for key, value in point.items() if held.get(key) != value}
    changes = before.changes | ({epoch: changed} if changed else {})
    return {key: first.get(key) for key in point} | ({"changes": changes} if changes else {})


def start_from(given: tune.Checkpoint, run: Config) -> None:
    """Put a checkpoint into the folder of a run that has none yet."""
    files, path = run_folder.locate(run)
    if newest_checkpoint(files, path) is None:
        with given.as_directory() as folder:
            keep_checkpoint(files, path, Path(folder), read_state(Path(folder)))


def tune_checkpoint(run: Config, epoch: int) -> tune.Checkpoint:
    files, path = run_folder.locate(run)
    return tune.Checkpoint(f"{path}/{checkpoint_name(epoch)}", files)
