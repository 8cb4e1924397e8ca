"""A model that leaves: as a file for other programs, and over HTTP."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from dml_core.data.datasets import SetIdentity
from pipelines.config.recipe import load_recipe
from pipelines.config.sections import Data
from pipelines.data.sets import load_collection
from pipelines.models import checkpoint
from pipelines.models.build import build_learner
from pipelines.models.checkpoint import TrainingState, model_fingerprint, read_class_names
from pipelines.models.embedder import Embedder
from pipelines.runs import record
from pipelines.serving import export as export_module
from pipelines.serving.export import PACKAGES, SUFFIXES
from pipelines.training.optimizer import build_optimizer, build_schedule
from tests.pipelines.conftest import answer, dml

pytestmark = pytest.mark.usefixtures("tracked_folder", "without_ray")
DOCS = Path(__file__).parents[3] / "docs" / "export.md"
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)


@pytest.fixture(scope="module")
def pictures() -> list[Path]:
    """Characters larger than the networks take them, not square."""
    images = load_collection(Data()).images
    paths = [Path(f"{number}.png") for number in range(40)]
    for number, path in enumerate(paths):
        to_pil_image(images.picture(50 * number, 32)).resize((80 + number, 100)).save(path)
    return paths


def test_files_do_what_the_checkpoint_does(exact, pictures: list[Path], tmp_path: Path) -> None:
    """A float64 run with NAMR; the receivers' code is that of the documentation."""
    run, folder = exact[2].run_id, Path(exact[2].checkpoint)
    expected = Embedder(folder).vectors([path.read_bytes() for path in pictures])
    names = {"batch": None, "vectors": None}
    for to, code in zip(("onnx", "torch"), PYTHON_BLOCKS[:2], strict=True):
        file = tmp_path / f"model{SUFFIXES[to]}"
        made = answer("export", run, "--to", to, "--out", file)
        assert made["file"] == str(file) and made["test_pictures"] + made["random_pictures"] == 256
        assert made["test_pictures"] > 100 and {*made["largest_difference"]} == {"vector", "structure"}
        assert max(made["largest_difference"].values()) < 1e-5
        code = code.replace('"model.', f'"{tmp_path}/model.')
        exec(code.replace('["first.jpg", "second.jpg"]', str([str(path) for path in pictures])), names)
        cosines = (torch.as_tensor(names["vectors"]) * expected["vector"]).sum(1)
        assert cosines.min() > 0.99  # Pillow's resize is not torchvision's
        about = json.loads(Path(f"{file}.json").read_text())
        assert about["model"]["run"] == run and about["model"]["fingerprint"] == model_fingerprint(folder)
        assert about["classes"] == [*read_class_names(folder)] and about["side"] == 32
        assert about["outputs"].keys() == expected.keys() and torch.__version__.startswith(about["versions"]["torch"])
    assert len({*tmp_path.iterdir()}) == 4
    assert "exists already" in dml("export", run, "--to", "torch", "--out", tmp_path / "model.pt2").stderr

    views = torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8)
    program, session = torch.export.load(tmp_path / "model.pt2").module(), names["session"]
    for size in (1, 7, 256):
        two = session.run(["vector", "structure"], {"image": views[:size].numpy()})
        for one, other in zip(program(views[:size]).values(), two, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_frozen_network_whose_pictures_are_not_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is this package installed."""

    def not_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(record, "version", not_installed)
    config = load_recipe("grocery", {"data.root": "/nowhere", "data.image_size": 32, "name": "unborn"})
    learner = build_learner(config, 5)
    optimizer = build_optimizer(config, learner)
    given = learner, optimizer, build_schedule(config, optimizer, 1), TrainingState(), [], {}, torch.zeros(0, 7)
    checkpoint.save(tmp_path / "run", config, SetIdentity("d", "p", "l", 5, 9), tuple("abcde"), *given)
    file = tmp_path / "model.onnx"
    found = dml("export", tmp_path / "run", "--to", "onnx", "--out", file, "--json")
    assert found.exit_code == 0 and "test pictures cannot be read here: data.root=/nowhere" in found.stderr
    made = json.loads(found.stdout.splitlines()[-1])
    assert (made["test_pictures"], made["random_pictures"]) == (0, 256)
    assert made["bytes"] == file.stat().st_size + Path(f"{file}.json").stat().st_size > 10e6
    assert json.loads(Path(f"{file}.json").read_text())["versions"]["dml-ray"] == "0"
    z = onnxruntime.InferenceSession(file).run(None, {"image": np.zeros((3, 3, 32, 32), np.uint8)})[0]
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-6)


def test_what_differs_is_not_kept(exact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "TOLERANCE", -1.0)
    found = dml("export", exact[2].checkpoint, "--to", "torch", "--out", tmp_path / "model.pt2")
    assert found.exit_code == 1 and "failed: the exported file differs from the checkpoint" in found.stderr
    assert not [*tmp_path.iterdir()]


def test_bad_input(exact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "onnx", ("onnx", "onnx_of_nobody"))
    for to, out, message in (
        ("tflite", "model.tflite", "--to tflite: not one of torch, onnx"),
        ("onnx", "model.onnx", "--to onnx: onnx_of_nobody not installed; pip install 'dml-ray[onnx]'"),
        ("torch", "model.pt", "--out model.pt: not the name of a file that ends with .pt2"),
        ("torch", "nowhere/model.pt2", "no folder"),
    ):
        found = dml("export", exact[2].checkpoint, "--to", to, "--out", out)
        assert found.exit_code == 2 and message in found.stderr and found.stderr.count("\n") == 1
    assert "unknown to MLflow" in dml("export", "nothing", "--to", "torch", "--out", "model.pt2").stderr


@pytest.fixture(scope="module")
def served(exact, mlflow_server) -> Iterator[str]:
    """The address of a run's registered model, served by MLflow."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [
        "--model-uri",
        f"models:/{exact[2].model}",
        "--env-manager",
        "local",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with open("served.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", *given],
            env=os.environ | {"MLFLOW_TRACKING_URI": mlflow_server.uri, "PATH": f"{Path(sys.executable).parent}:/bin"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(720):
            try:
                urllib.request.urlopen(f"{url}/ping", timeout=1)
                break
            except OSError:
                assert process.poll() is None, Path("served.log").read_text()[-2000:]
                time.sleep(0.25)
        yield f"{url}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def asked(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as told:
            return told.status, json.load(told)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_served_over_http(exact, served: str, pictures: list[Path], tmp_path: Path) -> None:
    """64 pictures in one request, as the documentation asks with Python and with curl, and from Python alone."""
    paths = [*pictures, *pictures][:64]
    contents = [path.read_bytes() for path in paths]
    expected = {name: rows.numpy() for name, rows in Embedder(exact[2].checkpoint).vectors(contents).items()}
    assert expected.keys() == {"vector", "structure"}
    code, direct = PYTHON_BLOCKS[2:]
    names: dict[str, Any] = {}
    code = code.replace('sorted(Path("PICTURES").glob("*/*"))[:64]', f"[Path(name) for name in {[*map(str, paths)]}]")
    exec(code.replace("http://127.0.0.1:5001/invocations", served), names)
    for name, rows in expected.items():
        assert names[f"{name}s"].dtype == np.float32 and names[f"{name}s"].shape == rows.shape
        np.testing.assert_array_equal(names[f"{name}s"], rows)
    texts = [base64.b64encode(content).decode() for content in contents[:3]]
    status, told = asked(served, {"inputs": {"image": texts}})
    assert status == 200 and [*told["predictions"][2]] == ["vector", "structure"], told
    assert len(told["predictions"]) == 3
    (command,) = re.findall(r"(?m)^echo .*(?:\n  .*)*", DOCS.read_text())
    command = command.replace("http://127.0.0.1:5001/invocations", served).replace("query.jpg", str(pictures[0]))
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    (row,) = json.loads(shown.stdout)["predictions"]
    assert row.keys() == expected.keys() and len(row["vector"]) == expected["vector"].shape[1]
    direct = direct.replace("models:/dml-glyphs/1", f"models:/{exact[2].model}")
    exec(direct.replace('["first.jpg", "second.jpg"]', str([*map(str, paths)])), names)
    np.testing.assert_array_equal(names["vectors"], expected["vector"])


def test_pictures_of_a_request_go_through_the_network_together(exact, pictures: list[Path]) -> None:
    embedder, sizes = Embedder(exact[2].checkpoint), list[int]()
    embedder.learner.head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    answer = embedder.predict({"image": [pictures[0].read_bytes()] * 64})
    assert sizes == [64] and len(answer) == 64


@pytest.mark.parametrize(
    ("column", "content", "message"),
    [
        ("image", b"no picture", "unreadable picture number 2 of the input: not a picture"),
        ("image", None, "unreadable picture number 2 of the input:"),
        ("picture", b"", "Model is missing inputs ['image']"),
    ],
)
def test_served_wrong_input(
    served: str, pictures: list[Path], column: str, content: bytes | None, message: str
) -> None:
    whole = pictures[0].read_bytes()
    wrong = whole[: len(whole) // 2] if content is None else content
    data = [[base64.b64encode(each).decode()] for each in (whole, wrong)]
    status, told = asked(served, {"dataframe_split": {"columns": [column], "data": data}})
    assert status == 400 and message in told["message"] and "stack_trace" not in told


@pytest.mark.parametrize("image", [[], [None], ["not base64!"], [7]])
def test_served_what_is_no_picture_at_all(served: str, image: list[Any]) -> None:
    for body in (
        {"inputs": {"image": image}},
        {"dataframe_split": {"columns": ["image"], "data": [[i] for i in image]}},
    ):
        status, told = asked(served, body)
        assert status == 400 and told["message"] and "stack_trace" not in told, told
