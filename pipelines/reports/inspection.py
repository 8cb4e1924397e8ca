"""What a trained model does with its test pictures: neighbours, errors, a map, how classes vary. One worker's work.

A set of more than PICTURES test pictures is looked at in part: whole classes, drawn by a fixed seed. Embeddings of that
part are held, and of similarities a block of queries at a time.
"""

import base64
import io
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_pil_image

from dml_core.data.datasets import LabelledImages, Retrieval, Splits
from dml_core.learner import Learner
from dml_core.retrieval.neighbors import GALLERY_BLOCK, nearest
from dml_core.retrieval.scores import average_precision_at_r, recall_at_k
from dml_core.retrieval.structure import index_vectors, query_vectors
from pipelines.data.sets import load_splits
from pipelines.data.sources import Sources
from pipelines.models.build import build_learner
from pipelines.reports import geometry
from pipelines.reports.geometry import Cloud, Point, Variation
from pipelines.training.evaluation import load_sources, retrieval_of, stream_outputs, test_metrics

PICTURES = 20_000  # test pictures looked at, at most: 80 MB of embeddings of 512 numbers, twice

MAPPED = 1_500

SHOWN = 6  # neighbours of a query

QUERIES = 6  # shown, of each sort

WORST = 10  # classes, and pairs of them

CHUNK = 1024  # queries at a time

SIDES = {"picture": 96, "dot": 48}  # pixels


class Hit(NamedTuple):
    """A neighbour. right: of the query's class."""

    picture: str
    label: str
    right: bool


class Query(NamedTuple):
    """rows: the way of ranking -> the nearest, best first."""

    picture: str
    label: str
    rows: dict[str, list[Hit]]


class Hard(NamedTuple):
    """A class. scores: the way of ranking -> (R@1, MAP@R).  taken_for: of most first neighbours that are wrong."""

    picture: str
    label: str
    queries: int
    scores: dict[str, tuple[float, float]]
    taken_for: str


class Pair(NamedTuple):
    """Two classes, and of how many of their queries the nearest picture is of the other."""

    pictures: tuple[str, str]
    labels: tuple[str, str]
    wrong: int
    queries: int


class Inspection(NamedTuple):
    """numbers: metrics of the run's tests.  looked_at, of: test pictures."""

    numbers: dict[str, float]
    looked_at: int
    of: int
    drawn: list[Query]
    missed: list[Query]
    hard: list[Hard]
    confused: list[Pair]
    points: list[Point]
    variation: dict[str, Variation]
    clouds: list[Cloud]


class Ranking(NamedTuple):
    """Of each query: near (N, SHOWN) positions in the gallery; recall, precision (N,): R@1 and MAP@R."""

    near: Tensor
    recall: Tensor
    precision: Tensor


def inspect_loop(job: dict[str, Any]) -> Inspection:
    """job: as of evaluate.evaluate_loop, and numbers: the tests' metrics, or None where they are to be found here."""
    sources = load_sources(job)
    config, learner = sources.config, sources.learner
    splits = load_splits(config, job["unreadable"])
    parameter = next(learner.parameters())
    untrained = build_learner(config, len(splits.train.class_names)).to(parameter.device, parameter.dtype).eval()
    whole = splits.tests["test"]
    numbers = job["numbers"] or _numbers(learner, untrained, splits, sources)
    task = part(whole)
    query = embedded(task.query, sources, learner, untrained)
    gallery = embedded(task.gallery, sources, learner, untrained) if task.gallery else query
    torch.set_num_threads(sources.cpus)
    images, targets = task.query, task.gallery or task.query
    labels, of_gallery = torch.from_numpy(images.labels), torch.from_numpy(targets.labels)
    counts = torch.bincount(of_gallery, minlength=len(images.class_names))[labels] - int(task.gallery is None)

    ranked = {"plain": ranking(query["trained"], gallery["trained"], labels, of_gallery, counts, task)}
    if "structure" in query:
        vectors = query_vectors(query["trained"], query["structure"]), index_vectors(gallery["trained"])
        ranked["structure-aware"] = ranking(*vectors, labels, of_gallery, counts, task)
    plain, asked = ranked["plain"], np.flatnonzero(counts.numpy() > 0)
    wrong = asked[plain.recall[asked].numpy() == 0]

    def shown(rows: np.ndarray) -> list[Query]:
        rng = np.random.default_rng(0)
        chosen = rng.permutation(rows)[:QUERIES].tolist()
        return [_query(images, targets, row, {way: found.near[row] for way, found in ranked.items()}) for row in chosen]

    first = of_gallery[plain.near[:, 0]].numpy()
    sources.progress.note("map", 0, 1)
    return Inspection(
        numbers,
        looked_at=len(images) + (len(task.gallery) if task.gallery else 0),
        of=len(whole.query) + (len(whole.gallery) if whole.gallery else 0),
        drawn=shown(asked),
        missed=shown(wrong),
        hard=_hard(images, ranked, asked, first),
        confused=_confused(images, asked, wrong, first),
        points=_points(images, query["trained"]),
        variation={name: geometry.variation(query[name], labels) for name in ("untrained", "trained")},
        clouds=geometry.clouds(learner, splits.train, sources, job["epoch"]),
    )


def _numbers(learner: Learner, untrained: Learner, splits: Splits, sources: Sources) -> dict[str, float]:
    """As at the end of training."""

    def baselines(x: Tensor) -> dict[str, Tensor]:
        seen = untrained.features(x)
        return {"untrained": untrained.embed(seen), "features": seen}

    found = test_metrics(learner, splits, sources)
    return found | retrieval_of(splits.tests["test"], sources, "baselines", baselines)


def some_classes(counts: np.ndarray, limit: int) -> np.ndarray:
    """Drawn by a fixed seed: of at most so many pictures together, or two. counts (C,)."""
    order = np.random.default_rng(0).permutation(len(counts))
    return order[: max(2, int((counts[order].cumsum() <= limit).sum()))]


def part(task: Retrieval) -> Retrieval:
    """Whole classes of a task of more than PICTURES."""
    query, gallery = task.query, task.gallery
    counts = np.bincount(query.labels, minlength=len(query.class_names))
    if gallery:
        counts += np.bincount(gallery.labels, minlength=len(counts))
    classes = some_classes(counts, PICTURES)

    def of(images: LabelledImages) -> LabelledImages:
        return images.rows(np.isin(images.labels, classes))

    return Retrieval(of(query), of(gallery) if gallery else None)


def embedded(images: LabelledImages, sources: Sources, learner: Learner, untrained: Learner) -> dict[str, Tensor]:
    """Of unit length, (N, D) "trained" and "untrained"; with NAMR "structure", too."""

    def outputs(x: Tensor) -> dict[str, Tensor]:
        seen = learner.features(x)
        found = {"trained": normalize(learner.embed(seen)), "untrained": normalize(untrained.embed(x))}
        return found | ({} if learner.namr is None else {"structure": learner.structure(seen)})

    parts = [*stream_outputs(images, sources, "embedding", outputs)]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def ranking(
    query: Tensor, gallery: Tensor, labels: Tensor, targets: Tensor, counts: Tensor, task: Retrieval
) -> Ranking:
    """labels, targets: of query and gallery.  counts: how many of the gallery are of each query's class."""
    blocks = [*zip(range(0, len(gallery), GALLERY_BLOCK), gallery.split(GALLERY_BLOCK))]
    k = min(len(gallery), max(SHOWN, int(counts.max())))
    parts = []
    for rows in torch.arange(len(query)).split(CHUNK):
        near = nearest(query[rows], blocks, k, None if task.gallery else rows).position
        relevant = (targets[near] == labels[rows, None]) & (near >= 0)
        scores = recall_at_k(relevant, 1), average_precision_at_r(relevant, counts[rows])
        parts.append(Ranking(near[:, :SHOWN], *scores))
    return Ranking(*(torch.cat(columns) for columns in zip(*parts)))


def _query(images: LabelledImages, targets: LabelledImages, row: int, near: dict[str, Tensor]) -> Query:
    def hit(position: int) -> Hit:
        right = targets.labels[position] == images.labels[row]
        return Hit(picture(targets, position), _label(targets, position), bool(right))

    found = {way: [hit(p) for p in positions.tolist() if p >= 0] for way, positions in near.items()}
    return Query(picture(images, row), _label(images, row), found)


def _hard(images: LabelledImages, ranked: dict[str, Ranking], asked: np.ndarray, first: np.ndarray) -> list[Hard]:
    """Classes of the lowest MAP@R by cosine, with at least one match."""
    labels, classes = images.labels[asked], len(images.class_names)
    counts = np.bincount(labels, minlength=classes)

    def means(values: Tensor) -> np.ndarray:
        return np.bincount(labels, values[asked].numpy(), classes) / np.maximum(counts, 1)

    scores = {way: (means(found.recall), means(found.precision)) for way, found in ranked.items()}
    order = np.lexsort((np.arange(classes), scores["plain"][1] + (counts == 0) * 2))
    made = []
    for label in order[: min(WORST, (counts > 0).sum())].tolist():
        rows = asked[labels == label]
        others = Counter(c for c in first[rows].tolist() if c != label)
        taken = images.class_names[others.most_common(1)[0][0]] if others else ""
        own = {way: (float(recall[label]), float(precision[label])) for way, (recall, precision) in scores.items()}
        made.append(Hard(picture(images, rows[0]), images.class_names[label], len(rows), own, taken))
    return made


def _confused(images: LabelledImages, asked: np.ndarray, wrong: np.ndarray, first: np.ndarray) -> list[Pair]:
    counts = np.bincount(images.labels[asked], minlength=len(images.class_names))
    taken = Counter(tuple(sorted(pair)) for pair in zip(images.labels[wrong].tolist(), first[wrong].tolist()))
    made = []
    for (a, b), times in sorted(taken.items(), key=lambda item: (-item[1], item[0]))[:WORST]:
        samples = [int(np.flatnonzero(images.labels == label)[0]) for label in (a, b)]
        pictures, labels = ([f(images, s) for s in samples] for f in (picture, _label))
        made.append(Pair((pictures[0], pictures[1]), (labels[0], labels[1]), times, int(counts[a] + counts[b])))
    return made


def _points(images: LabelledImages, z: Tensor) -> list[Point]:
    """Of whole classes, MAPPED pictures at most."""
    kept = np.flatnonzero(np.isin(images.labels, some_classes(np.bincount(images.labels), MAPPED)))[:MAPPED]
    places = geometry.placed(z[kept].float().numpy())
    return [
        Point(x, y, int(images.labels[row]), _label(images, row), picture(images, row, "dot"))
        for row, (x, y) in zip(kept.tolist(), places, strict=True)
    ]


def _label(images: LabelledImages, row: int) -> str:
    return images.class_names[images.labels[row]]


def picture(images: LabelledImages, row: int, kind: str = "picture") -> str:
    """A small WebP, as an address that holds it."""
    side, file = SIDES[kind], io.BytesIO()
    small = to_pil_image(images.picture(row, side))
    small.thumbnail((side, side))
    small.save(file, "WEBP", quality=60)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
