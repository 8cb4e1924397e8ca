"""Why a method helps or not: what its term pushes by epoch, and what becomes of the embedding.

    python benchmarks/diagnose.py glyphs
    python benchmarks/diagnose.py grocery-whole data.root=GroceryStoreDataset [key=value ...] [--methods iaa sgar namr]

The recipe is trained with the base loss alone and once more with each method, always with the same seed. What is
printed is measured on training and validation classes only. A setting of a method acts on its training alone.

Trainings are kept in ./runs by their config: the same command goes on where it was interrupted, and other settings of a
method are compared with the same training without it.
"""

import argparse
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from dml_core.data.datasets import LabelledImages, Retrieval, Splits
from dml_core.data.sampling import BatchPlan
from dml_core.geometry import alignment, distances_to_means, effective_rank, spectrum, uniformity
from dml_core.learner import Learner, at_least_float32
from dml_core.ranking.clusters import DistanceToCenters, adaptive_distance, cluster_centers, plain_distance
from dml_core.retrieval.ranked import RankedQueries
from dml_core.synthesis import radial
from pipelines.cli.endings import fail, run_script
from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.in_process import run_in_process
from pipelines.cluster.progress import Reporter
from pipelines.cluster.worker import device_of_worker
from pipelines.config.identity import group_of
from pipelines.config.methods import METHODS, Sizes
from pipelines.config.recipe import load_recipe
from pipelines.config.schema import Config
from pipelines.data.sets import identify, load_splits
from pipelines.data.sources import Sources
from pipelines.kept import keep_between_runs
from pipelines.models.build import build_learner
from pipelines.models.checkpoint import is_whole, load_weights, read_history, read_state
from pipelines.models.run_folder import RunFolder, checkpoint_name, checkpoint_names
from pipelines.training.evaluation import embeddings_of, retrieval_of_learner, stream_outputs
from pipelines.training.job import TrainingJob
from pipelines.training.setup import build_on

BATCHES = 5  # of training images, over which pulls and synthetics are measured; no step has seen their views
MOST_ROWS = 10  # epochs that the table shows
ALONE = "alone"
LEGEND = (
    "Of a term: its size, the norm of what it adds to the base loss's gradient on the embeddings over that gradient's "
    "norm; and its\ndirection, the cosine of the two (1 the same push, -1 against it, 0 elsewhere). iaa adds by its "
    "synthetics. One training each."
)


class Batch(NamedTuple):
    """Training images or features (b, ...) with their labels (b,)."""

    images: Tensor
    labels: Tensor


class Run(NamedTuple):
    """A finished training.

    Attributes:
        config: Of the run.
        folder: Of its checkpoints, one for each validated epoch.
        scores: Metrics of each validated epoch, from 1.
        best: The epoch with the best validation.
        splits: Training and validation classes.
        validation: The task to validate on.
        sources: Where batches come from.
        batches: What pulls are measured on, the same for all runs.
    """

    config: Config
    folder: Path
    scores: dict[int, dict[str, float]]
    best: int
    splits: Splits
    validation: Retrieval
    sources: Sources
    batches: list[Batch]

    def learner_after(self, epoch: int) -> Learner:
        """Return the learner as it was at the end of an epoch, in evaluation mode."""
        config, classes = self.config.at(epoch - 1), len(self.splits.train.class_names)
        learner = build_on(config, classes, self.sources.device, read_weights=False)
        load_weights(self.folder / checkpoint_name(epoch), learner)
        return learner.eval()

    def features(self, learner: Learner) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features (b, F) and labels (b,) of each batch."""
        for batch in self.batches:
            with torch.no_grad(), self.sources.autocast():
                features = at_least_float32(learner.features(batch.images))
            yield features, batch.labels

    def embed(self, learner: Learner, images: LabelledImages) -> Tensor:
        """Return the unit embeddings (N, D) of a set."""
        outputs = stream_outputs(images, self.sources, "embeddings", partial(embeddings_of, learner))
        return normalize(torch.cat([batch["z"] for batch in outputs]), dim=1)


class Pull(NamedTuple):
    """What a term adds to the gradient of the base loss: its size relative to that, and the cosine between them."""

    size: float
    direction: float


def train(recipe: str, assignments: Sequence[str], method: str) -> Run:
    """Train a recipe with one method, or alone, and keep the checkpoint of each validated epoch; or go on with it.

    Raises:
        ValueError: A value is refused.
    """
    own = [a for a in assignments if method_of(a) in (None, method)]
    place = [f"method=[{'' if method == ALONE else method}]", f"storage={Path('runs').absolute()}", "workers=1"]
    place.append("checkpoint_every=null")  # only what an epoch ends with is looked at
    config = resolve_devices(load_recipe(recipe, [*own, *place]), here=True)
    pictures = identify(config.data)
    group = group_of(config.flat(), pictures.digest)
    config = config.model_copy(update={"name": f"diagnose-{method}-{group}-s{config.seed}"})
    splits, run = load_splits(config), RunFolder(config)
    if splits.validation is None:
        fail(2, "bad input: data.validation_fraction=0: nothing is held out; this looks at validation classes")
    folder = Path(run.path) / "each"

    def keep(_: object = None) -> None:  # the run itself keeps the best and the last two
        for name in checkpoint_names(run.filesystem, run.path):
            if not is_whole(folder / name):
                shutil.copytree(Path(run.path) / name, folder / name, dirs_exist_ok=True)

    metrics = run_in_process(TrainingJob(config, test=False), report=keep).metrics
    keep()
    epochs = [read_state(checkpoint).epoch for checkpoint in sorted(folder.iterdir())]
    history = {record["step"]: record["metrics"] for record in read_history(folder / checkpoint_name(epochs[-1]))}
    device = device_of_worker(config)
    learner = build_learner(config, len(splits.train.class_names)).to(device)
    sources = Sources(config, learner, device, torch.get_num_threads(), Reporter(None), pictures)
    labels, batch = splits.train.labels, config.batch
    rows = BatchPlan(labels, batch.classes, batch.images, config.seed, BATCHES).rows(config.epochs)
    images = sources.batches(splits.train, list(rows))
    batches = [Batch(x, torch.from_numpy(labels[of]).to(device)) for x, of in zip(images, rows.samples, strict=True)]
    scores = {epoch: history[epoch] for epoch in epochs}
    return Run(config, folder, scores, int(metrics["best_epoch"]), splits, splits.validation, sources, batches)


def method_of(assignment: str) -> str | None:
    """Return the method whose setting key=value is, if it is one's."""
    section = assignment.partition("=")[0].partition(".")[0]
    return section if section in METHODS else None


def measure_pulls(run: Run, learner: Learner, epoch: int) -> dict[str, Pull]:
    """Return the pull of each weighted term in an epoch, the mean over the batches; the gate's share by "gate"."""
    found: dict[str, list[tuple[float, float]]] = {}
    learner.train()
    for seed, (features, labels) in enumerate(run.features(learner)):
        torch.manual_seed(seed)
        generator, outputs = torch.Generator(features.device).manual_seed(seed), list[Tensor]()
        with learner.head.register_forward_hook(lambda head, x, z, outputs=outputs: outputs.append(z)):
            terms = learner(features, labels, epoch - 1, generator)
        (z,) = outputs
        assert learner.base_loss is not None
        base = terms.base if learner.iaa is None else learner.base_loss(at_least_float32(z), labels)
        to_base = gradient(base, z)
        added = {name: weight * getattr(terms, name) for name, weight in learner.weights._asdict().items() if weight}
        gradients = {name: gradient(term, z) for name, term in added.items()}
        if learner.iaa is not None:
            gradients["iaa"] = gradient(terms.base, z) - to_base
        for name, of_term in gradients.items():
            pull = (of_term.norm() / to_base.norm()).item(), cosine_similarity(of_term, to_base, dim=0).item()
            found.setdefault(name, []).append(pull)
        if learner.sgar is not None:
            found.setdefault("gate", []).append((terms.sgar_open.item(), 0))
    learner.eval()
    return {name: Pull(*np.mean(values, axis=0)) for name, values in found.items()}


def gradient(term: Tensor, z: Tensor) -> Tensor:
    """Return the gradient of a term on embeddings, in one dimension."""
    return torch.autograd.grad(term, z, retain_graph=True)[0].flatten()


def measure_embedding(run: Run, learner: Learner) -> dict[str, str]:
    """Measure the embedding of a learner: a row of the table -> what stands in it."""
    ranked: list[RankedQueries] = []
    metrics = retrieval_of_learner(learner, run.validation, run.sources, "validation", "val", ranked.append)
    rows = {
        "best epoch": str(run.best),
        "R@1 %": percent(metrics["val/recall_at_1"]),
        "MAP@R %": percent(metrics["val/map_at_r"]),
    }
    by_class, sizes = ranked[0].means_by_class()["recall_at_1"], np.bincount(run.validation.query.labels)
    classes = np.array(list(by_class))
    thirds = np.searchsorted(np.quantile(sizes[classes], [1 / 3, 2 / 3]), sizes[classes])
    for third in np.unique(thirds):
        of_third = classes[thirds == third]
        low, high = sizes[of_third].min(), sizes[of_third].max()
        images_each = f"{low}" if low == high else f"{low} to {high}"
        rows[f"R@1 %, classes of {images_each} images ({len(of_third)})"] = percent(
            float(np.mean([by_class[label] for label in of_third]))
        )
    for which, images in (("training", run.splits.train), ("validation", run.validation.query)):
        z = run.embed(learner, images)
        distances = distances_to_means(z, torch.from_numpy(images.labels).to(z.device))
        variance, gap = (x.mean().item() for x in (distances.to_own.square(), distances.to_next.square()))
        rows[f"variance of a class, {which}"] = f"{variance:.3f}"
        rows[f"  over the squared distance to the next class, {which}"] = f"{variance / gap:.2f}"
    rows["effective rank"] = f"{effective_rank(spectrum(z)):.1f}"
    rows["alignment"], rows["uniformity"] = f"{alignment(distances):.3f}", f"{uniformity(z):.2f}"
    if "val_exact/map_at_r" in metrics:
        rows["MAP@R % by adaptive distance"] = percent(metrics["val_exact/map_at_r"])
    return rows


@torch.no_grad()
def describe_iaa(run: Run, learner: Learner, alone: Run) -> list[str]:
    """Say where IAA's synthetics lie."""
    assert learner.iaa is not None
    found, intensity = [], learner.iaa.intensity_in(run.best - 1)
    for seed, (features, labels) in enumerate(run.features(learner)):
        z = at_least_float32(learner.head(features))
        drawn = learner.iaa(z, labels, run.best - 1, torch.Generator(z.device).manual_seed(seed))
        if drawn is None:
            return [f"iaa: nothing is drawn before epoch {learner.iaa.start_epoch + 1}"]
        draws = len(drawn) // len(z)
        zh, cosine = normalize(z, dim=1), normalize(z, dim=1) @ normalize(drawn, dim=1).T
        same = labels[:, None] == labels
        own_copy = torch.eye(len(z), dtype=torch.bool, device=z.device).repeat(1, draws)
        own, other = same.repeat(1, draws) & ~own_copy, ~same.repeat(1, draws)
        among_real = zh @ zh.T
        hardest_negative = among_real.masked_fill(same, -2).amax(1, keepdim=True)
        positive = same ^ torch.eye(len(z), dtype=torch.bool, device=z.device)
        hardest_positive = among_real.masked_fill(~positive, 2).amin(1, keepdim=True)
        found.append([
            cosine[own_copy].mean(), among_real[positive].mean(), hardest_negative.mean(),
            ((cosine > hardest_negative) & other).any(0).float().mean(),
            ((cosine < hardest_positive) & own).any(0).float().mean(),
        ])  # fmt: skip
    copy, mate, negative, as_negative, as_positive = torch.tensor(found).mean(0).tolist()
    return [
        f"iaa: drawn with intensity {intensity:.2f}; cosine of a synthetic to its source {copy:.2f}, of a real image "
        f"to its class {mate:.2f}, to the nearest other {negative:.2f}",
        f"     {as_negative:.0%} of the synthetics are nearer to an image of another class than all real ones of the "
        f"batch, {as_positive:.0%} are farther from one of their own",
    ]


@torch.no_grad()
def describe_sgar(run: Run, learner: Learner, alone: Run) -> list[str]:
    """Say how similar SGAR's synthetics are to their sources; did the embedding learn it, or the projection?."""
    sgar, settings = learner.sgar, run.config.at(run.best - 1).sgar
    assert sgar is not None and settings is not None
    similarity = []
    for seed, (features, _) in enumerate(run.features(learner)):
        zh = normalize(at_least_float32(learner.head(features)), dim=1)
        generator = torch.Generator(zh.device).manual_seed(seed)
        offsets = radial.draw_offsets(zh, sgar.intensity, sgar.count, generator, sgar.shared_directions)
        source, drawn = (normalize(x @ sgar.projection.T, dim=-1).relu() for x in (zh, zh + offsets))
        similarity.append(torch.cat([(source * source).sum(1)[None], (drawn * source).sum(2)]))
    c = torch.cat(similarity, 1)
    steps = " ".join(f"{x.mean():.3f}±{x.std():.3f}" for x in c[1:])
    by_geometry = 1 / (1 + (sgar.intensity * torch.arange(1, sgar.count + 1)) ** 2).sqrt()
    pairs = [*itertools.combinations(range(sgar.count), 2)]
    met = torch.stack([c[1 + i] - c[1 + j] >= sgar.margin for i, j in pairs]).float().mean().item()
    met_by_geometry = sum(by_geometry[i] - by_geometry[j] >= sgar.margin for i, j in pairs)
    torch.manual_seed(0)
    fresh = settings.build(Sizes(0, 0, len(sgar.projection), 0)).to(sgar.projection)
    without = alone.learner_after(alone.best)
    terms = [
        mean_rank(run, learner, sgar),
        mean_rank(run, learner, fresh),
        mean_rank(alone, without, fresh),
    ]
    return [
        f"sgar: similarity of the source to itself {c[0].mean():.3f}, after each step {steps}",
        f"      in many dimensions a random step gives {' '.join(f'{x:.3f}' for x in by_geometry)} of it, by geometry "
        "alone",
        f"      pairs of steps that keep the margin of {sgar.margin:g}: {met:.0%}, by geometry alone "
        f"{met_by_geometry / len(pairs):.0%}",
        f"      ranking term {terms[0]:.4f}; by a fresh projection {terms[1]:.4f}, and {terms[2]:.4f} of the embedding "
        "that was trained without it",
    ]


def mean_rank(run: Run, learner: Learner, sgar: torch.nn.Module) -> float:
    """Return SGAR's ranking term of a learner's embeddings, the mean over the batches."""
    values = [
        sgar(at_least_float32(learner.head(features)), labels, None, torch.Generator(features.device).manual_seed(seed))
        for seed, (features, labels) in enumerate(run.features(learner))
    ]
    return float(np.mean([rank.item() for rank, _, _ in values]))


def describe_namr(run: Run, learner: Learner, alone: Run) -> list[str]:
    """Say how NAMR's weights differ from image to image, and which pairs its term draws nearer."""
    assert learner.namr is not None
    weights, found = [], []
    for features, labels in run.features(learner):
        with torch.no_grad():
            z, s = at_least_float32(learner.head(features)), learner.namr.structure(features)
            plain = plain_distance(z)
            scale = plain.sum() / (len(z) * (len(z) - 1))
            centers = cluster_centers(plain / scale, learner.namr.centers, learner.namr.t, learner.namr.spacing)
            distance = adaptive_distance(z / scale, s)
        distance.requires_grad_()
        (slope,) = torch.autograd.grad(DistanceToCenters.apply(distance, centers, learner.namr.alpha), distance)
        same = labels[:, None] == labels
        of_class = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        weights.append(s)
        found.append([(slope[of_class] < 0).float().mean(), (slope[~same] > 0).float().mean()])
    s, (apart, nearer) = torch.cat(weights), torch.tensor(found).mean(0).tolist()
    return [
        f"namr: weights of dimensions {s.mean():.2f}, between dimensions ±{s.mean(0).std():.3f}, by image "
        f"±{s.std(0).mean():.3f}",
        f"      it pushes {apart:.0%} of the pairs of a class apart, and draws {nearer:.0%} of those of different "
        "classes nearer",
    ]


DESCRIBE: dict[str, Callable[[Run, Learner, Run], list[str]]] = {
    "iaa": describe_iaa,
    "sgar": describe_sgar,
    "namr": describe_namr,
}


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def shown_epochs(run: Run) -> list[int]:
    """Return the epochs that the table has a row for: all, or some evenly spread where there are many."""
    epochs = sorted(run.scores)
    return sorted({epochs[round(i)] for i in np.linspace(0, len(epochs) - 1, min(MOST_ROWS, len(epochs)))})


def table_of_epochs(runs: dict[str, Run], pulls: dict[str, dict[int, dict[str, Pull]]], shown: list[int]) -> list[str]:
    """Return a row for each of some epochs: pulls, the gate, validation."""
    terms = [(method, term) for method, of_run in pulls.items() for term in of_run[shown[-1]]]
    heads = ["gate open" if term == "gate" else term for _, term in terms]
    rows = [["after epoch", *heads, *(f"MAP@R {method}" for method in runs)]]
    for epoch in shown:
        cells = []
        for method, term in terms:
            size, direction = pulls[method][epoch].get(term, Pull(0, 0))
            cells.append(f"{size:.0%}" if term == "gate" else f"{size:.2g} {direction:+.2f}" if size else "none")
        rows.append([str(epoch), *cells, *(percent(run.scores[epoch]["val/map_at_r"]) for run in runs.values())])
    return aligned(rows)


def table_of_embeddings(columns: dict[str, dict[str, str]]) -> list[str]:
    """Return a row for each measure, a column for each run."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    return aligned([["at the best epoch, validation classes", *columns], *rows])


def diagnose(recipe: str, assignments: Sequence[str], methods: Sequence[str]) -> Iterator[str]:
    """Train and look; yields lines.

    Raises:
        ValueError: A value is refused.
    """
    for assignment in assignments:
        if (method := method_of(assignment)) and method not in methods:
            fail(2, f"bad input: {assignment} cannot act: {method} is not among --methods {' '.join(methods)}")
    runs = {method: train(recipe, assignments, method) for method in (ALONE, *methods)}
    alone = runs[ALONE]
    config, train_set, validation = alone.config, alone.splits.train, alone.validation.query
    yield (
        f"{recipe}: {config.loss.name}, {config.epochs} epochs, seed {config.seed}; {len(train_set.class_names)} "
        f"training classes ({len(train_set)} images), {len(validation.class_names)} for validation ({len(validation)})"
    )
    best = {method: run.learner_after(run.best) for method, run in runs.items()}
    yield from ("", *table_of_embeddings({m: measure_embedding(run, best[m]) for m, run in runs.items()}), "")
    shown = shown_epochs(alone)
    pulls = {
        method: {epoch: measure_pulls(runs[method], runs[method].learner_after(epoch), epoch) for epoch in shown}
        for method in methods
    }
    yield from (*table_of_epochs(runs, pulls, shown), LEGEND, "")
    for method in methods:
        yield from DESCRIBE[method](runs[method], best[method], alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("assignments", nargs="*", metavar="key=value")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    options = parser.parse_args()
    keep_between_runs()
    for line in diagnose(options.recipe, options.assignments, options.methods):
        print(line, flush=True)


if __name__ == "__main__":
    run_script(main, "the same command goes on")
