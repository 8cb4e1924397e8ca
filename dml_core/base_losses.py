"""Base losses by name: those of pytorch-metric-learning, and their boosted form for synthetic embeddings.

Boosted form: Fu et al., "Intra-class Adaptive Augmentation with Neighbor Correction for Deep Metric Learning", IEEE
TMM 2022. Anchors are the B real embeddings, candidates the B real and the M*B synthetic ones; sample i and its own
synthetic copies are no candidates of anchor i.

But:
- The published code drops positives with a cosine above 1 - 1e-5 to get rid of the anchor itself. Here the anchor is
  left out by its place in the batch, so a true duplicate image stays a positive.
- A loss with proxies, and one that the library computes within a single batch only (`WITHIN_BATCH`), takes the
  synthetic embeddings as further samples.
- A sum over pairs (`SumReducer`) is divided by B, so that its scale does not depend on the batch.
- The conditions of two of its miners, and the sums of multi-similarity and contrastive, are applied in candidates.py to
  the matrix of pairs. Tests hold them equal to the library.
- Proxy-NCA has the scale 9 of its authors (embeddings and proxies of length 3); the library's default is 1.
"""

import inspect
from collections.abc import Collection
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import Tensor, nn

from dml_core import candidates

# Short names, their class, and where the papers' settings differ from the library's defaults.
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "triplet": (
        "TripletMarginLoss",
        {"margin": 0.2, "miner": "TripletMarginMiner", "miner_arguments": {"type_of_triplets": "semihard"}},
    ),
    "contrastive": (
        "ContrastiveLoss",
        {"pos_margin": 0.8, "neg_margin": 0.5, "distance": "CosineSimilarity", "reducer": "SumReducer"},
    ),
    "multi_similarity": (
        "MultiSimilarityLoss",
        {"beta": 40, "miner": "MultiSimilarityMiner", "miner_arguments": {"epsilon": 0.1}},
    ),
    "margin": ("MarginLoss", {"learn_beta": True, "miner": "DistanceWeightedMiner"}),
    "proxy_anchor": ("ProxyAnchorLoss", {}),
    "proxy_nca": ("ProxyNCALoss", {"softmax_scale": 9}),
    "RankedListLoss": ("RankedListLoss", {"margin": 0.4, "Tn": 10}),
}
UNSUITABLE = {
    *("BaseMetricLossFunction", "GenericPairLoss"),  # abstract
    *("ManifoldLoss", "VICRegLoss"),  # without labels
    "DynamicSoftMarginLoss",  # keeps a histogram, and its graph, from one step to the next
    "InstanceLoss",  # takes a class's number for the column of a batch's image
    "SmoothAPLoss",  # as of 2.9 exchanges the numbers of classes and of images a class
}
LOSSES = [
    name
    for name, item in sorted(vars(losses).items())
    if inspect.isclass(item) and issubclass(item, losses.BaseMetricLossFunction) and name not in UNSUITABLE
]
PARTS: dict[str, tuple[Any, list[str]]] = {
    "distance": (distances, ["CosineSimilarity", "DotProductSimilarity", "LpDistance", "SNRDistance"]),
    "reducer": (
        reducers,
        ["AvgNonZeroReducer", "DivisorReducer", "MeanReducer", "SumReducer", "ThresholdReducer"],
    ),
    # Those that look for hard pairs: the others would take an anchor's synthetic copy for its easiest positive.
    "miner": (
        miners,
        ["BatchHardMiner", "DistanceWeightedMiner", "MultiSimilarityMiner", "PairMarginMiner", "TripletMarginMiner"],
    ),
}
WEIGHTS = ("proxies", "W", "fc", "weight")  # what the library's losses call their class vectors
WITHIN_BATCH = {
    *("FastAPLoss", "HistogramLoss", "NCALoss", "NPairsLoss", "PNPLoss", "RankedListLoss"),
    "ThresholdConsistentMarginLoss",
}
WITHOUT_MINER = {"P2SGradLoss", "PNPLoss", "RankedListLoss"}
FROM_TRIPLETS = {"TripletMarginLoss", "MarginLoss"}
HIDDEN = {
    *("num_classes", "embedding_size", "descriptors_dim", "distance", "reducer"),  # ours to give
    *("self", "mat_based_loss", "is_inverted", "pos_strategy", "neg_strategy"),  # fixed by the subclasses
    *("swap", "triplets_per_anchor"),  # cannot act, as we choose the candidates
    *("weight_init_func", "weight_regularizer", "weight_reg_weight", "embedding_regularizer", "embedding_reg_weight"),
    "collect_stats",
}


def signature(cls: type) -> dict[str, Any]:
    """Names and defaults of what a library class takes, through its chain of **kwargs."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            for parameter in parameters:
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    found.setdefault(parameter.name, parameter.default)
            if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
                break
    return found


def options(cls: type) -> dict[str, Any]:
    return {name: default for name, default in signature(cls).items() if name not in HIDDEN}


def check(what: str, name: Any, allowed: Collection[str]) -> None:
    if name not in allowed:
        near = get_close_matches(str(name), allowed, 1, 0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{what} {name!r} is unknown{hint}. Allowed: {', '.join(allowed) or 'none'}")


def arguments(name: str) -> dict[str, Any]:
    """Allowed arguments of `build(name, ...)` with their defaults.

    Beside the library's: `distance`, `reducer`, `miner` (class names; None is the loss's own distance and reducer, and
    no miner) and their `*_arguments` (a dict each). The margin of a TripletMarginMiner is by default that of the loss.
    """
    check("loss.name", name, [*SHORT, *LOSSES])
    cls, ours = SHORT.get(name, (name, {}))
    allowed = options(getattr(losses, cls))
    for part in PARTS:
        if part != "miner" or cls not in WITHOUT_MINER:
            allowed |= {part: None, f"{part}_arguments": {}}
    return deepcopy(allowed | ours)


def build(name: str, num_classes: int, dim: int, **given: Any) -> "BaseLoss":
    """The loss `name` over `num_classes` training classes and embeddings of `dim` numbers.

    Raises ValueError for an unknown name or argument, and for a combination that the library refuses.
    """
    defaults = arguments(name)
    for argument in given:
        check(f"argument of loss {name}", argument, defaults)
    chosen = defaults | given
    for part in PARTS:  # ours hold beside those given, but not for another part
        if part in defaults and chosen[part] == defaults[part]:
            chosen[f"{part}_arguments"] = defaults[f"{part}_arguments"] | chosen[f"{part}_arguments"]
        else:
            chosen[f"{part}_arguments"] = given.get(f"{part}_arguments", {})
    parts = {part: (chosen.pop(part, None), chosen.pop(f"{part}_arguments", {})) for part in PARTS}
    cls = getattr(losses, SHORT.get(name, (name, {}))[0])
    if parts["miner"][0] == "TripletMarginMiner" and cls is losses.TripletMarginLoss:
        parts["miner"] = "TripletMarginMiner", {"margin": chosen["margin"]} | parts["miner"][1]
    sizes = {"num_classes": num_classes, "embedding_size": dim, "descriptors_dim": dim}
    if chosen.get("learn_beta") is False:
        del sizes["num_classes"]  # one constant for all classes
    try:
        made = {part: construct(part, *parts[part]) for part in PARTS}
        miner = made.pop("miner")
        loss = cls(**chosen, **made, **{size: sizes[size] for size in sizes.keys() & signature(cls).keys()})
    except (TypeError, AssertionError) as error:
        raise ValueError(f"loss {name}: {error}") from error
    return BaseLoss(loss, miner, num_classes, per_image=parts["reducer"][0] == "SumReducer")


def construct(part: str, name: str | None, given: dict[str, Any]) -> Any:
    module, allowed = PARTS[part]
    if name is None:
        if given:
            raise ValueError(f"loss.{part}_arguments {given} need a loss.{part}")
        return None
    check(f"loss.{part}", name, allowed)
    cls = getattr(module, name)
    for argument in given:
        check(f"argument of {name}", argument, options(cls))
    return cls(**given)


class BaseLoss(nn.Module):
    """A library loss and its miner over one global batch.

    needs_positives: a batch must hold more than one image of a class (true for losses without proxies).
    """

    def __init__(self, loss: Any, miner: Any, num_classes: int, per_image: bool) -> None:
        super().__init__()
        for key, value in list(vars(loss).items()):
            if isinstance(value, Tensor):  # the library's constants: as buffers they follow the module's device
                delattr(loss, key)
                loss.register_buffer(key, value, persistent=False)
        self.loss, self.miner = loss, miner
        self.num_classes, self.per_image = num_classes, per_image
        self.kind = type(loss).__name__
        self.weights = next((key for key in WEIGHTS if hasattr(loss, key)), None)
        self.needs_positives = self.weights is None
        cosine = isinstance(loss.distance, distances.CosineSimilarity)
        mined = miner is None or isinstance(miner, miners.MultiSimilarityMiner)
        self.multi_similarity = isinstance(loss, losses.MultiSimilarityLoss) and cosine and mined
        self.contrastive = isinstance(loss, losses.ContrastiveLoss) and cosine and miner is None and per_image
        if miner is not None:
            miner.distance.register_forward_hook(candidates.hide_copies)

    @property
    def proxies(self) -> Tensor | None:
        """(C, D), a view of the parameter; with several centres a class their mean direction. None: a pair loss."""
        if self.weights is None:
            return None
        weights = getattr(self.loss, self.weights)
        if self.weights == "proxies":
            return weights
        centers = weights.t().unflatten(0, (self.num_classes, -1))
        return centers[:, 0] if centers.shape[1] == 1 else nn.functional.normalize(centers, dim=2).mean(1)

    def forward(self, embeddings: Tensor, labels: Tensor, synthetic: Tensor | None = None) -> Tensor:
        """embeddings (B, D) raw; labels (B,); synthetic (M*B, D), row m*B + i a copy of sample i. Returns a scalar."""
        parameters = list(self.parameters())
        dtype = parameters[0].dtype if parameters else torch.promote_types(embeddings.dtype, torch.float32)
        with torch.autocast(embeddings.device.type, enabled=False):
            anchors = embeddings.to(dtype)
            pool = anchors if synthetic is None else torch.cat([anchors, synthetic.to(dtype)])
            pool_labels = labels if synthetic is None else labels.repeat(len(pool) // len(anchors))
            if self.weights is not None or self.kind in WITHIN_BATCH:
                loss = self.loss(pool, pool_labels, self.miner(pool, pool_labels) if self.miner else None)
            else:
                loss = self.boosted(anchors, labels, pool, pool_labels)
                loss = loss + 0 * sum(parameter.sum() for parameter in parameters)  # no parameter is ever unused
        return loss / len(anchors) if self.per_image else loss

    def boosted(self, anchors: Tensor, labels: Tensor, pool: Tensor, pool_labels: Tensor) -> Tensor:
        same = labels[:, None] == pool_labels
        positive, negative = same & ~candidates.own_copies(same), ~same
        if self.contrastive:
            margins = self.loss.pos_margin, self.loss.neg_margin
            return candidates.contrastive(candidates.cosine(anchors, pool), positive, negative, *margins)
        if self.multi_similarity:
            similarity = candidates.cosine(anchors, pool)
            if self.miner is not None:
                positive, negative = candidates.informative_pairs(
                    similarity.detach(), positive, negative, self.miner.epsilon
                )
            settings = self.loss.alpha, self.loss.beta, self.loss.base
            losses = candidates.MultiSimilarity.apply(similarity, positive, negative, *settings)
            places = torch.arange(len(losses), device=losses.device)
            per_anchor = {"losses": losses, "indices": places, "reduction_type": "element"}
            return self.loss.reducer({"loss": per_anchor}, anchors, labels)
        if self.miner is None:
            indices = (candidates.all_triplets if self.kind in FROM_TRIPLETS else candidates.all_pairs)(
                positive, negative
            )
        elif isinstance(self.miner, miners.TripletMarginMiner):
            with torch.no_grad():
                indices = candidates.violating_triplets(
                    self.miner.distance(anchors, pool), positive, negative, self.miner
                )
        else:
            indices = candidates.without_copies(self.miner(anchors, labels, pool, pool_labels), len(anchors))
        return self.loss(anchors, labels, indices, pool, pool_labels)
