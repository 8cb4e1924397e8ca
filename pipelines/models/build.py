"""From a config to a learner."""

import torch

from dml_core import backbones, base_losses, heads
from dml_core.learner import Learner, Weights
from dml_core.ranking.clusters import ClusterRanking
from dml_core.ranking.intensity import IntensityRanking
from dml_core.synthesis.gaussian import ClassAugmentation
from pipelines.cluster.worker import torch_threads
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
    weights, iaa, sgar, namr = Weights(), None, None, None
    if config.iaa is not None:
        iaa = ClassAugmentation(classes, dim, config.epochs, **config.iaa.model_dump())
    if (s := config.sgar) is not None:
        weights = weights._replace(sgar_rank=s.weight * s.ratio_rank, sgar_anchor=s.weight * s.ratio_anchor)
        sgar = IntensityRanking(
            dim=dim,
            intensity=s.intensity,
            count=s.count,
            margin=s.margin,
            max_gap=s.max_gap,
            scale=s.scale,
            gate=s.gate,
            anchor_scale=s.anchor_scale,
            anchor_margin=s.anchor_margin,
            shared_directions=s.directions == "shared",
        )
    if (n := config.namr) is not None:
        weights = weights._replace(namr_rank=n.weight)
        namr = ClusterRanking(heads.Structure(backbone.dim, dim), n.centers, n.t, n.alpha, n.spacing)
    return Learner(backbone, head, loss, weights, iaa, sgar, namr)
