"""Why a method helps or not: what its term sees and what it pushes, after a training without it and after one with it.

    python benchmarks/diagnose.py grocery data.root=GroceryStoreDataset [loss.name=...]

Training classes only. Cosines are of unit embeddings. "pull" is the norm of the gradient that a weighted term sends to
the embeddings of a batch, relative to that of the base loss.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dml_core.data.sampling import BatchPlan
from dml_core.learner import Learner
from dml_core.synthesis import gaussian, radial
from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.in_process import run_in_process
from pipelines.cluster.progress import Reporter
from pipelines.config.recipe import load_recipe
from pipelines.config.schema import Config
from pipelines.data.sets import identify, load_splits
from pipelines.data.sources import Sources
from pipelines.models import run_folder
from pipelines.models.build import build_learner
from pipelines.models.checkpoint import load_weights
from pipelines.models.run_folder import checkpoint_name
from pipelines.training.job import TrainingJob


def trained(arguments: list[str], folder: str, methods: list[str]) -> tuple[Config, Learner, Tensor, Tensor]:
    """Config, learner with the best epoch's weights, all training features and labels."""
    name = "_".join(methods) or "plain"
    given = [*arguments[1:], f"method=[{','.join(methods)}]", f"storage={folder}", f"name={name}", "workers=1"]
    config = resolve_devices(load_recipe(arguments[0], given), here=True)
    metrics = run_in_process(TrainingJob(config, test=False)).metrics
    splits = load_splits(config)
    learner = build_learner(config, len(splits.train.class_names))
    best = Path(run_folder.locate(config)[1]) / checkpoint_name(int(metrics["best_epoch"]))
    load_weights(best, learner)
    sources = Sources(config, learner, torch.device("cpu"), 1, Reporter(None), identify(config.data))
    features = next(iter(sources.of(splits.train).batches([[(i, None) for i in range(len(splits.train))]])))
    return config, learner, features, torch.from_numpy(splits.train.labels)


def iaa(config: Config, learner: Learner, features: Tensor, labels: Tensor) -> str:
    assert learner.iaa is not None and config.iaa is not None
    with torch.no_grad():
        z = learner.embed(features)
        learner.iaa.estimate([(z, labels)])
        drawn, _ = gaussian.synthesize(
            z, labels, learner.iaa.corrected, config.iaa.intensity, 1, torch.Generator().manual_seed(0)
        )
    zh, drawn_h = normalize(z), normalize(drawn)
    cosine = zh @ zh.T
    same = labels[:, None] == labels
    nearest = cosine.masked_fill(same, -1).amax(1)
    own = (cosine * same).sum(1).sub(1) / same.sum(1).sub(1).clamp(min=1)
    copy = (zh * drawn_h).sum(1)
    hard = ((zh @ drawn_h.T).masked_fill(same, -1).amax(1) > nearest).float().mean()
    return (
        f"cosine to an own synthetic {copy.mean():.2f}, to the class {own.mean():.2f}, to the nearest of another "
        f"{nearest.mean():.2f}; nearer synthetics of other classes for {hard:.0%}"
    )


def sgar(config: Config, learner: Learner, features: Tensor, labels: Tensor) -> str:
    assert learner.sgar is not None and config.sgar is not None and learner.base_loss is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = learner.embed(features)
        _, _, gate = learner.sgar(z, labels, learner.base_loss.proxies, generator)
        zh = normalize(z, dim=1)
        synthetics = zh + radial.draw_offsets(zh, config.sgar.intensity, config.sgar.count, generator)
        source, drawn = (normalize(x @ learner.sgar.projection.T, dim=-1).relu() for x in (zh, synthetics))
    steps = " ".join(f"{c.mean():.3f}±{c.std():.3f}" for c in (drawn * source).sum(2))
    return f"gate open for {gate:.0%}; similarity after each step {steps}; margin {config.sgar.margin}"


def namr(config: Config, learner: Learner, features: Tensor, labels: Tensor) -> str:
    learner.eval()
    with torch.no_grad():
        s = learner.structure(features)
    return f"weights of dimensions {s.mean():.2f}±{s.std():.2f}, differing by image by {s.std(0).mean():.3f}"


def pulls(config: Config, learner: Learner, features: Tensor, labels: Tensor) -> str:
    """Of each weighted term on the embeddings, relative to the base loss; the mean over ten batches."""
    plan = BatchPlan(labels.numpy(), config.batch.classes, config.batch.images, config.seed, 10).epoch(0)
    learner.train()
    found: dict[str, list[float]] = {}
    for step, rows in enumerate(plan):
        z: list[Tensor] = []
        hook = learner.head.register_forward_hook(lambda module, x, out, z=z: z.append(out))
        terms = learner(features[rows], labels[rows], config.epochs - 1, torch.Generator().manual_seed(step))
        hook.remove()
        norms = {"base": torch.autograd.grad(terms.base, z[0], retain_graph=True)[0].norm()}
        for name, weight in learner.weights._asdict().items():
            if weight:
                gradient = torch.autograd.grad(weight * getattr(terms, name), z[0], retain_graph=True)[0]
                norms[name] = gradient.norm()
        for name, norm in norms.items():
            found.setdefault(name, []).append((norm / norms["base"]).item())
    return ", ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in found.items() if name != "base")


def main(arguments: list[str]) -> None:
    torch.set_num_threads(2)
    looks = {"iaa": iaa, "sgar": sgar, "namr": namr}
    with tempfile.TemporaryDirectory() as folder:
        for method, look in looks.items():
            config, learner, features, labels = trained(arguments, folder, [method])
            print(f"{method}: {look(config, learner, features, labels)}")
            if told := pulls(config, learner, features, labels):
                print(f"{'':>6}pull {told}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
