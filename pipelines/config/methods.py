"""The methods over the base loss: which are used, their settings, and the modules that these build.

A method is a section here, a file of dml_core with its formula, and its term in dml_core/learner.py.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from pipelines.config.sections import Fraction, Positive, Section

if TYPE_CHECKING:
    from torch import nn


class Sizes(NamedTuple):
    """What the shapes of a method's parameters depend on.

    Attributes:
        classes: Training classes.
        features: Numbers that the backbone gives for an image.
        embedding: Numbers in an embedding.
        epochs: Epochs of the training.
    """

    classes: int
    features: int
    embedding: int
    epochs: int


class MethodSection(Section):
    """The settings of a method."""

    @property
    def weights(self) -> dict[str, float]:
        """The factors of the method's terms in the loss, by the names of dml_core.learner.Weights."""
        return {}

    @abstractmethod
    def build(self, sizes: Sizes) -> "nn.Module":
        """Build the module that dml_core.learner.Learner takes under the method's name."""


class Iaa(MethodSection):
    """Intra-class adaptive augmentation: synthetics drawn from each class's variation, as further candidates."""

    intensity: Annotated[float, Field(gt=0)] = 0.7
    """lambda, the share of the class's variance that synthetics are drawn with. It falls to 0.6 of its value towards
    the end."""
    draws: Positive = 3
    """M, the synthetics of a sample."""
    start: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the epochs without synthetics, before the first estimate of the variation."""
    update_every: Positive = 2
    """Epochs from one estimate to the next. Each estimate embeds the training set once."""
    momentum: Fraction = 0.2
    """Largest share that the old estimate keeps in the new one."""
    covariance: Literal["diag", "full"] = "diag"
    """What is estimated of a class's covariance. `full` takes classes x embedding_dim^2 numbers of memory."""
    neighbors: Positive = 25
    """K, the classes that correct the variation of a small class."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How fast the correction fades with the size of a class."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the variation of all classes in the correction."""
    tau: Annotated[float, Field(ge=0)] = 40.0
    """Largest number of images of a class that is corrected."""

    def build(self, sizes: Sizes) -> "nn.Module":
        from dml_core.synthesis.gaussian import ClassAugmentation

        return ClassAugmentation(sizes.classes, sizes.embedding, sizes.epochs, **self.model_dump())


class Sgar(MethodSection):
    """Self-supervised generative assisted ranking: synthetics of rising intensity, ranked by it."""

    intensity: Annotated[float, Field(ge=0)] = 0.1
    """r, the step from one synthetic to the next, relative to the embedding's norm."""
    count: Annotated[int, Field(ge=2)] = 5
    """N, the synthetics of a sample."""
    margin: Annotated[float, Field(ge=0)] = 0.11
    """delta, by how much a stronger synthetic must be farther from its source than a weaker one, in cosine."""
    max_gap: Annotated[float, Field(gt=0)] | None = None
    """delta': synthetic number j may be farther than a weaker one by j times this, at most. none: there is no limit."""
    scale: Annotated[float, Field(gt=0)] = 32.0
    """Sharpness of the ranking: how much the worst pair of synthetics outweighs the others."""
    gate: Annotated[float, Field(ge=-1, le=1)] = 0.05
    """Smallest cosine to its class proxy with which a sample is a source of synthetics."""
    anchor_scale: Annotated[float, Field(gt=0)] = 32.0
    """Sharpness of the anchor term, which keeps synthetics in their class."""
    anchor_margin: float = 0.1
    """Smallest cosine of a synthetic to its class proxy; a soft limit."""
    directions: Literal["independent", "shared"] = "independent"
    """Whether directions are drawn for each sample, or once for all samples of a step (as published)."""
    weight: Annotated[float, Field(ge=0)] = 0.23
    """lam, the factor of both terms in the loss."""
    ratio_rank: Annotated[float, Field(ge=0)] = 0.9
    """Factor of the ranking term beside `weight`."""
    ratio_anchor: Annotated[float, Field(ge=0)] = 0.9
    """Factor of the anchor term beside `weight`."""

    @property
    def weights(self) -> dict[str, float]:
        return {"sgar_rank": self.weight * self.ratio_rank, "sgar_anchor": self.weight * self.ratio_anchor}

    def build(self, sizes: Sizes) -> "nn.Module":
        from dml_core.ranking.intensity import IntensityRanking

        settings = self.model_dump(exclude={"directions", "weight", "ratio_rank", "ratio_anchor"})
        return IntensityRanking(dim=sizes.embedding, shared_directions=self.directions == "shared", **settings)


class Namr(MethodSection):
    """Neighborhood-adaptive multi-cluster ranking: a structure embedding weighs the dimensions around a sample."""

    centers: Annotated[int, Field(ge=2, le=8)] = 3
    """M, the distances that pairs are drawn to."""
    spacing: Literal["even", "quantile"] = "even"
    """Where these distances are: at even steps from the mean distance down, or at quantiles of the batch's
    distances."""
    t: Annotated[float, Field(gt=0)] = 3.0
    """For spacing=even: how many deviations below the mean distance the smallest of them is."""
    alpha: Annotated[float, Field(gt=0)] = 10.0
    """How sharply a pair decides for the nearest of them."""
    weight: Annotated[float, Field(ge=0)] = 2.0
    """lambda, the factor of the term in the loss."""
    rerank: Positive = 100
    """How many items at the top of a plain search the evaluation orders anew by the adaptive distance. It is the same
    for a whole run, and cannot be in `changes`."""

    @property
    def weights(self) -> dict[str, float]:
        return {"namr_rank": self.weight}

    def build(self, sizes: Sizes) -> "nn.Module":
        from dml_core.heads import Structure
        from dml_core.ranking.clusters import ClusterRanking

        structure = Structure(sizes.features, sizes.embedding)
        return ClusterRanking(structure, self.centers, self.t, self.alpha, self.spacing)


class Methods(Section):
    """The methods in use, and their settings: each has a field of its name, which is None if it is not in use."""

    method: list[Literal["iaa", "sgar", "namr"]] = []
    """Methods over the base loss, in any combination."""
    iaa: Iaa | None = None
    sgar: Sgar | None = None
    namr: Namr | None = None

    @field_validator("method")
    @classmethod
    def _each_once(cls, method: list[str]) -> list[str]:
        if len(set(method)) < len(method):
            raise ValueError(f"[{', '.join(method)}] names a method twice")
        return sorted(method, key=METHODS.index)

    @model_validator(mode="before")
    @classmethod
    def _methods_have_settings(cls, values: Any) -> Any:
        chosen = values.get("method") or []
        return {**values, **{m: {} for m in METHODS if m in chosen and values.get(m) is None}}

    @model_validator(mode="after")
    def _settings_act(self) -> "Methods":
        for method in METHODS:
            if getattr(self, method) is not None and method not in self.method:
                raise ValueError(f"{method}.* cannot act: {method} is not in method={self.method}")
        return self

    @property
    def method_settings(self) -> dict[str, MethodSection]:
        """The settings of the methods in use, by name."""
        return {method: getattr(self, method) for method in self.method}


METHODS = tuple(name for name in Methods.model_fields if name != "method")
