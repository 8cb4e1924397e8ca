"""A real browser (Chromium or Chrome), told what to do over its DevTools protocol."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

# Chromium or Chrome, by their names in Linux distributions and where macOS has them.
PROGRAMS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
PROGRAMS += [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Google Chrome", "Chromium")]
NO_BROWSER = "no Chromium or Chrome in PATH; to get one: apt install chromium, dnf install chromium, or "
NO_BROWSER += "brew install --cask google-chrome"
KEYS = {" ": 32, "Tab": 9, "Escape": 27, "End": 35, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]


class Page:
    """One page of a browser that is up; every call waits for its answer."""

    def __init__(self, port: int):
        self.loop, self.sent = asyncio.new_event_loop(), 0
        self.events: list[dict[str, Any]] = []
        self.session = self._wait(self._open())
        made = self._wait(self._new(port))
        self.socket = self._wait(self._connect(made["webSocketDebuggerUrl"]))
        self._call("Page.enable")

    def go(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        """The value of an expression once it is true. AssertionError, with the page's text, if it never is."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, f"{script}\n{self.run('document.body.innerText')}"
            time.sleep(0.2)
        return found

    def listen(self) -> None:
        """From here on `told` knows of requests, exceptions and the console."""
        for domain in ("Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """What the browser has told by itself, of some sorts."""
        return [event["params"] for event in self.events if event["method"] in methods]

    def look(self, width: int, dark: bool) -> None:
        """The window's width, and what colours its user prefers."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def choose(self, field: str, file: Path) -> None:
        """A file for an input, told by its selector."""
        found = self._call("Runtime.evaluate", expression=f"document.querySelector('{field}')")
        self._call("DOM.setFileInputFiles", files=[str(file)], objectId=found["result"]["objectId"])

    def keep(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._wait(self.socket.close())
        self._wait(self.session.close())
        self.loop.close()

    def _wait(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 60))

    async def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    async def _new(self, port: int) -> dict[str, Any]:
        async with self.session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
            return await answer.json()

    async def _connect(self, url: str) -> aiohttp.ClientWebSocketResponse:
        return await self.session.ws_connect(url, max_msg_size=0)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        return self._wait(self._answer({"id": self.sent, "method": method, "params": params}))

    async def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        await self.socket.send_json(asked)
        while (answer := json.loads((await self.socket.receive()).data)).get("id") != asked["id"]:
            if "method" in answer:
                self.events.append(answer)
        return answer["result"]


@contextmanager
def page(width: int = 1500, height: int = 1000) -> Iterator[Page]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NO_BROWSER)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        flags = ["--headless", "--no-sandbox", *QUIET, f"--user-data-dir={home}", f"--window-size={width},{height}"]
        process = subprocess.Popen(
            [program, *flags, "--remote-debugging-port=0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            told, deadline = Path(home) / "DevToolsActivePort", time.monotonic() + 60
            while not told.is_file() or "\n" not in told.read_text():
                assert process.poll() is None and time.monotonic() < deadline, "chromium did not start"
                time.sleep(0.1)
            opened = Page(int(told.read_text().splitlines()[0]))
            try:
                yield opened
            finally:
                opened.close()
        finally:
            process.terminate()
            process.wait(30)
