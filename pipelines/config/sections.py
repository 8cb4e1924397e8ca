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

Positive = Annotated[int, Field(ge=1)]

Fraction = Annotated[float, Field(ge=0, lt=1)]


def nearest(word: str, words: list[str]) -> str:
    """Return the end of an error message: the word that was probably meant, or all that are allowed."""
    matches = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {matches[0]}?" if matches else f"; allowed: {', '.join(words)}"


class Section(BaseModel):
    """A part of a config: it cannot be changed, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


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
    """Its folder, or a URL (s3://, gs://, abfs://, https://) for `folder` and `table`; `glyphs` needs none. `table`: by
    default the table's own folder."""
    table: Address | None = None
    """`table`: a CSV or Parquet file, local or a URL, with the columns path, label, and perhaps split and role."""
    download: bool = False
    """Fetch a benchmark into `root` where that is possible without an account."""
    links: bool = False
    """Follow symbolic links that lead out of `root`."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Pictures that cannot be read: fail when one is met, or look at all of them first and leave those out. `glyphs`
    has none."""
    image_size: Annotated[int, Field(ge=8, le=1024)] = 224
    """Side of the square pictures that the backbone sees, in pixels."""
    augment: Literal["crop", "shift", "none"] | None = None
    """Training views: random crop and flip (`crop`, for photographs; the default), small shifts and turns (`shift`, for
    characters), or `none`. Cannot act with `backbone.frozen`, whose features are computed once."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """`folder`, and a `table` without splits: share of the classes to test on (default 0.5)."""
    test_classes: list[str] | None = None
    """`folder`: the classes to test on, by name, in place of a share."""
    validation_fraction: Fraction | None = None
    """Share of the other classes to validate on (default 0.2); 0: none, and the last epoch is the best."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Equal parts of the classes that `fold` chooses from (default 4)."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Validate on this one, from 0, of `folds` equal parts of the other classes, in place of a share."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Draws the classes to validate (and, by share, to test) on. It is not `seed`, so that seeds share a split."""
    limit_classes: Annotated[int, Field(ge=3)] | None = None
    """At most so many classes to test on, and so many to train and validate on: for quick runs."""
    loader: Literal["auto", "torch", "ray"] = "auto"
    """Who decodes: `torch`, the DataLoader of each training worker; `ray`, tasks on any node's CPUs. auto: ray where
    nodes without training workers have CPUs, unless `loader_processes` is set."""
    loader_processes: Annotated[int, Field(ge=0)] | None = None
    """Decoding processes of each training worker's DataLoader; none: as many as it has CPUs to spare."""

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
        if self.loader_processes is not None and self.loader == "ray":
            raise ValueError("loader_processes cannot act with data.loader=ray, whose tasks decode; it is for torch")
        return self


class Batch(Section):
    """The global batch of P x K images, whatever the number of workers."""

    classes: Annotated[int, Field(ge=2)] = 32
    """P: classes in a global batch."""
    images: Positive = 4
    """K: images of each class in a global batch."""
    slices: Positive | None = None
    """Equal parts that gradients are computed in. Worker counts that divide it give the same bits, if both are powers
    of two. none: 4, or as many of 2 and 1 as divide the batch."""


class Backbone(Section):
    """The network from images to features."""

    name: str = "resnet50"
    """`small` (for pictures of about 32 pixels), `efficientnet_lite0`, a torchvision name, or timm:NAME."""
    weights: str = "imagenet"
    """`imagenet`, `none` (group norm takes the place of batch norm), or a file with a state dict."""
    frozen: bool = False
    """Compute features once, keep them on disk, and train the head on them."""


class Loss(BaseModel):
    """A loss of pytorch-metric-learning and its arguments: loss.name=proxy_anchor loss.margin=0.1"""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)
    name: str = "proxy_anchor"
    """triplet, contrastive, multi_similarity, margin, proxy_anchor, proxy_nca, or any of the library's class names."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What the loss is built with: argument -> value, of any type that a loss takes."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _arguments_exist(self) -> "Loss":
        from dml_core import base_losses

        allowed = base_losses.default_arguments(self.name)
        for key in self.arguments:
            if key not in allowed:
                raise ValueError(f"{key} is no argument of {self.name}{nearest(key, list(allowed))}")
            number = isinstance(allowed[key], int | float) and not isinstance(allowed[key], bool)
            if number and not isinstance(self.arguments[key], int | float):
                raise ValueError(f"{key}={self.arguments[key]} is not a number")
        base_losses.build(self.name, 2, 2, **self.arguments)
        return self


class Optimizer(Section):
    """How the gradient changes the parameters, and the learning rate over the epochs."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """PyTorch's optimizer of that name."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate of the backbone; head and loss have multiples of it."""
    head_multiplier: Annotated[float, Field(gt=0)] = 10.0
    """Of the heads and of a method's own layers."""
    loss_multiplier: Annotated[float, Field(gt=0)] = 100.0
    """Of the base loss's own parameters, such as proxies."""
    weight_decay: Annotated[float, Field(ge=0)] = 4e-4
    """Of weight matrices; norms, biases and the base loss's parameters are not decayed."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """sgd only (default 0.9)."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """cosine: to zero at the end of the last epoch; step: times `gamma` at each of `milestones`."""
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear rise at the start."""
    milestones: list[Positive] | None = None
    """schedule=step: epochs after which the learning rate falls."""
    gamma: Annotated[float, Field(gt=0, lt=1)] | None = None
    """schedule=step: what it is multiplied by at each of them."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient of a step."""

    @model_validator(mode="after")
    def _options_act(self) -> "Optimizer":
        if self.momentum is not None and self.name != "sgd":
            raise ValueError(f"momentum cannot act with optimizer.name={self.name}; it belongs to sgd")
        if self.schedule != "step" and (self.milestones or self.gamma):
            raise ValueError(f"milestones and gamma cannot act with optimizer.schedule={self.schedule}")
        if self.schedule == "step" and not (self.milestones and self.gamma):
            raise ValueError("schedule=step needs milestones=[..] (epochs) and gamma")
        return self
