"""From a config to a learner."""

from typing import Any

import torch

from dml_core import backbones, base_losses, heads
from dml_core.learner import Learner, Weights
from pipelines.cluster.worker import torch_threads
from pipelines.config.methods import Sizes
from pipelines.config.schema import Config


def build_learner(config: Config, classes: int, read_weights: bool = True) -> Learner:
    """Build the whole module on the CPU, in float32, initialised from the config's seed.

    Args:
        config: Of the run.
        classes: Number of training classes.
        read_weights: False leaves a pre-trained backbone as initialised, for a checkpoint to fill.

    Raises:
        OSError: Pre-trained weights cannot be had here.
        ValueError: There is no such backbone.
    """
    # The rounding of an orthogonal matrix depends on the number of threads, hence on that of workers.
    with torch_threads(1):
        torch.manual_seed(config.seed)
        return _build(config, classes, read_weights)


def _build(config: Config, classes: int, read_weights: bool) -> Learner:
    backbone = backbones.build(config.backbone.name, config.backbone.weights, read_weights)
    if config.backbone.frozen:
        backbone.freeze()
    dim = config.embedding_dim
    loss = base_losses.build(config.loss.name, classes, dim, **config.loss.arguments)
    head = heads.linear(backbone.dim, dim)
    sizes = Sizes(classes, backbone.dim, dim, config.epochs)
    # Each of the class that Learner takes under the method's name.
    methods: dict[str, Any] = {name: settings.build(sizes) for name, settings in config.method_settings.items()}
    weights = {term: weight for s in config.method_settings.values() for term, weight in s.weights.items()}
    return Learner(backbone, head, loss, Weights(**weights), **methods)
