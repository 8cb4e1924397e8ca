import inspect
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners
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
    "margin": [{"miner": None}, {"miner": None, "nu": 0.1}, {"miner": None, "nu": 0.1, "learn_beta": False}],
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


@pytest.mark.parametrize("miner", base_losses.PARTS["miner"][1])
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
        ("VICRegLoss", {}, "loss.name 'VICRegLoss' is unknown"),
        ("contrastive", {"pos_margn": 1}, "did you mean 'pos_margin'"),
        ("contrastive", {"miner": "MultiSimilarityMinr"}, "did you mean 'MultiSimilarityMiner'"),
        ("multi_similarity", {"miner_arguments": {"epsilom": 1}}, "did you mean 'epsilon'"),
        ("contrastive", {"miner_arguments": {"epsilon": 1}}, "need a loss.miner"),
        ("AngularLoss", {"distance": "CosineSimilarity"}, "requires the distance metric"),
        ("RankedListLoss", {"imbalance": 2}, "between 0 and 1"),
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
        assert ("convert_to_triplets" in source) == (name in base_losses.FROM_TRIPLETS | {"HistogramLoss"}), name
