"""A set is known by its pictures: here, in a bucket and on web servers that tell more or less of their files."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dml_core.data import files
from dml_core.data.datasets import GALLERY, QUERY, Collection, LabelledImages, SetIdentity, names_array
from dml_core.data.user_sets import load_folder, load_table

NAMES = [f"{label}/{number}.png" for label in "abc" for number in range(4)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(f"picture {name}".encode())
    (root / "table.csv").write_text("\n".join(["path,label", *(f"{name},{name[0]}" for name in NAMES)]))
    return root


def replace_in_place(path: Path, content: bytes) -> None:
    """As a tool does that writes a picture of the same size again, some seconds later."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, (status.st_atime, status.st_mtime + 2))


def changed(before: SetIdentity, after: SetIdentity) -> list[str]:
    return [name for name in before._fields if getattr(before, name) != getattr(after, name)]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_is_known_by_its_files_and_not_by_its_place(root: Path, scheme: str) -> None:
    def identity(folder: Path = root) -> SetIdentity:
        return load_folder(f"{scheme}{folder}").identity()

    first = identity()
    assert (first.classes, first.images) == (3, 12) and first == identity()
    shutil.copytree(root, root.with_name("copied with its times"))
    root.rename(root.with_name("moved"))
    assert identity(root.with_name("moved")) == first == identity(root.with_name("copied with its times"))
    root.with_name("moved").rename(root)

    replace_in_place(root / NAMES[3], (root / NAMES[3]).read_bytes()[::-1])
    second = identity()
    assert changed(first, second) == ["digest", "pictures"]
    (root / "c" / "0.png").rename(root / "b" / "9.png")
    assert changed(second, identity()) == ["digest", "pictures", "listing"]
    (root / "d").mkdir()
    (root / "d" / "0.png").write_bytes(b"new")
    assert identity().classes == 4


def test_more_files_than_are_asked_about_one_by_one_are_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, asked = f"file://{root}/table.csv", list[str]()
    first = load_table(table, None).identity()
    monkeypatch.setattr(files, "FEW", 5)
    monkeypatch.setattr(files.RemoteFiles, "_ask", lambda self, name, call: asked.append(name))
    assert load_table(table, None).identity() == first and not asked


def test_a_file_that_is_not_there_has_a_stamp_of_its_own(root: Path) -> None:
    rows = ["path,label", *(f"{name},{name[0]}" for name in [*NAMES, "a/lost.png"])]
    (root / "table.csv").write_text("\n".join(rows))
    local = load_table(str(root / "table.csv"), None)
    remote = load_table(f"file://{root}/table.csv", None)
    for whole in (local, remote):
        stamps = whole.images.stamps(lambda line: None)
        assert stamps[-1] == "missing" and "missing" not in stamps[:-1] and "" not in stamps
    before = local.identity()
    (root / "a" / "lost.png").write_bytes(b"found")
    assert local.identity() != before


@pytest.mark.parametrize("tells", ["ETag", "Last-Modified", "nothing"])
def test_a_web_server_is_believed_or_its_files_are_read(root: Path, web, tells: str) -> None:
    url, server = web(root)
    etags = {name: f'"{number}"' for number, name in enumerate(NAMES)}

    def end_headers(self) -> None:
        if tells == "ETag" and (etag := etags.get(self.path.lstrip("/"))):
            self.send_header("ETag", etag)
        super(server, self).end_headers()

    def send_header(self, key: str, value: str) -> None:
        if key != "Last-Modified" or tells == "Last-Modified":
            super(server, self).send_header(key, value)

    server.end_headers, server.send_header = end_headers, send_header
    told = list[str]()
    first = load_table(f"{url}/table.csv", None).identity(told.append)
    assert load_table(f"{url}/table.csv", None).identity(told.append) == first
    replace_in_place(root / NAMES[5], (root / NAMES[5]).read_bytes()[::-1])
    etags[NAMES[5]] = '"new"'
    assert changed(first, load_table(f"{url}/table.csv", None).identity(told.append)) == ["digest", "pictures"]
    lines = [
        f"{url}: neither an ETag nor a time of change is told of 12 pictures; they are read once, to know them again"
    ]
    assert told == 3 * lines * (tells == "nothing")


def test_a_server_that_refuses_questions_about_files_is_read(root: Path, web, monkeypatch: pytest.MonkeyPatch) -> None:
    url, server = web(root)
    whole, first = (load_table(f"{url}/table.csv", None) for _ in range(2))
    server.do_HEAD = lambda self: self.send_error(405)
    assert whole.identity().listing == first.identity().listing
    monkeypatch.setattr(files, "FIRST_WAIT", 0.001)
    server.failures = 10**6
    with pytest.raises(ConnectionError, match=rf"{url}/a/.*: 5 attempts failed"):
        whole.identity()


def test_pictures_replaced_in_a_bucket_are_seen_by_the_next_run_of_this_process(root: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in NAMES:
        memory.pipe_file(f"/pictures/{name}", (root / name).read_bytes())
    first = load_folder("memory://pictures").identity()
    assert load_folder("memory://pictures").identity() == first
    memory.pipe_file(f"/pictures/{NAMES[0]}", (root / NAMES[0]).read_bytes()[::-1])
    assert changed(first, load_folder("memory://pictures").identity()) == ["digest", "pictures"]
    memory.rm("/pictures", recursive=True)


def test_how_pictures_are_used_is_part_of_the_set(root: Path) -> None:
    whole = load_folder(str(root))
    role, cameras = np.tile([QUERY, GALLERY], 6), np.arange(12) % 3
    others = [
        replace(whole, role=role),
        replace(whole, role=role[::-1]),
        replace(whole, test=np.array([1])),
        replace(whole, validation=np.array([1])),
        replace(whole, images=replace(whole.images, cameras=cameras)),
        replace(whole, lists={"small": np.array([1])}),
        replace(whole, draws=2),
    ]
    identities = [other.identity() for other in (whole, *others)]
    assert len({identity.digest for identity in identities}) == 8
    assert len({identity.pictures for identity in identities}) == 1


def test_embedded_pictures_are_known_by_their_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8), np.uint8)
    whole = Collection(LabelledImages(pixels, np.arange(6) // 2, ("a", "b", "c")))
    other = pixels.copy()
    other[3, 4, 5] += 1
    assert whole.identity() == Collection(replace(whole.images, images=pixels.copy())).identity()
    assert whole.identity() != Collection(replace(whole.images, images=other)).identity()


def test_names_that_lie_in_one_folder_are_listed_from_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not what else is in the bucket."""
    remote, names = files.RemoteFiles(f"file://{root.parent}"), names_array([f"set/b/{n}.png" for n in range(4)])
    assert {Path(path).parent.name for path in remote._list_folder_of(names)} == {"b"}
    monkeypatch.setattr(files, "FEW", 2)
    assert "" not in remote.stamps(names)
