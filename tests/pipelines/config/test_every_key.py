"""Every key of a config acts: changing it changes something that can be observed, or it is refused.

The keys are read from the models, so that a new one fails `test_every_key_has_a_case` until it has a case here. Most
are observed in a training of some steps in this process, without Ray; the others where they act.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import save_file

from dml_core.backbones import small_network
from dml_core.data import benchmarks
from pipelines.cluster import devices, launch, session
from pipelines.cluster.progress import Reporter
from pipelines.cluster.worker import Worker
from pipelines.config.methods import METHODS
from pipelines.config.recipe import load_recipe, parse_config, to_yaml
from pipelines.config.schema import Config
from pipelines.console import QUIET
from pipelines.data.check import unreadable_pictures
from pipelines.data.sets import identify, load_collection, load_splits
from pipelines.data.sources import Sources
from pipelines.models.run_folder import RunFolder, locate
from pipelines.models.start import keep_start, open_start
from pipelines.runs import record
from pipelines.tracking.process import SameProcess
from pipelines.training.job import TrainingJob
from pipelines.training.loop import train_loop
from pipelines.training.setup import build_begun

CLASSES, EACH = 12, 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set in class folders with tables of it, another in which a picture is broken, and weights of a network."""
    place, rng = tmp_path_factory.mktemp("keys"), np.random.default_rng(0)
    for name in range(CLASSES):
        for root in ("set", "broken", "linked"):
            (place / root / f"c{name:02d}").mkdir(parents=True)
            for number in range(EACH):
                noise = 128 + 12 * name + rng.integers(0, 90, (40, 36, 3))
                Image.fromarray(noise.astype(np.uint8)).save(place / root / f"c{name:02d}" / f"{number}.png")
    (place / "broken" / "c03" / "1.png").write_bytes(b"no picture")
    (place / "elsewhere").mkdir()
    (place / "linked" / "c02" / "link").symlink_to(place / "elsewhere")
    Image.new("RGB", (40, 40)).save(place / "elsewhere" / "linked.png")
    rows = [(f"c{name:02d}/{number}.png", f"c{name:02d}") for name in range(CLASSES) for number in range(EACH)]
    for table, chosen in (("all", rows), ("few", rows[: EACH * 8])):
        (place / "set" / f"{table}.csv").write_text("path,label\n" + "".join(f"{p},{c}\n" for p, c in chosen))
    parts = ["train"] * 6 + ["validation"] * 3 + ["test"] * 3
    said = "".join(f"{p},{c},{parts[int(c[1:])]}\n" for p, c in rows)
    (place / "set" / "split.csv").write_text(f"path,label,split\n{said}")
    torch.manual_seed(5)
    save_file(small_network().state_dict(), place / "weights.safetensors")
    earlier = config_of(place, ["name=earlier", "seed=7", "epochs=1", "steps_per_epoch=1"])
    (place / "runs" / "earlier").mkdir(parents=True)
    (place / "runs" / "earlier" / "run.json").write_text("{}")
    threads = torch.get_num_threads()
    train_loop(TrainingJob(earlier, worker=Worker(report=dict)))
    torch.set_num_threads(threads)
    return place


BASE = ["data.name=folder", "data.root={place}/set", "data.image_size=32", "workers=1", "storage={place}/runs"]
BASE += ["epochs=3", "steps_per_epoch=3", "batch.classes=4", "batch.images=2", "embedding_dim=16", "method=[]"]
BASE += ["optimizer.warmup=0", "name=base", "data.loader=torch", "use_gpu=false", "precision=float32"]


def config_of(place: Path, assignments: list[str]) -> Config:
    return load_recipe("glyphs", [assignment.format(place=place) for assignment in [*BASE, *assignments]])


# What is observed: functions of a config, each with a fresh folder and a way to replace names for the time of a test.
Observer = Callable[[Config, Path, pytest.MonkeyPatch], object]


def training(config: Config, folder: Path, patch: pytest.MonkeyPatch) -> object:
    """Metrics of a whole training, those reported on the way, and the checkpoints that are left."""
    patch.setenv("DML_CACHE", str(folder / "cache"))
    config, reports = config.model_copy(update={"storage": str(folder), "name": "run"}), list[dict[str, Any]]()
    threads = torch.get_num_threads()
    try:
        metrics, *_ = train_loop(TrainingJob(config, worker=Worker(report=lambda report: reports.append(dict(report)))))
    finally:
        torch.set_num_threads(threads)
    timed = ("train/images_per_second", "train/data_wait", "train/startup_seconds")
    for numbers in (metrics, *reports):
        for name in timed:
            numbers.pop(name, None)
    return metrics, reports, sorted(path.name for path in (folder / "run").iterdir())


def resolved(config: Config, folder: Path, patch: pytest.MonkeyPatch) -> object:
    """Devices and precision on a cluster of a machine with GPUs and of one without."""
    nodes = [{"Alive": True, "Resources": {"CPU": 4, "GPU": 2}}, {"Alive": True, "Resources": {"CPU": 8}}]
    patch.setattr(ray, "cluster_resources", lambda: {"CPU": 12, "GPU": 2})
    patch.setattr(ray, "nodes", lambda: nodes)
    config = devices.resolve_devices(config)
    return config.use_gpu, config.precision, config.data.loader


def launched(config: Config, folder: Path, patch: pytest.MonkeyPatch) -> object:
    """What Ray Train is told of workers, network, failures and the folder."""

    class Trainer:
        def __init__(self, loop: object, **settings: Any):
            self.settings = settings

        def fit(self) -> object:
            scaling, network = self.settings["scaling_config"], self.settings["backend_config"]
            run = self.settings["run_config"]
            facts = scaling.num_workers, scaling.use_gpu, network.timeout_s, run.failure_config.max_failures
            return SimpleNamespace(return_value=(*facts, run.name, run.storage_path))

    board = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: None))
    patch.setattr(launch.ray, "remote", lambda **_: lambda _: board)
    patch.setattr(launch, "DataParallelTrainer", Trainer)
    patch.setattr(launch, "Follower", lambda *_: contextlib.nullcontext())
    patch.setattr(launch, "call_interruptibly", lambda function: function())
    patch.setattr(launch.ray, "nodes", lambda: [1, 2])
    patch.setattr(launch.ray, "cluster_resources", lambda: {"CPU": 8})
    patch.setattr(launch.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    return launch.run_on_workers(TrainingJob(config), config.storage, str(config.name), QUIET)


def waited(config: Config, folder: Path, patch: pytest.MonkeyPatch) -> object:
    """What an autoscaler is asked for while a cluster is too small, and for how many seconds."""
    requests, clock = list[object](), SimpleNamespace(now=0.0)
    patch.setattr(session.ray, "cluster_resources", dict)
    patch.setattr(session, "request_resources", lambda bundles: requests.append(bundles))
    patch.setattr(session.time, "monotonic", lambda: clock.now)
    patch.setattr(session.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    session._wait_for_nodes(config)
    return requests, clock.now


def kept_in(config: Config, folder: Path, patch: pytest.MonkeyPatch) -> object:
    """Where the run's files are."""
    return locate(config)[1]


def registered(config: Config, folder: Path, patch: pytest.MonkeyPatch) -> object:
    """The name of the registered model."""
    patch.setattr(record, "log_model", lambda *given: given[3])
    checkpoint, splits = "epoch_00001", load_splits(config)
    return record.register_model(SameProcess(), "uri", "id", config, RunFolder(config), checkpoint, splits)


def recorded(config: Config, folder: Path, patch: pytest.MonkeyPatch) -> object:
    """The experiment that MLflow is given."""
    config = record.with_experiment(config, None)
    patch.setattr(record, "start_run", lambda *given: given[1])
    return record.record_training(SameProcess(), "uri", config, identify(config.data), (), None, None, "")


def collection(config: Config, folder: Path, patch: pytest.MonkeyPatch) -> object:
    """The pictures of the set, or why it is refused."""
    fetched = list[str]()
    patch.setitem(benchmarks.BENCHMARKS, "cub", benchmarks.BENCHMARKS["cub"]._replace(fetch=fetched.append))
    try:
        images = load_collection(config.data).images
    except ValueError as error:
        return fetched, str(error)
    return images.names.tolist(), images.files.root if images.files else None


def left_out(config: Config, folder: Path, patch: pytest.MonkeyPatch) -> object:
    patch.setenv("DML_CACHE", str(folder))
    return unreadable_pictures(config.data, identify(config.data), QUIET)


def begun_with(config: Config, folder: Path, patch: pytest.MonkeyPatch) -> object:
    """The head that the training begins with; what it begins with is in the run's folder, as the driver keeps it."""
    config = config.model_copy(update={"storage": str(folder), "name": "run"})
    config, start = open_start(config, RunFolder(config), None)
    if start:
        keep_start(RunFolder(config), start)
    learner = build_begun(config, load_splits(config).train.class_names, torch.device("cpu"))
    return [tensor.tolist() for tensor in learner.head.state_dict().values()]


def decoded_by(config: Config, folder: Path, patch: pytest.MonkeyPatch) -> object:
    """What gives batches, and in how many processes."""
    patch.setattr("pipelines.data.streaming.ray.put", lambda views: views)
    learner: Any = None
    sources = Sources(config, learner, torch.device("cpu"), 3, Reporter(None), identify(config.data))
    return type(sources.of(load_collection(config.data).images)).__name__, sources.processes


class Case(NamedTuple):
    """Changing a key to `value`, with `also` beside it, in a config with `settings` changes what `observe` returns."""

    observe: Observer
    value: str
    settings: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


def acts(observe: Observer, value: str, *settings: str, also: tuple[str, ...] = ()) -> Case:
    return Case(observe, value, settings, also)


def trains(value: str, *settings: str, also: tuple[str, ...] = ()) -> Case:
    return Case(training, value, settings, also)


IAA = ("method=[iaa]", "iaa.start=0", "iaa.update_every=1")
SGAR = ("method=[sgar]", "sgar.intensity=0.3")
NAMR = ("method=[namr]",)
STEP = ("optimizer.schedule=step", "optimizer.milestones=[1]", "optimizer.gamma=0.5")
SGD = ("optimizer.name=sgd", "optimizer.lr=0.1")

CASES = {
    "workers": acts(launched, "1:2"),
    "use_gpu": acts(resolved, "true"),
    "gpus_per_worker": acts(waited, "0.5", "use_gpu=true", "wait_for_nodes=30"),
    "precision": trains("bf16"),
    "seed": trains("1"),
    "epochs": trains("2"),
    "steps_per_epoch": trains("2"),
    "evaluate_every": trains("2"),
    "checkpoint_every": trains("2", "evaluate_every=3"),
    "name": acts(launched, "other"),
    "storage": acts(kept_in, "{place}/others"),
    "experiment": acts(recorded, "mine"),
    "start_from": acts(begun_with, "{place}/runs/earlier"),
    "model_name": acts(registered, "mine"),
    "max_failures": acts(launched, "7"),
    "timeout": acts(launched, "60"),
    "wait_for_nodes": acts(waited, "30"),
    "embedding_dim": trains("8"),
    "method": trains("[sgar]"),
    "metrics": trains("[map,mrr,cmc,precision_at_3,map_at_5,nmi,ami]"),
    "changes": trains("{{1: {{loss.alpha: 9}}}}"),
    "data.name": acts(collection, "table", also=("data.table={place}/set/few.csv",)),
    "data.root": acts(collection, "{place}/linked", "data.links=true"),
    "data.table": acts(collection, "{place}/set/few.csv", "data.name=table", "data.table={place}/set/all.csv"),
    "data.download": acts(collection, "true", "data.name=cub"),
    "data.links": acts(collection, "true", "data.root={place}/linked"),
    "data.exclude": acts(collection, "[c03,*/4.png]"),
    "data.pattern": acts(collection, "(?P<label>c0[0-7])"),
    "data.on_bad_image": acts(left_out, "skip", "data.root={place}/broken"),
    "data.image_size": trains("24"),
    "data.augment": trains("none"),
    "data.test_fraction": trains("0.4"),
    "data.test_classes": trains("[c00,c01,c02,c03]"),
    "data.validation_fraction": trains("0"),
    "data.folds": trains("2", "data.fold=0", "batch.classes=3"),
    "data.fold": trains("1", "data.fold=0", "batch.classes=3"),
    "data.split_seed": trains("1"),
    "data.limit_classes": trains("5", "batch.classes=3"),
    "data.loader": acts(decoded_by, "ray"),
    "data.loader_processes": acts(decoded_by, "1"),
    "data.decode": acts(decoded_by, "gpu"),
    "batch.classes": trains("3"),
    "batch.images": trains("3"),
    "batch.slices": trains("1"),
    "gradients": trains("ddp"),
    "backbone.name": trains("resnet18"),
    "backbone.weights": trains("{place}/weights.safetensors"),
    "backbone.frozen": trains("true"),
    "backbone.compile": trains("true"),
    "loss.name": trains("triplet"),
    "loss.ARGUMENT": trains("9"),
    "iaa.intensity": trains("0.2", *IAA),
    "iaa.draws": trains("1", *IAA),
    "iaa.start": trains("0.5", *IAA),
    "iaa.update_every": trains("2", *IAA),
    "iaa.momentum": trains("0.9", *IAA),
    "iaa.covariance": trains("full", *IAA),
    "iaa.neighbors": trains("1", *IAA),
    "iaa.beta": trains("3", *IAA),
    "iaa.gamma": trains("0.9", *IAA),
    "iaa.tau": trains("0", *IAA),
    "sgar.intensity": trains("0.2", *SGAR),
    "sgar.count": trains("3", *SGAR),
    "sgar.margin": trains("0.3", *SGAR),
    "sgar.max_gap": trains("0.01", *SGAR),
    "sgar.scale": trains("3", *SGAR),
    "sgar.gate": trains("0.999", *SGAR),
    "sgar.anchor_scale": trains("3", *SGAR),
    "sgar.anchor_margin": trains("0.9", *SGAR),
    "sgar.directions": trains("shared", *SGAR),
    "sgar.weight": trains("3", *SGAR),
    "sgar.ratio_rank": trains("0.1", *SGAR),
    "sgar.ratio_anchor": trains("0.1", *SGAR),
    "namr.centers": trains("2", *NAMR),
    "namr.spacing": trains("quantile", *NAMR),
    "namr.t": trains("1", *NAMR),
    "namr.alpha": trains("1", *NAMR),
    "namr.weight": trains("0.1", *NAMR),
    "namr.rerank": trains("3", *NAMR),
    "optimizer.name": trains("adam"),
    "optimizer.lr": trains("1e-4"),
    "optimizer.head_multiplier": trains("9"),
    "optimizer.loss_multiplier": trains("9", "loss.name=proxy_anchor"),
    "optimizer.weight_decay": trains("0.5"),
    "optimizer.momentum": trains("0.1", *SGD),
    "optimizer.schedule": trains("constant"),
    "optimizer.warmup": trains("2"),
    "optimizer.milestones": trains("[2]", *STEP),
    "optimizer.gamma": trains("0.1", *STEP),
    "optimizer.clip_norm": trains("0.01"),
}

# Settings in which a key cannot act, and is refused.
REFUSALS = {
    "checkpoint_every": [("3",), ("9",), ("10",)],
    "changes": [
        ("{{3: {{loss.alpha: 9}}}}",),
        ("{{1: {{namr.rerank: 9}}}}", *NAMR),
        ("{{1: {{loss.centers_per_class: 4}}}}", "loss.name=SoftTripleLoss"),
        ("{{1: {{loss.beta: 1.1}}}}", "loss.name=margin"),
        ("{{1: {{iaa.covariance: full}}}}", *IAA),
    ],
    "iaa": [("{{draws: 2}}",)],
    "sgar": [("{{count: 3}}",)],
    "namr": [("{{t: 2}}",)],
    "data.root": [("{place}/set", "data.name=glyphs")],
    "data.table": [("{place}/set/all.csv",)],
    "data.download": [("true",), ("true", "data.name=vehicleid")],
    "data.links": [("true", "data.name=cub")],
    "data.exclude": [("[c03]", "data.name=cub")],
    "data.pattern": [("(?P<label>c0)", "data.name=table", "data.table={place}/set/all.csv")],
    "data.on_bad_image": [("skip", "data.name=glyphs", "data.root=")],
    "data.augment": [("none", "backbone.frozen=true"), ("crop", "backbone.frozen=true")],
    "data.test_fraction": [
        ("0.5", "data.name=cub"),
        ("0.5", "data.name=table", "data.table={place}/set/split.csv", "batch.classes=2"),
    ],
    "data.test_classes": [("[c01]", "data.name=table", "data.table={place}/set/all.csv")],
    "data.validation_fraction": [
        ("0.2", "data.fold=0"),
        ("0.2", "data.name=table", "data.table={place}/set/split.csv", "batch.classes=2"),
    ],
    "data.folds": [("4",)],
    "data.fold": [("0", "data.name=table", "data.table={place}/set/split.csv", "batch.classes=2")],
    "data.loader": [("ray", "data.name=glyphs", "data.root=")],
    "data.loader_processes": [("2", "data.loader=ray")],
    "data.decode": [("gpu", "data.loader=ray"), ("gpu", "data.name=glyphs", "data.root=")],
    "optimizer.momentum": [("0.5",)],
    "optimizer.milestones": [("[1]",)],
    "optimizer.gamma": [("0.5",)],
}


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of a model; a section is no key, what is in it is."""
    for name, field in model.model_fields.items():
        options = get_args(field.annotation) or (field.annotation,)
        sections = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if sections:
            yield from keys_of(sections[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_key_has_a_case() -> None:
    assert {*CASES} - {"loss.ARGUMENT"} == {*keys_of(Config)}
    assert {*REFUSALS} - {*METHODS} <= {*CASES}


OBSERVED: dict[tuple[Observer, str], object] = {}  # configs that several keys start from are observed once


def observed(case: Case, config: Config, tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> object:
    key = (case.observe, to_yaml(config))
    if key not in OBSERVED:
        OBSERVED[key] = case.observe(config, tmp_path_factory.mktemp("observed"), patch)
    return OBSERVED[key]


@pytest.mark.parametrize("key", CASES)
def test_changing_a_key_changes_something(
    key: str, place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, name = CASES[key], {"loss.ARGUMENT": "loss.alpha"}.get(key, key)
    before = config_of(place, [*case.settings])
    after = config_of(place, [*case.settings, f"{name}={case.value}", *case.also])
    assert parse_config(after.to_dict()) == after
    assert observed(case, before, tmp_path_factory, monkeypatch) != observed(case, after, tmp_path_factory, monkeypatch)


def test_a_training_is_observed_the_same_twice(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(place, [])
    first, second = (training(config, tmp_path_factory.mktemp("twice"), monkeypatch) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("key", "settings"), [(key, case) for key, cases in REFUSALS.items() for case in cases])
def test_what_cannot_act_is_refused(key: str, settings: tuple[str, ...], place: Path) -> None:
    value, *others = settings
    with pytest.raises(ValueError, match=r"cannot (act|become)") as refusal:
        load_splits(config_of(place, [*others, f"{key}={value}"]))
    message = str(refusal.value)
    assert key.rpartition(".")[2] in message and "\n" not in message
