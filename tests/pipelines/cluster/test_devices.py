"""What a run computes on: `workers: auto` by what a machine has, and GPUs that stay idle."""

import subprocess
import sys

import pytest

from pipelines.cluster.devices import (
    WORKER_MEMORY,
    Resources,
    choose_workers,
    idle_gpus,
    resolve_devices,
    resolve_workers,
    resources_here,
)
from pipelines.config.identity import with_slices
from pipelines.config.recipe import load_recipe, recipe_names
from pipelines.config.schema import Config

MEMORY = 64.0 * 2**30


@pytest.mark.parametrize("recipe", ["", *recipe_names()])
def test_recipes_leave_the_number_of_workers_open(recipe: str) -> None:
    config = load_recipe(recipe, ["data.root=."] if recipe not in ("", "glyphs") else []) if recipe else Config()
    assert config.workers == "auto" and with_slices(config, None).batch.slices is None


@pytest.mark.parametrize(
    ("has", "assignments", "expected", "reason"),
    [
        (Resources(0, 2, MEMORY), [], 2, "as there are 2 CPUs"),
        (Resources(0, 1, MEMORY), [], 1, "as there is 1 CPU"),
        (Resources(0, 3, MEMORY), [], 2, "3 CPUs"),  # of three workers one would have two of four slices, too
        (Resources(0, 16, MEMORY), [], 4, "one for each of batch.slices=4"),
        (Resources(0, 16, MEMORY), ["batch.slices=8"], 8, "batch.slices=8"),
        (Resources(0, 16, MEMORY), ["batch.slices=1"], 1, "batch.slices=1"),
        (Resources(0, 16, 3.0 * WORKER_MEMORY), [], 2, "each takes about 2 of 6.0 GiB"),
        (Resources(0, 16, 0.1 * WORKER_MEMORY), [], 1, "0.2 GiB"),
        (Resources(0, 16, MEMORY), ["backbone.frozen=true", "data.augment=null"], 1, "frozen backbone"),
        (Resources(1, 16, MEMORY), [], 1, "one on each GPU"),
        (Resources(8, 2, MEMORY), [], 8, "one on each GPU"),
        (Resources(3, 16, MEMORY), [], 3, "one on each GPU"),
        (Resources(8, 16, MEMORY), ["batch.slices=4"], 4, "one for each of batch.slices=4; there are 8 GPUs"),
        (Resources(8, 16, MEMORY), ["use_gpu=false"], 4, "batch.slices=4"),
        (Resources(8, 16, MEMORY), ["gpus_per_worker=0.5"], 1, "gpus_per_worker=0.5 is for one"),
        (Resources(0, 16, MEMORY), ["use_gpu=true"], 1, "one on each GPU"),  # refused by resolve_devices
    ],
)
def test_as_many_workers_as_help(has: Resources, assignments: list[str], expected: int, reason: str) -> None:
    number, said = choose_workers(load_recipe("glyphs", assignments), has, trains=True)
    assert number == expected and reason in said


def test_a_trained_model_is_used_by_one_process_or_on_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    config = load_recipe("glyphs", ["batch.slices=2"])
    assert choose_workers(config, Resources(0, 16, MEMORY), trains=False) == (1, "which uses all CPUs")
    assert choose_workers(config, Resources(8, 16, MEMORY), trains=False)[0] == 8
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert choose_workers(config, Resources(0, 16, MEMORY), trains=False)[0] == 2


def test_the_number_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    config = load_recipe("glyphs", [])
    resolved, said = resolve_workers(config)
    number, reason = choose_workers(config, resources_here(), trains=True)
    assert (resolved.workers, said) == (number, f" (auto: {reason})")
    assert with_slices(resolved, None).batch.slices == 4
    assert resolve_workers(resolved) == (resolved, "")
    assert resolve_workers(config, here=True)[0].workers == 1


def test_a_run_goes_on_with_the_slices_that_it_has() -> None:
    begun = with_slices(load_recipe("glyphs", ["workers=2"]), None).to_dict()
    continued = with_slices(load_recipe("glyphs", []), begun)
    assert choose_workers(continued, Resources(8, 16, MEMORY), trains=True)[0] == continued.batch.slices == 4


@pytest.mark.parametrize(
    ("assignments", "gpus", "line"),
    [
        (["workers=1"], 0, None),
        (["workers=1"], 1, None),
        (["workers=4"], 4, None),
        (["workers=1:4"], 2, None),
        (["workers=2"], 1, "1 GPU not used: workers=2 need one each; workers=auto uses what there is"),
        (["workers=1"], 4, "3 of 4 GPUs not used: workers=4 uses all"),
        (["gpus_per_worker=0.5"], 2, "1 of 2 GPUs not used: gpus_per_worker=1 workers=2 uses all"),
        (["workers=4", "batch.slices=4"], 8, "4 of 8 GPUs not used: batch.slices=4 allows no more workers"),
        (["workers=2", "use_gpu=false"], 1, "use_gpu=false: 1 GPU not used; use_gpu=true uses it"),
        (["workers=2", "use_gpu=false"], 2, "use_gpu=false: 2 GPUs not used; use_gpu=true uses them"),
    ],
)
def test_a_gpu_that_stays_idle_is_told_with_the_key_that_uses_it(
    assignments: list[str], gpus: int, line: str | None
) -> None:
    assert idle_gpus(load_recipe("glyphs", assignments), gpus) == line


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="use_gpu=true: each of workers=1 needs a GPU, this machine has 0"):
        resolve_devices(load_recipe("glyphs", ["use_gpu=true", "workers=1"]), here=True)


def test_without_a_driver_nobody_waits_for_torch() -> None:
    code = "import sys; from pipelines.cluster.devices import resources_here; resources_here(); "
    code += "import ctypes\ntry: ctypes.CDLL('libcuda.so.1')\nexcept OSError: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
