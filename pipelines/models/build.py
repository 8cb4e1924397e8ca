"""From a config to a learner."""

import copy
from pathlib import Path
from typing import Any

import torch

from dml_core import backbones, heads
from dml_core.learner import Learner, Weights
from pipelines.cluster.threads import torch_threads
from pipelines.config.methods import Sizes
from pipelines.config.schema import Config
from pipelines.kept import once
from pipelines.models.checkpoint import load_weights, read_class_names


def build_learner(config: Config, classes: int, read_weights: bool = True, loss: bool = True) -> Learner:
    """Build the whole module on the CPU, in float32, initialised from the config's seed.

    Args:
        config: Of the run.
        classes: Number of training classes.
        read_weights: False leaves a pre-trained backbone as initialised, for a checkpoint to fill.
        loss: False leaves the base loss out, for a learner that a checkpoint fills and that only embeds.

    Raises:
        OSError: Pre-trained weights cannot be had here.
        ValueError: There is no such backbone.
    """
    # The rounding of an orthogonal matrix depends on the number of threads, hence on that of workers.
    with torch_threads(1):
        torch.manual_seed(config.seed)
        return _build(config, classes, read_weights, loss)


def build_embedder(config: Config, folder: Path) -> Learner:
    """Build the learner of a checkpoint, without what only training takes: on the CPU, in float32, for evaluation.

    Args:
        config: Of the run, perhaps with other values of keys that do not shape the network.
        folder: The checkpoint.
    """
    learner = build_learner(config, len(read_class_names(folder)), read_weights=False, loss=False)
    load_weights(folder, learner, loss=False)
    return learner.eval()


def _build_backbone(config: Config, read_weights: bool) -> backbones.Backbone:
    """Build a backbone, or copy one that was built before; the generator goes on as if it had been built."""
    name, weights = config.backbone.name, config.backbone.weights

    def build() -> tuple[backbones.Backbone, torch.Tensor]:
        return backbones.build(name, weights, read_weights), torch.get_rng_state()

    backbone, generator = once(("backbone", name, weights, read_weights, config.seed), build)
    torch.set_rng_state(generator)
    return copy.deepcopy(backbone)


def _build(config: Config, classes: int, read_weights: bool, with_loss: bool) -> Learner:
    backbone = _build_backbone(config, read_weights)
    if config.backbone.frozen:
        backbone.freeze()
    dim = config.embedding_dim
    loss = None
    if with_loss:
        from dml_core import base_losses  # whose library takes a second to import

        loss = base_losses.build(config.loss.name, classes, dim, **config.loss.arguments)
    head = heads.linear(backbone.dim, dim)
    sizes = Sizes(classes, backbone.dim, dim, config.epochs)
    # Each of the class that Learner takes under the method's name.
    methods: dict[str, Any] = {name: settings.build(sizes) for name, settings in config.method_settings.items()}
    weights = {term: weight for s in config.method_settings.values() for term, weight in s.weights.items()}
    return Learner(backbone, head, loss, Weights(**weights), **methods)
