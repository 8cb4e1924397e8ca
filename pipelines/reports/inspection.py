"""What a trained model does with its test pictures: neighbours, errors, a map, how classes vary. One worker's work.

Of a set of more than MAX_PICTURES test pictures only some classes are looked at, drawn by a fixed seed. Embeddings of
these are kept in memory, similarities only of a block of queries at a time.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dml_core.data.datasets import LabelledImages, Retrieval, Splits
from dml_core.data.pictures import to_image
from dml_core.learner import Learner
from dml_core.retrieval.neighbors import GALLERY_BLOCK, nearest
from dml_core.retrieval.scores import average_precision_at_r, recall_at_k
from dml_core.retrieval.structure import index_vectors, query_vectors
from dml_core.retrieval.task import Task
from pipelines.data.sets import load_splits
from pipelines.data.sources import Sources
from pipelines.models.build import build_learner
from pipelines.pages.gallery import Hit, Query
from pipelines.reports import geometry
from pipelines.reports.geometry import Cloud, Point, Variation
from pipelines.reports.job import InspectJob
from pipelines.training.evaluation import baseline_metrics, labels_of, load_sources, stream_outputs, test_metrics

MAX_PICTURES = 20_000  # test pictures looked at: 80 MB of embeddings of 512 numbers, twice

MAX_POINTS = 1_500  # pictures on the map

NEIGHBOURS = 6  # shown for a query

QUERIES = 6  # shown of each sort

TABLE_ROWS = 10  # hardest classes, and confused pairs

QUERY_BLOCK = 1024  # queries ranked at a time

PICTURE_SIDE, POINT_SIDE = 96, 48  # pixels of the larger side, of a picture shown and of one on the map


class HardClass(NamedTuple):
    """A class with a low MAP@R.

    Attributes:
        picture: A data URL of one of its pictures.
        label: Its name.
        queries: How many of its pictures have a match.
        scores: (R@1, MAP@R) by each way of ranking.
        taken_for: The class that most of its wrong first neighbours are of; empty where none is wrong.
    """

    picture: str
    label: str
    queries: int
    scores: dict[str, tuple[float, float]]
    taken_for: str


class ConfusedPair(NamedTuple):
    """Two classes, and how many of their queries have the nearest picture in the other. pictures: data URLs."""

    pictures: tuple[str, str]
    labels: tuple[str, str]
    wrong: int
    queries: int


class Inspection(NamedTuple):
    """What a report shows of a trained model.

    Attributes:
        metrics: Test metrics by name.
        inspected: How many test pictures were looked at.
        total: How many there are.
        random_queries: Queries drawn at random.
        missed_queries: Queries whose nearest picture is of another class, drawn at random.
        hardest_classes: Classes of the lowest MAP@R.
        confused_pairs: Pairs of classes that are most often confused.
        points: The map.
        variation: How the test classes vary, by network: "untrained" and "trained".
        clouds: Synthetics around embeddings, for each method of synthesis in use.
    """

    metrics: Mapping[str, float]
    inspected: int
    total: int
    random_queries: list[Query]
    missed_queries: list[Query]
    hardest_classes: list[HardClass]
    confused_pairs: list[ConfusedPair]
    points: list[Point]
    variation: dict[str, Variation]
    clouds: list[Cloud]


class Ranking(NamedTuple):
    """N queries ranked.

    Attributes:
        near: (N, NEIGHBOURS) places of the nearest in the gallery, the best first; -1: there is none.
        recall: (N,) R@1 of each query.
        precision: (N,) MAP@R of each query.
    """

    near: Tensor
    recall: Tensor
    precision: Tensor


def inspect_loop(job: InspectJob) -> Inspection:
    """Look at what a trained model does with its test pictures: one worker's work."""
    sources = load_sources(job)
    config, learner = sources.config, sources.learner
    splits = load_splits(config, job.unreadable)
    parameter = next(learner.parameters())
    untrained = build_learner(config, len(splits.train.class_names)).to(parameter.device, parameter.dtype).eval()
    whole = splits.tests["test"]
    metrics = job.metrics or _measure(learner, untrained, splits, sources)
    task = limit_task(whole)
    query = embed_images(task.query, sources, learner, untrained)
    gallery = embed_images(task.gallery, sources, learner, untrained) if task.gallery else query
    torch.set_num_threads(sources.cpus)
    images, targets = task.query, task.gallery or task.query
    labels = labels_of(task, torch.device("cpu"))

    rankings = {"plain": rank_gallery(query["trained"], gallery["trained"], labels)}
    if "structure" in query:
        vectors = query_vectors(query["trained"], query["structure"]), index_vectors(gallery["trained"])
        rankings["structure-aware"] = rank_gallery(*vectors, labels)
    plain, with_match = rankings["plain"], np.flatnonzero(labels.matches.numpy() > 0)
    missed = with_match[plain.recall[with_match].numpy() == 0]

    def some_queries(rows: np.ndarray) -> list[Query]:
        rng = np.random.default_rng(0)
        chosen = rng.permutation(rows)[:QUERIES].tolist()
        return [
            _describe_query(images, targets, row, {way: ranking.near[row] for way, ranking in rankings.items()})
            for row in chosen
        ]

    first_labels = labels.targets[plain.near[:, 0]].numpy()
    sources.progress.note("map", 0, 1)
    return Inspection(
        metrics,
        inspected=len(images) + (len(task.gallery) if task.gallery else 0),
        total=len(whole.query) + (len(whole.gallery) if whole.gallery else 0),
        random_queries=some_queries(with_match),
        missed_queries=some_queries(missed),
        hardest_classes=_hardest_classes(images, rankings, with_match, first_labels),
        confused_pairs=_confused_pairs(images, with_match, missed, first_labels),
        points=_map_points(images, query["trained"]),
        variation={name: geometry.measure_variation(query[name], labels.labels) for name in ("untrained", "trained")},
        clouds=geometry.draw_synthetics(learner, splits.train, sources, job.epoch),
    )


def _measure(learner: Learner, untrained: Learner, splits: Splits, sources: Sources) -> dict[str, float]:
    """Measure what a training measures at its end."""
    return test_metrics(learner, splits.tests, sources) | baseline_metrics(untrained, splits, sources)


def draw_classes(counts: np.ndarray, limit: int) -> np.ndarray:
    """Draw classes by a fixed seed: as many as have at most `limit` pictures together, but two at least.

    Args:
        counts: (C,) pictures of each class.
        limit: Pictures.

    Returns:
        Indices of the classes drawn.
    """
    order = np.random.default_rng(0).permutation(len(counts))
    return order[: max(2, int((counts[order].cumsum() <= limit).sum()))]


def limit_task(task: Retrieval) -> Retrieval:
    """Return whole classes of a task, drawn by a fixed seed, with MAX_PICTURES pictures at most."""
    query, gallery = task.query, task.gallery
    counts = np.bincount(query.labels, minlength=len(query.class_names))
    if gallery:
        counts += np.bincount(gallery.labels, minlength=len(counts))
    classes = draw_classes(counts, MAX_PICTURES)

    def of_classes(images: LabelledImages) -> LabelledImages:
        return images.select(np.isin(images.labels, classes))

    return Retrieval(of_classes(query), of_classes(gallery) if gallery else None)


def embed_images(images: LabelledImages, sources: Sources, learner: Learner, untrained: Learner) -> dict[str, Tensor]:
    """Embed pictures by the trained and by the untrained network.

    Returns:
        "trained" and "untrained": (N, D) of unit length; with NAMR "structure", too.
    """

    def outputs(x: Tensor) -> dict[str, Tensor]:
        features = learner.features(x)
        vectors = {"trained": normalize(learner.embed(features)), "untrained": normalize(untrained.embed(x))}
        return vectors | ({} if learner.namr is None else {"structure": learner.structure(features)})

    batches = [*stream_outputs(images, sources, "embedding", outputs)]
    return {name: torch.cat([batch[name].cpu() for batch in batches]) for name in batches[0]}


def rank_gallery(query: Tensor, gallery: Tensor, task: Task) -> Ranking:
    """Rank the gallery for each query, exactly.

    Args:
        query: (N, D).
        gallery: (M, D); without a gallery of its own the queries.
        task: Labels, and what is left out of a query's ranking.
    """
    blocks = [*zip(range(0, len(gallery), GALLERY_BLOCK), gallery.split(GALLERY_BLOCK))]
    k = min(len(gallery), max(NEIGHBOURS, int(task.matches.max())))
    parts = []
    for rows in torch.arange(len(query)).split(QUERY_BLOCK):
        left_out = task.left_out([rows])
        near = nearest(query[rows], blocks, k, left_out[0] if left_out else None).position
        relevant = task.is_right(rows, near)
        scores = recall_at_k(relevant, 1), average_precision_at_r(relevant, task.matches[rows])
        parts.append(Ranking(near[:, :NEIGHBOURS], *scores))
    return Ranking(*(torch.cat(columns) for columns in zip(*parts)))


def _describe_query(images: LabelledImages, targets: LabelledImages, row: int, near: dict[str, Tensor]) -> Query:
    """Make a query and its neighbours to show. near: places in the gallery by each way of ranking."""

    def hit(place: int) -> Hit:
        right = targets.labels[place] == images.labels[row]
        return Hit(encode_picture(targets, place), _class_name(targets, place), bool(right))

    hits = {way: [hit(place) for place in places.tolist() if place >= 0] for way, places in near.items()}
    return Query(encode_picture(images, row), _class_name(images, row), hits)


def _hardest_classes(
    images: LabelledImages, rankings: dict[str, Ranking], with_match: np.ndarray, first_labels: np.ndarray
) -> list[HardClass]:
    """List the classes of the lowest MAP@R by cosine.

    with_match: rows of the queries that have a match.  first_labels (N,): the class of each query's first neighbour.
    """
    labels, classes = images.labels[with_match], len(images.class_names)
    counts = np.bincount(labels, minlength=classes)

    def class_means(values: Tensor) -> np.ndarray:
        return np.bincount(labels, values[with_match].numpy(), classes) / np.maximum(counts, 1)

    means = {way: (class_means(ranking.recall), class_means(ranking.precision)) for way, ranking in rankings.items()}
    order = np.lexsort((np.arange(classes), means["plain"][1] + (counts == 0) * 2))
    hardest = []
    for label in order[: min(TABLE_ROWS, (counts > 0).sum())].tolist():
        rows = with_match[labels == label]
        others = Counter(other for other in first_labels[rows].tolist() if other != label)
        taken_for = images.class_names[others.most_common(1)[0][0]] if others else ""
        scores = {way: (float(recall[label]), float(precision[label])) for way, (recall, precision) in means.items()}
        picture = encode_picture(images, rows[0])
        hardest.append(HardClass(picture, images.class_names[label], len(rows), scores, taken_for))
    return hardest


def _confused_pairs(
    images: LabelledImages, with_match: np.ndarray, missed: np.ndarray, first_labels: np.ndarray
) -> list[ConfusedPair]:
    """List the pairs of classes that are confused most often. missed: rows of the queries whose first hit is wrong."""
    counts = np.bincount(images.labels[with_match], minlength=len(images.class_names))
    confusions = zip(images.labels[missed].tolist(), first_labels[missed].tolist())
    times = Counter(tuple(sorted(pair)) for pair in confusions)
    pairs = []
    for (a, b), wrong in sorted(times.items(), key=lambda item: (-item[1], item[0]))[:TABLE_ROWS]:
        samples = [int(np.flatnonzero(images.labels == label)[0]) for label in (a, b)]
        one, other = (encode_picture(images, row) for row in samples)
        labels = images.class_names[a], images.class_names[b]
        pairs.append(ConfusedPair((one, other), labels, wrong, int(counts[a] + counts[b])))
    return pairs


def _map_points(images: LabelledImages, z: Tensor) -> list[Point]:
    """Place pictures of whole classes, MAX_POINTS at most, on the map."""
    classes = draw_classes(np.bincount(images.labels), MAX_POINTS)
    rows = np.flatnonzero(np.isin(images.labels, classes))[:MAX_POINTS]
    places = geometry.place_by_tsne(z[rows].float().numpy())
    return [
        Point(x, y, int(images.labels[row]), _class_name(images, row), encode_picture(images, row, POINT_SIDE))
        for row, (x, y) in zip(rows.tolist(), places, strict=True)
    ]


def _class_name(images: LabelledImages, row: int) -> str:
    return images.class_names[images.labels[row]]


def encode_picture(images: LabelledImages, row: int, side: int = PICTURE_SIDE) -> str:
    """Return a picture as a data URL of a small WebP. side: at most so many pixels wide and high."""
    file = io.BytesIO()
    small = to_image(images.picture(row, side))
    small.thumbnail((side, side))
    small.save(file, "WEBP", quality=60)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
