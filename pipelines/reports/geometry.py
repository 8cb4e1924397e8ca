"""Where embeddings lie: a map of them in two dimensions, how much each class spreads, and what synthesis draws."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dml_core.data.datasets import LabelledImages
from dml_core.geometry import distances_to_means, effective_rank, spectrum
from dml_core.learner import Learner
from dml_core.synthesis import gaussian, radial
from pipelines.data.sources import Sources
from pipelines.training.evaluation import stream_outputs

CLOUD_PICTURES = 200  # at most, of the class that synthesis is shown for


class Point(NamedTuple):
    """A picture's place on the map.

    Attributes:
        x, y: In 0 ... 1.
        class_index: The class as a number, which its colour follows from.
        label: The class's name.
        picture: A data URL.
    """

    x: float
    y: float
    class_index: int
    label: str
    picture: str


class Variation(NamedTuple):
    """How unit embeddings of several classes vary. C: classes with two pictures at least; D: dimensions.

    Attributes:
        to_own_center: (C,) mean distance of a class's embeddings to their centre.
        to_next_center: (C,) distance of a class's centre to the nearest other centre.
        spectrum: (D,) singular values of the centred embeddings, as shares of their sum, the largest first.
        effective_rank: exp of the entropy of these shares, see dml_core.geometry.
    """

    to_own_center: np.ndarray
    to_next_center: np.ndarray
    spectrum: np.ndarray
    effective_rank: float


class Cloud(NamedTuple):
    """Embeddings of one class and synthetics around them, on the two principal axes of the embeddings.

    Attributes:
        method: The method that draws the synthetics.
        label: The class's name.
        embeddings: (n, 2).
        synthetics: (m, 2) for each intensity, the weakest first.
        variance_share: Share of the embeddings' variance that lies on the two axes.
    """

    method: str
    label: str
    embeddings: np.ndarray
    synthetics: list[np.ndarray]
    variance_share: float


def place_by_tsne(z: np.ndarray) -> np.ndarray:
    """Place unit embeddings on a map by t-SNE, with a fixed seed.

    Args:
        z: (N, D); fewer than four are placed along a line.

    Returns:
        (N, 2) in 0 ... 1.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(z) < 4:
        return np.linspace(0, 1, len(z))[:, None].repeat(2, 1)
    tsne = TSNE(perplexity=min(30.0, (len(z) - 1) / 3), init="pca", random_state=0)
    # Its threads wait for each other a thousand times, spinning: on CPUs with other work, two took ten times as long.
    with threadpool_limits(1):
        places = tsne.fit_transform(z)
    return (places - places.min(0)) / np.maximum(np.ptp(places, 0), 1e-9)


def measure_variation(z: Tensor, labels: Tensor) -> Variation:
    """Measure how unit embeddings (N, D) of classes (N,) vary."""
    distances = distances_to_means(z, labels)
    to_own, shares, several = distances.mean_by_class(distances.to_own), spectrum(z), distances.sizes > 1
    return Variation(
        to_own[several].numpy(), distances.to_next[several].numpy(), shares.numpy(), effective_rank(shares)
    )


def draw_synthetics(learner: Learner, train: LabelledImages, sources: Sources, epoch: int) -> list[Cloud]:
    """Draw synthetics of the largest training class by each method of synthesis in use.

    Args:
        learner: The trained network, with IAA's estimate where IAA is in use.
        train: The training classes.
        sources: Its config says which methods are in use.
        epoch: From 0; what is drawn is what training draws in this epoch.

    Returns:
        A cloud for each of IAA and SGAR that is in use.
    """
    config = sources.config.at(epoch)
    iaa = learner.iaa if learner.iaa is not None and learner.iaa.corrected.any() else None
    if iaa is None and config.sgar is None:
        return []
    largest = int(np.bincount(train.labels).argmax())
    images = train.select(np.flatnonzero(train.labels == largest)[:CLOUD_PICTURES])
    z = torch.cat(
        [batch["z"] for batch in stream_outputs(images, sources, "synthesis", lambda x: {"z": learner.embed(x)})]
    )
    generator, label, clouds = torch.Generator(z.device), train.class_names[largest], []
    if iaa is not None and config.iaa is not None:
        labels = torch.full((len(z),), largest, device=z.device)
        intensity = gaussian.intensity_at(epoch / config.epochs, config.iaa.intensity)
        drawn, _ = gaussian.synthesize(z, labels, iaa.corrected, intensity, config.iaa.draws, generator.manual_seed(0))
        clouds.append(_project_cloud("IAA", label, z, [drawn]))
    if (sgar := config.sgar) is not None:
        z = normalize(z, dim=1)
        shared = sgar.directions == "shared"
        drawn = radial.synthesize(z, sgar.intensity, sgar.count, generator.manual_seed(0), shared)
        clouds.append(_project_cloud("SGAR", label, z, [*drawn]))
    return clouds


def _project_cloud(method: str, label: str, z: Tensor, synthetics: list[Tensor]) -> Cloud:
    """Project embeddings and synthetics onto the principal axes of the embeddings."""
    center = z.mean(0)
    _, values, axes = torch.linalg.svd(z - center, full_matrices=False)
    embeddings, *projected = [((x - center) @ axes[:2].T).cpu().numpy() for x in (z, *synthetics)]
    share = (values[:2].square().sum() / values.square().sum()).item()
    return Cloud(method, label, embeddings, projected, share)
