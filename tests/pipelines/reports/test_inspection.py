"""What a report says of test pictures, beside a naive ranking of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dml_core.data.datasets import LabelledImages, Retrieval
from pipelines.cluster.transfer import SentFiles
from pipelines.compare.wording import RANKINGS
from pipelines.config.recipe import load_recipe
from pipelines.data.sets import load_collection, load_splits
from pipelines.data.sources import views_of
from pipelines.models.build import build_learner
from pipelines.models.checkpoint import load_weights, read_class_names, read_config, read_state
from pipelines.reports import geometry, inspection
from pipelines.reports.inspection import MAX_POINTS, POINT_SIDE, Inspection, inspect_loop
from pipelines.reports.job import InspectJob


@pytest.fixture(scope="module")
def result(exact) -> Inspection:
    """Of the same run by its checkpoint alone: measured anew, in this process."""
    folder = Path(exact[1].checkpoint)
    config, state = read_config(folder), read_state(folder)
    return inspect_loop(InspectJob(config, model=SentFiles(folder=folder), epoch=state.epoch - 1))


def test_what_is_measured_anew_is_what_the_run_measured(exact, result: Inspection) -> None:
    metrics = exact[1].metrics
    tested = {key: value for key, value in metrics.items() if key.split("/")[0] in RANKINGS}
    assert result.metrics == pytest.approx(tested, abs=1e-9)
    assert result.inspected == result.total
    assert [*result.hardest_classes[0].scores] == ["plain", "structure-aware"]


def test_scores_neighbours_and_pairs_are_those_of_a_naive_ranking(exact, result: Inspection) -> None:
    """From the map's pictures, which are all of so small a set, and Embedder's vectors."""
    config = read_config(Path(exact[1].checkpoint))
    images = load_splits(config).tests["test"].query
    learner = build_learner(config, len(read_class_names(Path(exact[1].checkpoint)))).double().eval()
    load_weights(Path(exact[1].checkpoint), learner)
    with torch.inference_mode():
        views = views_of(config, images).batch([(row, None) for row in range(len(images))])
        z = torch.nn.functional.normalize(learner.embed(views)).numpy()
    similarity = z @ z.T
    np.fill_diagonal(similarity, -np.inf)
    order, labels = np.argsort(-similarity, axis=1, kind="stable"), images.labels
    scores: dict[int, list[float]] = {}
    for row, label in enumerate(labels):
        size = (labels == label).sum() - 1
        right = labels[order[row][:size]] == label
        precision = sum(right[: i + 1].mean() for i in np.flatnonzero(right)) / size
        scores.setdefault(label, []).append(precision)
    means = sorted((np.mean(values), images.class_names[label]) for label, values in scores.items())
    assert [hard.label for hard in result.hardest_classes] == [name for _, name in means[: len(result.hardest_classes)]]
    assert [hard.scores["plain"][1] for hard in result.hardest_classes] == pytest.approx(
        [mean for mean, _ in means][: len(result.hardest_classes)]
    )
    first = labels[order[:, 0]]
    wrong = {frozenset((images.class_names[a], images.class_names[b])) for a, b in zip(labels, first) if a != b}
    assert {frozenset(pair.labels) for pair in result.confused_pairs} <= wrong
    assert sum(pair.wrong for pair in result.confused_pairs) <= (labels != first).sum()
    assert all(not query.hits["plain"][0].right for query in result.missed_queries)
    assert all(
        hit.right == (hit.label == q.label) for q in result.random_queries for hits in q.hits.values() for hit in hits
    )

    own = [np.linalg.norm(z[labels == c] - z[labels == c].mean(0), axis=1).mean() for c in range(labels.max() + 1)]
    assert result.variation["trained"].to_own_center == pytest.approx(own)
    centers = np.stack([z[labels == c].mean(0) for c in range(labels.max() + 1)])
    between = np.linalg.norm(centers[:, None] - centers, axis=2) + np.diag(np.full(len(centers), np.inf))
    assert result.variation["trained"].to_next_center == pytest.approx(between.min(1), abs=1e-6)
    assert result.variation["trained"].spectrum.sum() == pytest.approx(1)

    iaa, sgar = result.clouds
    assert (iaa.method, sgar.method, len(sgar.synthetics)) == ("IAA", "SGAR", config.sgar.count)
    assert len(iaa.synthetics[0]) == config.iaa.draws * len(iaa.embeddings) and 0 < sgar.variance_share <= 1
    away = [np.linalg.norm(drawn - sgar.embeddings, axis=1).mean() for drawn in sgar.synthetics]
    assert away == sorted(away)  # weakest first
    assert len(result.points) == len(images) and all(0 <= p.x <= 1 and 0 <= p.y <= 1 for p in result.points)
    assert [point.label for point in result.points] == [images.class_names[label] for label in labels]


def test_a_large_set_is_looked_at_in_whole_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_collection(load_recipe("glyphs", []).data).images
    monkeypatch.setattr(inspection, "MAX_PICTURES", 1000)
    some = inspection.limit_task(Retrieval(images)).query
    counts = np.bincount(images.labels)
    assert 900 < len(some) <= 1000
    assert all(counts[label] == (some.labels == label).sum() for label in np.unique(some.labels))
    apart = inspection.limit_task(
        Retrieval(images.select(np.arange(0, len(images), 2)), images.select(np.arange(1, len(images), 2)))
    )
    assert 900 < len(apart.query) + len(apart.gallery) <= 1000
    assert {*apart.query.labels} <= {*apart.gallery.labels}


def test_pictures_are_small_whatever_they_show() -> None:
    """Noise is the worst there is: a map of it is under 10 MB."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 300, 500), dtype=np.uint8)
    images = LabelledImages(noise, np.zeros(1, np.int64), ("noise",))
    assert len(inspection.encode_picture(images, 0, POINT_SIDE)) * MAX_POINTS < 6e6
    assert len(inspection.encode_picture(images, 0)) < 10_000


def test_a_map_of_very_few() -> None:
    for size in (1, 3, 5):
        places = geometry.place_by_tsne(np.eye(8, dtype=np.float32)[:size])
        assert places.shape == (size, 2) and np.isfinite(places).all()
