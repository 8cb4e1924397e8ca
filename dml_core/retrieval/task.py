"""A retrieval task as its labels have it: what each query is ranked against, and which of that is right.

Zheng et al. 2015, "Scalable Person Re-identification: A Benchmark", section 5: gallery items of the query's own label
and camera are left out of its ranking. They are neither right nor wrong, and take no rank.
A query that is itself in the gallery is left out of its own ranking in the same way.

Legend: N queries, M gallery items, Q queries of a block, K items that are left out, R right items of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dml_core.retrieval.full_list import relevant_positions


@dataclass(frozen=True)
class Task:
    """Labels of queries and gallery, and what is left out. make_task checks them.

    Attributes:
        labels: (N,) of the queries.
        targets: (M,) of the gallery.
        own: (N,) where each query stands in the gallery, -1: it is not in it; None: no query is.
        cameras: (N,) of the queries, -1: none; None: no camera is known.
        target_cameras: (M,) of the gallery.
        is_gallery: (M,) which of `targets` are the gallery, where the others are the queries; None: all.
    """

    labels: Tensor
    targets: Tensor
    own: Tensor | None = None
    cameras: Tensor | None = None
    target_cameras: Tensor | None = None
    is_gallery: Tensor | None = None

    @cached_property
    def is_query(self) -> Tensor:
        """(N,) which of `labels` are those of queries."""
        return torch.ones_like(self.labels, dtype=torch.bool) if self.is_gallery is None else ~self.is_gallery

    @cached_property
    def same_label(self) -> Tensor:
        """(N,) how many gallery items have each query's label, those that are left out among them."""
        _, classes = self._by_label
        return _count(self.labels, classes) * self.is_query

    @cached_property
    def matches(self) -> Tensor:
        """(N,) R: of these the ones that are not left out."""
        left_out = torch.zeros_like(self.same_label)
        if self._groups is not None:
            group, _, classes = self._groups
            left_out += _count(group, classes)
        if self.own is not None:
            everyone = torch.arange(len(self.own), device=self.own.device)
            left_out += (self.own >= 0) & ~self._shares_camera(everyone, self.own[:, None])[:, 0]
        return (self.same_label - left_out) * self.is_query

    def left_out(self, rows: Sequence[Tensor]) -> list[Tensor] | None:
        """List what is left out of the ranking of queries.

        Args:
            rows: For each block which queries (Q,) it has.

        Returns:
            For each block gallery positions (Q, K), -1 in empty places; None where nothing is left out of any.
        """
        own = None if self.own is None else [self.own[block][:, None] for block in rows]
        if self._groups is None:
            return own
        group, positions, classes = self._groups
        most = _most(_count(group, classes), rows)
        same = [relevant_positions(group[block], classes, positions, k) for block, k in zip(rows, most, strict=True)]
        return same if own is None else [torch.cat(pair, 1) for pair in zip(own, same, strict=True)]

    def right(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """List the right gallery items of queries: (Q, .) for each block of `rows`, ascending but for places of -1."""
        positions, classes = self._by_label
        blocks = []
        for block, most in zip(rows, _most(self.same_label, rows), strict=True):
            position = relevant_positions(self.labels[block], classes, positions, most)
            if self.own is not None:
                position = torch.where(position == self.own[block][:, None], -1, position)
            position = torch.where(self._shares_camera(block, position), -1, position)
            blocks.append(torch.where(self.matches[block][:, None] > 0, position, -1))
        return blocks

    def is_right(self, rows: Tensor, position: Tensor) -> Tensor:
        """Return (Q, k) bool, whether items in the ranking of queries `rows` are right; False at places of -1."""
        return (self.targets[position] == self.labels[rows][:, None]) & (position >= 0)

    @cached_property
    def _by_label(self) -> tuple[Tensor, Tensor]:
        """Positions of the gallery items, sorted by label, and these labels."""
        positions = self.targets.argsort(stable=True)
        if self.is_gallery is not None:
            positions = positions[self.is_gallery[positions]]
        return positions, self.targets[positions]

    @cached_property
    def _groups(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """A number for label and camera of each query; positions of the gallery items with a camera, and their numbers.

        The positions are sorted by number. None where no camera is known.
        """
        if self.cameras is None or self.target_cameras is None:
            return None
        (labels, targets), (cameras, target_cameras) = (
            torch.cat(pair).unique(return_inverse=True)[1].split([len(self.labels), len(self.targets)])
            for pair in ((self.labels, self.targets), (self.cameras, self.target_cameras))
        )
        several = max(len(self.labels), len(self.targets)) * 2  # more than there are cameras
        group = torch.where(self.cameras >= 0, labels * several + cameras, -1)
        target_group = torch.where(self.target_cameras >= 0, targets * several + target_cameras, -1)
        positions = target_group.argsort(stable=True)
        used = target_group[positions] >= 0
        if self.is_gallery is not None:
            used &= self.is_gallery[positions]
        positions = positions[used]
        return group, positions, target_group[positions]

    def _shares_camera(self, rows: Tensor, position: Tensor) -> Tensor:
        """Return (Q, .) bool, whether gallery items (Q, .) are of the cameras of queries `rows`."""
        if self.cameras is None or self.target_cameras is None:
            return torch.zeros_like(position, dtype=torch.bool)
        camera = self.cameras[rows][:, None]
        return (self.target_cameras[position] == camera) & (camera >= 0) & (position >= 0)


def make_task(
    labels: Tensor,
    targets: Tensor | None,
    device: torch.device,
    cameras: Tensor | None = None,
    target_cameras: Tensor | None = None,
    positions: Tensor | None = None,
    in_gallery: Tensor | None = None,
) -> Task:
    """Check a task's labels, and bring them to a device.

    Args:
        labels: (N,) of the queries.
        targets: (M,) of the gallery; None: the queries are the gallery, each left out of its own ranking.
        device: That of the embeddings.
        cameras: (N,) of the queries; a negative number where there is none.
        target_cameras: (M,) of the gallery, where there is one.
        positions: (N,) where each query stands in the gallery, where there is one; -1: it is not in it.
        in_gallery: (N,) bool, where no gallery is given: which samples are the gallery; the others are the queries.

    Raises:
        ValueError: Shapes or numbers are wrong; the message names the argument.
    """
    labels = _numbers("query_labels", labels, device)
    if targets is None:
        if target_cameras is not None or positions is not None:
            raise ValueError("gallery_cameras and query_positions need a gallery and gallery_labels")
        targets, own = labels, None if in_gallery is not None else torch.arange(len(labels), device=device)
    else:
        targets, own = _numbers("gallery_labels", targets, device), None
        if in_gallery is not None:
            raise ValueError("in_gallery: one entry a query, and no gallery beside it")
        if (cameras is None) != (target_cameras is None):
            raise ValueError("query_cameras and gallery_cameras go together: give both or neither")
    if cameras is not None:
        cameras = _numbers("query_cameras", cameras, device, len(labels), lowest=None)
        given = target_cameras is not None
        target_cameras = _numbers("gallery_cameras", target_cameras, device, len(targets), None) if given else cameras
    if positions is not None:
        own = _numbers("query_positions", positions, device, len(labels), lowest=-1)
        if bool((own >= len(targets)).any()):
            raise ValueError(f"query_positions: {int(own.max())} is no position in a gallery of {len(targets)} items")
        if different := int(((own >= 0) & (targets[own] != labels)).sum()):
            raise ValueError(f"query_positions: {different} queries have another label than the item at their position")
    if in_gallery is not None:
        if len(in_gallery) != len(labels):
            raise ValueError("in_gallery: one entry a query, and no gallery beside it")
        in_gallery = torch.as_tensor(in_gallery, device=device).bool()
    return Task(labels, targets, own, cameras, target_cameras, in_gallery)


def _numbers(
    name: str, values: object, device: torch.device, size: int | None = None, lowest: int | None = 0
) -> Tensor:
    """Return whole numbers (N,), int64. Raises ValueError for others. size: N, if known; lowest: the least allowed."""
    try:
        numbers = torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: no array of whole numbers; number the classes 0, 1, 2, ...") from None
    if numbers.ndim != 1:
        hint = f"; {name}.flatten() has it" if numbers.ndim and numbers.numel() == len(numbers) else ""
        raise ValueError(f"{name}: shape {tuple(numbers.shape)}, but one number a row is needed, shape (N,){hint}")
    if size is not None and len(numbers) != size:
        raise ValueError(f"{name}: {len(numbers)} numbers for {size} items")
    whole = numbers if numbers.is_complex() or not numbers.is_floating_point() else numbers.nan_to_num(0.5, 0.5, 0.5)
    if numbers.is_complex() or (numbers.is_floating_point() and bool((wrong := whole != whole.trunc()).any())):
        first = numbers[0] if numbers.is_complex() else numbers[wrong][0]
        raise ValueError(f"{name}: {first.item()} is no whole number")
    numbers = numbers.long()
    if lowest is not None and bool((wrong := numbers < lowest).any()):
        hint = "; leave out rows without a label" if name.endswith("labels") else ""
        raise ValueError(
            f"{name}: {int(wrong.sum())} of {len(numbers)} are below {lowest}, {int(numbers[wrong][0])} first{hint}"
        )
    return numbers


def _count(values: Tensor, among: Tensor) -> Tensor:
    """Return (N,), how often each of `values` (N,) is among others, which ascend."""
    return torch.searchsorted(among, values, right=True) - torch.searchsorted(among, values)


def _most(counts: Tensor, rows: Sequence[Tensor]) -> list[int]:
    """Return the greatest of the counts (N,) of each block, one at least."""
    if not rows:
        return []
    return torch.stack([counts[block].amax() for block in rows]).clamp(min=1).tolist()
