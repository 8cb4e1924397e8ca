"""`dml export`: a trained model as one file that needs neither this package nor, as ONNX, PyTorch.

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
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from dml_core.learner import Learner
from pipelines.config.identity import with_absolute_paths
from pipelines.console import RunFailed
from pipelines.data.sets import load_splits
from pipelines.models.checkpoint import model_fingerprint, read_class_names
from pipelines.models.embedder import Embedder, embed_views
from pipelines.models.find import find_checkpoint

Reader = Callable[[Tensor], dict[str, Tensor]]

ENDS = {"torch": ".pt2", "onnx": ".onnx"}

PACKAGES = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}

TOLERANCE = 1e-4  # of a number of a unit vector, or of a weight between 0.5 and 1.5

BATCHES = (1, 7, *8 * (31,))  # in which the file is compared: their size is dynamic

PICTURES = sum(BATCHES)

IN_ONE_FILE = 2**31 - 2**24  # bytes of weights: ONNX keeps what is more in a file of its own


class Exported(nn.Module):
    """uint8 pictures (N, 3, S, S) to "vector" (N, D) and, with NAMR, "structure" (N, D)."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.learner = learner.requires_grad_(False).to(memory_format=torch.contiguous_format)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return embed_views(self.learner, image)


def export_model(run: str, to: str, out: str, console: Console) -> dict[str, Any]:
    """Write the file `out` and its .json, in a format of ENDS. Returns what `dml export --json` prints.

    ValueError: there is no such run, `out` cannot be made, a package is missing. RunFailed: the file does not do what
    the checkpoint's network does; nothing is left of it.
    """
    started = time.monotonic()
    path = _target(out, to)
    folder = find_checkpoint(run)
    model = Embedder(folder)
    with tempfile.TemporaryDirectory(prefix="dml-", dir=path.parent) as scratch:
        file = Path(scratch, path.name)
        with console.status(f"exporting to {to}"):
            read = (_torch if to == "torch" else _onnx)(Exported(model.learner), model.view.side, file)
        pictures, own = _pictures(model, console)
        with console.status(f"comparing on {PICTURES} pictures"):
            differences = compare(model.learner, read, pictures)
        checked = {"test_pictures": own, "random_pictures": PICTURES - own, "largest_difference": differences}
        about = _about(model) | {"checked": checked}
        about["model"] = {"run": run, "fingerprint": model_fingerprint(folder), "config": model.config.flat()}
        about["classes"] = read_class_names(folder)
        about["versions"] = {name: version(name) for name in ("dml-ray", "torch", "torchvision", *PACKAGES[to])}
        Path(scratch, f"{path.name}.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), "utf-8")
        made = sorted(Path(scratch).iterdir(), reverse=True)  # the file itself comes last
        for part in made:
            part.rename(path.parent / part.name)
    facts = {"file": str(path), "bytes": sum((path.parent / part.name).stat().st_size for part in made)}
    return facts | {**checked, "seconds": time.monotonic() - started}


@torch.inference_mode()
def compare(learner: Learner, read: Reader, pictures: Tensor) -> dict[str, float]:
    """The largest difference, by output, of what a file gives from what the learner gives. RunFailed above TOLERANCE.

    pictures: (PICTURES, 3, S, S).
    """
    differences: dict[str, list[Tensor]] = {}
    for batch in pictures.split(BATCHES):
        found = read(batch)
        for name, values in embed_views(learner, batch).items():
            differences.setdefault(name, []).append((values - found[name]).abs().max())
    largest = {name: torch.stack(values).max().item() for name, values in differences.items()}
    if not all(value <= TOLERANCE for value in largest.values()):
        told = ", ".join(f"{name} by {value:.2g}" for name, value in largest.items())
        raise RunFailed(f"the exported file differs from the checkpoint, {told}; {TOLERANCE} is allowed")
    return largest


def _torch(model: Exported, side: int, file: Path) -> Reader:
    """Write the file. Returns what reads it."""
    torch.export.save(_program(model, side), file)
    return torch.export.load(file).module()


def _onnx(model: Exported, side: int, file: Path) -> Reader:
    import onnxruntime

    names = [*_outputs(model.learner)]
    apart = sum(p.nbytes for p in model.parameters()) > IN_ONE_FILE
    program = _program(model, side)
    torch.onnx.export(program, f=file, input_names=["image"], output_names=names, external_data=apart, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def read(pictures: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, map(torch.from_numpy, session.run(names, {"image": pictures.numpy()})), strict=True))

    return read


def _program(model: Exported, side: int) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    return torch.export.export(model, (example,), dynamic_shapes={"image": {0: batch}})


def _pictures(model: Embedder, console: Console) -> tuple[Tensor, int]:
    """(PICTURES, 3, S, S) to compare on, and how many of them are of the run's test set; the others are noise."""
    side, own = model.view.side, list[Tensor]()
    try:
        query = load_splits(with_absolute_paths(model.config)).tests["test"].query
        for number in range(0, len(query), max(1, len(query) // PICTURES))[:PICTURES]:
            own.append(model.view.transform(query.picture(number, side)))
    except (ValueError, OSError) as error:
        told = f"the run's test pictures cannot be read here: {error}"
        console.print(told, style="yellow", highlight=False, markup=False, soft_wrap=True)
    noise = torch.Generator().manual_seed(0)
    drawn = torch.randint(256, (PICTURES - len(own), 3, side, side), dtype=torch.uint8, generator=noise)
    return torch.cat([torch.stack(own), drawn] if own else [drawn]), len(own)


def _target(out: str, to: str) -> Path:
    if to not in ENDS:
        raise ValueError(f"--to {to}: not one of {', '.join(ENDS)}")
    if missing := [name for name in PACKAGES[to] if find_spec(name) is None]:
        raise ValueError(f"--to {to}: {', '.join(missing)} not installed; pip install 'dml-ray[{to}]'")
    path = Path(out).expanduser().resolve()
    if path.suffix != ENDS[to]:
        raise ValueError(f"--out {out}: not the name of a file that ends with {ENDS[to]}")
    if taken := [str(file) for file in (path, Path(f"{path}.json")) if file.exists()]:
        raise ValueError(f"--out {out}: {taken[0]} exists already; remove it or choose another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {out}: no folder {path.parent} that can be written to")
    return path


def _outputs(learner: Learner) -> dict[str, str]:
    meanings = {"vector": "of unit length: an inner product of two is their cosine similarity"}
    if learner.namr is not None:
        meanings["structure"] = "the weights of the dimensions around the picture, for structure-aware search"
    return meanings


def _about(model: Embedder) -> dict[str, Any]:
    side, dim = model.view.side, model.config.embedding_dim
    outputs = {
        name: {"type": "float32", "shape": ["batch", dim], "meaning": meaning}
        for name, meaning in _outputs(model.learner).items()
    }
    steps = [
        "decode to RGB of 8 bits a channel, turned upright by its EXIF tag, transparent parts over white",
        "cut the largest square out of the middle",
        f"resize it to {side} x {side} pixels, bilinear with antialiasing",
        "order as channels, rows, columns; leave pixels at 0 to 255, the file normalises them itself",
    ]
    image = {"name": "image", "type": "uint8", "shape": ["batch", 3, side, side], "preparation": steps}
    return {"side": side, "input": image, "outputs": outputs}
