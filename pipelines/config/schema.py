"""Every key of a run: frozen models with real defaults, which recipe.py reads from files and the command line.

The same dictionary goes to the workers, the checkpoint and MLflow. Unknown keys are refused, and so is an option that
cannot act: settings of a method that is not in `method`, a momentum for Adam, a data folder for the embedded set. A key
whose default acts in some configs alone is None until it is set, so that what is written down can be read again.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipelines.config.methods import Methods
from pipelines.config.sections import (
    Address,
    Backbone,
    Batch,
    Data,
    ExperimentName,
    Loss,
    ModelName,
    Optimizer,
    Positive,
    RunName,
    nearest,
)

AUTO = "auto"  # workers: as many as there are GPUs, or as CPUs, memory and slices make a training faster


class Config(Methods):
    """All settings of a run: these keys, and the sections."""

    workers: Positive | Annotated[str, Field(pattern=r"^(auto|[1-9]\d*:[1-9]\d*)$")] = AUTO
    """Number of workers: auto, N, or MIN:MAX to go on with fewer when some are lost and to grow again. `auto`: one on
    each GPU; without GPUs as many as the slices of a batch, CPUs and memory allow, and one where all CPUs work for it
    anyway, as with a frozen backbone or a trained model. It is not a hyperparameter: results do not depend on it."""
    use_gpu: bool | None = None
    """Whether each worker has a GPU. none: if the cluster has enough of them."""
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1
    """Share of a GPU that Ray sets aside for a worker: with 0.25, four trials of a sweep share each GPU. It limits no
    memory: so many trainings must fit beside each other. A share is for runs of one worker."""
    precision: Literal["float32", "bf16", "float64"] | None = None
    """Number format of the training; `bf16` is autocast. none: bf16 on GPUs, float32 on CPUs."""
    gradients: Literal["exact", "ddp"] = "exact"
    """How workers add up their gradients. `exact`: in slices along a tree, to the same bits for any number of workers.
    `ddp`: by PyTorch's DistributedDataParallel, during the backward pass and each worker's rows at once; results of
    different numbers of workers then differ by rounding at first, and as much as seeds do in the end."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, batches, augmentations and synthetics. The split of classes has a seed of its own,
    `data.split_seed`."""
    epochs: Positive = 20
    """Passes over the training set, of `steps_per_epoch` steps each."""
    steps_per_epoch: Positive | None = None
    """Steps of the optimizer in an epoch. none: as many as show each training image once."""
    evaluate_every: Positive = 1
    """Epochs between validations. A checkpoint is stored at each."""
    checkpoint_every: Positive | None = None
    """Steps between further checkpoints within an epoch, for long epochs on nodes that may be lost. Whatever this says,
    a checkpoint is stored at once when a worker's node is about to be taken away."""
    name: RunName | None = None
    """Name of the run and its folder. The same name again continues the run. none: made from set, method, loss, seed
    and time."""
    storage: Address = "runs"
    """Folder, or address in a bucket, that the folders of runs are in. All nodes of a cluster must see it."""
    experiment: ExperimentName | None = None
    """Name of the experiment in MLflow that records the run. A run that goes on stays in its own. none: that of the
    variable MLFLOW_EXPERIMENT_NAME, or else the name of the set."""
    start_from: Address | None = None
    """An earlier run whose model this one begins with: its run id, a checkpoint folder or its URL, the run's folder, or
    models:/NAME@ALIAS. Backbone, head and the methods' layers are taken, and of the loss and the class statistics what
    belongs to classes of the same name. Optimizer, schedule and epochs begin anew."""
    model_name: ModelName | None = None
    """Name of the registered model in MLflow that this run's model becomes a version of. none: dml-SET."""
    max_failures: Annotated[int, Field(ge=0)] | None = None
    """How often the workers are started again from the last checkpoint when one is lost. Nodes that were taken away
    with a notice do not count. none: 3 on a cluster of several nodes, 0 on one machine."""
    timeout: Positive = 600
    """Seconds that workers wait for a silent worker before they take it for lost."""
    wait_for_nodes: Annotated[int, Field(ge=0)] = 0
    """Seconds to wait for machines that the cluster does not have yet; its autoscaler is asked for them. After that
    time (at once with 0), a cluster that is too small for `workers`, or has no GPU for `use_gpu=true`, is refused."""
    embedding_dim: Positive = 512
    """D, the numbers in an embedding."""
    metrics: list[str] | None = None
    """Further retrieval metrics of validation and test, beside R@k, R-Precision and MAP@R: `map` and `mrr` (over the
    full ranking), `cmc`, `precision_at_K`, `map_at_K` and `recall_at_K` for any number K, `nmi`, `ami`; docs/metrics.md
    describes them. none: those that the papers report on the set, which are `map` and `cmc` on `inshop` and
    `vehicleid`."""
    data: Data = Data()
    batch: Batch = Batch()
    backbone: Backbone = Backbone()
    loss: Loss = Field(default_factory=Loss)
    optimizer: Optimizer = Optimizer()
    changes: dict[Annotated[int, Field(ge=1)], dict[str, Any]] = {}
    """Settings of the loss and the methods that change during the training: those under N hold from the end of epoch N
    on. For instance `changes.10.sgar.intensity=0.2`. `dml tune --schedule pbt` searches for such changes."""

    @field_validator("metrics")
    @classmethod
    def _metrics_exist(cls, metrics: list[str] | None) -> list[str] | None:
        from dml_core.retrieval.scores import is_metric, metric_names, metric_order

        for name in metrics or []:
            if not is_metric(name):
                raise ValueError(f"{name}: there is no such metric{nearest(name, metric_names())}")
        return metrics if metrics is None else sorted({*metrics}, key=metric_order)

    @field_validator("changes", mode="before")
    @classmethod
    def _in_order(cls, changes: Any) -> Any:
        try:
            return {after: flatten(changes[after]) for after in sorted(changes, key=int)}
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"{changes} is not {{EPOCH: {{KEY: VALUE}}}}") from None

    @model_validator(mode="after")
    def _options_act(self) -> "Config":
        if self.backbone.frozen and self.data.augment:
            raise ValueError(
                f"data.augment={self.data.augment} cannot act with backbone.frozen=true: features are computed once"
            )
        low, high = self.worker_range
        size = self.batch.size
        if low > high:
            raise ValueError(f"workers={self.workers}: the first number must not be the larger")
        if self.gpus_per_worker < 1 and high > 1:
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker:g} cannot act with workers={self.workers}: NCCL takes no two "
                "workers of a run on one GPU"
            )
        if self.gpus_per_worker < 1 and self.use_gpu is False:
            raise ValueError(f"gpus_per_worker={self.gpus_per_worker:g} cannot act with use_gpu=false")
        if size % self.slices:
            raise ValueError(f"batch.slices={self.slices} does not divide the global batch of {size}")
        every, steps = self.checkpoint_every, self.steps_per_epoch
        if every and steps and (every % steps == 0 or every >= self.epochs * steps):
            raise ValueError(
                f"checkpoint_every={every} cannot act: it falls on no step within an epoch of steps_per_epoch={steps}; "
                f"evaluate_every={self.evaluate_every} keeps those at the ends of epochs"
            )
        for after, values in self.changes.items():
            if not values or after >= self.epochs:
                raise ValueError(f"changes.{after} cannot act: it names no setting, or epochs={self.epochs} are over")
            for key in values:
                if values[key] is None or not self.may_change(key):
                    raise ValueError(f"changes.{after}: {key} cannot become {values[key]} in the middle of a run")
            try:
                loss = self.at(after).loss
            except ValidationError as error:
                first = error.errors()[0]
                where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
                raise ValueError(f"changes.{after}: {where}={first['input']}: {message}") from None
            for key in values:
                if key.startswith("loss.") and not _has_same_parameters(self.loss, loss):
                    raise ValueError(
                        f"changes.{after}: {key} cannot become {values[key]} in the middle of a run: "
                        f"it shapes parameters of {loss.name}"
                    )
        return self

    def may_change(self, key: str) -> bool:
        """Return whether a setting can take another value while a run goes on.

        It can if it belongs to the loss or a method in use, has shaped no parameter and no statistic, and is not of
        evaluation, which is the same for a whole run.
        """
        fixed = {"loss.name", "iaa.covariance", "namr.rerank"}
        fixed |= {"loss.beta"} if self.loss.name == "margin" else set()
        return key.partition(".")[0] in ("loss", *self.method) and key not in fixed

    def at(self, epoch: int) -> "Config":
        """Return the config that holds in an epoch, from 0: with the `changes` up to there."""
        tree = self.model_dump(exclude_none=True, exclude={"changes"})
        for after, values in self.changes.items():
            for key, value in values.items() if after <= epoch else ():
                section, _, name = key.partition(".")
                tree[section][name] = value
        return Config.model_validate(tree)

    @property
    def extra_metrics(self) -> tuple[str, ...]:
        """Retrieval metrics besides the usual ones: `metrics`, or those of the set's papers."""
        from dml_core.data.benchmarks import BENCHMARKS

        if self.metrics is not None:
            return tuple(self.metrics)
        return BENCHMARKS[self.data.name].metrics if self.data.name in BENCHMARKS else ()

    @property
    def slices(self) -> int:
        """Equal parts that the gradients of a global batch are computed in, of which each worker has whole ones.

        By default 4, or the larger of 2 and 1 that divides the batch; for more workers the next power of two, or where
        that does not divide the batch its least divisor that is enough.
        """
        batch, most = self.batch.size, self.worker_range[1]
        if self.batch.slices or most <= math.gcd(4, batch):
            return self.batch.slices or math.gcd(4, batch)
        enough = [number for number in range(most, batch + 1) if batch % number == 0]
        power = 2 ** (most - 1).bit_length()
        return power if power in enough else min(enough, default=batch)

    def require_slices(self) -> None:
        """Raise ValueError where a worker would have no slice. Whoever trains nothing need not ask."""
        if self.worker_range[1] > self.slices:
            raise ValueError(
                f"workers={self.workers}: more workers than slices: gradients are computed in "
                f"batch.slices={self.slices} parts of the global batch of {self.batch.size}"
            )

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers; one at least, until cluster.devices makes `auto` a number."""
        if self.workers == AUTO:
            return 1, 1
        low, _, high = str(self.workers).partition(":")
        return int(low), int(high or low)

    def to_dict(self) -> dict[str, Any]:
        """Return nested keys and values, leaving out what is not set: what checkpoints, run folders and files keep."""
        return self.model_dump(exclude_none=True)

    def flat(self) -> dict[str, Any]:
        """Return dotted key -> value, leaving out what is not set."""
        return flatten(self.model_dump(exclude_none=True))


def _has_same_parameters(loss: Loss, other: Loss) -> bool:
    """Return whether two settings of a loss begin with the same parameters, of the same shapes."""
    import torch

    from dml_core import base_losses

    states = []
    for settings in (loss, other):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            states.append(base_losses.build(settings.name, 3, 2, **settings.arguments).state_dict())
    one, two = states
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of a nested dictionary."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
