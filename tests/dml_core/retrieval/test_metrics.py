import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dml_core import gather
from dml_core.retrieval import neighbors
from dml_core.retrieval.metrics import (
    clustering_metrics,
    retrieval_metrics,
    sharded_clustering_metrics,
    sharded_retrieval_metrics,
)
from dml_core.retrieval.neighbors import BLOCK, GALLERY_BLOCK, owned_rows
from dml_core.retrieval.scores import CMC_RANKS
from tests import ranks
from tests.dml_core.retrieval.gpu_way import search_as_a_gpu

NAMES = {"precision_at_1": "recall_at_1", "mean_average_precision_at_r": "map_at_r", "r_precision": "r_precision"}


def their_metrics(names: tuple, *sets: Tensor | None, k: str | None = None) -> dict[str, float]:
    # Imported late: the processes spawned below import this file and need none of it.
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    return AccuracyCalculator(include=names, k=k, device=torch.device("cpu")).get_accuracy(*sets)


def clustered(size: int, classes: int, dim: int = 16, noise: float = 1.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (size,), generator=generator)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return F.normalize(centers[labels] + noise * torch.randn(size, dim, generator=generator)), labels


def corners(size: int, classes: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Corners of a cube: in 4 or 16 dimensions their cosines are exact, and most of them tie."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, 2, (size, dim), generator=generator).double() * 2 - 1
    return points, torch.randint(0, classes, (size,), generator=generator)


def naive(
    query: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    targets: Tensor | None = None,
    ks: tuple = (1, 2, 4, 8),
    structure: Tensor | None = None,
    rerank: int = 10**6,
) -> dict[str, float]:
    """Straight from the definitions, one query and one place at a time."""
    alone = gallery is None
    gallery, targets = (query, labels) if gallery is None or targets is None else (gallery, targets)
    similarity = (F.normalize(query) @ F.normalize(gallery).T).tolist()
    truth, classes, skipped = targets.tolist(), labels.tolist(), 0
    names = [*(f"recall_at_{k}" for k in ks), *(f"cmc_at_{k}" for k in CMC_RANKS)]
    totals = dict.fromkeys([*names, "r_precision", "map_at_r", "mean_average_precision"], 0.0)
    for i, row in enumerate(similarity):
        ranking = sorted((j for j in range(len(row)) if not (alone and j == i)), key=lambda j: (-row[j], j))
        if structure is not None:
            square = (structure[i] * (F.normalize(query)[i] - F.normalize(gallery)).square()).sum(1).tolist()
            ranking = sorted(ranking[:rerank], key=lambda j: square[j]) + ranking[rerank:]
        hits = [truth[j] == classes[i] for j in ranking]
        r = sum(hits)
        if r == 0:
            skipped += 1
            continue
        precision = [sum(hits[: p + 1]) / (p + 1) if hits[p] else 0.0 for p in range(len(hits))]
        scores = {f"recall_at_{k}": float(any(hits[:k])) for k in ks}
        scores |= {f"cmc_at_{k}": float(any(hits[:k])) for k in CMC_RANKS}
        scores |= {"r_precision": sum(hits[:r]) / r, "map_at_r": sum(precision[:r]) / r}
        scores |= {"mean_average_precision": sum(precision) / r}
        totals = {name: totals[name] + score for name, score in scores.items()}
    return {name: t / max(1, len(similarity) - skipped) for name, t in totals.items()} | {
        "queries_without_match": skipped
    }


@pytest.mark.parametrize("noise", [0.5, 1.5, 5.0])
@pytest.mark.parametrize("classes", [3, 40, 500])
@pytest.mark.parametrize("separate", [False, True])
def test_equal_to_accuracy_calculator(noise: float, classes: int, separate: bool) -> None:
    query, labels = clustered(600, classes, noise=noise)
    other = clustered(700, classes, noise=noise, seed=1) if separate else (None, None)
    expected = their_metrics(tuple(NAMES), query, labels, *other, k="max_bin_count")
    metrics = retrieval_metrics(query, labels, *other)
    for theirs, ours in NAMES.items():
        assert metrics[ours] == pytest.approx(expected[theirs], abs=1e-6)
    if classes == 500:
        assert metrics["queries_without_match"] > 0


def test_full_list_map_equals_accuracy_calculator() -> None:
    query, labels = clustered(400, 30)
    expected = their_metrics(("mean_average_precision",), query, labels)["mean_average_precision"]
    metrics = retrieval_metrics(query, labels, extra=("map",))
    assert metrics["mean_average_precision"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("make", [clustered, lambda n, c, seed: corners(n, c, 16, seed)], ids=["random", "ties"])
@pytest.mark.parametrize("size", [2, 40, BLOCK - 1, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("as_a_gpu", [False, True])
def test_equal_to_the_definitions(make: Callable, size: int, as_a_gpu: bool) -> None:
    with search_as_a_gpu() if as_a_gpu else nullcontext():
        compare_with_the_definitions(make, size)


def compare_with_the_definitions(make: Callable, size: int) -> None:
    query, labels = make(size, 7, seed=2)
    query = query.double()
    metrics = retrieval_metrics(query, labels, extra=("map", "cmc"))
    assert metrics == pytest.approx(naive(query, labels), abs=1e-12)
    gallery, targets = make(BLOCK + 5, 9, seed=3)
    metrics = retrieval_metrics(query, labels, gallery.double(), targets, ks=(1, 3, 1000), extra=("map", "cmc"))
    assert metrics == pytest.approx(naive(query, labels, gallery.double(), targets, ks=(1, 3, 1000)), abs=1e-12)


def structures(query: Tensor) -> Tensor:
    return 0.5 + torch.rand(query.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 40, BLOCK + 1])
@pytest.mark.parametrize("rerank", [None, 1, 5, 10_000])
def test_structure_aware_ranking_equals_the_definitions(size: int, rerank: int | None) -> None:
    query, labels = clustered(size, 7, seed=2)
    gallery, targets = clustered(GALLERY_BLOCK + 300 if size == 2 else 300, 9, seed=3)
    s, query, gallery = structures(query), query.double(), gallery.double()
    for other in ((), (gallery, targets)):
        metrics = retrieval_metrics(query, labels, *other, structure=s, rerank=rerank)
        expected = naive(query, labels, *other, structure=s, rerank=rerank or 10**6)
        assert metrics == pytest.approx({key: expected[key] for key in metrics}, abs=1e-12)


def test_structure_of_ones_is_the_plain_ranking() -> None:
    query, labels = clustered(300, 10)
    ones = torch.ones(query.shape, dtype=torch.float64)
    plain = retrieval_metrics(query.double(), labels)
    for rerank in (None, 1, 20):
        assert retrieval_metrics(query.double(), labels, structure=ones, rerank=rerank) == plain


@pytest.mark.parametrize("rerank", [None, 7])
@pytest.mark.parametrize("size", [40, 600])
@pytest.mark.parametrize("as_a_gpu", [False, True])
def test_a_gallery_among_the_queries_is_that_gallery_apart(size: int, rerank: int | None, as_a_gpu: bool) -> None:
    with search_as_a_gpu() if as_a_gpu else nullcontext():
        compare_with_the_gallery_apart(size, rerank)


def compare_with_the_gallery_apart(size: int, rerank: int | None) -> None:
    points, labels = clustered(size, 6)
    mask = torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.3
    extra = () if rerank else ("map", "cmc")
    structure = structures(points)
    arguments = {"structure": structure[~mask], "rerank": rerank} if rerank else {}
    separate = retrieval_metrics(points[~mask], labels[~mask], points[mask], labels[mask], extra=extra, **arguments)
    arguments = {"structure": structure, "rerank": rerank} if rerank else {}
    assert retrieval_metrics(points, labels, in_gallery=mask, extra=extra, **arguments) == pytest.approx(
        separate, rel=1e-9
    )


def test_several_gallery_blocks() -> None:
    query, labels = corners(9, 40, 16, seed=0)
    gallery, targets = corners(2 * GALLERY_BLOCK + 1, 40, 16, seed=1)
    metrics = retrieval_metrics(query, labels, gallery, targets, extra=("map", "cmc"))
    assert metrics == pytest.approx(naive(query, labels, gallery, targets), abs=1e-12)


@settings(max_examples=25)
@given(st.integers(2, 60), st.integers(1, 8), st.integers(1, 5), st.integers(0, 999))
def test_ties_follow_the_gallery(size: int, classes: int, copies: int, seed: int) -> None:
    points, labels = corners(size, classes, 4, seed)
    points, labels = points.repeat(copies, 1), labels.repeat(copies).roll(1)
    metrics = retrieval_metrics(points, labels, extra=("map", "cmc"))
    assert metrics == pytest.approx(naive(points, labels), abs=1e-12)
    with search_as_a_gpu():
        assert retrieval_metrics(points, labels, extra=("map", "cmc")) == metrics


@settings(max_examples=25)
@given(st.integers(4, 400), st.integers(1, 30), st.integers(0, 999))
def test_order_does_not_matter_without_ties(size: int, classes: int, seed: int) -> None:
    query, labels = clustered(size, classes, seed=seed)
    gallery, targets = clustered(size + 3, classes, seed=seed + 1)
    p, q = torch.randperm(size), torch.randperm(size + 3)
    extra = ("map", "cmc")
    expected = retrieval_metrics(query.double(), labels, gallery.double(), targets, extra=extra)
    shuffled = retrieval_metrics(query[p].double(), labels[p], gallery[q].double(), targets[q], extra=extra)
    assert shuffled == pytest.approx(expected, abs=1e-12)
    alone = retrieval_metrics(query.double(), labels, extra=extra)
    assert retrieval_metrics(query[p].double(), labels[p], extra=extra) == pytest.approx(alone, abs=1e-12)


@settings(max_examples=25)
@given(st.integers(2, 300), st.integers(1, 40), st.integers(0, 999))
def test_bounds(size: int, classes: int, seed: int) -> None:
    query, labels = clustered(size, classes, seed=seed)
    metrics = retrieval_metrics(query, labels, ks=(1, 2, 5, 20, 10_000), extra=("map",))
    recalls = [metrics[f"recall_at_{k}"] for k in (1, 2, 5, 20, 10_000)]
    assert recalls == sorted(recalls) and recalls[-1] in (0.0, 1.0)
    assert 0 <= metrics["map_at_r"] <= metrics["r_precision"] <= 1
    assert metrics["map_at_r"] <= metrics["mean_average_precision"] <= 1


@settings(max_examples=10)
@given(st.integers(2, 30), st.integers(2, 8))
def test_perfect_embeddings(classes: int, images: int) -> None:
    labels = torch.arange(classes).repeat(images)
    metrics = retrieval_metrics(torch.eye(classes)[labels], labels, extra=("map", "cmc"))
    assert metrics.pop("queries_without_match") == 0
    assert min(metrics.values()) == pytest.approx(1) and max(metrics.values()) == pytest.approx(1)


@pytest.mark.parametrize("size", [1, 5])
def test_no_query_has_a_match(size: int) -> None:
    metrics = retrieval_metrics(torch.randn(size, 4), torch.arange(size), extra=("map", "cmc"))
    assert metrics.pop("queries_without_match") == size
    assert set(metrics.values()) == {0.0}


def test_queries_without_match_are_left_out() -> None:
    query, labels = clustered(300, 10)
    lonely, numbers = clustered(40, 40, seed=5)[0], torch.arange(1000, 1040)
    gallery, targets = clustered(200, 10, seed=6)
    expected = retrieval_metrics(query, labels, gallery, targets)
    metrics = retrieval_metrics(torch.cat([query, lonely]), torch.cat([labels, numbers]), gallery, targets)
    assert metrics.pop("queries_without_match") == 40 and expected.pop("queries_without_match") == 0
    assert metrics == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    query, labels = clustered(300, 10)
    query = query.to(dtype)
    assert retrieval_metrics(query, labels) == pytest.approx(retrieval_metrics(query.double(), labels), abs=1e-3)
    assert retrieval_metrics(query, labels.int(), query.float(), labels)["recall_at_1"] == 1


def test_length_of_embeddings_and_gradients_do_not_matter() -> None:
    query, labels = clustered(100, 5)
    scaled = (query * 2.0 ** torch.randint(-3, 4, (100, 1))).requires_grad_()
    assert retrieval_metrics(scaled, labels) == retrieval_metrics(query, labels)


def test_clustering_equals_accuracy_calculator() -> None:
    query, labels = clustered(300, 8, noise=2.0)
    expected = their_metrics(("NMI", "AMI"), query, labels)
    assert clustering_metrics(query, labels, seed=1234) == pytest.approx(
        {"nmi": expected["NMI"], "ami": expected["AMI"]}, abs=1e-6
    )
    assert clustering_metrics(query, labels, 3) == clustering_metrics(query, labels, 3)
    metrics = retrieval_metrics(query, labels, extra=("ami",), seed=3)
    assert metrics["ami"] == clustering_metrics(query, labels, 3)["ami"] and "nmi" not in metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ks": (0, 1)}, "every k must be at least 1"),
        ({"extra": ("maps",)}, "maps"),
        ({"gallery": torch.ones(2, 4)}, "go together"),
        ({"gallery": torch.ones(2, 3), "gallery_labels": torch.ones(2)}, "query has 4 dimensions, gallery 3"),
        ({"gallery": torch.ones(2, 4), "gallery_labels": torch.ones(3)}, "3 labels make it 3 rows"),
        ({"gallery": torch.ones(0, 4), "gallery_labels": torch.ones(0)}, "gallery: the set is empty"),
        ({"query": torch.full((5, 4), torch.nan)}, "5 of 5 embeddings are not finite"),
        ({"query": torch.ones(5)}, "query: shape"),
        ({"structure": torch.ones(5, 3)}, "structure: shape"),
        ({"rerank": 10}, "rerank=10 needs structure embeddings"),
        ({"in_gallery": torch.ones(3)}, "in_gallery: one entry a query"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(**({"query": torch.ones(5, 4), "query_labels": torch.zeros(5)} | arguments))


def test_clustering_is_refused_in_shards() -> None:
    with pytest.raises(ValueError, match="nmi"):
        sharded_retrieval_metrics(torch.ones(2, 2), torch.zeros(2), extra=("nmi",))


def test_memory_is_that_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, product = [0], torch.mm  # numbers of the largest product

    def watched(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        largest[0] = max(largest[0], out.numel())
        return product(a, b, out=out)

    monkeypatch.setattr(neighbors.torch, "mm", watched)
    query, labels = clustered(3000, 50, dim=4)
    retrieval_metrics(query, labels, *clustered(GALLERY_BLOCK + 300, 50, dim=4), extra=("map",))
    assert largest[0] == BLOCK * GALLERY_BLOCK


def cases() -> dict[str, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]]:
    """Query set and gallery: fewer blocks than ranks, uneven blocks, several gallery blocks, many ties."""
    points, labels = clustered(700, 20, dim=48)
    return {
        "one block": (clustered(100, 9), None),
        "three blocks": ((points, labels), None),
        "gallery": (clustered(1100, 400, dim=48), clustered(GALLERY_BLOCK + 700, 400, dim=48, seed=1)),
        "ties": (
            (points.repeat(2, 1), labels.repeat(2).roll(1)),
            (points.repeat(2, 1)[:1300], labels.repeat(2)[:1300]),
        ),
        "bfloat16": ((points.bfloat16(), labels), None),
        "single": ((points[:1], labels[:1]), None),
    }


def evaluate_in_group(folder: Path, as_a_gpu: bool) -> None:
    with search_as_a_gpu() if as_a_gpu else nullcontext():
        evaluate_shards(folder)


def evaluate_shards(folder: Path) -> None:
    rank, world = gather.rank(), gather.world_size()
    results = {}
    for name, (query, other) in cases().items():
        shards = [z[owned_rows(len(z), rank, world)] for z, _ in (query, *([other] if other else []))]
        gallery, targets = (shards[1], other[1]) if other else (None, None)
        results[name] = sharded_retrieval_metrics(shards[0], query[1], gallery, targets, extra=("map", "cmc"))
        s = structures(query[0])[owned_rows(len(query[0]), rank, world)]
        for rerank in (None, 20):
            results[f"{name}, rerank={rerank}"] = sharded_retrieval_metrics(
                shards[0], query[1], gallery, targets, structure_shard=s, rerank=rerank
            )
        if not other:
            mask = torch.arange(len(query[0])) % 5 == 0
            results[f"{name}, in_gallery"] = sharded_retrieval_metrics(shards[0], query[1], in_gallery=mask)
    results["alone"] = retrieval_metrics(*cases()["three blocks"][0], extra=("map", "cmc"))
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))


@pytest.mark.parametrize("as_a_gpu", [False, True])
def test_any_number_of_processes_gives_the_same_bits(as_a_gpu: bool, tmp_path: Path) -> None:
    for world in (4, 2, 1):
        ranks.run(evaluate_in_group, world, tmp_path, as_a_gpu)
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(results) == 4 + 2 + 1
    for metrics in results.values():
        assert metrics == results["1-0"]
        assert metrics["alone"] == metrics["three blocks"]
    for name, (query, other) in cases().items():
        gallery, targets = other or (None, None)
        expected = retrieval_metrics(*query, gallery, targets, extra=("map", "cmc"))
        assert results["1-0"][name] == pytest.approx(expected, abs=1e-9)


CLUSTERED = {"one block": (100, 9), "three blocks": (700, 20), "several gallery blocks": (GALLERY_BLOCK + 300, 12)}


def cluster_in_group(folder: Path) -> None:
    rank, world = gather.rank(), gather.world_size()
    results = {}
    for name, (size, classes) in CLUSTERED.items():
        points, labels = clustered(size, classes)
        results[name] = sharded_clustering_metrics(points[owned_rows(size, rank, world)], labels, seed=3)
        with torch.inference_mode():  # as embeddings come from it
            results[f"{name}, inference"] = sharded_clustering_metrics(
                1 * points[owned_rows(size, rank, world)], labels, seed=3
            )
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))


def test_clustering_in_shards_is_that_of_the_whole_set(tmp_path: Path) -> None:
    """The same bits for any number of processes; fewer blocks than ranks, uneven blocks, several gallery blocks."""
    for world in (2, 1):
        ranks.run(cluster_in_group, world, tmp_path)
    expected = {}
    for name, (size, classes) in CLUSTERED.items():
        expected[name] = expected[f"{name}, inference"] = clustering_metrics(*clustered(size, classes), seed=3)
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text()) == expected, path.stem
    assert len([*tmp_path.iterdir()]) == 3 and 0 < expected["three blocks"]["ami"] < expected["three blocks"]["nmi"] < 1


def test_a_shard_of_another_set_is_refused_for_clustering() -> None:
    with pytest.raises(ValueError, match="2 rows, which are not this rank's of 3 labels"):
        sharded_clustering_metrics(torch.ones(2, 2), torch.zeros(3))


@settings(max_examples=10)
@given(st.integers(2, 400), st.integers(1, 30), st.sampled_from([None, 1, 9]), st.booleans(), st.integers(0, 999))
def test_a_gpu_measures_what_a_processor_does(
    size: int, classes: int, rerank: int | None, ties: bool, seed: int
) -> None:
    make = (lambda n, s: corners(n, classes, 4, s)) if ties else (lambda n, s: clustered(n, classes, seed=s))
    (query, labels), (gallery, targets) = make(size, seed), make(size + 5, seed + 1)
    structure, ks = structures(query), (1, 5, size, 2 * size)
    for other in ((), (gallery.double(), targets)):
        arguments = {"structure": structure, "rerank": rerank} if rerank else {"extra": ("map", "cmc")}
        expected = retrieval_metrics(query.double(), labels, *other, ks=ks, **arguments)
        with search_as_a_gpu():
            assert retrieval_metrics(query.double(), labels, *other, ks=ks, **arguments) == expected
