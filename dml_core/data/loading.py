"""Batches of pictures, decoded and augmented in the order of a plan."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dml_core.data.datasets import LabelledImages
from dml_core.data.pictures import BadPicture
from dml_core.data.sampling import Rows
from dml_core.data.transforms import View, apply_seeded


class Views(Dataset[Tensor]):
    """Views of labelled pictures. The key of a view is (sample, seed); seed None: nothing is random.

    Args:
        images: The pictures.
        evaluation: The view without a seed.
        training: The view with a seed, if there is any.
    """

    def __init__(self, images: LabelledImages, evaluation: View, training: View | None = None):
        self.images, self.evaluation, self.training = images, evaluation, training

    def __getitem__(self, key: tuple[int, int | None]) -> Tensor:
        sample, seed = key
        if seed is None:
            return self.evaluation.transform(self.images.picture(sample, self.evaluation.side))
        assert self.training is not None
        return apply_seeded(self.training.transform, self.images.picture(sample, self.training.side), seed)

    def __getitems__(self, rows: Rows) -> list[Tensor]:
        """Return the views of a batch. Raises BadPicture, which names all of its pictures that cannot be read."""
        views, bad = [], []
        for key in rows:
            try:
                views.append(self[key])
            except BadPicture as error:
                bad += error.bad
        if bad:
            raise BadPicture(bad)
        return views

    def batch(self, rows: Rows) -> Tensor:
        """Return the views of a batch, uint8 (b, 3, S, S)."""
        return torch.stack(self.__getitems__(rows))

    def batches(self, rows: Iterable[Rows], processes: int = 0) -> Iterator[Tensor]:
        """Yield one batch for each entry of `rows`, in that order, decoded in this process or in `processes` others."""
        loader = DataLoader(self, batch_sampler=rows, num_workers=processes)
        yield from loader
