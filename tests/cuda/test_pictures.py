"""Pictures on a GPU: views made there have the bits of a processor's, and no batch is overwritten early."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dml_core.data.datasets import LabelledImages
from dml_core.data.jpegs import JpegViews
from dml_core.data.loading import Views, sent_ahead
from dml_core.data.user_sets import load_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = torch.device("cuda")


@pytest.fixture
def photographs(tmp_path: Path) -> LabelledImages:
    """Smooth JPEGs, in which another decoder's rounding stays small, of all orientations; one is gray, one a PNG."""
    (tmp_path / "class").mkdir()
    y, x = np.mgrid[:240, :320]
    for number in range(10):
        channels = x * 255 // 320, y * 255 // 240, (x + y + 20 * number) % 560 * 255 // 560
        pixels = np.stack(channels, 2).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        Image.fromarray(pixels).save(tmp_path / "class" / f"{number}.jpg", quality=95, exif=exif)
    Image.fromarray(pixels).convert("L").save(tmp_path / "class" / "gray.jpg")
    Image.fromarray(pixels).save(tmp_path / "class" / "other.png")
    return load_folder(str(tmp_path)).images


def embedded_views(device: torch.device) -> list[torch.Tensor]:
    pixels = np.random.default_rng(0).integers(0, 255, (500, 32, 32), np.uint8)
    images = LabelledImages(pixels, np.zeros(500, np.int64), ("a",)).select(np.arange(400))
    views = Views(images, 32, "shift", torch.from_numpy(pixels).to(device))
    rows = [(7 * row % 400, 1000 + row) for row in range(300)]
    parts = [rows, rows[:128], rows[128:], [(sample, None) for sample, _ in rows]]
    return [*sent_ahead(views.batches(parts), device)]


def test_views_of_embedded_pictures_have_the_bits_of_the_processors() -> None:
    expected, found = embedded_views(torch.device("cpu")), embedded_views(GPU)
    for one, other in zip(expected, found, strict=True):
        assert other.is_cuda and torch.equal(one, other.cpu())
    assert torch.equal(found[0], torch.cat(found[1:3]))


def test_making_views_of_embedded_pictures_does_not_wait() -> None:
    embedded_views(GPU)
    images = LabelledImages(np.zeros((500, 32, 32), np.uint8), np.zeros(500, np.int64), ("a",))
    views = Views(images, 32, "shift", torch.from_numpy(images.images).to(GPU))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in views.batches([[(row, row) for row in range(128)]] * 3):
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_that_are_sent_ahead_arrive_whole_and_stay() -> None:
    """While the device is busy with each, as buffers that were reused early would show."""
    sources = [torch.full((64, 3, 224, 224), number, dtype=torch.uint8) for number in range(12)]
    weights = torch.randn(4096, 4096, device=GPU)
    sums = list[torch.Tensor]()
    for batch in sent_ahead(sources, GPU):
        for _ in range(20):
            weights = torch.nn.functional.normalize(weights @ weights)
        sums.append(batch.double().mean())
        del batch
    assert [mean.item() for mean in sums] == [*range(12)]


@pytest.mark.parametrize("processes", [0, 2])
def test_loader_of_photographs_pins_and_sends(photographs: LabelledImages, processes: int) -> None:
    views = Views(photographs, 64, "crop")
    rows = [[(sample, 10 * step + sample) for sample in range(len(photographs))] for step in range(4)]
    for batch, batch_rows in zip(sent_ahead(views.batches(rows, processes, True), GPU), rows, strict=True):
        assert torch.equal(batch.cpu(), views.batch(batch_rows))


@pytest.mark.parametrize("name", ["crop", "shift", "none"])
def test_jpegs_decoded_by_the_gpu_are_the_processors_but_for_rounding(photographs: LabelledImages, name: str) -> None:
    ours, theirs = JpegViews(photographs, 64, name, GPU), Views(photographs, 64, name)
    for seed in (None, 7):
        rows = [(sample, None if seed is None else seed + sample) for sample in range(len(photographs))]
        (views,) = sent_ahead(ours.batches([rows], 2), GPU)
        difference = (views.cpu().int() - theirs.batch(rows).int()).abs().float()
        assert difference.mean() < 2 and difference.quantile(0.99) < 8
        for row, view in zip(rows, views, strict=True):  # its bits do not depend on the batch
            assert torch.equal(ours.batch([row])[0], view)


def test_a_picture_of_the_processor_leaves_the_others_of_its_batch_as_they_are(photographs: LabelledImages) -> None:
    rows, file = [(sample, 3) for sample in range(6)], io.BytesIO()
    views = JpegViews(photographs, 64, "crop", GPU)
    whole = views.batch(rows)
    Image.effect_noise((320, 240), 80).convert("CMYK").save(file, "JPEG")
    Path(photographs.files.root, photographs.entry(2)).write_bytes(file.getvalue())
    assert torch.equal(views.batch(rows)[[0, 1, 3, 4, 5]], whole[[0, 1, 3, 4, 5]])
