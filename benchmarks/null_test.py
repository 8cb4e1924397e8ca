"""How often `dml compare --queries` calls two equal configs different: it should be 5 times of 100 at most.

Each repetition draws test classes of the glyphs, trains one config by 16 seeds, gives 8 of the trainings one name and 8
another, and compares them query by query. A training is real, but short: a linear head on fixed random features.

python benchmarks/null_test.py --repetitions 100
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dml_core import base_losses, heads
from dml_core.retrieval.ranked import rank_queries
from dml_core.retrieval.task import make_task
from pipelines.compare.queries import ALPHA, PairedQueries, compare_queries
from pipelines.compare.wording import QUERY_METRICS, QueryLine
from pipelines.config.sections import Data
from pipelines.data.sets import load_collection

PAIRS = 8
FEATURES, DIM = 256, 32  # numbers of a picture before and after the head
CLASSES, IMAGES, STEPS = 8, 4, 25  # of a batch, and of a training
TESTED = 30  # classes


def main(repetitions: int) -> None:
    torch.set_num_threads(1)
    images = load_collection(Data()).images
    labels, features = torch.from_numpy(images.labels), embed_fixed(images.names)
    called = dict.fromkeys(QUERY_METRICS, 0)
    by_classes, by_seeds = dict(called), dict(called)
    print("repetition   gain R@1  p classes    p seeds   gain MAP@R  p classes    p seeds")
    for repetition in range(repetitions):
        order = np.random.default_rng(repetition).permutation(len(images.class_names))
        tested = torch.from_numpy(np.isin(images.labels, order[:TESTED]))
        known = [torch.nonzero((labels == c) & ~tested)[:, 0] for c in labels[~tested].unique()]
        scores = [
            train_and_test(features, labels, known, tested, seed=2 * PAIRS * repetition + number)
            for number in range(2 * PAIRS)
        ]
        classes = np.unique(images.labels[tested.numpy()], return_inverse=True)[1]
        gains = {
            metric: np.stack([other[metric] - one[metric] for one, other in zip(scores[:PAIRS], scores[PAIRS:])])
            for metric in QUERY_METRICS
        }
        names = [str(number) for number in range(TESTED)]
        seeds = tuple(str(number) for number in range(PAIRS))
        lines = compare_queries([PairedQueries("the other", seeds, classes, names, gains)]).lines
        for line in lines:
            assert line.p_classes is not None and line.p_seeds is not None
            called[line.metric] += line.differs
            by_classes[line.metric] += line.p_classes <= ALPHA
            by_seeds[line.metric] += line.p_seeds <= ALPHA
        print(f"{repetition:>10} ", *(describe(line) for line in lines), flush=True)
    for metric in QUERY_METRICS:
        print(
            f"{metric}: {called[metric]} of {repetitions} called different; by the test over classes alone "
            f"{by_classes[metric]}, by the test over seeds alone {by_seeds[metric]}"
        )


def describe(line: QueryLine) -> str:
    return f"{100 * line.gain:>+9.2f} % {line.p_classes:>10.3f} {line.p_seeds:>10.3f}"


def embed_fixed(pictures: np.ndarray) -> Tensor:
    """Return random features of gray pictures (N, H, W): (N, FEATURES)."""
    pixels = torch.from_numpy(pictures).flatten(1).float() / 255
    projection = torch.randn(pixels.shape[1], FEATURES, generator=torch.Generator().manual_seed(0))
    return torch.relu((pixels - pixels.mean(0)) @ projection / pixels.shape[1] ** 0.5)


def train_and_test(
    features: Tensor, labels: Tensor, known: Sequence[Tensor], tested: Tensor, seed: int
) -> dict[str, np.ndarray]:
    """Train a head on the known classes' rows, and return each test query's score by the metric's name."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the head's weights
    head = heads.linear(FEATURES, DIM)
    loss = base_losses.build("multi_similarity", num_classes=int(labels.max()) + 1, dim=DIM)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(STEPS):
        chosen = torch.randperm(len(known), generator=generator)[:CLASSES].tolist()
        of_classes = [known[c][torch.randperm(len(known[c]), generator=generator)[:IMAGES]] for c in chosen]
        rows = torch.cat(of_classes)
        optimizer.zero_grad()
        loss(head(features[rows]), labels[rows]).backward()
        optimizer.step()
    with torch.inference_mode():
        z = normalize(head(features[tested]))
        ranked = rank_queries(make_task(labels[tested], None, z.device), z, None, (1,))
    return {metric: ranked.scores[metric.removeprefix("test/")].numpy() for metric in QUERY_METRICS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=100)
    main(parser.parse_args().repetitions)
