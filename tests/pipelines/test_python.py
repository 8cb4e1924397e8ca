"""The code blocks of docs/python.md, as they stand there, and the types that another project's checker sees."""

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from torchvision.transforms.functional import to_pil_image

from pipelines.config.recipe import load_recipe
from pipelines.config.sections import Data
from pipelines.data.sets import load_collection

ROOT = Path(__file__).parents[2]
CLASSES, EACH = 44, 2
TRAINING, LOOP = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)


@pytest.fixture(scope="module")
def pictures(tracked_folder: Path, without_ray: None) -> Path:
    """A folder for each character, beside which the code runs."""
    images = load_collection(Data()).images
    for label in range(CLASSES):
        for number in (images.labels == label).nonzero()[0][:EACH]:
            path = tracked_folder / "PICTURES" / images.class_names[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(images.picture(number, 32)).save(path)
    return tracked_folder


def test_training_and_search(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(TRAINING, {})
    output = capsys.readouterr()
    lines = output.out.splitlines()
    recall, checkpoint, model = lines[0].split()
    assert 0 < float(recall) <= 1 and Path(checkpoint, "manifest.json").is_file() and model.startswith("dml-folder/")
    assert len(lines) == 6 and lines[1] == str(sorted(Path("PICTURES").glob("*/*"))[0])
    assert re.search(r"^\w+ +\d+/\d+ epoch 3/3  loss 0\.", output.err, re.M) and "\x1b" not in output.err + output.out


def test_losses_without_ray(pictures: Path) -> None:
    check = "import sys; assert not {'ray', 'mlflow', 'pipelines'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", f"{LOOP}\n{check}"], cwd=pictures, capture_output=True, text=True)
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
