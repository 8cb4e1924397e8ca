"""cluster.yaml by Ray's own validation, and the Kubernetes manifests by their form; both offline."""

import fnmatch
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[3]
KUBERAY = ROOT / "docs" / "kuberay"
COMMANDS = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_the_cluster(cluster: dict[str, Any]) -> None:
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    validate_config(prepare_config(cluster))


def test_head_and_workers_start_as_meant(cluster: dict[str, Any]) -> None:
    """What Ray's validation does not look at."""
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    head, worker = ("\n".join(cluster[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "ray start --head" in head and "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert re.findall(r"--dashboard-host=(\S+)", head) == ["127.0.0.1"]
    assert "--address=$RAY_HEAD_IP:6379" in worker and "--port=6379" in head
    # The head decodes and trains nothing, in the autoscaler's books as in Ray's.
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0} and "--num-cpus=0" in head
    assert sum(t["max_workers"] for t in types.values()) <= cluster["max_workers"]
    assert "InstanceMarketOptions" not in types[cluster["head_node_type"]]["node_config"]


@pytest.mark.parametrize("kind", COMMANDS)
def test_commands_are_shell_as_ray_wraps_them(cluster: dict[str, Any], kind: str) -> None:
    """In parentheses, which close behind the end mark of a here-document or spoil it."""
    assert cluster[kind]
    for command in cluster[kind]:
        checked = ["bash", "-n", "-c", *shlex.split(_with_interactive(command)[-1])]
        done = subprocess.run(checked, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, command


def test_variables_reach_every_command_that_starts_ray(cluster: dict[str, Any], tmp_path: Path) -> None:
    for command in cluster["setup_commands"]:
        if command.startswith("cat >"):
            subprocess.run(["bash", "-c", f"({command})"], env={"HOME": str(tmp_path)}, check=True)
    shown = ["bash", "-c", ". ~/dml.env; env"]
    told = subprocess.run(shown, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    variables = dict(line.partition("=")[::2] for line in told.stdout.splitlines())
    assert {"MLFLOW_TRACKING_URI", "DML_NFS", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"} <= set(variables)
    assert variables["DML_CACHE"] == f"{tmp_path}/.cache/dml-ray" and variables["RAY_AUTH_MODE"] == "token"
    assert variables["PATH"].startswith(f"{tmp_path}/dml-venv/bin:")
    for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert all(command.startswith(". ~/dml.env;") for command in cluster[kind])


def excluded(path: str, patterns: list[str]) -> bool:
    """As rsync: a pattern that ends in / is of folders, here of any part of the path but the last."""
    parts = path.split("/")
    folders = any(fnmatch.fnmatchcase(part, p[:-1]) for part in parts[:-1] for p in patterns if p.endswith("/"))
    return folders or any(fnmatch.fnmatchcase(part, p) for part in parts for p in patterns)


def test_the_package_travels_and_nothing_else(cluster: dict[str, Any]) -> None:
    mounted, patterns = cluster["file_mounts"], cluster["rsync_exclude"]
    ours = {here for here in mounted.values() if not here.startswith("~")}
    assert {"dml_core", "pipelines", "tune_spaces", "pyproject.toml", "constraints.txt"} <= ours
    readme = {"README.md", "LICENSE"}  # pyproject.toml reads them
    assert ours - {"dml_core", "pipelines", "tune_spaces", "pyproject.toml", "constraints.txt"} == readme
    tracked = subprocess.run(["git", "ls-files", *ours], cwd=ROOT, capture_output=True, text=True, check=True)
    files = tracked.stdout.split()
    assert len(files) > 50 and not [path for path in files if excluded(path, patterns)]
    for path in (
        ".git/HEAD",
        ".venv/bin/python",
        "runs/a/run.json",
        "mlflow.db",
        "mlflow.db-wal",
        "mlruns/0/meta.yaml",
    ):
        assert excluded(path, patterns), path
    for path in ("datasets/a.png", "x/1.jpg", "pipelines/__pycache__/a.pyc", ".mypy_cache/a", ".cache/a", ".env"):
        assert excluded(path, patterns), path


def containers(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield from tree.get("containers", [])
        for value in tree.values():
            yield from containers(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from containers(value)


@pytest.mark.parametrize(("file", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_manifest(file: str, kind: str) -> None:
    manifest = yaml.safe_load((KUBERAY / file).read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    spec = manifest["spec"] if kind == "RayCluster" else manifest["spec"]["rayClusterSpec"]
    assert f"ray=={spec['rayVersion']}" in (ROOT / "constraints.txt").read_text().split()
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    found = [*containers(spec)]
    assert len(found) == 1 + len(spec["workerGroupSpecs"])
    for container in found:
        for of in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][of])
        variables = {variable["name"]: variable for variable in container["env"]}
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            assert (
                variables[name]["valueFrom"]["secretKeyRef"]["name"] == "dml-mlflow" and "value" not in variables[name]
            )
        for name, variable in variables.items():
            assert "value" not in variable or not re.search("PASSWORD|TOKEN|SECRET|KEY", name)


def test_the_job_is_a_command_of_ours() -> None:
    """Its recipe and keys are those of the command line."""
    from pipelines.config.recipe import load_recipe

    words = shlex.split(yaml.safe_load((KUBERAY / "rayjob.yaml").read_text())["spec"]["entrypoint"])
    assert words[:2] == ["dml", "train"]
    config = load_recipe(words[2], [word for word in words[3:] if not word.startswith("--")])
    assert config.worker_range == (2, 2) and config.storage.startswith("/mnt/dml")


def test_the_image_copies_what_there_is() -> None:
    for line in (KUBERAY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            assert all((ROOT / source).exists() for source in line.split()[1:-1])
