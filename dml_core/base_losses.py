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
- Multi-similarity, contrastive, triplet, margin and proxy-anchor loss are computed in candidates.py on the matrix of
  pairs, with no wait for a GPU (`matrix_form` says with which distances, miners and reducers). Tests hold them equal to
  the library, the drawn triplets of the margin loss in distribution. All else is the library's: it lists pairs or
  triplets, and the host waits for their number.
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

# Short name -> the library's class, and the papers' settings where they differ from the library's defaults.
SHORT_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
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
CLASSES: dict[str, type[losses.BaseMetricLossFunction]] = {
    name: item
    for name, item in sorted(vars(losses).items())
    if inspect.isclass(item) and issubclass(item, losses.BaseMetricLossFunction)
}
LOSSES = [name for name in CLASSES if name not in UNSUITABLE]
# What a loss of the library is assembled with: argument -> the library's module, and the classes that are allowed.
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
CLASS_VECTORS = ("proxies", "W", "fc", "weight")  # what the library's losses call them
WITHIN_BATCH = {
    *("FastAPLoss", "HistogramLoss", "NCALoss", "NPairsLoss", "PNPLoss", "RankedListLoss"),
    "ThresholdConsistentMarginLoss",
}
WITHOUT_MINER = {"P2SGradLoss", "PNPLoss", "RankedListLoss"}
FROM_TRIPLETS = {"TripletMarginLoss", "MarginLoss"}
HIDDEN_ARGUMENTS = {
    *("num_classes", "embedding_size", "descriptors_dim", "distance", "reducer"),  # ours to give
    *("self", "mat_based_loss", "is_inverted", "pos_strategy", "neg_strategy"),  # fixed by the subclasses
    *("swap", "triplets_per_anchor"),  # cannot act, as we choose the candidates
    *("weight_init_func", "weight_regularizer", "weight_reg_weight", "embedding_regularizer", "embedding_reg_weight"),
    "collect_stats",
}


def constructor_defaults(cls: type) -> dict[str, Any]:
    """Return the arguments of a library class and their defaults, those of its base classes (**kwargs) included."""
    defaults: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            for parameter in parameters:
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    defaults.setdefault(parameter.name, parameter.default)
            if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
                break
    return defaults


def options(cls: type) -> dict[str, Any]:
    """Return the arguments of a library class that users may set, and their defaults."""
    return {name: default for name, default in constructor_defaults(cls).items() if name not in HIDDEN_ARGUMENTS}


def check_name(what: str, name: Any, allowed: Collection[str]) -> None:
    """Raise ValueError for a name that is not allowed, with the nearest one that is."""
    if name not in allowed:
        near = get_close_matches(str(name), allowed, 1, 0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{what} {name!r} is unknown{hint}. Allowed: {', '.join(allowed) or 'none'}")


def default_arguments(name: str) -> dict[str, Any]:
    """Return the allowed arguments of `build(name, ...)` and their defaults.

    Beside the library's arguments there are `distance`, `reducer` and `miner` (class names; None: the loss's own
    distance and reducer, and no miner) and their `*_arguments` (a dict each). The margin of a TripletMarginMiner is by
    default that of the loss.

    Args:
        name: A short name (triplet, proxy_anchor, ...) or a class of pytorch-metric-learning.

    Returns:
        Argument -> default.

    Raises:
        ValueError: There is no such loss.
    """
    check_name("loss.name", name, [*SHORT_NAMES, *LOSSES])
    cls, published = SHORT_NAMES.get(name, (name, {}))
    allowed = options(CLASSES[cls])
    for part in PARTS:
        if part != "miner" or cls not in WITHOUT_MINER:
            allowed |= {part: None, f"{part}_arguments": {}}
    return deepcopy(allowed | published)


def build(name: str, num_classes: int, dim: int, **arguments: Any) -> "BaseLoss":
    """Build a base loss of pytorch-metric-learning by name.

    Args:
        name: A short name (triplet, proxy_anchor, ...) or a class of the library.
        num_classes: C, how many training classes there are.
        dim: D, the numbers in an embedding.
        **arguments: What the loss takes; `default_arguments(name)` lists it.

    Returns:
        The loss, as a module that is called with (embeddings, labels, synthetic=None).

    Raises:
        ValueError: A name or argument is unknown, or the library refuses the combination.
    """
    defaults = default_arguments(name)
    for argument in arguments:
        check_name(f"argument of loss {name}", argument, defaults)
    settings = defaults | arguments
    for part in PARTS:  # default arguments belong to the default part alone
        if part in defaults and settings[part] == defaults[part]:
            settings[f"{part}_arguments"] = defaults[f"{part}_arguments"] | settings[f"{part}_arguments"]
        else:
            settings[f"{part}_arguments"] = arguments.get(f"{part}_arguments", {})
    parts = {part: (settings.pop(part, None), settings.pop(f"{part}_arguments", {})) for part in PARTS}
    cls = CLASSES[SHORT_NAMES.get(name, (name, {}))[0]]
    if parts["miner"][0] == "TripletMarginMiner" and cls is losses.TripletMarginLoss:
        parts["miner"] = "TripletMarginMiner", {"margin": settings["margin"]} | parts["miner"][1]
    sizes = {"num_classes": num_classes, "embedding_size": dim, "descriptors_dim": dim}
    if settings.get("learn_beta") is False:
        del sizes["num_classes"]  # one constant for all classes
    try:
        objects = {part: build_part(part, *parts[part]) for part in PARTS}
        miner = objects.pop("miner")
        wanted_sizes = {size: sizes[size] for size in sizes.keys() & constructor_defaults(cls).keys()}
        loss = cls(**settings, **objects, **wanted_sizes)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"loss {name}: {error}") from error
    return BaseLoss(loss, miner, num_classes, reducer=parts["reducer"][0])


def build_part(part: str, name: str | None, arguments: dict[str, Any]) -> Any:
    """Build the distance, reducer or miner `name` of the library; None for no name."""
    module, allowed = PARTS[part]
    if name is None:
        if arguments:
            raise ValueError(f"loss.{part}_arguments {arguments} need a loss.{part}")
        return None
    check_name(f"loss.{part}", name, allowed)
    cls = getattr(module, name)
    for argument in arguments:
        check_name(f"argument of {name}", argument, options(cls))
    return cls(**arguments)


class BaseLoss(nn.Module):
    """A loss and a miner of pytorch-metric-learning over one global batch.

    Args:
        loss: The library's loss.
        miner: The library's miner, or None.
        num_classes: C.
        reducer: Class of the loss's reducer; None: its own. A SumReducer's sum is divided by the batch size B.

    Attributes:
        needs_positives: Whether a batch must hold more than one image of a class: true for losses without proxies.
    """

    def __init__(self, loss: Any, miner: Any, num_classes: int, reducer: str | None) -> None:
        super().__init__()
        for key, value in list(vars(loss).items()):
            if isinstance(value, Tensor):  # the library's constants: as buffers they follow the module's device
                delattr(loss, key)
                loss.register_buffer(key, value, persistent=False)
        self.loss, self.miner = loss, miner
        self.num_classes, self.per_image = num_classes, reducer == "SumReducer"
        self.loss_class = type(loss).__name__
        self.class_vectors_name = next((key for key in CLASS_VECTORS if hasattr(loss, key)), None)
        self.needs_positives = self.class_vectors_name is None
        self.form = matrix_form(loss, miner, reducer)
        if miner is not None:
            miner.distance.register_forward_hook(candidates.hide_copies)

    @property
    def proxies(self) -> Tensor | None:
        """The class vectors (C, D), a view of the parameter; with several centres a class their mean direction.

        None for a loss without class vectors.
        """
        if self.class_vectors_name is None:
            return None
        weights = getattr(self.loss, self.class_vectors_name)
        if self.class_vectors_name == "proxies":
            return weights
        centers = weights.t().unflatten(0, (self.num_classes, -1))
        return centers[:, 0] if centers.shape[1] == 1 else nn.functional.normalize(centers, dim=2).mean(1)

    def forward(self, embeddings: Tensor, labels: Tensor, synthetic: Tensor | None = None) -> Tensor:
        """Compute the loss; the boosted loss where synthetic embeddings are given.

        Args:
            embeddings: (B, D) raw embeddings.
            labels: (B,) classes.
            synthetic: (M*B, D); row m*B + i is a copy of sample i.

        Returns:
            A scalar.
        """
        parameters = list(self.parameters())
        dtype = parameters[0].dtype if parameters else torch.promote_types(embeddings.dtype, torch.float32)
        with torch.autocast(embeddings.device.type, enabled=False):
            anchors = embeddings.to(dtype)
            pool = anchors if synthetic is None else torch.cat([anchors, synthetic.to(dtype)])
            pool_labels = labels if synthetic is None else labels.repeat(len(pool) // len(anchors))
            if self.form == "proxy_anchor":
                cosine = candidates.cosine(pool, self.loss.proxies)
                loss = candidates.proxy_anchor(cosine, pool_labels, self.loss.margin, self.loss.alpha)
            elif self.class_vectors_name is not None or self.loss_class in WITHIN_BATCH:
                loss = self.loss(pool, pool_labels, self.miner(pool, pool_labels) if self.miner else None)
            else:
                loss = self.boosted(anchors, labels, pool, pool_labels)
                loss = loss + 0 * sum(parameter.sum() for parameter in parameters)  # no parameter is ever unused
        return loss / len(anchors) if self.per_image else loss

    def boosted(self, anchors: Tensor, labels: Tensor, pool: Tensor, pool_labels: Tensor) -> Tensor:
        """Compute a pair loss of anchors (B, D) against candidates `pool` (R, D), without an anchor's own copies."""
        same = labels[:, None] == pool_labels
        positive, negative = same & ~candidates.own_copies(same), ~same
        if self.form == "contrastive":
            margins = self.loss.pos_margin, self.loss.neg_margin
            return candidates.contrastive(candidates.cosine(anchors, pool), positive, negative, *margins)
        if self.form == "multi_similarity":
            return self.multi_similarity(anchors, labels, pool, positive, negative)
        if self.form == "triplet":
            distance = self.loss.distance(anchors, pool)
            return candidates.triplet_margin(distance, positive, negative, self.loss.margin, self.miner)
        if self.form == "margin":
            return self.margin(anchors, labels, pool, positive, negative)
        if self.miner is None:
            indices = (candidates.all_triplets if self.loss_class in FROM_TRIPLETS else candidates.all_pairs)(
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

    def multi_similarity(
        self, anchors: Tensor, labels: Tensor, pool: Tensor, positive: Tensor, negative: Tensor
    ) -> Tensor:
        """Compute the multi-similarity loss of anchors (B, D) against `pool` (R, D); masks (B, R)."""
        similarity = candidates.cosine(anchors, pool)
        if self.miner is not None:
            positive, negative = candidates.informative_pairs(
                similarity.detach(), positive, negative, self.miner.epsilon
            )
        scales = self.loss.alpha, self.loss.beta, self.loss.base
        losses = candidates.MultiSimilarity.apply(similarity, positive, negative, *scales)
        rows = torch.arange(len(losses), device=losses.device)
        per_anchor = {"losses": losses, "indices": rows, "reduction_type": "element"}
        return self.loss.reducer({"loss": per_anchor}, anchors, labels)

    def margin(self, anchors: Tensor, labels: Tensor, pool: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Compute the margin loss of anchors (B, D) against `pool` (R, D), over drawn triplets or all; masks (B, R)."""
        distance = self.loss.distance(anchors, pool)
        if self.miner is None:
            near, far = positive * negative.sum(1, keepdim=True), negative * positive.sum(1, keepdim=True)
        else:
            with torch.no_grad():
                weights = candidates.distance_weights(distance, negative, anchors.shape[1], self.miner)
                near, far = candidates.draw_triplets(weights, positive, ~negative)
        beta = self.loss.beta if len(self.loss.beta) == 1 else self.loss.beta[labels]
        nu = self.loss.nu if self.loss.learn_beta else 0
        return candidates.margin_loss(distance, beta[:, None], near, far, self.loss.margin, nu)


def matrix_form(loss: Any, miner: Any, reducer: str | None) -> str | None:
    """Return which loss of candidates.py computes the same on the matrix of pairs, without a wait for the device.

    Args:
        loss: The library's loss.
        miner: The library's miner, or None.
        reducer: Class of the loss's reducer; None: its own.

    Returns:
        Its name; None: there is none, and the library is given lists of pairs or triplets.
    """
    cosine = isinstance(loss.distance, distances.CosineSimilarity)
    euclidean = isinstance(loss.distance, distances.LpDistance) and (
        (loss.distance.p, loss.distance.power, loss.distance.normalize_embeddings) == (2, 1, True)
    )
    match loss:
        case losses.MultiSimilarityLoss() if cosine and isinstance(miner, miners.MultiSimilarityMiner | None):
            return "multi_similarity"
        case losses.ContrastiveLoss() if cosine and miner is None and reducer == "SumReducer":
            return "contrastive"
        case losses.TripletMarginLoss() if (
            euclidean
            and isinstance(miner, miners.TripletMarginMiner | None)
            and reducer in (None, "AvgNonZeroReducer")
            and not loss.smooth_loss
        ):
            return "triplet"
        case losses.MarginLoss() if (
            euclidean and isinstance(miner, miners.DistanceWeightedMiner | None) and reducer in (None, "DivisorReducer")
        ):
            return "margin"
        case losses.ProxyAnchorLoss() if cosine and miner is None and reducer in (None, "DivisorReducer"):
            return "proxy_anchor"
    return None
