"""Figure of docs/methods.md: what IAA and SGAR draw around a class, before and after training.

    python benchmarks/synthetics.py docs/synthetics.png

Trains on a few glyphs in this process (a minute or two), then shows one training class and the two classes nearest to
it in the plane of their three means, and the synthetics of the first.
"""

import sys
import tempfile
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from dml_core.learner import Learner
from dml_core.synthesis import gaussian, radial

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.in_process import run_in_process
from pipelines.config.recipe import load_recipe
from pipelines.config.schema import Config
from pipelines.data.sets import load_splits
from pipelines.data.sources import views_of
from pipelines.models import run_folder
from pipelines.models.build import build_learner
from pipelines.models.checkpoint import load_weights
from pipelines.models.run_folder import checkpoint_name
from pipelines.training.job import TrainingJob

RUN = ["data.limit_classes=80", "method=[iaa,sgar]", "epochs=12", "evaluate_every=12", "workers=1", "name=run"]
COLORS = "#1b6ca8", "#b5b5b5", "#8a8a8a"
INTENSITIES = ("#fdd49e", "#fdbb84", "#fc8d59", "#e34a33", "#b30000")


@torch.inference_mode()
def embeddings(learner: Learner, config: Config) -> tuple[Tensor, Tensor]:
    images = load_splits(config).train
    views = views_of(config, images)
    parts = [learner.embed(x) for x in views.batches([[(i, None)] for i in range(len(images))])]
    return torch.cat(parts), torch.from_numpy(images.labels)


def draw(axes: list[plt.Axes], learner: Learner, config: Config, title: str) -> None:
    z, labels = embeddings(learner.eval(), config)
    assert learner.iaa is not None and config.iaa is not None and config.sgar is not None
    learner.iaa.estimate([(z, labels)])
    mean = learner.iaa.variation.mean
    chosen = (mean[:, None] - mean).norm(dim=2)[0].topk(3, largest=False).indices
    origin = mean[chosen[0]]
    plane = torch.linalg.qr((mean[chosen[1:]] - origin).T)[0]

    def flat(x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(((x - origin) @ plane).T)  # type: ignore[return-value]

    generator, own = torch.Generator().manual_seed(0), labels == chosen[0]
    drawn, _ = gaussian.synthesize(z[own], labels[own], learner.iaa.corrected, config.iaa.intensity, 3, generator)
    steps = radial.synthesize(z[own], config.sgar.intensity, config.sgar.count, generator)
    axes[0].scatter(*flat(drawn), s=12, c=INTENSITIES[1], label=f"drawn with lambda = {config.iaa.intensity}")
    for number, step in enumerate(steps):
        axes[1].scatter(*flat(step), s=12, c=INTENSITIES[number], label=f"step {number + 1}")
    for axis, method in zip(axes, ("IAA", "SGAR"), strict=True):
        for color, label in zip(COLORS, chosen, strict=True):
            axis.scatter(*flat(z[labels == label]), s=26, c=color, edgecolors="white", linewidths=0.6)
        axis.set_title(f"{method}, {title}")
        axis.set_aspect("equal", "datalim")
        axis.legend(fontsize=7, frameon=False)


def main(path: str) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 9))
    with tempfile.TemporaryDirectory() as storage:
        config = resolve_devices(load_recipe("glyphs", [*RUN, f"storage={storage}"]), here=True)
        learner = build_learner(config, len(load_splits(config).train.class_names))
        draw(axes[0], learner, config, "before training")
        metrics = run_in_process(TrainingJob(config, test=False)).metrics
        folder = Path(run_folder.locate(config)[1])
        load_weights(folder / checkpoint_name(int(metrics["best_epoch"])), learner)
        draw(axes[1], learner, config, "after training")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
