"""The page that searches by pictures, in a real browser: what it shows is what `dml index search` finds."""

import http.client
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipelines.config.recipe import parse_assignments
from pipelines.console import QUIET
from pipelines.models.checkpoint import read_config
from pipelines.serving import embed
from pipelines.serving.demo import open_demo
from tests.pipelines import browser
from tests.pipelines.conftest import ROWS, answer, refused

pytestmark = pytest.mark.usefixtures("tracked_folder", "without_ray")
TOLD = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
HEAD, STATUS = "document.querySelector('h2')?.innerText", "document.querySelector('[role=status]').innerText"
HITS = """[...document.querySelectorAll('ol button')].map(b =>
    [b.querySelector('img').getAttribute('src'), ...[...b.querySelectorAll('span')].map(s => s.textContent)])"""
MANY = """(async () => {
    const blob = await (await fetch('/picture/7')).blob();
    window.answers = await Promise.all([...Array(8)].map(() => {
        const form = new FormData();
        form.append('file', blob, 'many.webp');
        return fetch(getElement(uploader).url, {method: 'POST', body: form}).then(r => r.status);
    }));
})()"""

HANDED = """(async () => {{
    const blob = await (await fetch('/picture/9')).blob(), data = new DataTransfer();
    data.items.add(new File([blob], '{kind}.webp', {{type: 'image/webp'}}));
    document.dispatchEvent(new {event}('{kind}', {{clipboardData: data, dataTransfer: data}}));
}})()"""


@pytest.fixture(scope="module")
def served(index: Path) -> Iterator[str]:
    """URL of `dml demo` over the index; it ends as Ctrl-C ends it."""
    command = [sys.executable, "-m", "pipelines.cli", "demo", str(index), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        assert line, process.stderr.read()
        facts = json.loads(line)
        assert facts == facts | {"index": str(index), "rows": ROWS, "structure": True}
        yield facts["url"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        told = process.stderr.read()
        assert told.splitlines()[-1] == "stopped" and "Traceback" not in told


def same(shown: list[list[str]], hits: list[dict[str, Any]]) -> None:
    assert len(shown) == len(hits)
    for (source, name, score, *path), hit in zip(shown, hits, strict=True):
        kind = "distance" if "distance" in hit else "similarity"
        assert (source, name) == (f"/picture/{hit['id']}", f"{hit['place']}. {hit['label'] or hit['path']}")
        assert score.startswith(f"{kind} ") and float(score.split()[1]) == pytest.approx(hit[kind], abs=2e-3)
        assert path == ([hit["path"]] if hit["label"] else [])


def test_in_a_browser(index: Path, pictures: Path, served: str, tmp_path: Path) -> None:
    paths = pd.read_parquet(index / "items.parquet")["path"]
    image = pictures / paths[123]
    search = ["index", "search", index, "--image", image]
    aware, plain = answer(*search)["hits"], answer(*search, "--plain")["hits"]
    assert [hit["id"] for hit in aware] != [hit["id"] for hit in plain]
    (tmp_path / "large.png").write_bytes(bytes(33 << 20))
    with browser.page(1280, 900) as page:
        page.listen()
        page.go(served)
        page.wait_for("document.querySelectorAll('input[type=file]').length")
        page.choose("input[type=file]", image)
        page.wait_for(f"{HEAD} === 'Nearest to {image.name}, structure-aware'")
        same(page.run(HITS), aware)
        assert "Embedded in" in page.run(STATUS) and page.run(STATUS).endswith(" ms.")
        for dark in (False, True):
            for width in (1280, 400):
                page.look(width, dark)
                page.wait_for(f"document.body.classList.contains('body--dark') === {str(dark).lower()}")
                page.wait_for("document.querySelector('ol img').naturalWidth")
                assert page.run("document.documentElement.scrollWidth") <= width
                page.keep(tmp_path / f"{width}-{dark}.png")
        page.run("document.querySelectorAll('[role=radio]')[1].click()")
        page.wait_for(f"{HEAD} === 'Nearest to {image.name}, plain'")
        same(page.run(HITS), plain)
        field = "document.querySelector('input[type=number]')"
        page.run(f"{field}.value = '3'; {field}.dispatchEvent(new Event('input'))")
        page.wait_for("document.querySelectorAll('ol button').length === 3")
        same(page.run(HITS), plain[:3])

        # By keyboard: what Tab reaches and the space bar presses; the new heading is then where a reader goes on.
        for _ in range(20):
            page.press("Tab")
            if page.run("document.activeElement === document.querySelectorAll('ol button')[1]"):
                break
        page.press(" ")
        page.wait_for(f"{HEAD} === 'Nearest to {plain[1]['label']}, plain' && document.activeElement.tagName === 'H2'")
        found = answer("index", "search", index, "--image", pictures / plain[1]["path"], "--plain", "-k", "3")
        same(page.run(HITS), found["hits"])

        for file, told in {
            next(pictures.rglob("broken.png")): "not a picture",
            tmp_path / "large.png": "32 MB",
        }.items():
            page.choose("input[type=file]", file)
            page.wait_for(f"{STATUS}.includes('{told}') && document.querySelector('.status.wrong') !== null")
        page.run(MANY)
        assert page.wait_for("window.answers") == [200] * 8
        page.wait_for(f"{HEAD} === 'Nearest to many.webp, plain' && {STATUS}.endsWith(' ms.')")
        assert page.run(HITS)[0][0] == "/picture/7"
        for kind, event in (("paste", "ClipboardEvent"), ("drop", "DragEvent")):
            page.run(HANDED.format(kind=kind, event=event))
            page.wait_for(f"{HEAD} === 'Nearest to {kind}.webp, plain'")
            assert page.run(HITS)[0][0] == "/picture/9"

        assert (
            page.run("document.querySelectorAll('h1').length")
            == 1
            == page.run("document.querySelectorAll('main').length")
        )
        assert page.run("document.documentElement.lang") == "en-US"
        assert page.run("[...document.querySelectorAll('img')].every(i => i.alt)")
        assert page.run("document.querySelector('input[type=number]').labels.length || 0") == 1
        urls = {urlsplit(told["request"]["url"])[:2] for told in page.told("Network.requestWillBeSent")}
        assert urls <= {urlsplit(served)[:2], ("data", "")}
        assert not page.told(*TOLD)


def test_only_its_pictures_and_only_for_this_machine(served: str) -> None:
    def asked(path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(urlsplit(served).netloc, timeout=30)
        connection.request(method, path, headers=headers)
        found = connection.getresponse()
        return found.status, found.read()

    status, content = asked(f"/picture/{ROWS - 1}")
    assert status == 200 and Image.open(io.BytesIO(content)).format == "WEBP"
    for item in (str(ROWS), "-1", "../index.json", "..%2f..%2findex.json", "%2fetc%2fpasswd"):
        assert asked(f"/picture/{item}")[0] in (404, 422), item
    assert asked("/", Host="elsewhere.example")[0] == 400
    for header in ({"Content-Length": str(33 << 20)}, {"Transfer-Encoding": "chunked"}):
        assert asked("/", "POST", **header)[0] == 413
    with socket.socket() as other, pytest.raises(OSError):
        other.connect(("127.0.0.2", urlsplit(served).port))


def test_a_run_alone_shows_its_test_pictures(exact) -> None:
    config = read_config(Path(exact[1].checkpoint))
    test = embed.pictures_of(config, "test")
    with open_demo(exact[1].checkpoint, None, parse_assignments(["workers=1"]), QUIET) as shown:
        assert (
            shown.index.about.rows == len(test) < len(embed.pictures_of(config, "own")) and shown.index.about.structure
        )
        picture = np.asarray(Image.open(io.BytesIO(shown.content(5))))
        assert (picture == test.picture(5, 32).permute(1, 2, 0).numpy()).all()
        found = shown.ask(shown.content(5), 3, plain=True)
        first = {"place": 1, "id": 5, "path": None, "label": test.class_names[test.labels[5]]}
        assert found["hits"][0].pop("similarity") == pytest.approx(1, abs=1e-5) and found["hits"][0] == first
    assert not shown.index.folder.exists()


def test_bad_input(exact, index: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(index, tmp_path / "index")
    about, items = tmp_path / "index" / "index.json", tmp_path / "index" / "items.parquet"
    told = about.read_text()
    about.write_text(told.replace(str(pictures), f"{tmp_path}/moved"))
    assert "its pictures are not at hand" in refused("demo", about.parent, "--port", "0")
    with open_demo(str(about.parent), None, parse_assignments([f"data.root={pictures}"]), QUIET) as shown:
        assert shown.content(1) == (pictures / shown.pictures.entry(1)).read_bytes()
    about.write_text(json.dumps(json.loads(told) | {"root": None}))
    assert "it is not noted where its pictures are" in refused("demo", about.parent, "--port", "0")
    about.write_text(told)
    frame = pd.read_parquet(items)
    frame.assign(path="../secret.png").to_parquet(items)
    assert f"{ROWS} paths lead out of the root" in refused("demo", about.parent, "--port", "0")
    assert "not an index" in refused("demo", exact[2].checkpoint, "--index", tmp_path, "--port", "0")
    assert "built by another model" in refused("demo", exact[1].checkpoint, "--index", index, "--port", "0")
    assert "workers cannot act" in refused("demo", index, "workers=2", "--port", "0")
    assert "nothing: not a checkpoint folder" in refused("demo", "nothing", "--port", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: Address already in use" in refused("demo", index, "--port", str(port))


def test_the_package_that_is_missing_is_named(index: Path) -> None:
    code = "import sys; sys.modules['nicegui'] = None; from pipelines.cli.main import app; app()"
    found = subprocess.run([sys.executable, "-c", code, "demo", str(index)], capture_output=True, text=True)
    assert found.returncode == 2
    line = found.stderr.splitlines()[-1]  # after what is said where imports take long
    assert line == "bad input: dml demo: NiceGUI is not installed; pip install 'dml-ray[demo]'"
