"""What of a tree is a picture of the set, the same on disk and in a bucket, and what is said of the rest."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from dml_core.data.datasets import Collection
from dml_core.data.listing import Sieve, describe_passed_over
from dml_core.data.pictures import BadPicture, picture_endings
from dml_core.data.user_sets import load_folder


def picture(path: Path, kind: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (len(path.name), 9, 9)).save(path, kind)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for label in "ab":
        for number in range(3):
            picture(tmp_path / "set" / label / f"{number}.png")
    return tmp_path / "set"


@pytest.fixture(params=["local", "file", "memory"])
def load(request: pytest.FixtureRequest) -> Iterator[Callable[..., Collection]]:
    """load_folder of a local tree, of its URL, or of a copy in memory."""
    memory = fsspec.filesystem("memory")

    def load(tree: Path, **options) -> Collection:
        if request.param == "memory":
            for path in tree.rglob("*"):
                if path.is_file():
                    memory.pipe(f"/bucket/{path.relative_to(tree)}", path.read_bytes())
        return load_folder(
            {"local": str(tree), "file": f"file://{tree}", "memory": "memory://bucket"}[request.param], **options
        )

    yield load
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


JUNK = [
    "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "__MACOSX/._0.png",
    "._0.png",
    ".thumbs/0.png",
    "Thumbs.db",
    "desktop.ini",
]
JUNK += ["#recycle/0.png", "lost+found/0.png", "$RECYCLE.BIN/0.png", "System Volume Information/0.png", ".DS_Store"]


def test_junk_is_no_picture_and_no_class(tree: Path, load: Callable[..., Collection]) -> None:
    for place in (tree, tree / "a"):
        for name in JUNK:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((tree / "b" / "0.png").read_bytes())
    collection = load(tree)
    assert collection.images.class_names == ("a", "b") and len(collection.images) == 6
    assert sum(collection.passed_over.values()) == 2 * len(JUNK)
    assert collection.passed_over["files in or named @eaDir"] == 2
    assert collection.passed_over["files with a dot name"] == 6
    assert collection.notes[0].startswith("passed over: 6 files with a dot name, 2 files in or named ")


def test_all_that_pillow_reads_is_a_picture_and_the_rest_is_counted_by_ending(
    tree: Path, load: Callable[..., Collection]
) -> None:
    kinds = {
        "1.jfif": "JPEG",
        "2.JPE": "JPEG",
        "3.avif": "AVIF",
        "4.WEBP": "WEBP",
        "5.jp2": "JPEG2000",
        "6.tiff": "TIFF",
    }
    kinds |= {"7.apng": "PNG", "8.tga": "TGA", "9.pcx": "PCX"}
    for name, kind in kinds.items():
        picture(tree / "a" / name, kind)
    for name in ("notes.txt", "more.TXT", "label", "scan.pdf", "phone.heic"):
        (tree / "b" / name).write_text("")
    collection = load(tree)
    assert len(collection.images) == 6 + len(kinds)
    assert all(collection.images.picture(index, 8).shape[0] == 3 for index in range(len(collection.images)))
    counts = {"files that end with .txt": 2, "files without an ending": 1, "files that end with .pdf": 1}
    assert collection.passed_over == counts | {"files that end with .heic": 1}
    assert "pip install pillow-heif reads .heic" in collection.notes[0]


def test_what_pillow_cannot_show_is_no_picture() -> None:
    assert {".jpg", ".mpo", ".png", ".gif", ".bmp"} <= picture_endings()
    assert not {".pdf", ".eps", ".h5", ".mpg", ".wmf"} & picture_endings()


PLUGIN = """
from PIL import Image, PpmImagePlugin
Image.register_open("HEIF", PpmImagePlugin.PpmImageFile, lambda start: start.startswith(b"P6"))
Image.register_extension("HEIF", ".heic")
"""
READ = """
import json, sys
from dml_core.data.user_sets import load_folder
images = load_folder(sys.argv[1]).images
print(json.dumps([images.names.tolist(), images.picture(0, 8).shape]))
"""


def test_formats_of_plugins_are_read_and_one_that_fails_is_no_matter(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "pillow_jxl.py").write_text(PLUGIN)
    (tmp_path / "plugins" / "pillow_avif.py").write_text("raise RuntimeError('of another Pillow')")
    picture(tree / "a" / "0.heic", "PPM")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "plugins"), *sys.path])}
    command = [sys.executable, "-c", READ, str(tree)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    names, shape = json.loads(output)
    assert names[0] == "a/0.heic" and shape == [3, 20, 20]


def test_pictures_beside_class_folders_are_counted(tree: Path, load: Callable[..., Collection]) -> None:
    for number in range(5):
        picture(tree / f"{number}.png")
    collection = load(tree)
    assert len(collection.images) == 6 and collection.notes == ("passed over: 5 pictures beside the class folders",)


def test_patterns_leave_out_files_and_folders(tree: Path, load: Callable[..., Collection]) -> None:
    for name in (
        "a/0_mask.png",
        "a/deep/1_mask.png",
        "b/thumbs/0.png",
        "backup/0.png",
        "b/deep/thumbs/1.png",
        "c/0.png",
    ):
        picture(tree / name)
    patterns = ["*_mask*", "thumbs/", "./backup/*", "**/c", "nothing*"]
    collection = load(tree, exclude=patterns)
    assert collection.images.class_names == ("a", "b") and len(collection.images) == 6
    counts = {"*_mask*": 2, "thumbs/": 2, "./backup/*": 1, "**/c": 1}
    assert collection.passed_over == {f"data.exclude {pattern}": count for pattern, count in counts.items()}
    assert collection.notes[1].startswith("data.exclude: nothing* matches no file")


def test_folders_without_a_picture_are_named_with_the_way_on(tree: Path, load: Callable[..., Collection]) -> None:
    (tree / "annotations").mkdir()
    (tree / "annotations" / "a.xml").write_text("")
    with pytest.raises(
        ValueError, match=r"without a picture: annotations; data.exclude=\[annotations\] leaves them out"
    ):
        load(tree)
    assert len(load(tree, exclude=["annotations"]).images) == 6


def test_nothing_but_other_files_says_what_there_is(tmp_path: Path, load: Callable[..., Collection]) -> None:
    (tmp_path / "set").mkdir()
    picture(tmp_path / "set" / "x.png")
    (tmp_path / "set" / "x.txt").write_text("")
    with pytest.raises(
        ValueError, match=r"no class folders in it; expected .*1 files that end with .txt, 1 pictures beside"
    ):
        load(tmp_path / "set")


def test_order_and_classes_are_the_same_everywhere(tree: Path, load: Callable[..., Collection]) -> None:
    for name in ("a-b/0.png", "a b/0.png", "a/x/0.png", "a/x.png", "é/0.png"):
        picture(tree / name)
    here, there = load_folder(str(tree)).images, load(tree).images
    assert here.names.tolist() == there.names.tolist() and here.class_names == there.class_names
    assert (here.labels == there.labels).all() and here.class_names == ("a", "a b", "a-b", "b", "é")


def test_class_folders_that_differ_by_a_space_are_one_class(tree: Path, load: Callable[..., Collection]) -> None:
    for name in ("a ", "B"):
        picture(tree / name / "9.png")
    collection = load(tree)
    assert collection.images.class_names == ("B", "a", "b") and collection.images.labels.tolist()[-3:] == [2] * 3
    one, other = collection.notes
    assert one.startswith("class folders that differ only by spaces") and "'a' and 'a '" in one
    assert "different classes: 'B' and 'b'" in other


def test_bad_entries_end_nothing(tree: Path) -> None:
    """Links to themselves and to nothing, a pipe, a link to a file's child, names that are not UTF-8."""
    (tree / "a" / "loop.png").symlink_to("loop.png")
    (tree / "a" / "gone.png").symlink_to("nowhere.png")
    (tree / "b" / "through.png").symlink_to("0.png/1.png")
    os.mkfifo(tree / "a" / "pipe.png")
    for name in (b"caf\xe9", b"b/caf\xe9.png"):
        path = os.path.join(os.fsencode(tree), name)
        if not name.endswith(b"png"):
            os.mkdir(path)
            path = os.path.join(path, b"0.png")
        with open(path, "wb") as file:
            file.write((tree / "a" / "0.png").read_bytes())
    collection = load_folder(str(tree))
    images = collection.images
    assert collection.unreadable == {
        "a/pipe.png": "it is neither a file nor a folder",
        "b/caf\\xe9.png": "its name is not UTF-8; rename it (convmv -t utf8)",
        "caf\\xe9": "its name is not UTF-8; rename it (convmv -t utf8)",
    }
    reasons = {}
    for index in range(len(images)):
        try:
            images.picture(index, 8)
        except BadPicture as error:
            reasons.update(error.bad)
    assert {name: reason.lower() for name, reason in reasons.items()} == {
        "a/loop.png": "too many levels of symbolic links",
        "a/gone.png": "no such file or directory",
        "b/through.png": "not a directory",
    }


LIST = """
import json, os, sys
from dml_core.data.user_sets import load_folder
load_folder(sys.argv[1] + "/a", labelled=False)  # which imports what the other user may not read
if os.getuid() == 0:
    os.setuid(65534)  # whom permissions hold
print(json.dumps(load_folder(sys.argv[1]).unreadable))
try:
    load_folder(sys.argv[1] + "/closed")
except ValueError as error:
    print(error)
"""


def test_a_folder_that_may_not_be_read_is_named(tree: Path) -> None:
    (tree / "closed").mkdir()
    picture(tree / "closed" / "0.png")
    for path in tree.parents:
        if path.stat().st_uid == os.getuid() and path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    (tree / "closed").chmod(0)
    output = subprocess.run([sys.executable, "-c", LIST, str(tree)], check=True, capture_output=True, text=True).stdout
    unreadable, refusal = output.splitlines()
    assert json.loads(unreadable) == {"closed": "Permission denied"}
    assert refusal == f"data.root={tree}/closed: cannot be listed (Permission denied)"
    (tree / "closed").chmod(0o755)


def test_a_file_in_place_of_a_folder_is_named(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"data.root=.*0.png: not a folder but a file"):
        load_folder(str(tree / "a" / "0.png"))


def test_many_reasons_are_one_line() -> None:
    line = describe_passed_over({f"files that end with .{number}": 100 - number for number in range(20)})
    assert line.count("files that end") == 8 and line.endswith(", 1,038 of 12 other kinds") and "\n" not in line
    assert describe_passed_over({}) == "" and Sieve().notes() == []
