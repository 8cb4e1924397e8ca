"""Population-based training: settings that change while a run goes on.

Jaderberg et al., "Population Based Training of Neural Networks", 2017. What a trial ends with is a config with
`changes`: the run that trains by it from the start repeats the trial bit for bit. But:
- A value that is drawn anew or moved stays in its range; Ray Tune's may leave it.
- What cannot change in a run that goes on (a learning rate, how many statistics are kept) is drawn once, and a trial
  that goes on from another's checkpoint takes it from there.
"""

import random
from pathlib import Path

import numpy as np
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search.sample import Categorical, Float, Integer

from pipelines.config.schema import Config
from pipelines.models import run_folder
from pipelines.models.checkpoint import read_config, read_state
from pipelines.models.run_folder import checkpoint_name, keep_checkpoint, newest_checkpoint
from pipelines.sweeps.records import CLOCK, SCORE, TrialConfig
from pipelines.sweeps.spaces import Point, Space

TURNS = 5  # parts that a training is cut into; settings change between them


def select_changeable(space: Space, config: Config) -> Space:
    """Return the part of the space that can change while a run goes on.

    Raises:
        ValueError: There is none.
    """
    changeable = {
        key: domain
        for key, domain in space.items()
        if config.may_change(key) and not (isinstance(domain, Categorical) and None in domain.categories)
    }
    if not changeable:
        raise ValueError(f"--schedule pbt: a run cannot change {', '.join(space)} on the way; asha or none can search")
    return changeable


def make_pbt_scheduler(space: Space, config: Config) -> PopulationBasedTraining:
    """Make Ray Tune's scheduler for trials that report a TrialReport.

    Raises:
        ValueError: No setting can change, or the training is too short to change one.
    """
    interval = config.evaluate_every * max(1, config.epochs // (TURNS * config.evaluate_every))
    if interval >= config.epochs:
        budget = f"epochs={config.epochs} with evaluate_every={config.evaluate_every}"
        raise ValueError(f"--schedule pbt: {budget} leave nothing to change")
    random.seed(config.seed)  # Ray Tune draws from both
    np.random.seed(config.seed)
    changeable = select_changeable(space, config)

    def keep_in_range(drawn: TrialConfig) -> TrialConfig:
        point = dict(drawn["point"])
        for key, domain in changeable.items():
            if isinstance(domain, Float | Integer):
                last = domain.upper - 1 if isinstance(domain, Integer) else domain.upper
                number = int if isinstance(domain, Integer) else float
                point[key] = number(min(max(point[key], domain.lower), last))
        return {**drawn, "point": point}

    mutations = {key: d.categories if isinstance(d, Categorical) else d for key, d in changeable.items()}
    return PopulationBasedTraining(
        time_attr=CLOCK,
        metric=SCORE,
        mode="max",
        perturbation_interval=interval,
        hyperparam_mutations={"point": mutations},
        custom_explore_fn=keep_in_range,
        log_config=False,
    )


def settings_after(checkpoint: tune.Checkpoint, point: Point) -> Point:
    """Return the settings of a run that goes on from a checkpoint, its own or another's, with those of `point`."""
    with checkpoint.as_directory() as folder:
        config, epoch = read_config(Path(folder)), read_state(Path(folder)).epoch
    first, now = config.flat(), config.at(epoch).flat()
    changed = {key: value for key, value in point.items() if now.get(key) != value}
    changes = config.changes | ({epoch: changed} if changed else {})
    return {key: first.get(key) for key in point} | ({"changes": changes} if changes else {})


def copy_to_new_run(checkpoint: tune.Checkpoint, run: Config) -> None:
    """Put a checkpoint into the folder of a run that has none yet."""
    files, path = run_folder.locate(run)
    if newest_checkpoint(files, path) is None:
        with checkpoint.as_directory() as folder:
            keep_checkpoint(files, path, Path(folder), read_state(Path(folder)))


def open_as_tune_checkpoint(run: Config, epoch: int) -> tune.Checkpoint:
    """Return the checkpoint of a run's epoch, where it lies, as one of Ray Tune's."""
    files, path = run_folder.locate(run)
    return tune.Checkpoint(f"{path}/{checkpoint_name(epoch)}", files)
