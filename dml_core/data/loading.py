"""Batches of pictures, decoded and augmented in the order of a plan."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dml_core.data.datasets import LabelledImages
from dml_core.data.sampling import Rows
from dml_core.data.transforms import seeded


class Views(Dataset[Tensor]):
    """Views of labelled pictures, asked for by (sample, seed)."""

    def __init__(
        self, images: LabelledImages, size: int, evaluation: v2.Transform, training: v2.Transform | None = None
    ):
        self.images, self.size, self.evaluation, self.training = images, size, evaluation, training

    def __getitem__(self, key: tuple[int, int | None]) -> Tensor:
        sample, seed = key
        picture = self.images.picture(sample, self.size)
        if seed is None:
            return self.evaluation(picture)
        assert self.training is not None
        return seeded(self.training, picture, seed)

    def batches(self, rows: Iterable[Rows], processes: int = 0) -> Iterator[Tensor]:
        """uint8 (b, 3, S, S), one for each entry of `rows`, in that order; decoded here or in `processes` others."""
        loader = DataLoader(self, batch_sampler=list(rows), num_workers=processes, collate_fn=torch.stack)  # type: ignore[arg-type]
        yield from loader
