"""A real browser (Debian's chromium), told what to do over its DevTools protocol."""

import asyncio
import base64
import json
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

QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]


class Page:
    """One page of a browser that is up; every call waits for its answer."""

    def __init__(self, port: int):
        self.loop, self.sent = asyncio.new_event_loop(), 0
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
            pass
        return answer["result"]


@contextmanager
def page(width: int = 1500, height: int = 1000) -> Iterator[Page]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser: apt install chromium")
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
