"""The sections of a config: data, batch, backbone, loss, optimizer. schema.py puts them together."""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

SECRET = re.compile(r"://[^/?#]*@|[?&][^=&]*(secret|token|signature|password|credential|access_key|sig)[^=&]*=", re.I)


def refuse_secrets(address: str) -> str:
    """Return an address as it is, if it may be kept in MLflow, checkpoints and logs.

    Raises:
        ValueError: It holds a password, a key or a signature.
    """
    if "://" in address and SECRET.search(address):
        raise ValueError(
            "the address holds a secret, which MLflow and checkpoints would keep; give it by the environment "
            "(AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ~/.netrc, ...)"
        )
    return address


Address = Annotated[str, AfterValidator(refuse_secrets)]


def _name(pattern: str, others: str, longest: int, allowed: str) -> AfterValidator:
    """Return the check of a name.

    Args:
        pattern: What it must match.
        others: The characters that it must not have; in the name that is proposed instead they are "-".
        longest: Most bytes of it.
        allowed: What is allowed, in words.
    """

    def check(name: str) -> str:
        if re.fullmatch(pattern, name) and name.isprintable() and len(name.encode()) <= longest:
            return name
        proposed = re.sub(rf"{others}+", "-", name).strip("-. ")[: longest // 4] or "first"
        raise ValueError(f"{allowed}; {longest} bytes at most; for instance {proposed}")

    return AfterValidator(check)


# Of a run, which is also the name of its folder.
RunName = Annotated[
    str, _name(r"\w[\w.\-]*", r"[^\w.]", 200, "letters, digits, _ . and - are allowed, but . and - not at the start")
]
# MLflow refuses / and :, and does not find models:/NAME where the name has one of the others.
ModelName = Annotated[
    str,
    _name(
        r"[^\s./:@#?%]([^/:@#?%]*[^\s/:@#?%])?", r"[/:@#?%\s]", 250, "no / : @ # ? % is allowed, and no . at the start"
    ),
]
ExperimentName = Annotated[
    str, _name(r"[^\s\-](.*\S)?", r"\s", 500, "no - or space is allowed at the start, and no space at the end")
]

Positive = Annotated[int, Field(ge=1)]

Fraction = Annotated[float, Field(ge=0, lt=1)]


def nearest(word: str, words: list[str]) -> str:
    """Return the end of an error message: the word that was probably meant, or all that are allowed."""
    matches = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {matches[0]}?" if matches else f"; allowed: {', '.join(words)}"


class Section(BaseModel):
    """A part of a config: it cannot be changed, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)


OWN_SETS = ("glyphs", "folder", "table")  # those besides the benchmarks


def _list_sets(schema: dict[str, Any]) -> None:
    """Add the names of all sets to the schema of `data.name`, from which its documentation is made."""
    from dml_core.data.benchmarks import BENCHMARKS

    schema["enum"] = [*OWN_SETS, *BENCHMARKS]


class Data(Section):
    """The pictures, and how their classes are divided into train, validation and test."""

    name: Annotated[str, Field(json_schema_extra=_list_sets)] = "glyphs"
    """The set: embedded characters, your own (a class-per-folder tree, a table of paths), or a benchmark."""
    root: Address | None = None
    """Folder of the set; for `folder` and `table` also a URL (s3://, gs://, abfs://, https://). `glyphs` needs none.
    The default for `table` is the table's own folder."""
    table: Address | None = None
    """For `table`: a CSV or Parquet file, or its URL, with the columns path and label, and optionally split, role, and
    camera or sequence."""
    exclude: list[str] | None = None
    """For `folder` and `table`: glob patterns of pictures to leave out, such as `[*_mask*,thumbs]`: of the name of a
    file or folder or, with a `/` in it, of a path relative to `root`."""
    pattern: str | None = None
    """For `folder`: a regular expression that is searched for in each path relative to `root`, and whose named groups
    say what a picture is: `(?P<label>...)`, `(?P<camera>...)` or `(?P<sequence>...)`, `(?P<split>...)` and
    `(?P<role>...)`. What no group says is said by the folders."""
    download: bool = False
    """Whether to fetch a benchmark into `root`, where that is possible without an account."""
    links: bool = False
    """Whether to follow symbolic links that lead out of `root`."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What to do with pictures that cannot be read: `fail` when one is met, or `skip`, which reads all pictures first
    and leaves those out. `glyphs` has none."""
    image_size: Annotated[int, Field(ge=8, le=1024)] = 224
    """Side of the square pictures that the backbone sees, in pixels."""
    augment: Literal["crop", "shift", "none"] | None = None
    """How training images are changed at random: `crop` (random crop and flip, for photographs; the default), `shift`
    (small shifts and turns, for characters), or `none`. Cannot act with `backbone.frozen`, whose features are computed
    once."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """For `folder`, and a `table` without splits: share of the classes to test on (default 0.5)."""
    test_classes: list[str] | None = None
    """For `folder`: the names of the classes to test on, in place of a share."""
    validation_fraction: Fraction | None = None
    """Share of the other classes to validate on (default 0.2). With 0 nothing is validated, and the last epoch counts
    as the best."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Number of equal parts of the classes that `fold` chooses from (default 4)."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Which of the `folds` equal parts of the other classes to validate on, from 0, in place of a share."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed that draws the classes to validate on and, by share, to test on. It is not `seed`, so that runs of several
    seeds share a split."""
    limit_classes: Annotated[int, Field(ge=3)] | None = None
    """Largest number of classes to test on, and of those to train and validate on, for quick runs."""
    loader: Literal["auto", "torch", "ray"] = "auto"
    """Who decodes pictures: the DataLoader of each training worker (`torch`), or tasks on the CPUs of any node (`ray`).
    `auto` is ray if the training is on GPUs, some node has CPUs only, and `loader_processes` is not set."""
    loader_processes: Annotated[int, Field(ge=0)] | None = None
    """Number of decoding processes of each training worker's DataLoader. none: as many as the worker has CPUs to
    spare."""

    decode: Literal["cpu", "gpu"] = "cpu"
    """Who decodes the JPEGs that the `torch` loader's processes read: those processes (`cpu`), or the GPU that trains
    (`gpu`), with nvJPEG, for machines with few CPUs a GPU. Pixels of the two differ by rounding. Other pictures are
    always decoded by CPUs."""

    @property
    def augmentation(self) -> Literal["crop", "shift", "none"]:
        """What training views are made by."""
        return self.augment or "crop"

    @property
    def fractions(self) -> tuple[float, float]:
        """Shares of the classes: to test on, of all; to validate on, of the others."""
        validation = 0.2 if self.validation_fraction is None else self.validation_fraction
        return self.test_fraction or 0.5, validation

    @property
    def fold_of(self) -> tuple[int, int] | None:
        """The fold to validate on, from 0, and how many there are; None: a share is validated on."""
        return None if self.fold is None else (self.fold, self.folds or 4)

    @model_validator(mode="after")
    def _options_act(self) -> "Data":
        name = self.name
        if name not in OWN_SETS:
            from dml_core.data.benchmarks import BENCHMARKS

            if name not in BENCHMARKS:
                raise ValueError(f"there is no data.name={name}{nearest(name, [*OWN_SETS, *BENCHMARKS])}")
        if name == "glyphs" and self.root is not None:
            raise ValueError("root cannot act on data.name=glyphs, which is embedded")
        if name not in ("glyphs", "table") and self.root is None:
            raise ValueError(f"root is needed for data.name={name}: data.root=FOLDER")
        if (name == "table") != (self.table is not None):
            needed = "is needed for" if name == "table" else "cannot act on"
            raise ValueError(f"table {needed} data.name={name}: data.table=FILE.csv or FILE.parquet goes with table")
        if self.exclude and name not in ("folder", "table"):
            raise ValueError(f"exclude cannot act on data.name={name}; it goes with folder and table")
        if self.pattern is not None:
            if name != "folder":
                raise ValueError(f"pattern cannot act on data.name={name}; it goes with folder")
            from dml_core.data.user_sets import pattern_regex

            pattern_regex(self.pattern)
        if self.root and "://" in self.root and name not in ("folder", "table"):
            raise ValueError(f"root={self.root}: {name} is read from a folder; URLs go with folder and table")
        if self.download:
            from dml_core.data.benchmarks import BENCHMARKS

            fetchable = [key for key, benchmark in BENCHMARKS.items() if benchmark.fetch]
            if name not in fetchable:
                raise ValueError(f"download cannot act on data.name={name}; it fetches {', '.join(fetchable)}")
        if self.links and name not in ("folder", "table"):
            raise ValueError(f"links cannot act on data.name={name}")
        if (self.test_fraction and name not in ("folder", "table")) or (self.test_classes and name != "folder"):
            raise ValueError(f"test_fraction and test_classes cannot act on data.name={name}, whose split is fixed")
        if self.test_fraction and self.test_classes:
            raise ValueError("test_fraction and test_classes exclude each other")
        if self.folds and self.fold is None:
            raise ValueError(f"folds={self.folds} cannot act without data.fold=NUMBER, the one to validate on")
        if self.validation_fraction is not None and self.fold is not None:
            raise ValueError(f"validation_fraction cannot act with data.fold={self.fold}, which is validated on")
        if self.fold_of and self.fold_of[0] >= self.fold_of[1]:
            raise ValueError(f"fold={self.fold}: the {self.fold_of[1]} folds are numbered from 0")
        if name == "glyphs" and self.on_bad_image == "skip":
            raise ValueError("on_bad_image=skip cannot act on data.name=glyphs, whose pictures are embedded")
        if name == "glyphs" and self.loader == "ray":
            raise ValueError("loader=ray cannot act on data.name=glyphs, of which nothing is decoded")
        if self.decode == "gpu" and name == "glyphs":
            raise ValueError("decode=gpu cannot act on data.name=glyphs, of which nothing is decoded; allowed: cpu")
        if self.decode == "gpu" and self.loader == "ray":
            raise ValueError("decode=gpu cannot act with data.loader=ray, whose tasks decode; allowed: cpu")
        if self.loader_processes is not None and self.loader == "ray":
            raise ValueError("loader_processes cannot act with data.loader=ray, whose tasks decode; it is for torch")
        return self


class Batch(Section):
    """The global batch of P x K images, whatever the number of workers."""

    classes: Annotated[int, Field(ge=2)] = 32
    """P, the classes in a global batch."""
    images: Positive = 4
    """K, the images of each class in a global batch."""
    slices: Positive | None = None
    """S, the number of equal parts (slices) that the gradients of a global batch are computed in and summed over, in an
    order that does not depend on `workers`: any number of workers up to it gives the same bits. The bits depend on it,
    so that it belongs to a run. none: 4, or the larger of 2 and 1 that divides the batch; with more workers, the next
    power of two."""

    @property
    def size(self) -> int:
        """Images in a global batch, P x K."""
        return self.classes * self.images


class Backbone(Section):
    """The network from images to features."""

    name: str = "resnet50"
    """The network: `small` (for pictures of about 32 pixels), `efficientnet_lite0`, a name of torchvision, or
    timm:NAME."""
    weights: str = "imagenet"
    """Initial weights: `imagenet`, `none` (group norm then takes the place of batch norm), a file with a state dict, or
    an earlier run, as `start_from` takes it, of which the backbone alone is taken. With `start_from` they are those of
    the earlier run."""
    frozen: bool = False
    """Whether to leave the backbone as it is: features are computed once and kept on disk, and the head is trained on
    them."""
    compile: bool = False
    """Whether torch.compile compiles the network before the first step: it takes a minute or more, and a C++ compiler,
    and makes the steps of large networks faster, most of all on GPUs. Results differ from others by rounding."""


# Losses that a config may name without a look into the library, which takes seconds to import. A test holds that there
# are such losses; any other name, and all arguments, are for the library to judge.
KNOWN_LOSSES = {
    *("triplet", "contrastive", "multi_similarity", "margin", "proxy_anchor", "proxy_nca"),
    *("AngularLoss", "ArcFaceLoss", "CircleLoss", "ContrastiveLoss", "CosFaceLoss", "FastAPLoss", "HistogramLoss"),
    *("GeneralizedLiftedStructureLoss", "IntraPairVarianceLoss", "LargeMarginSoftmaxLoss", "LiftedStructureLoss"),
    *("MarginLoss", "MultiSimilarityLoss", "NCALoss", "NPairsLoss", "NTXentLoss", "NormalizedSoftmaxLoss"),
    *("P2SGradLoss", "PNPLoss", "ProxyAnchorLoss", "ProxyNCALoss", "RankedListLoss", "SoftTripleLoss"),
    *("SignalToNoiseRatioContrastiveLoss", "SphereFaceLoss", "SubCenterArcFaceLoss", "SupConLoss"),
    *("ThresholdConsistentMarginLoss", "TripletMarginLoss", "TupletMarginLoss"),
}


class Loss(BaseModel):
    """A loss of pytorch-metric-learning and its arguments: loss.name=proxy_anchor loss.margin=0.1"""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)
    name: str = "proxy_anchor"
    """The loss: triplet, contrastive, multi_similarity, margin, proxy_anchor, proxy_nca, or the name of a class of
    pytorch-metric-learning."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What the loss is built with: argument -> value, of any type that a loss takes."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, values: Any) -> Any:
        """Keep a null, which would be left out of a stored config, as the word that takes a default part away."""
        if not isinstance(values, dict):
            return values
        return {key: "none" if value is None and key != "name" else value for key, value in values.items()}

    @model_validator(mode="after")
    def _arguments_exist(self) -> "Loss":
        if self.name in KNOWN_LOSSES and not self.arguments:
            return self
        from dml_core import base_losses

        base_losses.check(self.name, self.arguments)
        return self


class Optimizer(Section):
    """How the gradient changes the parameters, and the learning rate over the epochs."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """The optimizer, by its name in PyTorch."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate of the backbone. Head and loss have multiples of it."""
    head_multiplier: Annotated[float, Field(gt=0)] = 10.0
    """Factor of the learning rate for the heads and a method's own layers."""
    loss_multiplier: Annotated[float, Field(gt=0)] = 100.0
    """Factor of the learning rate for the base loss's own parameters, such as proxies."""
    weight_decay: Annotated[float, Field(ge=0)] = 4e-4
    """Decay of weight matrices. Norms, biases and the base loss's parameters are not decayed."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Momentum, for sgd only (default 0.9)."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """How the learning rate changes: `cosine` falls to zero at the end of the last epoch; `step` multiplies it by
    `gamma` at each of `milestones`."""
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Epochs in which the learning rate rises linearly at the start."""
    milestones: list[Positive] | None = None
    """For schedule=step: the epochs after which the learning rate falls."""
    gamma: Annotated[float, Field(gt=0, lt=1)] | None = None
    """For schedule=step: the factor of the learning rate at each of them."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of a step's gradient; larger ones are scaled down to it."""

    @model_validator(mode="after")
    def _options_act(self) -> "Optimizer":
        if self.momentum is not None and self.name != "sgd":
            raise ValueError(f"momentum cannot act with optimizer.name={self.name}; it belongs to sgd")
        if self.schedule != "step" and (self.milestones or self.gamma):
            raise ValueError(f"milestones and gamma cannot act with optimizer.schedule={self.schedule}")
        if self.schedule == "step" and not (self.milestones and self.gamma):
            raise ValueError("schedule=step needs milestones=[..] (epochs) and gamma")
        return self
