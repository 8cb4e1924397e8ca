"""Where embeddings lie: a map of them in two dimensions, how much each class spreads, and what synthesis draws."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dml_core.data.datasets import LabelledImages
from dml_core.learner import Learner
from dml_core.synthesis import gaussian, radial
from pipelines.data.sources import Sources
from pipelines.training.evaluation import stream_outputs

FEW = 200  # pictures of the class that synthesis is shown for

BLOCK = 1024  # class centres at a time


class Point(NamedTuple):
    """x, y in 0 ... 1."""

    x: float
    y: float
    kind: int
    label: str
    picture: str


class Variation(NamedTuple):
    """Of unit embeddings. own (C,): mean distance to the centre of the class; other (C,): from it to the nearest other
    centre.  spectrum (D,): singular values of the centred embeddings, as shares of their sum.  rank: the effective one,
    exp of the entropy of these shares."""

    own: np.ndarray
    other: np.ndarray
    spectrum: np.ndarray
    rank: float


class Cloud(NamedTuple):
    """Embeddings of one class and synthetics around them, on the first two principal axes of the former.

    real (n, 2).  synthetic: a list of (m, 2), weakest first.  share: of the variance, on these axes.
    """

    method: str
    label: str
    real: np.ndarray
    synthetic: list[np.ndarray]
    share: float


def placed(z: np.ndarray) -> np.ndarray:
    """t-SNE of unit embeddings (N, D), by a fixed seed: (N, 2) in 0 ... 1. So few as three have a place, too."""
    from sklearn.manifold import TSNE

    if len(z) < 4:
        return np.linspace(0, 1, len(z))[:, None].repeat(2, 1)
    tsne = TSNE(perplexity=min(30.0, (len(z) - 1) / 3), init="pca", random_state=0)
    places = tsne.fit_transform(z)
    return (places - places.min(0)) / np.maximum(np.ptp(places, 0), 1e-9)


def variation(z: Tensor, labels: Tensor) -> Variation:
    """Of classes with two pictures at least; z (N, D)."""
    kinds, place, counts = labels.unique(return_inverse=True, return_counts=True)
    centers = z.new_zeros(len(kinds), z.shape[1]).index_add_(0, place, z) / counts[:, None]
    distance = (z - centers[place]).norm(dim=1)
    own = z.new_zeros(len(kinds)).index_add_(0, place, distance) / counts
    other = torch.cat([torch.cdist(part, centers).topk(min(2, len(kinds)), largest=False).values[:, -1]
                       for part in centers.split(BLOCK)])  # fmt: skip
    shares = torch.linalg.svdvals((z - z.mean(0)).double())
    shares = shares / shares.sum()
    kept = counts > 1
    rank = torch.special.entr(shares).sum().exp().item()
    return Variation(own[kept].numpy(), other[kept].numpy(), shares.numpy(), rank)


def clouds(learner: Learner, train: LabelledImages, sources: Sources, epoch: int) -> list[Cloud]:
    """Of the largest training class, what each method of synthesis in use draws in an epoch, from 0."""
    config = sources.config.at(epoch)
    iaa = learner.iaa if learner.iaa is not None and learner.iaa.corrected.any() else None
    if iaa is None and config.sgar is None:
        return []
    kind = int(np.bincount(train.labels).argmax())
    images = train.rows(np.flatnonzero(train.labels == kind)[:FEW])
    z = torch.cat(
        [part["z"] for part in stream_outputs(images, sources, "synthesis", lambda x: {"z": learner.embed(x)})]
    )
    generator, label, found = torch.Generator(z.device), train.class_names[kind], []
    if iaa is not None and config.iaa is not None:
        labels = torch.full((len(z),), kind, device=z.device)
        intensity = gaussian.intensity_at(epoch / config.epochs, config.iaa.intensity)
        drawn, _ = gaussian.synthesize(z, labels, iaa.corrected, intensity, config.iaa.draws, generator.manual_seed(0))
        found.append(_cloud("IAA", label, z, [drawn]))
    if (s := config.sgar) is not None:
        z = normalize(z, dim=1)
        drawn = radial.synthesize(z, s.intensity, s.count, generator.manual_seed(0), s.directions == "shared")
        found.append(_cloud("SGAR", label, z, [*drawn]))
    return found


def _cloud(method: str, label: str, z: Tensor, synthetic: list[Tensor]) -> Cloud:
    center = z.mean(0)
    _, values, axes = torch.linalg.svd(z - center, full_matrices=False)
    on = [((x - center) @ axes[:2].T).cpu().numpy() for x in (z, *synthetic)]
    share = (values[:2].square().sum() / values.square().sum()).item()
    return Cloud(method, label, on[0], on[1:], share)
