"""What is left out of a query's ranking: itself, and items of its own label and camera; against naive loops."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dml_core import gather
from dml_core.retrieval.metrics import retrieval_metrics, sharded_retrieval_metrics
from dml_core.retrieval.neighbors import BLOCK, GALLERY_BLOCK, owned_rows
from tests import ranks
from tests.dml_core.retrieval.gpu_way import search_as_a_gpu
from tests.dml_core.retrieval.test_metrics import clustered, corners, structures

EXTRA = ("map", "mrr", "cmc", "precision_at_3", "map_at_5", "recall_at_7")


def cameras(size: int, count: int, seed: int = 0) -> Tensor:
    """From -1, which is none."""
    return torch.randint(-1, count, (size,), generator=torch.Generator().manual_seed(seed))


def naive(
    similarity: list[list[float]],
    labels: list[int],
    targets: list[int],
    query_cameras: list[int],
    gallery_cameras: list[int],
    positions: list[int],
) -> dict[str, float]:
    """From the definitions: rank, strike out what does not count, and go down the list."""
    totals, matched = dict[str, float](), 0
    for i, row in enumerate(similarity):
        ranking = sorted(range(len(row)), key=lambda j: (-row[j], j))
        own = [labels[i] == targets[j] and query_cameras[i] == gallery_cameras[j] >= 0 for j in range(len(row))]
        hits = [targets[j] == labels[i] for j in ranking if not own[j] and j != positions[i]]
        r = sum(hits)
        if not r:
            continue
        matched += 1
        precision = [sum(hits[: p + 1]) / (p + 1) if hits[p] else 0.0 for p in range(len(hits))]
        scores = {f"recall_at_{k}": float(any(hits[:k])) for k in (1, 2, 4, 8, 7)}
        scores |= {f"cmc_at_{k}": float(any(hits[:k])) for k in (1, 5, 10, 20, 30)}
        scores |= {"r_precision": sum(hits[:r]) / r, "map_at_r": sum(precision[:r]) / r}
        scores |= {"mean_average_precision": sum(precision) / r, "mrr": 1 / (1 + hits.index(True))}
        scores |= {"precision_at_3": sum(hits[:3]) / 3, "map_at_5": sum(precision[:5]) / min(5, r)}
        totals = {name: totals.get(name, 0.0) + score for name, score in scores.items()}
    means = {name: total / matched for name, total in totals.items()}
    return means | {"queries_without_match": len(similarity) - matched}


def market_1501(
    similarity: list[list[float]], ids: list[int], cams: list[int], gallery_ids: list[int], gallery_cams: list[int]
) -> tuple[float, list[float]]:
    """As the benchmark's own evaluation is described: junk is taken out of the list, then CMC and average precision.

    Good: same id, another camera. Junk: same id and camera. A query without a good image is not evaluated.
    """
    average_precisions, curves = [], []
    for q, row in enumerate(similarity):
        order = sorted(range(len(row)), key=lambda g: -row[g])
        good = {g for g in order if gallery_ids[g] == ids[q] and gallery_cams[g] != cams[q]}
        junk = {g for g in order if gallery_ids[g] == ids[q] and gallery_cams[g] == cams[q]}
        if not good:
            continue
        ranked = [g for g in order if g not in junk]
        places = [place for place, g in enumerate(ranked, 1) if g in good]
        average_precisions.append(sum((n + 1) / place for n, place in enumerate(places)) / len(good))
        curves.append([float(places[0] <= k) for k in (1, 5, 10)])
    mean_curve = [sum(values) / len(curves) for values in zip(*curves, strict=True)]
    return sum(average_precisions) / len(curves), mean_curve


@pytest.mark.parametrize("as_a_gpu", [False, True])
def test_re_identification_is_that_of_market_1501(as_a_gpu: bool) -> None:
    query, ids = clustered(300, 40, noise=1.0)
    gallery, gallery_ids = clustered(900, 60, noise=1.0, seed=1)
    cams, gallery_cams = cameras(300, 6).clamp(min=0), cameras(900, 6, 1).clamp(min=0)
    similarity = (F.normalize(query.double()) @ F.normalize(gallery.double()).T).tolist()
    average_precision, curve = market_1501(
        similarity, ids.tolist(), cams.tolist(), gallery_ids.tolist(), gallery_cams.tolist()
    )
    sets = query.double(), ids, gallery.double(), gallery_ids
    with search_as_a_gpu() if as_a_gpu else nullcontext():
        metrics = retrieval_metrics(*sets, extra=("map", "cmc"), query_cameras=cams, gallery_cameras=gallery_cams)
    assert metrics["mean_average_precision"] == pytest.approx(average_precision, abs=1e-12)
    assert [metrics[f"cmc_at_{k}"] for k in (1, 5, 10)] == pytest.approx(curve, abs=1e-12)
    assert metrics["mean_average_precision"] < retrieval_metrics(*sets, extra=("map",))["mean_average_precision"]


@settings(max_examples=30)
@given(
    st.integers(2, 60), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 999),
)  # fmt: skip
def test_equal_to_the_definitions(
    size: int, classes: int, count: int, alone: bool, ties: bool, as_a_gpu: bool, seed: int
) -> None:
    make = corners if ties else (lambda n, c, dim, s: clustered(n, c, dim, seed=s))
    query, labels = make(size, classes, 16, seed)
    own_cameras = cameras(size, count, seed)
    if alone:
        gallery, targets, target_cameras, positions = query, labels, own_cameras, torch.arange(size)
        given_ = {}
    else:  # a gallery that has some of the queries
        others, other_labels = make(size + 3, classes, 16, seed + 1)
        gallery, targets = torch.cat([others, query[::2]]), torch.cat([other_labels, labels[::2]])
        target_cameras = torch.cat([cameras(size + 3, count, seed + 1), own_cameras[::2]])
        positions = torch.full((size,), -1)
        positions[::2] = len(others) + torch.arange(len(query[::2]))
        given_ = {"gallery": gallery.double(), "gallery_labels": targets}
        given_ |= {"gallery_cameras": target_cameras, "query_positions": positions}
    similarity = (F.normalize(query.double()) @ F.normalize(gallery.double()).T).tolist()
    lists = [x.tolist() for x in (labels, targets, own_cameras, target_cameras, positions)]
    expected = naive(similarity, *lists)
    with search_as_a_gpu() if as_a_gpu else nullcontext():
        metrics = retrieval_metrics(query.double(), labels, **given_, extra=EXTRA, query_cameras=own_cameras)
    assert metrics["queries_without_match"] == expected["queries_without_match"]
    if metrics["queries_without_match"] < size:
        assert metrics == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("as_a_gpu", [False, True])
def test_several_blocks_of_gallery(as_a_gpu: bool) -> None:
    """The items of one label and camera lie in several blocks, and one group is as large as a block's whole ranking."""
    query, labels = clustered(BLOCK + 9, 3)
    gallery, targets = clustered(GALLERY_BLOCK + 500, 3, seed=1)
    cams = cameras(len(query), 3), cameras(len(gallery), 3, 1)
    similarity = (F.normalize(query.double()) @ F.normalize(gallery.double()).T).tolist()
    expected = naive(similarity, *(x.tolist() for x in (labels, targets, *cams)), [-1] * len(query))
    with search_as_a_gpu() if as_a_gpu else nullcontext():
        metrics = retrieval_metrics(
            *(query.double(), labels, gallery.double(), targets),
            extra=EXTRA,
            query_cameras=cams[0],
            gallery_cameras=cams[1],
        )
    assert metrics == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rerank", [None, 7])
def test_what_is_left_out_is_as_if_it_were_not_there(rerank: int | None) -> None:
    """One query at a time, against a gallery without its own label and camera; plain and structure-aware."""
    query, labels = clustered(30, 4)
    gallery, targets = clustered(200, 4, seed=1)
    cams, gallery_cams, s = cameras(30, 2), cameras(200, 2, 1), structures(query)
    given_ = {"structure": s, "rerank": rerank}
    query, gallery = query.double(), gallery.double()
    metrics = retrieval_metrics(
        query, labels, gallery, targets, query_cameras=cams, gallery_cameras=gallery_cams, **given_
    )
    singles = []
    for i in range(30):
        kept = (targets != labels[i]) | (gallery_cams != cams[i]) | (cams[i] < 0)
        one = {"structure": s[i : i + 1], "rerank": rerank}
        singles.append(retrieval_metrics(query[i : i + 1], labels[i : i + 1], gallery[kept], targets[kept], **one))
    for name in ("recall_at_1", "recall_at_4", "map_at_r", "r_precision"):
        assert metrics[name] == pytest.approx(sum(one[name] for one in singles) / 30, abs=1e-12)


def test_a_query_that_is_part_of_the_gallery_does_not_find_itself() -> None:
    z, labels = clustered(400, 20, noise=3.0)
    queries = torch.arange(0, 400, 4)
    finds_itself = retrieval_metrics(z[queries], labels[queries], z, labels)
    metrics = retrieval_metrics(z[queries], labels[queries], z, labels, query_positions=queries)
    assert finds_itself["recall_at_1"] == 1 > metrics["recall_at_1"] + 0.5
    alone = retrieval_metrics(z, labels, return_per_class=True)["recall_at_1"]
    subset = retrieval_metrics(z, labels, z, labels, query_positions=torch.arange(400), return_per_class=True)
    assert subset["recall_at_1"] == alone


def test_without_any_camera_nothing_is_left_out() -> None:
    z, labels = clustered(300, 20)
    none = torch.full((300,), -1)
    assert retrieval_metrics(z, labels, query_cameras=none) == pytest.approx(retrieval_metrics(z, labels), abs=1e-12)


def test_where_all_matches_are_left_out_no_query_has_a_match() -> None:
    z, labels = clustered(50, 5)
    metrics = retrieval_metrics(z, labels, query_cameras=torch.zeros(50), extra=EXTRA)
    assert metrics.pop("queries_without_match") == 50 and set(metrics.values()) == {0.0}


def test_a_gallery_among_the_queries_has_cameras_too() -> None:
    z, labels = clustered(300, 6)
    mask, cams = torch.arange(300) % 3 == 0, cameras(300, 3)
    apart = retrieval_metrics(
        *(z[~mask], labels[~mask], z[mask], labels[mask]), query_cameras=cams[~mask], gallery_cameras=cams[mask]
    )
    assert retrieval_metrics(z, labels, in_gallery=mask, query_cameras=cams) == pytest.approx(apart, rel=1e-9)


@settings(max_examples=20)
@given(st.integers(2, 80), st.integers(1, 12), st.integers(1, 4), st.integers(0, 999))
def test_values_by_class_are_means_of_their_queries(size: int, classes: int, count: int, seed: int) -> None:
    z, labels = clustered(size, classes, seed=seed)
    given_ = {"extra": EXTRA, "query_cameras": cameras(size, count, seed)}
    whole = retrieval_metrics(z, labels, **given_)
    by_class = retrieval_metrics(z, labels, **given_, return_per_class=True)
    unmatched = by_class.pop("queries_without_match")
    assert {*unmatched} == {*labels.tolist()} and sum(unmatched.values()) == whole.pop("queries_without_match")
    matched = {c: (labels == c).sum().item() - unmatched[c] for c in unmatched}
    for name, values in by_class.items():
        assert {*values} == {c for c, n in matched.items() if n}
        mean = sum(matched[c] * value for c, value in values.items()) / max(1, sum(matched.values()))
        assert mean == pytest.approx(whole[name], abs=1e-12)


def in_group(folder: Path, as_a_gpu: bool) -> None:
    rank, world = gather.rank(), gather.world_size()
    (query, labels), (gallery, targets) = clustered(700, 9), clustered(GALLERY_BLOCK + 300, 9, seed=1)
    cams, gallery_cams, positions = cameras(700, 3), cameras(len(gallery), 3, 1), torch.full((700,), -1)
    gallery[5:305], targets[5:305], gallery_cams[5:305] = query[:300], labels[:300], cams[:300]
    positions[:300] = torch.arange(5, 305)
    shards = [z[owned_rows(len(z), rank, world)] for z in (query, gallery)]
    with search_as_a_gpu() if as_a_gpu else nullcontext():
        results = [
            sharded_retrieval_metrics(
                *(shards[0], labels, shards[1], targets),
                extra=EXTRA,
                query_cameras=cams,
                gallery_cameras=gallery_cams,
                query_positions=positions,
            ),
            sharded_retrieval_metrics(shards[0], labels, extra=EXTRA, query_cameras=cams),
        ]
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))


@pytest.mark.parametrize("as_a_gpu", [False, True])
def test_any_number_of_processes_leaves_out_the_same(as_a_gpu: bool, tmp_path: Path) -> None:
    for world in (3, 1):
        ranks.run(in_group, world, tmp_path, as_a_gpu)
    results = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert len(results) == 4 and all(result == results[0] for result in results)
    assert results[0][0]["queries_without_match"] == 0 < results[0][0]["mrr"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_labels": torch.zeros(5, 1)}, r"query_labels: shape \(5, 1\), but .* query_labels.flatten\(\) has it"),
        ({"query_labels": torch.zeros(5, 2)}, r"query_labels: shape \(5, 2\), but one number a row is needed"),
        ({"query_labels": torch.tensor(3)}, r"query_labels: shape \(\), but"),
        ({"query_labels": torch.tensor([0, 1, torch.nan, 1, 0])}, "query_labels: nan is no whole number"),
        ({"query_labels": torch.tensor([0, 1, torch.inf, 1, 0])}, "query_labels: inf is no whole number"),
        ({"query_labels": torch.tensor([0, 1, 0.5, 1, 0])}, "query_labels: 0.5 is no whole number"),
        ({"query_labels": torch.tensor([0, 1, -1, 1, -2])}, "2 of 5 are below 0, -1 first; leave out rows without"),
        ({"query_labels": ["a", "b", "c", "d", "e"]}, "query_labels: no array of whole numbers; number the classes"),
        ({"gallery": torch.ones(2, 4), "gallery_labels": torch.zeros(2, 1)}, r"gallery_labels: shape \(2, 1\)"),
        ({"query_cameras": torch.zeros(4)}, "query_cameras: 4 numbers for 5 items"),
        ({"gallery_cameras": torch.zeros(4)}, "gallery_cameras and query_positions need a gallery"),
        ({"query_positions": torch.zeros(5)}, "gallery_cameras and query_positions need a gallery"),
        (
            {"gallery": torch.ones(2, 4), "gallery_labels": torch.zeros(2), "query_cameras": torch.zeros(5)},
            "query_cameras and gallery_cameras go together",
        ),
        (
            {"gallery": torch.ones(2, 4), "gallery_labels": torch.zeros(2), "query_positions": torch.arange(5)},
            "query_positions: 4 is no position in a gallery of 2 items",
        ),
        (
            {"gallery": torch.ones(2, 4), "gallery_labels": torch.ones(2), "query_positions": torch.zeros(5)},
            "query_positions: 5 queries have another label than the item at their position",
        ),
        ({"ks": (1.5,)}, r"ks: \(1.5,\) is no list of whole numbers"),
        ({"ks": 5}, "ks: 5 is no list of whole numbers"),
        ({"extra": "map"}, r"extra: \['map'\] unknown; a list of names, of map, mrr, cmc"),
        ({"extra": ["precision_at_0"]}, "precision_at_0"),
        ({"extra": ["nmi"], "return_per_class": True}, "nmi: of all clusters at once"),
        ({"structure": torch.full((5, 4), torch.nan)}, "structure: 5 of 5 embeddings are not finite"),
        ({"structure": torch.ones(5, 4), "rerank": -3}, "rerank=-3: must be at least 1"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(**({"query": torch.ones(5, 4), "query_labels": torch.zeros(5)} | arguments))
