"""What a report says of test pictures, beside a naive ranking of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dml_core.data.datasets import LabelledImages, Retrieval
from pipelines.cluster.transfer import put_files
from pipelines.compare.wording import RANKINGS
from pipelines.config.recipe import load_recipe
from pipelines.data.sets import load_collection, load_splits
from pipelines.data.sources import views_of
from pipelines.models.build import build_learner
from pipelines.models.checkpoint import MODEL_FILES, load_weights, read_class_names, read_config, read_state
from pipelines.reports import geometry, inspection
from pipelines.reports.inspection import MAPPED, Inspection, inspect_loop


@pytest.fixture(scope="module")
def found(exact) -> Inspection:
    """Of the same run by its checkpoint alone: measured anew, in this process."""
    folder = Path(exact[1].checkpoint)
    config, state = read_config(folder), read_state(folder)
    held = put_files(folder, MODEL_FILES)
    job = {"config": config.model_dump(exclude_none=True), "checkpoint": held, "unreadable": []}
    return inspect_loop(job | {"cpus": 1, "board": None, "numbers": None, "epoch": state.epoch - 1})


def test_what_is_measured_anew_is_what_the_run_measured(exact, found: Inspection) -> None:
    metrics = exact[1].metrics
    tested = {key: value for key, value in metrics.items() if key.split("/")[0] in RANKINGS}
    assert found.numbers == pytest.approx(tested, abs=1e-9)
    assert found.looked_at == found.of
    assert [*found.hard[0].scores] == ["plain", "structure-aware"]


def test_scores_neighbours_and_pairs_are_those_of_a_naive_ranking(exact, found: Inspection) -> None:
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
    assert [hard.label for hard in found.hard] == [name for _, name in means[: len(found.hard)]]
    assert [hard.scores["plain"][1] for hard in found.hard] == pytest.approx(
        [mean for mean, _ in means][: len(found.hard)]
    )
    first = labels[order[:, 0]]
    wrong = {frozenset((images.class_names[a], images.class_names[b])) for a, b in zip(labels, first) if a != b}
    assert {frozenset(pair.labels) for pair in found.confused} <= wrong
    assert sum(pair.wrong for pair in found.confused) <= (labels != first).sum()
    assert all(not query.rows["plain"][0].right for query in found.missed)
    assert all(hit.right == (hit.label == q.label) for q in found.drawn for hits in q.rows.values() for hit in hits)

    own = [np.linalg.norm(z[labels == c] - z[labels == c].mean(0), axis=1).mean() for c in range(labels.max() + 1)]
    assert found.variation["trained"].own == pytest.approx(own)
    centers = np.stack([z[labels == c].mean(0) for c in range(labels.max() + 1)])
    between = np.linalg.norm(centers[:, None] - centers, axis=2) + np.diag(np.full(len(centers), np.inf))
    assert found.variation["trained"].other == pytest.approx(between.min(1), abs=1e-6)
    assert found.variation["trained"].spectrum.sum() == pytest.approx(1)

    iaa, sgar = found.clouds
    assert (iaa.method, sgar.method, len(sgar.synthetic)) == ("IAA", "SGAR", config.sgar.count)
    assert len(iaa.synthetic[0]) == config.iaa.draws * len(iaa.real) and 0 < sgar.share <= 1
    away = [np.linalg.norm(drawn - sgar.real, axis=1).mean() for drawn in sgar.synthetic]
    assert away == sorted(away)  # weakest first
    assert len(found.points) == len(images) and all(0 <= p.x <= 1 and 0 <= p.y <= 1 for p in found.points)
    assert [point.label for point in found.points] == [images.class_names[label] for label in labels]


def test_a_large_set_is_looked_at_in_whole_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_collection(load_recipe("glyphs", []).data).images
    monkeypatch.setattr(inspection, "PICTURES", 1000)
    some = inspection.part(Retrieval(images)).query
    counts = np.bincount(images.labels)
    assert 900 < len(some) <= 1000
    assert all(counts[label] == (some.labels == label).sum() for label in np.unique(some.labels))
    apart = inspection.part(
        Retrieval(images.rows(np.arange(0, len(images), 2)), images.rows(np.arange(1, len(images), 2)))
    )
    assert 900 < len(apart.query) + len(apart.gallery) <= 1000
    assert {*apart.query.labels} <= {*apart.gallery.labels}


def test_pictures_are_small_whatever_they_show() -> None:
    """Noise is the worst there is: a map of it is under 10 MB."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 300, 500), dtype=np.uint8)
    images = LabelledImages(noise, np.zeros(1, np.int64), ("noise",))
    assert len(inspection.picture(images, 0, "dot")) * MAPPED < 6e6
    assert len(inspection.picture(images, 0)) < 10_000


def test_a_map_of_very_few() -> None:
    for size in (1, 3, 5):
        places = geometry.placed(np.eye(8, dtype=np.float32)[:size])
        assert places.shape == (size, 2) and np.isfinite(places).all()
