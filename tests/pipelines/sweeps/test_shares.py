"""What trials of a process share, and shares of a GPU: in Ray's books, where GPUs can be invented."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from rich.console import Console

from dml_core import backbones
from dml_core.data import glyphs
from pipelines import kept
from pipelines.cluster.worker import Worker
from pipelines.config.recipe import load_recipe, with_values
from pipelines.config.schema import Config
from pipelines.data import sources
from pipelines.data.sets import identify, load_splits
from pipelines.models.build import build_learner
from pipelines.sweeps.records import Sweep, SweepOptions
from pipelines.sweeps.stages import place_trials
from pipelines.training.job import TrainingJob
from pipelines.training.loop import train_loop

SMALL = ["data.limit_classes=9", "batch.classes=3", "batch.images=4", "epochs=2", "steps_per_epoch=2", "workers=1"]
SMALL += ["use_gpu=false", "precision=float32", "name=run"]


@pytest.fixture
def sharing() -> Iterator[None]:
    kept.keep_between_runs()
    yield
    kept.forget()


def test_a_value_is_made_once_where_values_are_kept() -> None:
    made = list[int]()

    def make() -> int:
        made.append(len(made))
        return made[-1]

    assert [kept.once("a", make), kept.once("a", make)] == [0, 1]
    kept.keep_between_runs()
    try:
        assert [kept.once("a", make), kept.once("a", make), kept.once(("a", 1), make)] == [2, 2, 3]
        for number in range(kept.MOST_KEPT):
            kept.once("a", make)  # in use
            kept.once(("others", number), make)
        assert kept.once("a", make) == 2 and kept.once(("a", 1), make) == len(made) - 1
    finally:
        kept.forget()
    assert kept.once("a", make) == len(made) - 1 > 2


def train(config: Config, folder: Path) -> tuple[dict[str, float], list[list[float]]]:
    """Return the metrics of a training but for its speed, and the losses of its steps."""
    config, threads = with_values(config, {"storage": str(folder)}), torch.get_num_threads()
    try:
        result = train_loop(TrainingJob(config, worker=Worker(report=dict)))
    finally:
        torch.set_num_threads(threads)
    timed = ("train/images_per_second", "train/data_wait", "train/startup_seconds")
    metrics = {name: value for name, value in result.metrics.items() if name not in timed}
    return metrics, [record.get("step_loss", []) for record in result.records]


@pytest.mark.parametrize("frozen", ["false", "true"])
def test_trainings_that_share_are_those_that_do_not(cache: Path, tmp_path: Path, frozen: str) -> None:
    """One after the other in a process: other seeds, folds, classes, settings that change, and the first once more."""
    keys = [*SMALL, "method=[sgar,namr]", f"backbone.frozen={frozen}"]
    config = load_recipe("glyphs", keys + (["data.augment=none"] if frozen == "false" else []))
    others = [
        {},
        {"seed": 1},
        {"data.fold": 0, "data.folds": 3, "data.validation_fraction": None},
        {"data.fold": 1, "data.folds": 3, "data.validation_fraction": None},
        {"data.limit_classes": 12},
        {"data.split_seed": 1},
        {"changes": {1: {"sgar.intensity": 0.4}}},
        {},
    ]
    configs = [with_values(config, values) for values in others]
    alone = [train(c, tmp_path / f"alone{number}") for number, c in enumerate(configs)]
    kept.keep_between_runs()
    try:
        together = [train(c, tmp_path / f"together{number}") for number, c in enumerate(configs)]
    finally:
        kept.forget()
    assert together == alone
    assert alone[0] == alone[-1]
    assert len({json.dumps(losses) for _, losses in alone}) >= 6  # they do differ


def test_sets_networks_and_features_are_read_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharing: None
) -> None:
    calls = list[str]()

    def counted(module: object, name: str) -> None:
        function = getattr(module, name)

        def count(*given: object, **more: object) -> object:
            calls.append(name)
            return function(*given, **more)

        monkeypatch.setattr(module, name, count)

    counted(glyphs, "load")
    counted(backbones, "build")
    counted(sources, "cached_features")
    config = load_recipe("glyphs", [*SMALL, "backbone.frozen=true"])
    for number, rate in enumerate((1e-3, 3e-3)):
        train(with_values(config, {"optimizer.lr": rate, "name": f"run{number}"}), tmp_path)
    assert sorted(calls) == ["build", "cached_features", "load"]
    one, other = (load_splits(with_values(config, {"data.fold": n, "data.folds": 3})) for n in (0, 1))
    assert calls.count("load") == 1 and one.train.class_names != other.train.class_names


def test_networks_are_copies(cache: Path, sharing: None) -> None:
    config = load_recipe("glyphs", SMALL)
    one, other = build_learner(config, 5), build_learner(config, 5)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert all(tensor.abs().sum() > 0 for name, tensor in other.named_parameters() if name.endswith("conv1.weight"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["gpus_per_worker=2"], "gpus_per_worker"),
        (["gpus_per_worker=0"], "gpus_per_worker"),
        (["gpus_per_worker=0.5", "workers=2"], "NCCL takes no two workers of a run on one GPU"),
        (["gpus_per_worker=0.5", "workers=1", "use_gpu=false"], "gpus_per_worker=0.5 cannot act with use_gpu=false"),
    ],
)
def test_shares_that_cannot_be_are_refused(keys: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("glyphs", keys)


@pytest.mark.parametrize(
    ("share", "gpus", "line"),
    [
        ("0.25", 2, "8 trials at a time, each on 0.25 of 2 GPUs"),
        ("0.4", 2, "4 trials at a time, each on 0.4 of 2 GPUs"),
        ("0.1", 1, "10 trials at a time, each on 0.1 of 1 GPUs"),
        ("1", 2, "2 trials at a time, each on 1 of 2 GPUs"),
    ],
)
def test_trials_are_dealt_to_shares(share: str, gpus: int, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": float(gpus)})
    monkeypatch.setattr(ray, "nodes", list)
    config = load_recipe("glyphs", ["workers=1", f"gpus_per_worker={share}", "data.loader=torch"])
    console = Console(file=io.StringIO(), width=200)
    placement = place_trials(
        Sweep("s", "folder", "uri", "id", config, identify(config.data), SweepOptions("sgar")), True, console
    )
    assert console.file.getvalue().strip() == line
    assert placement.resources["GPU"] == float(share)
    assert placement.resources["CPU"] * placement.concurrent <= 4


SCRIPT = """
import json, os, sys, time
from pathlib import Path
import ray
from ray import tune
from pipelines.config.recipe import load_recipe
from pipelines.console import messages
from pipelines.data.sets import identify
from pipelines.sweeps.records import Sweep, SweepOptions
from pipelines.sweeps.stages import place_trials, run_stage
from pipelines.sweeps.trial import prepare_process
from ray.tune.schedulers import AsyncHyperBandScheduler

def end_slowly(config, sweep, in_process):
    prepare_process()
    try:
        for epoch in (1, 2, 3):
            tune.report({"score": 0.0, "epochs_done": epoch})
    finally:
        time.sleep(3)  # longer than Ray Tune waits by itself

def look(config, sweep, in_process):
    folder = Path(sweep.folder)
    (folder / f"{config['point']}.json").write_text(json.dumps(ray.get_gpu_ids()))
    deadline = time.monotonic() + 60
    while len([*folder.glob("?.json")]) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    tune.report({"score": 0.0, "epochs_done": 1, "together": len([*folder.glob("?.json")])})

if __name__ == "__main__":
    folder = sys.argv[1]
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    config = load_recipe("glyphs", ["workers=1", "gpus_per_worker=0.5", "use_gpu=true", "data.loader=torch"])
    sweep = Sweep("s", folder, "uri", "id", config, identify(config.data), SweepOptions("sgar"))
    trials = run_stage(place_trials(sweep, True, messages), "look", look, tune.grid_search([0, 1, 2, 3]), 4)
    together = [trial.last_result["together"] for trial in trials]
    one = place_trials(sweep._replace(options=SweepOptions("sgar", concurrent=1)), True, messages)
    early = AsyncHyperBandScheduler("epochs_done", "score", "max", max_t=2, grace_period=1)
    ended = run_stage(one, "end", end_slowly, tune.grid_search([0, 1, 2]), 3, scheduler=early)
    print(json.dumps([together, [[t.last_result["pid"], t.last_result["epochs_done"]] for t in ended]]))
"""


def test_ray_gives_trials_half_a_gpu_each_and_has_them_follow_each_other_in_a_process(tmp_path: Path) -> None:
    """GPUs that are in Ray's books alone; then trials that are ended early, and take seconds to end."""
    script = tmp_path / "look.py"
    script.write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    (tmp_path / "sweep").mkdir()
    looked = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "sweep")], capture_output=True, text=True, env=environment
    )
    assert looked.returncode == 0, looked.stderr[-3000:]
    assert "4 trials at a time, each on 0.5 of 2 GPUs" in looked.stderr
    together, ended = json.loads(looked.stdout.splitlines()[-1])
    assert together == [4, 4, 4, 4]
    assert len({process for process, _ in ended}) == 1 and {epochs for _, epochs in ended} == {2}
    ids = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("?.json"))]
    assert sorted(int(one) for (one,) in ids) == [0, 0, 1, 1]
