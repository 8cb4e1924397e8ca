"""Config to objects: the sets, the learner, the optimizer and its schedule."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dml_core import backbones, base_losses, heads
from dml_core.data import benchmarks, datasets, glyphs, own, transforms
from dml_core.data.datasets import Collection, LabelledImages, Splits, names_array
from dml_core.data.loading import Views
from dml_core.learner import Learner, Weights
from dml_core.ranking.clusters import ClusterRanking
from dml_core.ranking.intensity import IntensityRanking
from dml_core.synthesis.gaussian import ClassAugmentation
from pipelines.config import Config
from pipelines.sections import Data


def cache_folder() -> Path:
    """DML_CACHE, or dml-ray in the user's cache folder: rendered glyphs, features of frozen backbones."""
    if folder := os.environ.get("DML_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dml-ray"


def collection(config: Data, unreadable: Sequence[str] = (), labelled: bool = True) -> Collection:
    """The set as it is, before any split. ValueError where it is missing or wrong.

    unreadable: names to leave out.  labelled: False takes your own pictures without labels, too, as of a class "".
    """
    whole = _collection(config, labelled)
    return whole.without(np.isin(whole.images.names, names_array([*unreadable]))) if unreadable else whole


def _collection(config: Data, labelled: bool) -> Collection:
    if config.name == "glyphs":
        images, labels, names = glyphs.load(cache_folder())
        return Collection(LabelledImages(images, labels, tuple(names)))
    if config.name == "table":
        assert config.table
        return own.load_table(config.table, config.root, config.links, labelled)
    assert config.root
    if config.name == "folder":
        return _with_test_classes(config, own.load_folder(config.root, config.links, labelled))
    benchmark = benchmarks.BENCHMARKS[config.name]
    if config.download:
        assert benchmark.fetch
        try:
            benchmark.fetch(config.root)
        except OSError as error:
            raise OSError(f"data.download=true: {benchmark.title} cannot be fetched ({error})") from None
    return benchmark.load(Path(config.root))


def splits(config: Config, unreadable: Sequence[str] = ()) -> Splits:
    """ValueError where the set is missing or too small for what is asked of it. unreadable: names to leave out."""
    data = config.data
    whole = collection(data, unreadable)
    fold = None if data.fold is None else (data.fold, data.folds)
    fractions = data.test_fraction or 0.5, data.validation_fraction
    made = datasets.split(whole, *fractions, data.split_seed, fold, data.limit_classes)
    classes = len(made.train.class_names)
    if config.batch.classes > classes:
        raise ValueError(f"batch.classes={config.batch.classes}: the training set has only {classes} classes")
    return made


def learner(config: Config, classes: int, read_weights: bool = True) -> Learner:
    """The whole module, in float32, initialised from the config's seed. `classes` of the training set.

    read_weights: False leaves a pre-trained backbone as initialised, for a checkpoint to fill.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the rounding of an orthogonal matrix depends on their number, hence on that of workers
    torch.manual_seed(config.seed)
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
    made = Learner(backbone, head, loss, weights, iaa, sgar, namr)
    torch.set_num_threads(threads)
    return made


def views(config: Config, images: LabelledImages) -> Views:
    size, augment = config.data.image_size, config.data.augment
    return Views(images, transforms.evaluation(size), transforms.training(augment, size))


def optimizer(config: Config, module: Learner) -> torch.optim.Optimizer:
    """Three groups with their own learning rates: backbone, heads and methods, the base loss's parameters.

    Scales and shifts of norms, and biases, are not decayed; nor are parameters of the loss.
    """
    o = config.optimizer
    loss_parameters = set(module.base_loss.parameters())
    backbone_parameters = set(module.backbone.parameters())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        multiplier = o.head_multiplier
        decay = o.weight_decay if parameter.ndim > 1 else 0.0
        if parameter in loss_parameters:
            multiplier, decay = o.loss_multiplier, 0.0
        elif parameter in backbone_parameters:
            multiplier = 1.0
        groups.setdefault((o.lr * multiplier, decay), []).append(parameter)
    parameters = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    if o.name == "sgd":
        return torch.optim.SGD(parameters, lr=o.lr, momentum=0.9 if o.momentum is None else o.momentum)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[o.name](parameters, lr=o.lr, fused=True)


def schedule(config: Config, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rate by optimizer step, `steps` of which make an epoch."""
    o, total = config.optimizer, config.epochs * steps

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (o.warmup * steps)) if o.warmup else 1.0
        if o.schedule == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * step / total))
        if o.schedule == "step":
            assert o.milestones and o.gamma
            return rise * o.gamma ** sum(step >= m * steps for m in o.milestones)
        return rise

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _with_test_classes(config: Data, whole: Collection) -> Collection:
    wanted, names = config.test_classes, whole.images.class_names
    if not wanted:
        return whole
    if unknown := sorted(set(wanted) - set(names)):
        raise ValueError(f"data.test_classes: no class folder is called {', '.join(unknown)}")
    return replace(whole, test=np.flatnonzero(np.isin(names, wanted)))
