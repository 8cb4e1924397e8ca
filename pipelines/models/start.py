"""What a run begins with: the network of an earlier run, found once and kept in the run's own folder.

Workers on any node read it there, and a run that goes on does not depend on what an alias or a folder has become since.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.fs

from pipelines.config.schema import Config
from pipelines.models.checkpoint import copy_model, model_fingerprint, read_class_names, read_config
from pipelines.models.find import RUN_ID, find_checkpoint
from pipelines.models.run_folder import RunFolder, local_copy, locate, read_json
from pipelines.tracking.address import default_uri

if TYPE_CHECKING:  # a start is found and refused without torch
    from torch import Tensor

    from dml_core.learner import Learner

FOLDER = "start"  # in a run's folder: the earlier checkpoint's model files, and
RECORD = "start.json"  # a Start, written last
BUILT_IN = ("imagenet", "none")  # backbone.weights that name neither a file nor a run


class Start(NamedTuple):
    """The checkpoint that a run begins with.

    Attributes:
        name: Of the run that made it.
        run_id: That run's id in MLflow; None where it is not known.
        fingerprint: See checkpoint.model_fingerprint.
    """

    name: str
    run_id: str | None
    fingerprint: str

    @property
    def label(self) -> str:
        """What tells it from other starts in tables and groups: the run's name, and which checkpoint of it."""
        return f"{self.name}@{self.fingerprint[:12]}"


class OpenStart(NamedTuple):
    """A start whose files are at hand.

    Attributes:
        start: What it is.
        key: The key of the config that names it: start_from, or backbone.weights, by which the backbone alone is taken.
        text: The key's value, as the user wrote it.
        folder: Its files, on this machine.
        is_kept: Whether the run's folder has them already.
        is_new_network: Whether backbone.weights, by which the network has one kind of norms or another, is the start's
            in place of the config's own.
    """

    start: Start
    key: str
    text: str
    folder: Path
    is_kept: bool
    is_new_network: bool = False


def key_of_start(config: Config) -> str | None:
    """Return the key by which a config names an earlier run to begin with; None where it names none."""
    if config.start_from is not None:
        return "start_from"
    weights = config.backbone.weights
    return None if weights in BUILT_IN or Path(weights).is_file() else "backbone.weights"


def open_start(config: Config, folder: RunFolder, earlier: Mapping[str, Any] | None) -> tuple[Config, OpenStart | None]:
    """Find what a run begins with, and give the config what it decides of the network.

    Args:
        config: Of the run, with absolute paths.
        folder: Of the run.
        earlier: The nested config that the run was begun with, if it goes on: the start is then that of before,
            whatever its name means by now.

    Returns:
        The config, and the start; None where the run begins with none.

    Raises:
        ValueError: There is no such checkpoint, its network is another than the config's, or the run was begun with
            another.
    """
    key, before = key_of_start(config), (earlier or {}).get("start_from")
    if before and config.start_from is None:
        raise ValueError(
            f"name={config.name} was begun with start_from={before} (in {folder.path}); set it again, or choose "
            "another name"
        )
    if key is None:
        return config, None
    text, kept = str(config.flat()[key]), folder.read(f"{FOLDER}/{RECORD}") if earlier else None
    begun_with = _value_at(earlier or {}, key)
    if kept and text == begun_with:
        opened = OpenStart(Start(**kept), key, text, find_checkpoint(f"{config.storage}/{config.name}/{FOLDER}"), True)
    else:
        try:
            checkpoint = find_checkpoint(text)
        except ValueError as error:
            reason = str(error).removeprefix(f"{text}: ")
            known = "not imagenet, none or a file, and as a run: " if key == "backbone.weights" else ""
            raise ValueError(f"{key}={text}: {known}{reason}") from None
        opened = OpenStart(identify_checkpoint(text, checkpoint), key, text, checkpoint, False)
        if kept:
            if Start(**kept).fingerprint != opened.start.fingerprint:
                raise ValueError(
                    f"{key}={text}: name={config.name} was begun with another checkpoint, {key}={begun_with} (in "
                    f"{folder.path}); choose another name"
                )
            # The same by another name.
            config, opened = _with_value(config, key, begun_with), opened._replace(is_kept=True)
    as_begun = _with_network_of(config, opened)
    return as_begun, opened._replace(is_new_network=as_begun.backbone.weights != config.backbone.weights)


def identify_checkpoint(text: str, checkpoint: Path) -> Start:
    """Return what a checkpoint is, and whose. text: the user's name for it."""
    if (record := checkpoint / RECORD).is_file():  # itself the start of a run, or of a sweep
        return Start(**json.loads(record.read_text()))
    run_id: str | None = None
    if RUN_ID.fullmatch(text):
        run_id = text
    elif text.startswith("models:/"):
        from pipelines.tracking.runs import find_run

        run = find_run(default_uri(Path.cwd()), text)
        run_id = run.run_id if run else None
    else:
        with contextlib.suppress(OSError, ValueError):  # the folder of its run is not there, or has no such file
            files, path = pyarrow.fs.FileSystem.from_uri(text if "://" in text else str(checkpoint))
            places = [path, str(Path(path).parent)] if "://" in text else [str(checkpoint.parent)]
            for place in places:
                if files.get_file_info(f"{place}/run.json").is_file:
                    run_id = read_json(files, f"{place}/run.json").get("run_id")
    return Start(str(read_config(checkpoint).name), run_id, model_fingerprint(checkpoint))


def _with_network_of(config: Config, opened: OpenStart) -> Config:
    """Return a config whose network is the start's. backbone.weights of an earlier run decides its kind of norms."""
    earlier = read_config(opened.folder)
    keys = ["backbone.name", "embedding_dim"] if opened.key == "start_from" else ["backbone.name"]
    own, its = config.flat(), earlier.flat()
    if different := [key for key in keys if own[key] != its[key]]:
        has = ", ".join(f"{key}={its[key]} (here {own[key]})" for key in different)
        way = " ".join(f"{key}={its[key]}" for key in different)
        raise ValueError(f"{opened.key}={opened.text}: its network has {has}; set {way} to begin with it")
    if opened.key == "backbone.weights" or earlier.backbone.weights == config.backbone.weights:
        return config
    return _with_value(config, "backbone.weights", earlier.backbone.weights)


def _value_at(tree: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key of a nested config; None where there is none."""
    section, _, name = key.partition(".")
    return tree.get(section, {}).get(name) if name else tree.get(section)


def _with_value(config: Config, key: str, value: Any) -> Config:
    if key == "start_from":
        return config.model_copy(update={key: value})
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"weights": value})})


def keep_start(folder: RunFolder, opened: OpenStart) -> None:
    """Copy a start into the folder of the run, or the sweep, that begins with it."""
    if opened.is_kept:
        return
    place = f"{folder.path}/{FOLDER}"
    folder.filesystem.create_dir(place, recursive=True)
    with tempfile.TemporaryDirectory(prefix="dml-") as scratch:
        copy_model(opened.folder, Path(scratch, FOLDER))
        pyarrow.fs.copy_files(str(Path(scratch, FOLDER)), place, destination_filesystem=folder.filesystem)
    folder.write(f"{FOLDER}/{RECORD}", opened.start._asdict())


@contextlib.contextmanager
def kept_start(config: Config) -> Iterator[Path | None]:
    """Yield a local folder, for the time of the block, with what the run of a config begins with; None: nothing."""
    files, run = locate(config)
    if not files.get_file_info(f"{run}/{FOLDER}/{RECORD}").is_file:
        assert config.start_from is None, "the start is kept before any worker starts"
        yield None
        return
    with local_copy(files, f"{run}/{FOLDER}") as folder:
        yield folder


class Taken(NamedTuple):
    """What a learner has taken over from a start.

    Attributes:
        parts: Names of the learner's parts that it has taken, all or in part.
        new: Those that begin as they were initialised.
        known_classes: Training classes that the start was trained on, too, by name; None where no part of the learner
            that could be taken knows classes.
        classes: All training classes.
    """

    parts: list[str]
    new: list[str]
    known_classes: int | None
    classes: int

    def describe(self, opened: OpenStart) -> str:
        """Say in one line what a run begins with."""
        line = f"{opened.key}: {', '.join(self.parts)} of {opened.start.name}"
        if self.known_classes is not None:
            line += f"; of {self.known_classes} of {self.classes} training classes, by name, also what it knows of each"
        return line + (f"; new: {', '.join(self.new)}" if self.new else "")


def take_over(learner: "Learner", start: Path, config: Config, class_names: Sequence[str]) -> Taken:
    """Put the weights of a start into a new learner.

    What belongs to a class (its vectors in the loss, its variation) is taken for classes of the same name, wherever
    they stand; the loss's only where loss.name is the same. Parts of other shapes stay as they are.

    Args:
        learner: As initialised, on any device and in any precision.
        start: Folder with the start's model files.
        config: Of the run that begins; without start_from the backbone alone is taken.
        class_names: Of the run's training classes, by label.

    Raises:
        ValueError: The start's backbone or head does not fit.
    """
    from safetensors.torch import load_file
    from torch import Tensor

    from dml_core.weights import compare

    given, own, earlier = load_file(start / "learner.safetensors"), learner.state_dict(), read_config(start)
    names_before = read_class_names(start)
    pairs = match_classes(names_before, class_names)
    axes, taken = class_axes(config), dict[str, Tensor]()
    wanted = {name for name in own if config.start_from is not None or name.startswith("backbone.")}
    if earlier.loss.name != config.loss.name:
        wanted = {name for name in wanted if not name.startswith("base_loss.")}
    network = {name: own[name] for name in own if name in wanted and name.startswith(("backbone.", "head."))}
    if not (fit := compare(network, given)).is_whole:
        lacking = fit._replace(unknown=[]).describe()
        hint = " (backbone.weights=none: it has group norms)" if earlier.backbone.weights == "none" else ""
        hint += "; start_from=RUN takes its network as it is" if config.start_from is None else ""
        raise ValueError(f"{earlier.name}: its network does not fit this one's: it {lacking}{hint}")
    of_classes = False
    for name in wanted & given.keys():
        if name not in axes:
            if own[name].shape == given[name].shape:
                taken[name] = given[name]
        elif (rows := _class_rows(own[name], given[name], *axes[name], len(names_before), pairs)) is not None:
            taken[name], of_classes = rows, True
    learner.load_state_dict({**own, **taken})
    parts = list(dict.fromkeys(name.partition(".")[0] for name in own))
    has = {name.partition(".")[0] for name in taken}
    new = [part.replace("base_loss", "loss") for part in parts if part not in has]
    kept = [part.replace("base_loss", "loss") for part in parts if part in has]
    return Taken(kept, new, len(pairs) if of_classes else None, len(class_names))


def match_classes(before: Sequence[str], now: Sequence[str]) -> list[tuple[int, int]]:
    """Return (number before, number now) of each class whose name is in both lists."""
    number = {name: place for place, name in enumerate(before)}
    return [(number[name], place) for place, name in enumerate(now) if name in number]


def _class_rows(
    own: "Tensor", given: "Tensor", axis: int, each: int, classes_before: int, pairs: Sequence[tuple[int, int]]
) -> "Tensor | None":
    """Return a tensor with the given rows of classes in both, and its own of the others; None: they do not fit.

    Args:
        own: With `each` rows along `axis` for each class, those of a class one after the other.
        given: The same for other classes.
        axis: Of the classes.
        each: Rows of a class.
        classes_before: Classes of `given`.
        pairs: What match_classes returned.
    """
    import torch

    shape = [*own.shape]
    shape[axis] = each * classes_before
    if [*given.shape] != shape:
        return None
    offsets, numbers = torch.arange(each), torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    sources, targets = ((numbers[:, column, None] * each + offsets).flatten() for column in (0, 1))
    return own.index_copy(axis, targets.to(own.device), given.index_select(axis, sources).to(own))


def class_axes(config: Config) -> dict[str, tuple[int, int]]:
    """Return which tensors of a learner have rows for each training class: name -> (axis, rows of a class).

    They are found by building the parts behind the backbone for two classes and for three.
    """
    import torch

    from dml_core import base_losses
    from pipelines.config.methods import Sizes

    shapes = []
    for classes in (2, 3):
        sizes = Sizes(classes, features=2, embedding=2, epochs=config.epochs)
        with torch.random.fork_rng(devices=[]):
            parts: dict[str, Any] = {
                "base_loss": base_losses.build(config.loss.name, classes, 2, **config.loss.arguments),
                **{name: settings.build(sizes) for name, settings in config.method_settings.items()},
            }
        shapes.append({f"{part}.{n}": t.shape for part, m in parts.items() for n, t in m.state_dict().items()})
    return {
        name: (axis, three - two)
        for name, shape in shapes[0].items()
        for axis, (two, three) in enumerate(zip(shape, shapes[1][name], strict=True))
        if two != three
    }
