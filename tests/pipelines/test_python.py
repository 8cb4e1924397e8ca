"""The code of docs/python.md, as it stands there, and the types that another project's checker sees."""

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from pipelines.config.recipe import load_recipe

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "python.ipynb"


def test_notebook(tracked_folder: Path, without_ray: None) -> None:
    """The page docs/python.md, cell after cell in a kernel of Jupyter: training, neighbours as a picture, a loop."""
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tracked_folder)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = [
        "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout") for cell in cells
    ]
    errors = [
        "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stderr") for cell in cells
    ]
    recall, checkpoint, model = texts[1].split()
    assert 0 < float(recall) <= 1 and Path(checkpoint, "manifest.json").is_file() and model.startswith("dml-folder/")
    # Plain lines of progress. Which ones is a matter of time: the board is read once a second, and epochs are shorter.
    assert re.search(r"^\w+ +\d+/\d+", errors[1], re.M) and "\x1b" not in errors[1] + texts[1]
    assert any("image/png" in output.get("data", {}) for output in cells[2].outputs)
    picture = Image.open(tracked_folder / "neighbors.png")
    assert picture.size == Image.open(NOTEBOOK.parent / "neighbors.png").size and len(picture.getcolors(1 << 24)) > 100
    assert "'map_at_r'" in texts[3]


def test_losses_without_ray(tracked_folder: Path) -> None:
    """The loop of the page, alone: it imports neither Ray nor MLflow."""
    pictures, *_, loop = re.findall(r"```python\n(.*?)```", NOTEBOOK.with_suffix(".md").read_text(), re.S)
    exec(pictures, {})
    check = "import sys; assert not {'ray', 'mlflow', 'pipelines'} & {*sys.modules}"
    done = subprocess.run(
        [sys.executable, "-c", f"{loop}\n{check}"], cwd=tracked_folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and "'map_at_r'" in done.stdout, done.stderr


def test_assignments_as_a_dictionary() -> None:
    texts = ["epochs=3", "data.name=folder", "data.root=X", "method=[iaa]", "loss.name=triplet", "loss.margin=0.3"]
    values = {"epochs": 3, "data": {"name": "folder", "root": "X"}, "method": ["iaa"], "loss.name": "triplet"}
    assert load_recipe("glyphs", texts) == load_recipe("glyphs", {**values, "loss.margin": 0.3})
    with pytest.raises(ValueError, match="unknown key epoch; did you mean epochs"):
        load_recipe("glyphs", {"epoch": 3})


STRANGER = """
from dml_core.base_losses import build
from pipelines.config import load
from pipelines.runs.train import run_training

reveal_type(run_training(load("glyphs", {"epochs": 1})).metrics)
reveal_type(build("triplet", 10, 128))
load(3)
"""


def test_types_are_seen_from_outside(tmp_path: Path) -> None:
    """Of the wheel, installed elsewhere; libraries that it needs are not looked into, which takes minutes."""
    for name in ("dml_core", "pipelines", "tune_spaces"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    venv.create(tmp_path / "elsewhere")
    (packages,) = (tmp_path / "elsewhere").glob("lib/python*/site-packages")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", packages]
    subprocess.run([sys.executable, "-m", "pip", *install, tmp_path / "source"], check=True)
    (tmp_path / "stranger.py").write_text(STRANGER)
    ours = "[mypy-dml_core.*,pipelines.*,tune_spaces.*]\nfollow_imports = silent\n"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = skip\nignore_missing_imports = true\n{ours}")
    options = [
        "--config-file",
        "mypy.ini",
        "--python-executable",
        tmp_path / "elsewhere" / "bin" / "python",
        "stranger.py",
    ]
    checked = subprocess.run([sys.executable, "-m", "mypy", *options], cwd=tmp_path, capture_output=True, text=True)
    assert 'Revealed type is "dict[str, float]"' in checked.stdout, checked.stdout
    assert 'Revealed type is "dml_core.base_losses.BaseLoss"' in checked.stdout
    assert 'Argument 1 to "load_recipe" has incompatible type "int"; expected "str"' in checked.stdout
