"""Write a trained model as one file that needs neither this package nor, as ONNX, PyTorch.

FILE.pt2 or FILE.onnx   uint8 pictures (N, 3, S, S) to unit vectors; normalisation, backbone and heads are inside
FILE.onnx.json          how to prepare a picture, what comes out, what was exported, and how well it agrees

The file is read back and compared with the checkpoint's network before it gets its name.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from rich.console import Console
from torch import Tensor, nn

from dml_core.learner import Learner
from pipelines.config.identity import with_absolute_paths
from pipelines.console import RunFailed, stage
from pipelines.data.sets import load_splits
from pipelines.models.checkpoint import model_fingerprint, read_class_names
from pipelines.models.embedder import Embedder, embed_views
from pipelines.models.find import find_checkpoint
from pipelines.runs.record import package_version

Reader = Callable[[Tensor], dict[str, Tensor]]  # uint8 pictures (n, 3, S, S) to outputs by name, each (n, D)

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}  # by format

PACKAGES = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}  # that a format needs

TOLERANCE = 1e-4  # of a number of a unit vector, or of a weight between 0.5 and 1.5

BATCHES = (1, 7, *8 * (31,))  # in which the file is compared: their size is dynamic

PICTURES = sum(BATCHES)

LARGEST_ONNX = 2**31 - 2**24  # bytes of weights: ONNX keeps what is more in a file of its own


class Agreement(TypedDict):
    """How well a file agrees with the checkpoint: the pictures compared, and the largest difference by output."""

    test_pictures: int
    random_pictures: int
    largest_difference: dict[str, float]


class ExportResult(Agreement):
    """What `dml export --json` prints."""

    file: str
    bytes: int
    seconds: float


class SamplePictures(NamedTuple):
    """Pictures to compare on, uint8 (PICTURES, 3, S, S): first those of the run's test set, then noise."""

    pictures: Tensor
    from_test_set: int


class ExportedModel(nn.Module):
    """uint8 pictures (N, 3, S, S) to "vector" (N, D) and, with NAMR, "structure" (N, D)."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.learner = learner.requires_grad_(False).to(memory_format=torch.contiguous_format)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return embed_views(self.learner, image)


def export_model(run: str, to: str, out: str, console: Console) -> ExportResult:
    """Write a model to a file, and a description beside it.

    Args:
        run: See models.find.find_checkpoint.
        to: The format: "torch" or "onnx".
        out: The file; the description is `out`.json.
        console: Where progress is shown.

    Raises:
        ValueError: There is no such run, `out` cannot be made, or a package is missing.
        RunFailed: The file does not do what the checkpoint's network does; nothing is left of it.
    """
    started = time.monotonic()
    path = _check_target(out, to)
    folder = find_checkpoint(run)
    model = Embedder(folder)
    with tempfile.TemporaryDirectory(prefix="dml-", dir=path.parent) as scratch:
        file = Path(scratch, path.name)
        with stage(console, f"exporting to {to}"):
            read = (_write_torch if to == "torch" else _write_onnx)(ExportedModel(model.learner), model.view.side, file)
        sample = _sample_pictures(model, console)
        with stage(console, f"comparing on {PICTURES} pictures"):
            differences = compare_outputs(model.learner, read, sample.pictures)
        agreement = Agreement(
            test_pictures=sample.from_test_set,
            random_pictures=PICTURES - sample.from_test_set,
            largest_difference=differences,
        )
        description = {
            **_describe_use(model),
            "checked": agreement,
            "model": {"run": run, "fingerprint": model_fingerprint(folder), "config": model.config.flat()},
            "classes": read_class_names(folder),
            "versions": {"dml-ray": package_version()}
            | {name: version(name) for name in ("torch", "torchvision", *PACKAGES[to])},
        }
        Path(scratch, f"{path.name}.json").write_text(json.dumps(description, indent=1, ensure_ascii=False), "utf-8")
        parts = sorted(Path(scratch).iterdir(), reverse=True)  # the file itself comes last
        for part in parts:
            part.rename(path.parent / part.name)
    size = sum((path.parent / part.name).stat().st_size for part in parts)
    return ExportResult(file=str(path), bytes=size, **agreement, seconds=time.monotonic() - started)


@torch.inference_mode()
def compare_outputs(learner: Learner, read: Reader, pictures: Tensor) -> dict[str, float]:
    """Compare what a file gives with what the learner gives.

    Args:
        learner: Of the checkpoint.
        read: Runs the file.
        pictures: uint8 (PICTURES, 3, S, S).

    Returns:
        The largest difference of a number, by output.

    Raises:
        RunFailed: It is above TOLERANCE.
    """
    differences: dict[str, list[Tensor]] = {}
    for batch in pictures.split(BATCHES):
        outputs = read(batch)
        for name, values in embed_views(learner, batch).items():
            differences.setdefault(name, []).append((values - outputs[name]).abs().max())
    largest = {name: torch.stack(values).max().item() for name, values in differences.items()}
    if not all(value <= TOLERANCE for value in largest.values()):
        amounts = ", ".join(f"{name} by {value:.2g}" for name, value in largest.items())
        raise RunFailed(f"the exported file differs from the checkpoint, {amounts}; {TOLERANCE} is allowed")
    return largest


def _write_torch(model: ExportedModel, side: int, file: Path) -> Reader:
    """Write the file as a program of torch.export. Return what runs it."""
    torch.export.save(_trace(model, side), file)
    return torch.export.load(file).module()


def _write_onnx(model: ExportedModel, side: int, file: Path) -> Reader:
    """Write the file as ONNX. Return what runs it."""
    import onnxruntime

    names = [*_output_meanings(model.learner)]
    is_large = sum(p.nbytes for p in model.parameters()) > LARGEST_ONNX
    program = _trace(model, side)
    torch.onnx.export(program, f=file, input_names=["image"], output_names=names, external_data=is_large, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def read(pictures: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, map(torch.from_numpy, session.run(names, {"image": pictures.numpy()})), strict=True))

    return read


def _trace(model: ExportedModel, side: int) -> torch.export.ExportedProgram:
    """Trace the model with a batch of any size."""
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    return torch.export.export(model, (example,), dynamic_shapes={"image": {0: batch}})


def _sample_pictures(model: Embedder, console: Console) -> SamplePictures:
    """Take pictures from all over the run's test set; noise stands in for those that cannot be read here."""
    side, views = model.view.side, list[Tensor]()
    try:
        query = load_splits(with_absolute_paths(model.config)).tests["test"].query
        for number in range(0, len(query), max(1, len(query) // PICTURES))[:PICTURES]:
            views.append(model.view.transform(query.picture(number, side)))
    except (ValueError, OSError) as error:
        warning = f"the run's test pictures cannot be read here: {error}"
        console.print(warning, style="yellow", highlight=False, markup=False, soft_wrap=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (PICTURES - len(views), 3, side, side), dtype=torch.uint8, generator=generator)
    return SamplePictures(torch.cat([torch.stack(views), noise] if views else [noise]), len(views))


def _check_target(out: str, to: str) -> Path:
    """Return the path of the new file. ValueError where it cannot be made."""
    if to not in SUFFIXES:
        raise ValueError(f"--to {to}: not one of {', '.join(SUFFIXES)}")
    if missing := [name for name in PACKAGES[to] if find_spec(name) is None]:
        raise ValueError(f"--to {to}: {', '.join(missing)} not installed; pip install 'dml-ray[{to}]'")
    path = Path(out).expanduser().resolve()
    if path.suffix != SUFFIXES[to]:
        raise ValueError(f"--out {out}: not the name of a file that ends with {SUFFIXES[to]}")
    for file in (path, Path(f"{path}.json")):
        if file.exists():
            raise ValueError(f"--out {out}: {file} exists already; remove it or choose another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {out}: no folder {path.parent} that can be written to")
    return path


def _output_meanings(learner: Learner) -> dict[str, str]:
    """Say what each output is, by name."""
    meanings = {"vector": "of unit length: an inner product of two is their cosine similarity"}
    if learner.namr is not None:
        meanings["structure"] = "the weights of the dimensions around the picture, for structure-aware search"
    return meanings


def _describe_use(model: Embedder) -> dict[str, object]:
    """Describe, for a program that runs the file, its input and its outputs."""
    side, dim = model.view.side, model.config.embedding_dim
    outputs = {
        name: {"type": "float32", "shape": ["batch", dim], "meaning": meaning}
        for name, meaning in _output_meanings(model.learner).items()
    }
    steps = [
        "decode to RGB of 8 bits a channel, turned upright by its EXIF tag, transparent parts over white",
        "cut the largest square out of the middle",
        f"resize it to {side} x {side} pixels, bilinear with antialiasing",
        "order as channels, rows, columns; leave pixels at 0 to 255, the file normalises them itself",
    ]
    image = {"name": "image", "type": "uint8", "shape": ["batch", 3, side, side], "preparation": steps}
    return {"side": side, "input": image, "outputs": outputs}
