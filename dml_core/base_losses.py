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
- Regularizers are of the real embeddings, never of synthetic ones, and no reducer touches them: `SumReducer` does not
  divide them by B.
"""

import inspect
import warnings
from collections.abc import Collection, Mapping
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
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
REFUSED = {  # classes of the library that are not taken, and why
    **dict.fromkeys(
        ("BaseMetricLossFunction", "GenericPairLoss", "BaseReducer", "BaseDistance", "BaseMiner", "BaseRegularizer"),
        "an abstract class, which others are derived from",
    ),
    "BaseLossWrapper": "an abstract class of wrappers",
    "EmbeddingRegularizerMixin": "a part of all losses: loss.embedding_regularizer",
    "WeightRegularizerMixin": "a part of the losses with class vectors: loss.weight_regularizer",
    "CrossBatchMemory": "a wrapper of other losses, which remembers earlier batches; take the loss itself",
    "MultipleLosses": "a wrapper of other losses; one base loss is trained, and `method` adds terms to it",
    "SelfSupervisedLoss": "a wrapper of other losses, which needs pairs of views; take the loss itself",
    "VICRegLoss": "needs pairs of views, and takes no labels",
    "ManifoldLoss": "takes no labels",
    "DynamicSoftMarginLoss": "keeps a histogram, and its graph, from one step to the next; try TripletMarginLoss",
    "InstanceLoss": "takes a class's number for the column of a batch's image; try NormalizedSoftmaxLoss",
    "SmoothAPLoss": "as of 2.9 exchanges the numbers of classes and of images a class; try FastAPLoss",
    "BatchedDistance": "a wrapper of other distances",
    "MultipleReducers": "a wrapper of other reducers",
    "DoNothingReducer": "reduces nothing, and a training needs one number",
    "ClassWeightedReducer": "needs a weight for each training class, whose numbers depend on the split",
    **dict.fromkeys(
        ("AngularMiner", "BatchEasyHardMiner", "HDCMiner", "UniformHistogramMiner"),
        "would take an anchor's synthetic copy for a positive",
    ),
    "EmbeddingsAlreadyPackagedAsTriplets": "needs batches that are sorted into triplets",
}
CLASSES: dict[str, type[losses.BaseMetricLossFunction]] = {
    name: item
    for name, item in sorted(vars(losses).items())
    if inspect.isclass(item) and issubclass(item, losses.BaseMetricLossFunction)
}
LOSSES = [name for name in CLASSES if name not in REFUSED]


class PerAnchorReducer(reducers.PerAnchorReducer):
    """The mean over anchors of the mean over an anchor's pairs, with any number of candidates.

    But: the library's own takes the candidates for the anchors, and losses of shape (pairs, 1) for an error.
    """

    def tuple_reduction_helper(
        self, losses: Tensor, loss_indices: tuple[Tensor, Tensor], embeddings: Tensor, labels: Tensor
    ) -> Tensor:
        """Reduce the losses of pairs: first those of one anchor, and then the anchors, with 0 for one without pairs."""
        anchors, others = loss_indices
        totals = losses.new_zeros(len(embeddings), int(others.max()) + 1)
        counts = torch.zeros_like(totals).index_put((anchors, others), losses.new_ones(()))
        totals = totals.index_put((anchors, others), losses.flatten())
        per_anchor = totals.sum(1) / counts.sum(1).clamp(min=1)
        rows = torch.arange(len(embeddings), device=embeddings.device)
        return self.element_reduction(per_anchor, rows, embeddings, labels)


# What a loss is assembled with: argument -> the classes that are allowed, by their names in the library.
PARTS: dict[str, dict[str, type]] = {
    "distance": {
        name: getattr(distances, name)
        for name in ("CosineSimilarity", "DotProductSimilarity", "LpDistance", "SNRDistance")
    },
    "reducer": {
        **{
            name: getattr(reducers, name)
            for name in ("AvgNonZeroReducer", "DivisorReducer", "MeanReducer", "SumReducer", "ThresholdReducer")
        },
        "PerAnchorReducer": PerAnchorReducer,
    },
    # Those that look for hard pairs: the others would take an anchor's synthetic copy for its easiest positive.
    "miner": {
        name: getattr(miners, name)
        for name in (
            *("BatchHardMiner", "DistanceWeightedMiner", "MultiSimilarityMiner", "PairMarginMiner"),
            "TripletMarginMiner",
        )
    },
    "embedding_regularizer": {
        name: getattr(regularizers, name)
        for name in ("CenterInvariantRegularizer", "LpRegularizer", "ZeroMeanRegularizer")
    },
    "weight_regularizer": {
        name: getattr(regularizers, name)
        for name in (
            *("CenterInvariantRegularizer", "LpRegularizer", "RegularFaceRegularizer", "SparseCentersRegularizer"),
            "ZeroMeanRegularizer",
        )
    },
}
REGULARIZER_WEIGHTS = {"embedding_regularizer": "embedding_reg_weight", "weight_regularizer": "weight_reg_weight"}
CLASS_VECTORS = ("proxies", "W", "fc", "weight")  # what the library's losses call them
WITHIN_BATCH = {
    *("FastAPLoss", "HistogramLoss", "NCALoss", "NPairsLoss", "PNPLoss", "RankedListLoss"),
    "ThresholdConsistentMarginLoss",
}
WITHOUT_MINER = {"P2SGradLoss", "PNPLoss", "RankedListLoss"}
WITHOUT_DISTANCE = {"P2SGradLoss", "ThresholdConsistentMarginLoss"}
WITHOUT_REDUCER = {"HistogramLoss", "P2SGradLoss", "PNPLoss", "ThresholdConsistentMarginLoss"}
WITH_DIVISOR = {"MarginLoss", "ProxyAnchorLoss"}
FROM_TRIPLETS = {"TripletMarginLoss", "MarginLoss"}
# Losses that are defined on some distances only.
DISTANCES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("AngularLoss", "FastAPLoss", "RankedListLoss"), ("LpDistance",)),
    "SignalToNoiseRatioContrastiveLoss": ("SNRDistance",),
    "SoftTripleLoss": ("CosineSimilarity", "DotProductSimilarity"),
    **dict.fromkeys(
        (
            *("ArcFaceLoss", "CircleLoss", "CosFaceLoss", "HistogramLoss", "LargeMarginSoftmaxLoss", "PNPLoss"),
            *("SphereFaceLoss", "SubCenterArcFaceLoss", "TupletMarginLoss"),
        ),
        ("CosineSimilarity",),
    ),
}
# Arguments of the library that are not offered, and why.
HIDDEN_ARGUMENTS = {
    "num_classes": "the training set gives it; loss.beta_per_class=false makes one beta of MarginLoss for all classes",
    **dict.fromkeys(("embedding_size", "descriptors_dim"), "embedding_dim gives it"),
    **dict.fromkeys(
        ("mat_based_loss", "is_inverted", "pos_strategy", "neg_strategy"), "the loss or miner itself fixes it"
    ),
    "swap": "candidates are not anchors, so that there is no distance of a positive to a negative",
    "triplets_per_anchor": "all triplets count, or those that loss.miner chooses",
    **dict.fromkeys(("weight_init_func", "aggregation_func"), "a function, which a config cannot hold"),
    **dict.fromkeys(("distance", "reducer"), "the library's default is taken here"),  # of parts
    "collect_stats": "nothing reads what it collects",
    "self": "it is no argument",
}
# Arguments of a part that its class fixes, and the way on.
FIXED_ARGUMENTS = {
    ("CosineSimilarity", "normalize_embeddings"): "a cosine is of unit vectors; loss.distance=DotProductSimilarity "
    "has normalize_embeddings=false",
    ("AvgNonZeroReducer", "low"): "it is 0; loss.reducer=ThresholdReducer has another",
    ("SparseCentersRegularizer", "centers_per_class"): "the loss gives it",
}
COUNTS = {"centers_per_class", "n_bins", "num_bins", "sub_centers"}
CHOICES = {"type_of_triplets": ("all", "hard", "semihard", "easy"), "variant": tuple(losses.PNPLoss.VARIANTS)}


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
    return {
        name: default
        for name, default in constructor_defaults(cls).items()
        if name not in HIDDEN_ARGUMENTS and (cls.__name__, name) not in FIXED_ARGUMENTS
    }


def check_name(key: str, name: Any, allowed: Collection[str]) -> None:
    """Raise ValueError for a name that is not allowed: with the reason, or with the nearest one that is."""
    if isinstance(name, str) and name in allowed:
        return
    if isinstance(name, str) and name in REFUSED:
        others = f". Allowed: {', '.join(allowed)}" if len(allowed) < 10 else ""
        raise ValueError(f"{key}={name}: {REFUSED[name]}{others}")
    lowered = {each.lower(): each for each in allowed}
    near = get_close_matches(str(name).lower(), lowered, 1, 0.5)
    hint = f" (did you mean {lowered[near[0]]!r}?)" if near else ""
    raise ValueError(f"{key}={name} is unknown{hint}. Allowed: {', '.join(allowed)}")


def class_of(name: str) -> str:
    """Return the class's name of a loss. ValueError, with the reason, where there is no such loss."""
    check_name("loss.name", name, list(dict.fromkeys([*SHORT_NAMES, *LOSSES])))
    return SHORT_NAMES.get(name, (name, {}))[0]


def reason_without(cls: str, part: str) -> str | None:
    """Return why a part of PARTS cannot act on a loss of the library; None: it can."""
    if part == "miner" and cls in WITHOUT_MINER:
        return "it compares all images of the batch"
    if part == "distance" and cls in WITHOUT_DISTANCE:
        return "it computes cosines itself"
    if part == "reducer" and cls in WITHOUT_REDUCER:
        return "its value is one number for the whole batch"
    if part == "weight_regularizer" and part not in constructor_defaults(CLASSES[cls]):
        return "it has no class vectors that the library regularizes"
    return None


def default_arguments(name: str) -> dict[str, Any]:
    """Return the allowed arguments of `build(name, ...)` and their defaults.

    Beside the library's arguments there are `distance`, `reducer`, `miner`, `embedding_regularizer` and
    `weight_regularizer` (class names; None: the loss's own distance and reducer, no miner, no regularizer) and their
    `*_arguments` (a dict each), where they can act. The margin of a TripletMarginMiner is by default that of the loss.
    `beta_per_class` of MarginLoss says whether a learned beta is one for each class, or one for all.

    Args:
        name: A short name (triplet, proxy_anchor, ...) or a class of pytorch-metric-learning.

    Returns:
        Argument -> default.

    Raises:
        ValueError: There is no such loss, or it is not taken here.
    """
    cls = class_of(name)
    allowed = options(CLASSES[cls])
    for part in PARTS:
        allowed.pop(part, None)
        if reason_without(cls, part) is None:
            allowed |= {part: None, f"{part}_arguments": {}}
    if cls == "MarginLoss":
        allowed["beta_per_class"] = True
    return deepcopy(allowed | SHORT_NAMES.get(name, (name, {}))[1])


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError, with key, value and reason, for an argument that `build(name, ...)` does not take."""
    defaults, cls = default_arguments(name), class_of(name)
    for argument, value in arguments.items():
        part = argument.removesuffix("_arguments")
        if argument in defaults:
            check_value(f"loss.{argument}", value, defaults[argument], CHOICES.get(argument))
            if argument in COUNTS and not (isinstance(value, int) and value > 0) and value is not None:
                raise ValueError(f"loss.{argument}={value}: allowed is a whole number, at least 1")
        elif part in PARTS:
            raise ValueError(f"loss.{argument} cannot act on loss.name={name}: {reason_without(cls, part)}")
        elif argument in HIDDEN_ARGUMENTS and argument in constructor_defaults(CLASSES[cls]):
            raise ValueError(f"loss.{argument} cannot be set: {HIDDEN_ARGUMENTS[argument]}")
        else:
            near = get_close_matches(argument, defaults, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(defaults)}"
            raise ValueError(f"loss.{argument}: {argument} is no argument of {name}; {hint}")
    settings = defaults | dict(arguments)
    for part, weight in REGULARIZER_WEIGHTS.items():
        if settings.get(weight) != defaults.get(weight) and settings[part] in (None, "none"):
            raise ValueError(f"loss.{weight}={arguments[weight]} cannot act without loss.{part}")
    if settings.get("beta_per_class") is False and not settings["learn_beta"]:
        raise ValueError("loss.beta_per_class=False cannot act without loss.learn_beta=true")


def check_value(key: str, value: Any, default: Any, choices: Collection[str] | None = None) -> None:
    """Raise ValueError for a value that cannot take the place of a default of the library.

    Args:
        key: Of the config, for the message.
        value: What was given.
        default: A truth value, number, text or mapping. None stands for a number, a range of numbers, or a name.
        choices: The texts that are allowed; None: any.
    """
    if choices is not None and value not in choices:
        raise ValueError(f"{key}={value}: allowed is {', '.join(choices)}")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{key}={value}: allowed is true or false")
    elif isinstance(default, int | float):
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ValueError(f"{key}={value} is not a number")
    elif isinstance(default, dict) and not isinstance(value, dict):
        raise ValueError(f"{key}={value}: not a mapping of arguments, such as {key}={{margin: 0.1}}")


def check(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError, in one line, for a loss that cannot be built, or that fails in its first step.

    A small step is taken, with synthetic embeddings and without: what the library refuses only then is refused here.
    The state of the random generator stays as it is.

    Args:
        name: As of `build`.
        arguments: As of `build`.
    """
    check_arguments(name, arguments)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        loss = build(name, 4, 8, **arguments)
        labels = torch.arange(4).repeat_interleave(2)
        z = (torch.randn(4, 8)[labels] + torch.randn(8, 8)).requires_grad_()
        try:
            values = [loss(z, labels), loss(z, labels, z.detach() + torch.randn(8, 8))]
            torch.stack(values).sum().backward()
        except Exception as error:
            raise ValueError(f"{describe(name, arguments)} cannot be computed ({_words(error)})") from error
    if not torch.stack(values).isfinite().all():
        raise ValueError(f"{describe(name, arguments)} cannot be computed: it is not finite on a small batch")


def describe(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a loss and its arguments as a command line has them."""
    return " ".join(f"loss.{key}={value}" for key, value in {"name": name, **arguments}.items())


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def build(name: str, num_classes: int, dim: int, **arguments: Any) -> "BaseLoss":
    """Build a base loss of pytorch-metric-learning by name.

    Args:
        name: A short name (triplet, proxy_anchor, ...) or a class of the library.
        num_classes: C, how many training classes there are.
        dim: D, the numbers in an embedding.
        **arguments: What the loss takes; `default_arguments(name)` lists it. "none" takes a default part away.

    Returns:
        The loss, as a module that is called with (embeddings, labels, synthetic=None).

    Raises:
        ValueError: A name or argument is unknown, or the library refuses the combination.
    """
    check_arguments(name, arguments)
    defaults = default_arguments(name)
    arguments = {key: None if key in PARTS and value == "none" else value for key, value in arguments.items()}
    settings = defaults | arguments
    for part in PARTS:  # default arguments belong to the default part alone
        if part in defaults and settings[part] == defaults[part]:
            settings[f"{part}_arguments"] = defaults[f"{part}_arguments"] | settings[f"{part}_arguments"]
        else:
            settings[f"{part}_arguments"] = arguments.get(f"{part}_arguments", {})
    parts = {part: (settings.pop(part, None), settings.pop(f"{part}_arguments", {})) for part in PARTS}
    cls = CLASSES[class_of(name)]
    if parts["miner"][0] == "TripletMarginMiner" and cls is losses.TripletMarginLoss:
        parts["miner"] = "TripletMarginMiner", {"margin": settings["margin"]} | parts["miner"][1]
    sizes = {"num_classes": num_classes, "embedding_size": dim, "descriptors_dim": dim}
    beta_per_class = settings.pop("beta_per_class", True)
    if settings.get("learn_beta") is False or not beta_per_class:
        del sizes["num_classes"]  # one beta for all classes
    centers = settings.get("centers_per_class", settings.get("sub_centers", 1))
    weights = {part: settings.pop(weight, 1) for part, weight in REGULARIZER_WEIGHTS.items()}
    check_parts(cls.__name__, name, {part: parts[part][0] for part in PARTS}, centers)
    try:
        objects = {part: build_part(part, *parts[part], num_classes, centers) for part in PARTS}
        miner = objects.pop("miner")
        penalties = {
            part: Penalty(regularizer, weights[part])
            for part in REGULARIZER_WEIGHTS
            if (regularizer := objects.pop(part)) is not None
        }
        wanted_sizes = {size: sizes[size] for size in sizes.keys() & constructor_defaults(cls).keys()}
        loss = cls(**settings, **objects, **wanted_sizes)
    except (TypeError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{describe(name, arguments)} cannot be built ({_words(error)})") from error
    check_margins(name, loss)
    return BaseLoss(loss, miner, num_classes, reducer=parts["reducer"][0], **penalties)


def check_parts(cls: str, name: str, parts: Mapping[str, str | None], centers: int) -> None:
    """Raise ValueError, with the reason, for a part that exists and cannot act on this loss.

    Args:
        cls: The loss's class.
        name: The loss as the user names it.
        parts: Argument -> class, or None.
        centers: Vectors of a class; 1 also where there are none.
    """
    for part, chosen in parts.items():
        if chosen is not None:
            check_name(f"loss.{part}", chosen, PARTS[part])
    distance, reducer = parts["distance"], parts["reducer"]
    if distance is not None and distance not in (fixed := DISTANCES.get(cls, (distance,))):
        raise ValueError(f"loss.distance={distance}: loss.name={name} is defined on {' or '.join(fixed)} only")
    if reducer == "DivisorReducer" and cls not in WITH_DIVISOR:
        raise ValueError(
            f"loss.reducer={reducer}: loss.name={name} gives no divisor; {' and '.join(sorted(WITH_DIVISOR))} do"
        )
    if reducer == "PerAnchorReducer" and cls in FROM_TRIPLETS:
        raise ValueError(f"loss.reducer={reducer}: it reduces pairs, and loss.name={name} has triplets")
    if parts["weight_regularizer"] == "SparseCentersRegularizer" and centers < 2:
        raise ValueError(
            "loss.weight_regularizer=SparseCentersRegularizer: it joins several vectors of a class, which "
            f"loss.name={name} has not; SoftTripleLoss and SubCenterArcFaceLoss have"
        )


def check_margins(name: str, loss: Any) -> None:
    """Raise ValueError for a contrastive loss whose margins do not part positives from negatives."""
    if not isinstance(loss, losses.ContrastiveLoss):
        return
    near, far = loss.pos_margin, loss.neg_margin
    if near < far if loss.distance.is_inverted else near > far:
        what, order = ("similarity", "not below") if loss.distance.is_inverted else ("distance", "not above")
        raise ValueError(
            f"loss.pos_margin={near} loss.neg_margin={far}: {type(loss.distance).__name__} is a {what}, so that "
            f"loss.name={name} needs a pos_margin that is {order} its neg_margin"
        )


def build_part(part: str, name: str | None, arguments: dict[str, Any], num_classes: int, centers: int) -> Any:
    """Build a part `name` of PARTS; None for no name. centers: vectors of a class, for the regularizer of those."""
    if name is None:
        if arguments:
            raise ValueError(f"loss.{part}_arguments={arguments} needs a loss.{part}")
        return None
    cls = PARTS[part][name]
    allowed = options(cls)
    for argument, value in arguments.items():
        key = f"loss.{part}_arguments.{argument}"
        if (name, argument) in FIXED_ARGUMENTS:
            raise ValueError(f"{key} cannot be set: {FIXED_ARGUMENTS[name, argument]}")
        if argument in HIDDEN_ARGUMENTS and argument in constructor_defaults(cls):
            raise ValueError(f"{key} cannot be set: {HIDDEN_ARGUMENTS[argument]}")
        if argument not in allowed:
            near = get_close_matches(argument, allowed, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(allowed) or 'none'}"
            raise ValueError(f"{key}: {argument} is no argument of {name}; {hint}")
        check_value(key, value, allowed[argument], CHOICES.get(argument))
    if cls is regularizers.SparseCentersRegularizer:
        return cls(num_classes=num_classes, centers_per_class=centers, **arguments)
    return cls(**arguments)


class Penalty(nn.Module):
    """A regularizer of the library with its weight: a term beside the loss, of embeddings or of class vectors.

    Args:
        regularizer: The library's, from rows (N, D) to a scalar.
        weight: Its factor.
    """

    def __init__(self, regularizer: Any, weight: float) -> None:
        super().__init__()
        self.regularizer, self.weight = regularizer, weight

    def forward(self, rows: Tensor) -> Tensor:
        """Compute the term of rows (N, D)."""
        return self.weight * self.regularizer(rows)


class BaseLoss(nn.Module):
    """A loss and a miner of pytorch-metric-learning over one global batch.

    Args:
        loss: The library's loss.
        miner: The library's miner, or None.
        num_classes: C.
        reducer: Class of the loss's reducer; None: its own. A SumReducer's sum is divided by the batch size B.
        embedding_regularizer: A term of the embeddings, if in use.
        weight_regularizer: A term of the class vectors, if in use.

    Attributes:
        needs_positives: Whether a batch must hold more than one image of a class: true for losses without proxies.
    """

    def __init__(
        self,
        loss: Any,
        miner: Any,
        num_classes: int,
        reducer: str | None,
        embedding_regularizer: Penalty | None = None,
        weight_regularizer: Penalty | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner
        self.embedding_regularizer, self.weight_regularizer = embedding_regularizer, weight_regularizer
        for module in self.modules():
            for key, value in list(vars(module).items()):
                if isinstance(value, Tensor):  # the library's constants: as buffers they follow the module's device
                    delattr(module, key)
                    module.register_buffer(key, value, persistent=False)
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
            loss = loss / len(anchors) if self.per_image else loss
            if self.embedding_regularizer is not None:
                loss = loss + self.embedding_regularizer(anchors)
            if self.weight_regularizer is not None:
                assert self.class_vectors_name is not None
                vectors = getattr(self.loss, self.class_vectors_name)
                loss = loss + self.weight_regularizer(vectors if self.class_vectors_name == "proxies" else vectors.t())
        return loss

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
