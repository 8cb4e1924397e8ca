import inspect
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from torch import Tensor
from torch.nn.functional import normalize

from dml_core import base_losses
from dml_core.base_losses import build, default_arguments
from dml_core.candidates import (
    all_triplets,
    distance_weights,
    draw_columns,
    draw_triplets,
    informative_pairs,
    margin_loss,
    own_copies,
    violating_triplets,
    without_copies,
)
from tests.dml_core.test_waits import whole_step

PAIR = ["triplet", "contrastive", "multi_similarity", "margin"]
PROXY = ["proxy_anchor", "proxy_nca", "ArcFaceLoss"]
SHARED = Path(os.environ.get("DML_SHARED", Path(__file__).parents[3] / "shared"))
CLASSES, DIM = 6, 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),  # the library's HistogramLoss
    pytest.mark.filterwarnings("ignore:Values of Tp or Tn:UserWarning"),  # its RankedListLoss
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),  # its LargeMarginSoftmaxLoss
]


@pytest.fixture(scope="module")
def golden():
    return np.load(SHARED / "golden" / "published_code.npz")


def batch(seed: int = 0, images: int = 3, draws: int = 2, dtype: torch.dtype = torch.float64, spread: float = 1.0):
    """P = 4 classes x K images around their class centres, and `draws` synthetic copies of each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat_interleave(images)
    centers = torch.randn(CLASSES, DIM, generator=generator, dtype=dtype)
    z = centers[labels] + spread * torch.randn(len(labels), DIM, generator=generator, dtype=dtype)
    noise = torch.randn(draws * len(z), DIM, generator=generator, dtype=dtype)
    return z.requires_grad_(), labels, (z.detach().repeat(draws, 1) + 0.3 * noise).requires_grad_()


def unit(x: Tensor) -> list[Tensor]:
    return list(x / x.norm(dim=1, keepdim=True))


def candidates(z: Tensor, labels: Tensor, synthetic: Tensor | None):
    """For each anchor: its vector, its positives and its negatives, by the words of the paper."""
    pool = unit(z) + ([] if synthetic is None else unit(synthetic))
    for i in range(len(z)):
        others = [j for j in range(len(pool)) if j % len(z) != i]
        positives = [pool[j] for j in others if labels[j % len(z)] == labels[i]]
        negatives = [pool[j] for j in others if labels[j % len(z)] != labels[i]]
        yield pool[i], positives, negatives


def naive_contrastive(z, labels, synthetic):
    total = z.new_zeros(())
    for anchor, positives, negatives in candidates(z, labels, synthetic):
        total = total + sum(max(0.8 - anchor @ x, 0.0 * anchor[0]) for x in positives)
        total = total + sum(max(anchor @ x - 0.5, 0.0 * anchor[0]) for x in negatives)
    return total / len(z)


def naive_multi_similarity(z, labels, synthetic):
    total = z.new_zeros(())
    for anchor, positives, negatives in candidates(z, labels, synthetic):
        near, far = [anchor @ x for x in positives], [anchor @ x for x in negatives]
        hard_near = [c for c in near if c - 0.1 < max(far)]
        hard_far = [c for c in far if c + 0.1 > min(near)]
        if hard_near and hard_far:
            total = total + torch.log(1 + sum(torch.exp(-2 * (c - 0.5)) for c in hard_near)) / 2
            total = total + torch.log(1 + sum(torch.exp(40 * (c - 0.5)) for c in hard_far)) / 40
    return total / len(z)


def naive_triplet(z, labels, synthetic, triplets="semihard", margin=0.2):
    violations = []
    for anchor, positives, negatives in candidates(z, labels, synthetic):
        for p in positives:
            for n in negatives:
                gap = (anchor - n).norm() - (anchor - p).norm()
                semihard, hard = 0 < gap < margin, gap < 0
                if {"semihard": semihard, "hard": hard, "all": semihard or hard}[triplets]:
                    violations.append(margin - gap)
    return sum(violations) / len(violations)


NAIVE = {"triplet": naive_triplet, "contrastive": naive_contrastive, "multi_similarity": naive_multi_similarity}


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("name", NAIVE)
def test_equals_the_loop_of_the_paper(name, boosted):
    z, labels, synthetic = batch()
    inputs = [z, synthetic] if boosted else [z]
    ours = build(name, CLASSES, DIM)(z, labels, synthetic if boosted else None)
    oracle = NAIVE[name](z, labels, synthetic if boosted else None)
    torch.testing.assert_close(ours, oracle)
    for got, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(oracle, inputs), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("which", ["semihard", "hard", "all"])
def test_triplets_that_count(which):
    z, labels, synthetic = batch()
    loss = build("triplet", CLASSES, DIM, margin=0.3, miner_arguments={"type_of_triplets": which})
    torch.testing.assert_close(loss(z, labels, synthetic), naive_triplet(z, labels, synthetic, which, margin=0.3))


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("which", ["semihard", "hard", "all", "easy"])
def test_violating_triplets_are_those_of_the_librarys_miner(which, boosted):
    z, labels, synthetic = batch()
    pool = torch.cat([z, synthetic]) if boosted else z
    miner = miners.TripletMarginMiner(margin=0.2, type_of_triplets=which)
    expected = miner(z, labels, pool, labels.repeat(3)) if boosted else miner(z, labels)
    expected = without_copies(expected, len(z))
    same = labels[:, None] == labels.repeat(len(pool) // len(z))
    positive = same & ~own_copies(same)
    got = violating_triplets(miner.distance(z, pool), positive, ~same, miner)
    assert len(got[0]) > 0 and torch.equal(torch.stack(got), torch.stack(expected))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_informative_pairs_are_those_of_the_librarys_miner(epsilon):
    z, labels, _ = batch()
    miner = miners.MultiSimilarityMiner(epsilon)
    a, p, b, n = miner(z, labels)
    same = labels[:, None] == labels
    positive, negative = informative_pairs(miner.distance(z), same & ~own_copies(same), ~same, epsilon)
    assert positive.sum() == len(a) > 0 and positive[a, p].all()
    assert negative.sum() == len(b) > 0 and negative[b, n].all()


def naive_margin(z, labels, synthetic, beta=1.2, margin=0.2):
    terms = []
    for anchor, positives, negatives in candidates(z, labels, synthetic):
        for p in positives:
            for n in negatives:
                terms += [(anchor - p).norm() - beta + margin, beta - (anchor - n).norm() + margin]
    active = [term for term in terms if term > 0]
    return sum(active) / len(active)


@pytest.mark.parametrize("learn", [False, True])
def test_margin_without_miner_equals_the_loop(learn):
    z, labels, synthetic = batch()
    loss = build("margin", CLASSES, DIM, miner=None, learn_beta=learn).double()
    torch.testing.assert_close(loss(z, labels, synthetic), naive_margin(z, labels, synthetic), atol=1e-7, rtol=1e-6)


FORMS = {
    "multi_similarity": [{}, {"miner": None}, {"reducer": "AvgNonZeroReducer"}],
    "contrastive": [{}],
    "triplet": [
        {"miner_arguments": {"type_of_triplets": kind, "margin": margin}}
        for kind in ("semihard", "hard", "all", "easy")
        for margin in (-0.1, 0.1, 0.2, 0.4)
    ],
    "TripletMarginLoss": [{}, {"margin": 0.3}],
    "margin": [
        {"miner": "none", "nu": nu, "learn_beta": learn} | one
        for nu in (0, 0.1)
        for learn, one in ((True, {}), (True, {"beta_per_class": False}), (False, {}))
    ],
    "proxy_anchor": [{}, {"margin": 0.2, "alpha": 16}],
}


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("name", "arguments"), [(name, each) for name, all_of in FORMS.items() for each in all_of])
def test_the_form_on_the_matrix_equals_the_librarys_lists(name, arguments, ties, boosted, monkeypatch):
    z, labels, synthetic = batch(images=4)
    if ties:  # embeddings along a few directions have equal distances
        z, synthetic = (x.detach().sign().mul(x.detach().abs() > 1).requires_grad_() for x in (z, synthetic))
    loss = build(name, CLASSES, DIM, **arguments).double()
    assert loss.form == {"TripletMarginLoss": "triplet"}.get(name, name)
    inputs = [z, *([synthetic] if boosted else []), *loss.parameters()]
    monkeypatch.setattr("dml_core.candidates.BLOCK", 5 * len(z))
    ours = loss(z, labels, synthetic if boosted else None)
    gradients = torch.autograd.grad(ours, inputs, materialize_grads=True)
    loss.form = None
    listed = loss(z, labels, synthetic if boosted else None)
    torch.testing.assert_close(ours, listed)
    for got, expected in zip(gradients, torch.autograd.grad(listed, inputs, materialize_grads=True), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("triplet", {"smooth_loss": True}),
        ("triplet", {"reducer": "MeanReducer"}),
        ("triplet", {"distance": "CosineSimilarity"}),
        ("triplet", {"miner": "BatchHardMiner"}),
        ("margin", {"reducer": "MeanReducer"}),
        ("margin", {"miner": "PairMarginMiner"}),
        ("contrastive", {"reducer": None}),
        ("multi_similarity", {"miner": "PairMarginMiner"}),
        ("proxy_anchor", {"miner": "MultiSimilarityMiner"}),
        ("ArcFaceLoss", {}),
    ],
)
def test_what_has_no_form_on_the_matrix_is_the_librarys(name, arguments):
    assert build(name, CLASSES, DIM, **arguments).form is None


def test_repeated_triplets_count_repeatedly():
    z, labels, synthetic = batch(images=4)
    loss = build("margin", CLASSES, DIM, nu=0.1).double()
    with torch.no_grad():
        loss.loss.beta.copy_(torch.linspace(0.9, 1.4, CLASSES))
    pool, pool_labels = torch.cat([z, synthetic]), labels.repeat(3)
    same = labels[:, None] == pool_labels
    triplets = torch.stack(all_triplets(same & ~own_copies(same), ~same))
    triplets = triplets[:, torch.randint(triplets.shape[1], (200,), generator=torch.Generator().manual_seed(0))]
    expected = loss.loss(z, labels, tuple(triplets), pool, pool_labels)
    distance, near, far = loss.loss.distance(z, pool), *torch.zeros(2, *same.shape, dtype=z.dtype)
    for count, column in ((near, triplets[1]), (far, triplets[2])):
        count.index_put_((triplets[0], column), torch.ones(200, dtype=z.dtype), accumulate=True)
    assert near.max() > 1
    got = margin_loss(distance, loss.loss.beta[labels][:, None], near, far, loss.loss.margin, 0.1)
    torch.testing.assert_close(got, expected)
    inputs = [z, synthetic, loss.loss.beta]
    for one, other in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


def labels_of(pool: Tensor, labels: Tensor) -> Tensor:
    return labels if len(pool) == len(labels) else labels.repeat(len(pool) // len(labels))


def drawn_by_the_library(z: Tensor, labels: Tensor, pool: Tensor, miner: miners.DistanceWeightedMiner):
    """How often a triplet of each pair with a positive, and of each with a negative, is drawn."""
    a, p, n = without_copies(miner(z, labels, pool, labels_of(pool, labels)), len(z))
    near, far = torch.zeros(2, len(z), len(pool))
    for count, column in ((near, p), (far, n)):
        count.index_put_((a, column), torch.ones(len(a)), accumulate=True)
    return near, far


def librarys_weights(z: Tensor, labels: Tensor, pool: Tensor, miner, monkeypatch) -> Tensor:
    """(B, R) probabilities, NaN in the rows of anchors that are left out."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "pytorch_metric_learning.utils.loss_and_miner_utils.get_random_triplet_indices",
            lambda labels, ref_labels, weights: (weights,) * 3,
        )
        return miner(z, labels, pool, labels_of(pool, labels))[0]


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_negatives_are_the_librarys(dtype, boosted, monkeypatch):
    """Among them those of an anchor with far negatives, which underflow in float32 beside those of near ones."""
    _, labels, _ = batch()
    generator = torch.Generator().manual_seed(0)
    z = 0.9 + torch.randn(len(labels), 256, generator=generator, dtype=dtype)
    synthetic = z.repeat(2, 1) + 0.5 * torch.randn(2 * len(labels), 256, generator=generator, dtype=dtype)
    z[-1] = z[0] + 0.01  # of another class, and nearer than the cutoff
    z[1] *= -1  # farther from all others than the limit
    pool = torch.cat([z, synthetic]) if boosted else z
    loss = build("margin", CLASSES, z.shape[1])
    negative = labels[:, None] != labels_of(pool, labels)
    ours = distance_weights(loss.loss.distance(z, pool), negative, z.shape[1], loss.miner)
    expected = librarys_weights(z, labels, pool, loss.miner, monkeypatch)
    left_out = expected.isnan().any(1)
    assert left_out.sum() > (dtype == torch.float32) and not left_out.all() and not ours[left_out].any()
    ours = ours[~left_out]
    torch.testing.assert_close(ours / ours.sum(1, keepdim=True), expected[~left_out])


@pytest.mark.parametrize("who", ["ours", "library"])
@pytest.mark.parametrize("boosted", [False, True])
def test_drawn_triplets_have_the_librarys_distribution(boosted, who, monkeypatch):
    """Chi-square tests of many draws: which positives, which negatives, how many."""
    z, labels, synthetic = (x.detach() for x in batch(images=4))
    labels[-1] = CLASSES - 1  # alone: without positives, unless among synthetics, which are its own
    pool = torch.cat([z, synthetic]) if boosted else z
    loss = build("margin", CLASSES, DIM, miner_arguments={"nonzero_loss_cutoff": 1.5})
    same = labels[:, None] == labels_of(pool, labels)
    positive = same & ~own_copies(same)
    probability = librarys_weights(z, labels, pool, loss.miner, monkeypatch)
    assert not probability.isnan().any()
    torch.manual_seed(0)
    draws, near, far = 300, *torch.zeros(2, *same.shape)
    for _ in range(draws):
        if who == "library":
            one = drawn_by_the_library(z, labels, pool, loss.miner)
        else:
            one = draw_triplets(distance_weights(loss.loss.distance(z, pool), ~same, DIM, loss.miner), positive, same)
        near, far = near + one[0], far + one[1]
    assert not near[~positive].any() and not far[probability == 0].any() and torch.equal(near.sum(1), far.sum(1))
    kept = near.sum(1, keepdim=True)
    slots = draws * same.sum(1, keepdim=True).double()
    if boosted:  # each slot draws among own copies, too: a binomial number is left
        share = positive.sum(1, keepdim=True) / same.sum(1, keepdim=True)
        deviation = (kept - slots * share)[:-1] / (slots * share * (1 - share))[:-1].sqrt()
        assert (deviation.abs() < 4).all()
    else:
        assert torch.equal(kept[:-1], slots[:-1].to(kept.dtype))
    assert kept[-1] == 0
    for count, chance in ((near, positive / positive.sum(1, keepdim=True)), (far, probability)):
        expected = (kept * chance)[:-1]
        large = expected > 5
        terms = torch.where(large, (count[:-1] - expected).square() / expected, 0)
        degrees = (large.sum(1) - 1).sum()
        assert abs(terms.sum() - degrees) < 4 * (2 * degrees) ** 0.5


def test_draws_of_columns():
    """Every row by its own weights, the least and the greatest of which differ a million times."""
    torch.manual_seed(0)
    weights = torch.tensor([[0, 1, 0, 3, 0], [1e-30, 2e-30, 0, 0, 1e-30], [0, 0, 0, 0, 0], [1, 1e-6, 0, 1, 0.0]])
    columns = torch.cat([draw_columns(weights) for _ in range(4000)], 1)
    assert (columns[2] == 5).all()
    for row in (0, 1, 3):
        expected = weights[row] / weights[row].sum() * columns.shape[1]
        got = columns[row].bincount(minlength=5)
        assert not got[weights[row] == 0].any() and ((got - expected).abs() <= 4 * expected.sqrt() + 1).all()


def naive_proxy_anchor(z, labels, proxies, margin=0.1, scale=32):
    vectors, proxies = unit(z), unit(proxies)
    near, far, present = z.new_zeros(()), z.new_zeros(()), set(labels.tolist())
    for k, proxy in enumerate(proxies):
        cosines = [(proxy @ x, y == k) for x, y in zip(vectors, labels, strict=True)]
        near = near + torch.log1p(sum((torch.exp(-scale * (c - margin)) for c, own in cosines if own), z.new_zeros(())))
        far = far + torch.log1p(sum(torch.exp(scale * (c + margin)) for c, own in cosines if not own))
    return near / len(present) + far / len(proxies)


def test_proxy_anchor_takes_synthetics_as_further_samples():
    z, labels, synthetic = batch()
    loss = build("proxy_anchor", CLASSES, DIM).double()
    expected = naive_proxy_anchor(torch.cat([z, synthetic]), labels.repeat(3), loss.proxies)
    torch.testing.assert_close(loss(z, labels, synthetic), expected)
    torch.testing.assert_close(loss(z, labels), naive_proxy_anchor(z, labels, loss.proxies))


@pytest.mark.parametrize(("name", "key"), [("multi_similarity", "ms"), ("contrastive", "con")])
def test_golden(golden, name, key):
    anchors = int(golden["iaa_B"])
    x = torch.from_numpy(golden["iaa_x"]).requires_grad_()
    labels = torch.from_numpy(golden["iaa_y"])[:anchors]
    loss = build(name, 4, x.shape[1])(x[:anchors], labels, x[anchors:])
    loss.backward()
    published = torch.from_numpy(golden[f"iaa_{key}_grad"])
    tangent = published - (published * x).sum(1, keepdim=True) * x
    assert math.isclose(loss.item(), golden[f"iaa_{key}_loss"], rel_tol=1e-5)
    assert (x.grad - tangent).norm() <= 1e-5 * tangent.norm()


@pytest.mark.parametrize("name", PAIR + PROXY)
def test_gradcheck(name):
    z, labels, synthetic = batch(images=2, draws=1)
    loss = build(name, CLASSES, DIM).double()

    def value(z, synthetic):
        torch.manual_seed(0)
        return loss(z, labels, synthetic)

    assert torch.autograd.gradcheck(value, (z, synthetic), atol=1e-5)


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("name", [n for n in base_losses.LOSSES if n != "NPairsLoss"] + PAIR + PROXY)
def test_order_of_the_batch_does_not_matter(name, boosted):
    z, labels, synthetic = batch()
    loss = build(name, CLASSES, DIM, **({"miner": None} if name == "margin" else {})).double()
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    copies = torch.cat([order, order + len(z)])
    straight = loss(z, labels, synthetic if boosted else None)
    shuffled = loss(z[order], labels[order], synthetic[copies] if boosted else None)
    torch.testing.assert_close(shuffled, straight)


def library_classes() -> list[str]:
    """All that the library calls a loss, found in the package."""
    return sorted(name for name, item in vars(losses).items() if inspect.isclass(item))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", library_classes())
def test_every_class_of_the_library_trains_or_is_refused_with_the_reason(name, precision):
    if name in base_losses.REFUSED:
        with pytest.raises(ValueError, match=rf"^loss\.name={name}: {re.escape(base_losses.REFUSED[name])}"):
            build(name, CLASSES, DIM)
        return
    torch.manual_seed(0)
    head, loss = torch.nn.Linear(16, DIM), build(name, CLASSES, DIM)
    trained = torch.nn.ModuleList([head, loss])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    labels = torch.arange(4).repeat_interleave(3)
    features = torch.randn(CLASSES, 16)[labels] + torch.randn(len(labels), 16)
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in trained.parameters()]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            z = head(features)
            value = loss(z, labels, z.detach() + 0.1 * torch.randn_like(z))
        assert z.dtype == precision and value.dtype == torch.float32 and value.isfinite()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert all(parameter.isfinite().all() for parameter in trained.parameters())
        assert not torch.equal(before[0], head.weight)


@pytest.mark.parametrize("name", base_losses.LOSSES + PAIR + PROXY)
def test_every_loss_trains_under_all_methods(name):
    """IAA's boosted loss, SGAR's and NAMR's rankings in one step; a loss without class vectors has SGAR's means."""
    learner, step, (features, labels, epoch) = whole_step(name)
    terms = learner(features, labels, epoch, torch.Generator())
    assert all(term.isfinite() for term in terms) and terms.sgar_rank > 0 and terms.namr_rank > 0
    step(features, labels, epoch, torch.Generator()).backward()
    assert features.grad.isfinite().all() and features.grad.any()
    assert all(parameter.grad.isfinite().all() for parameter in learner.parameters() if parameter.grad is not None)


def parts_and_choices():
    """Each part of a loss with what may be chosen for it, one at a time."""
    for part, allowed in base_losses.PARTS.items():
        for choice in allowed:
            more = {"reducer_arguments": {"low": 0.0}} if choice == "ThresholdReducer" else {}
            yield pytest.param({part: choice} | more, id=f"{part}={choice}")


@pytest.mark.parametrize("arguments", list(parts_and_choices()))
def test_every_part_acts_on_a_loss_or_is_refused(arguments):
    """Of all losses: none that is built fails later, with synthetics and without."""
    trained = 0
    for name in [*PAIR, *PROXY, *base_losses.LOSSES]:
        try:
            loss = build(name, CLASSES, DIM, **arguments)
        except ValueError as error:
            assert re.search(r"loss\.\w+(=\w+:| cannot act|=.* needs)", str(error)) and name in str(error)
            continue
        for boosted in (False, True):
            z, labels, synthetic = batch(images=4, dtype=torch.float32)
            value = loss(z, labels, synthetic if boosted else None)
            value.backward()
            assert value.shape == () and value.isfinite() and z.grad.isfinite().all(), name
        trained += 1
    assert trained > 1


LP = distances.LpDistance(p=1, power=2)
LIKE_THE_LIBRARY = [
    ("ContrastiveLoss", {"reducer": "PerAnchorReducer"}, {"reducer": reducers.PerAnchorReducer()}),
    ("NTXentLoss", {"reducer": "PerAnchorReducer"}, {"reducer": reducers.PerAnchorReducer()}),
    ("MultiSimilarityLoss", {"reducer": "PerAnchorReducer"}, {"reducer": reducers.PerAnchorReducer()}),
    (
        "TripletMarginLoss",
        {"distance": "LpDistance", "distance_arguments": {"p": 1, "power": 2}, "reducer": "MeanReducer"},
        {"distance": LP, "reducer": reducers.MeanReducer()},
    ),
    ("SupConLoss", {"distance": "SNRDistance"}, {"distance": distances.SNRDistance()}),
    ("MarginLoss", {"learn_beta": True, "nu": 0.3, "beta_per_class": False}, {"learn_beta": True, "nu": 0.3}),
    ("MarginLoss", {"learn_beta": True, "nu": 0.3}, {"learn_beta": True, "nu": 0.3, "num_classes": CLASSES}),
    *(
        (
            name,
            {"embedding_regularizer": kind, "embedding_reg_weight": 0.3} | more,
            {"embedding_regularizer": getattr(regularizers, kind)(**arguments), "embedding_reg_weight": 0.3},
        )
        for name in ("TripletMarginLoss", "ContrastiveLoss", "MultiSimilarityLoss", "MarginLoss", "SoftTripleLoss")
        for kind, arguments, more in (
            ("LpRegularizer", {"p": 1}, {"embedding_regularizer_arguments": {"p": 1}}),
            ("CenterInvariantRegularizer", {}, {}),
            ("ZeroMeanRegularizer", {}, {}),
        )
    ),
    *(
        (
            name,
            {"weight_regularizer": kind, "weight_reg_weight": 0.3},
            {"weight_regularizer": getattr(regularizers, kind)(), "weight_reg_weight": 0.3},
        )
        for name in ("ProxyAnchorLoss", "ProxyNCALoss", "ArcFaceLoss", "SoftTripleLoss", "SubCenterArcFaceLoss")
        for kind in ("CenterInvariantRegularizer", "LpRegularizer", "RegularFaceRegularizer", "ZeroMeanRegularizer")
    ),
    *(
        (
            name,
            {"weight_regularizer": "SparseCentersRegularizer"},
            {"weight_regularizer": regularizers.SparseCentersRegularizer(CLASSES, centers)},
        )
        for name, centers in (("SoftTripleLoss", 10), ("SubCenterArcFaceLoss", 3))
    ),
    *((name, {}, {}) for name in base_losses.LOSSES),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "ours", "librarys"), LIKE_THE_LIBRARY)
def test_equals_the_library(name, ours, librarys, dtype):
    """Value and gradients; numbers in bfloat16 are those of the library in float32."""
    z, labels, _ = batch(images=4, dtype=torch.float64)
    z = z.detach().to(dtype).requires_grad_()
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = {"num_classes": CLASSES, "embedding_size": DIM, "descriptors_dim": DIM}
    taken = base_losses.constructor_defaults(getattr(losses, name))
    sizes = {} if name == "MarginLoss" else {key: value for key, value in sizes.items() if key in taken}
    published = {"margin": 0.4, "Tn": 10} if name == "RankedListLoss" else {}
    expected_loss = getattr(losses, name)(**sizes, **published, **librarys).to(exact)
    loss = build(name, CLASSES, DIM, **ours).to(exact)
    for own, its in zip(loss.parameters(), expected_loss.parameters(), strict=True):
        assert own.shape == its.shape
        own.data.copy_(its.data)
    value = loss(z, labels)
    expected_z = z.detach().to(exact).requires_grad_()
    expected = expected_loss(expected_z, labels)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(
        z.grad, expected_z.grad.to(dtype), atol=1e-5, rtol=1e-4 if dtype != torch.bfloat16 else 0.02
    )
    for own, its in zip(loss.parameters(), expected_loss.parameters(), strict=True):
        torch.testing.assert_close(
            own.grad, torch.zeros_like(own) if its.grad is None else its.grad, atol=1e-5, rtol=1e-4
        )


def test_regularizers_are_of_real_embeddings_and_not_divided():
    z, labels, synthetic = batch()
    plain = build("contrastive", CLASSES, DIM)
    loss = build("contrastive", CLASSES, DIM, embedding_regularizer="LpRegularizer", embedding_reg_weight=0.5)
    term = 0.5 * z.norm(dim=1).mean()
    torch.testing.assert_close(loss(z, labels, synthetic), plain(z, labels, synthetic) + term)
    assert loss.state_dict().keys() == plain.state_dict().keys()


def test_mean_of_an_anchors_pairs_with_synthetics():
    z, labels, synthetic = batch()
    loss = build("ContrastiveLoss", CLASSES, DIM, reducer="PerAnchorReducer")
    expected = z.new_zeros(())
    for anchor, positives, negatives in candidates(z, labels, synthetic):
        expected = expected + sum((anchor - x).norm() for x in positives) / len(positives)
        expected = expected + sum(max(1 - (anchor - x).norm(), 0 * anchor[0]) for x in negatives) / len(negatives)
    torch.testing.assert_close(loss(z, labels, synthetic), expected / len(z), atol=1e-7, rtol=1e-6)


def test_every_named_part_of_the_library_is_taken_or_refused():
    known = {name for allowed in base_losses.PARTS.values() for name in allowed} | base_losses.REFUSED.keys()
    for module in (losses, distances, reducers, miners, regularizers):
        classes = {name for name, item in vars(module).items() if inspect.isclass(item)}
        assert classes <= known | {*base_losses.LOSSES}


def test_a_check_takes_a_step_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    base_losses.check("margin", {"nu": 0.1})
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"^loss.name=NTXentLoss loss.temperature=0 cannot be computed"):
        base_losses.check("NTXentLoss", {"temperature": 0})
    with pytest.raises(ValueError, match=r"loss.num_classes cannot be set: the training set gives it"):
        base_losses.check("margin", {"num_classes": 3})


def test_distances_are_those_that_the_library_allows():
    """Beside those that it takes and cannot compute: HistogramLoss and RankedListLoss with others."""
    for name in {*base_losses.LOSSES} - {"HistogramLoss", "RankedListLoss"} - base_losses.WITHOUT_DISTANCE:
        for distance, cls in base_losses.PARTS["distance"].items():
            sizes = {"num_classes": CLASSES, "embedding_size": DIM}
            sizes = {key: sizes[key] for key in sizes.keys() & base_losses.constructor_defaults(getattr(losses, name))}
            arguments = {"power": 2} if name == "FastAPLoss" else {}
            try:
                getattr(losses, name)(**sizes, distance=cls(**arguments))
                allowed = True
            except AssertionError:
                allowed = False
            assert allowed == (distance in base_losses.DISTANCES.get(name, (distance,))), (name, distance)


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("name", base_losses.LOSSES + PAIR + PROXY)
def test_every_loss_gives_finite_gradients(name, boosted):
    z, labels, synthetic = batch(dtype=torch.float32)
    loss = build(name, CLASSES, DIM)
    value = loss(z, labels, synthetic if boosted else None)
    value.backward()
    assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
    assert z.grad.isfinite().all() and z.grad.any()
    for parameter in loss.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    if loss.needs_positives:
        assert loss.proxies is None
    else:
        assert loss.proxies.shape == (CLASSES, DIM) and loss.proxies.requires_grad


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("labels", [[0], [0, 0], [0, 1]], ids=["one image", "one class", "no positives"])
def test_degenerate_batches_are_a_differentiable_zero(name, boosted, labels):
    z, _, _ = batch(dtype=torch.float32)
    z = z.detach()[: len(labels)]
    z = torch.stack([torch.linspace(1, 2, DIM), torch.linspace(-1, 1, DIM).cos()])[: len(z)]  # near, yet not too near
    z = z.requires_grad_()
    loss = build(name, CLASSES, DIM)
    value = loss(z, torch.tensor(labels), z.detach().repeat(2, 1) if boosted else None)
    value.backward()
    assert z.grad.isfinite().all() and all(parameter.grad is not None for parameter in loss.parameters())
    if name != "contrastive" or labels == [0]:
        assert value == 0 and not z.grad.any()


@pytest.mark.parametrize("name", PAIR + PROXY)
def test_identical_embeddings_give_no_nan(name):
    z = torch.ones(8, DIM, requires_grad=True)
    loss = build(name, CLASSES, DIM)
    loss(z, torch.arange(4).repeat_interleave(2), torch.ones(16, DIM)).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", PAIR + PROXY)
def test_low_precision_is_computed_in_float32(name):
    z, labels, synthetic = batch(dtype=torch.float32)
    low, low_synthetic = z.detach().bfloat16().requires_grad_(), synthetic.detach().bfloat16()
    loss = build(name, CLASSES, DIM)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(low, labels, low_synthetic)
    torch.manual_seed(0)
    expected = loss(low.detach().float(), labels, low_synthetic.float())
    assert value.dtype == torch.float32 and all(p.dtype == torch.float32 for p in loss.parameters())
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    value.backward()
    assert low.grad.dtype == torch.bfloat16


def test_random_miners_follow_the_global_seed():
    z, labels, synthetic = batch()
    loss = build("margin", CLASSES, DIM).double()
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(loss(z, labels, synthetic).item())
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("miner", base_losses.PARTS["miner"])
def test_miners_never_pair_an_anchor_with_its_copies(miner):
    z, labels, _ = batch()
    near = z.detach().repeat(2, 1)  # synthetics on top of their source: the nearest of all
    loss = build("TripletMarginLoss", CLASSES, DIM, miner=miner, smooth_loss=True)  # of a list of triplets
    calls = []
    loss.loss.register_forward_hook(lambda module, inputs, output: calls.append(inputs[2]))
    loss(z, labels, near)
    assert len(calls[0][0]) > 0 and (calls[0][1] % len(z) != calls[0][0]).all()


def test_hardest_positive_is_never_an_own_copy():
    """Synthetics opposite to their source: its own copy would be the hardest positive of every anchor."""
    z, labels, _ = batch(spread=0.1)
    loss = build("TripletMarginLoss", CLASSES, DIM, miner="BatchHardMiner")
    calls = []
    loss.loss.register_forward_hook(lambda module, inputs, output: calls.append(inputs[2]))
    loss(z, labels, -z.detach())
    distance = torch.cdist(normalize(z), normalize(torch.cat([z, -z])))
    own = torch.arange(2 * len(z)) % len(z) == torch.arange(len(z))[:, None]
    allowed = (labels[:, None] == labels.repeat(2)) & ~own
    assert torch.equal(calls[0][0], torch.arange(len(z)))
    assert torch.equal(calls[0][1], distance.masked_fill(~allowed, -1).argmax(1))


def test_several_centers_a_class_give_one_proxy_each():
    loss = build("SubCenterArcFaceLoss", CLASSES, DIM, sub_centers=2)
    first = normalize(loss.loss.W[:, :2], dim=0).mean(1)
    torch.testing.assert_close(loss.proxies[0], first)


def test_proxies_follow_the_module():
    loss = build("margin", CLASSES, DIM)
    assert dict(loss.named_parameters()).keys() == {"loss.beta"} == loss.state_dict().keys()
    assert build("proxy_nca", CLASSES, DIM).state_dict().keys() == {"loss.proxies"}


def test_arguments_are_those_that_build_takes():
    for name in [*base_losses.SHORT_NAMES, *base_losses.LOSSES]:
        build(name, CLASSES, DIM, **default_arguments(name))
    assert default_arguments("contrastive")["pos_margin"] == 0.8 and default_arguments("multi_similarity")["beta"] == 40
    assert "num_classes" not in default_arguments("proxy_anchor") and "miner" not in default_arguments("PNPLoss")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("multi_similarty", {}, "did you mean 'multi_similarity'"),
        ("cosface", {}, "did you mean 'CosFaceLoss'"),
        ("contrastive", {"pos_margn": 1}, "did you mean pos_margin"),
        ("triplet", {"swap": True}, "loss.swap cannot be set: candidates are not anchors"),
        ("triplet", {"margin": "wide"}, "loss.margin=wide is not a number"),
        ("triplet", {"margin": True}, "loss.margin=True is not a number"),
        ("triplet", {"margin": math.nan}, "loss.margin=nan is not a number"),
        ("margin", {"learn_beta": "maybe"}, "loss.learn_beta=maybe: allowed is true or false"),
        ("margin", {"learn_beta": False, "beta_per_class": False}, "cannot act without loss.learn_beta=true"),
        ("contrastive", {"miner": "MultiSimilarityMinr"}, "did you mean 'MultiSimilarityMiner'"),
        ("contrastive", {"miner": "HDCMiner"}, "loss.miner=HDCMiner: would take an anchor's synthetic copy"),
        ("contrastive", {"miner": ["a"]}, r"loss.miner=\['a'\] is unknown"),
        ("multi_similarity", {"miner_arguments": {"epsilom": 1}}, "did you mean epsilon"),
        ("multi_similarity", {"miner_arguments": {"epsilon": "x"}}, "miner_arguments.epsilon=x is not a number"),
        ("multi_similarity", {"miner_arguments": 3}, "loss.miner_arguments=3: not a mapping"),
        ("triplet", {"miner_arguments": {"type_of_triplets": "semi"}}, "allowed is all, hard, semihard, easy"),
        ("contrastive", {"miner_arguments": {"epsilon": 1}}, "needs a loss.miner"),
        ("PNPLoss", {"miner": "BatchHardMiner"}, "cannot act on loss.name=PNPLoss: it compares all images"),
        ("PNPLoss", {"variant": "Q"}, "loss.variant=Q: allowed is Ds"),
        ("PNPLoss", {"reducer": "SumReducer"}, "loss.reducer cannot act on loss.name=PNPLoss: its value is one"),
        ("P2SGradLoss", {"distance": "LpDistance"}, "loss.distance cannot act"),
        ("AngularLoss", {"distance": "CosineSimilarity"}, "is defined on LpDistance only"),
        ("AngularLoss", {"distance": "LpDistance", "distance_arguments": {"p": 1}}, "requires distance.p to be 2"),
        ("SoftTripleLoss", {"distance": "LpDistance"}, "on CosineSimilarity or DotProductSimilarity only"),
        (
            "triplet",
            {"distance": "CosineSimilarity", "distance_arguments": {"normalize_embeddings": False}},
            "normalize_embeddings cannot be set: a cosine is of unit vectors; loss.distance=DotProductSimilarity",
        ),
        ("ContrastiveLoss", {"distance": "CosineSimilarity"}, "needs a pos_margin that is not below its neg_margin"),
        ("contrastive", {"distance": "LpDistance"}, "needs a pos_margin that is not above its neg_margin"),
        ("triplet", {"reducer": "DivisorReducer"}, "gives no divisor; MarginLoss and ProxyAnchorLoss do"),
        ("triplet", {"reducer": "PerAnchorReducer"}, "it reduces pairs, and loss.name=triplet has triplets"),
        ("triplet", {"reducer": "DoNothingReducer"}, "reduces nothing"),
        ("triplet", {"reducer": "ThresholdReducer"}, "At least one of low or high must be specified"),
        (
            "triplet",
            {"reducer": "AvgNonZeroReducer", "reducer_arguments": {"low": 1}},
            "low cannot be set: it is 0; loss.reducer=ThresholdReducer",
        ),
        ("triplet", {"embedding_regularizer": "RegularFaceRegularizer"}, "RegularFaceRegularizer is unknown"),
        ("triplet", {"embedding_reg_weight": 2}, "cannot act without loss.embedding_regularizer"),
        ("triplet", {"weight_regularizer": "LpRegularizer"}, "it has no class vectors"),
        ("ArcFaceLoss", {"weight_regularizer": "SparseCentersRegularizer"}, "SoftTripleLoss and SubCenterArcFaceLoss"),
        ("RankedListLoss", {"imbalance": 2}, "between 0 and 1"),
        ("HistogramLoss", {"n_bins": 0}, "loss.n_bins=0: allowed is a whole number, at least 1"),
        ("SubCenterArcFaceLoss", {"sub_centers": 1.5}, "loss.sub_centers=1.5: allowed is a whole number"),
        ("HistogramLoss", {"n_bins": 50, "delta": 0.1}, "cannot be built .AssertionError: delta and n_bins must"),
    ],
)
def test_bad_names_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(name, CLASSES, DIM, **arguments)


def test_given_arguments_of_a_miner_join_ours():
    miner = build("triplet", CLASSES, DIM, miner_arguments={"margin": 0.5}).miner
    assert (miner.margin, miner.type_of_triplets) == (0.5, "semihard")


def test_another_miner_does_not_inherit_arguments():
    assert build("multi_similarity", CLASSES, DIM, miner="PairMarginMiner").miner.pos_margin == 0.2
    assert build("multi_similarity", CLASSES, DIM, miner=None).miner is None


def test_lists_agree_with_the_library():
    """A new version of the library must not move a loss from one list to another unnoticed."""
    for name in base_losses.LOSSES:
        source = inspect.getsource(getattr(losses, name).compute_loss)
        proxies = not build(name, CLASSES, DIM).needs_positives
        within = "ref_not_supported" in source and not proxies
        known = {"NCALoss", "ThresholdConsistentMarginLoss"}  # take ref_emb, but not as candidates of chosen pairs
        assert within or name in known or name not in base_losses.WITHIN_BATCH, name
        assert not within or name in base_losses.WITHIN_BATCH, name
        assert ("indices_tuple_not_supported" in source) == (name in base_losses.WITHOUT_MINER), name
        assert ('"divisor"' in source) == (name in base_losses.WITH_DIVISOR), name
        assert ("convert_to_triplets" in source) == (name in base_losses.FROM_TRIPLETS | {"HistogramLoss"}), name
