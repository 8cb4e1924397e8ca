"""The page of `dml demo`, made by NiceGUI, and who is served: this machine alone, with what the index holds."""

import asyncio
import base64
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from nicegui import html, ui
from nicegui.events import UploadEventArguments
from starlette.formparsers import MultiPartParser
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dml_core.data.pictures import BadPicture
from pipelines.serving.demo import SIDE, Demo, small_picture

HOSTS = ["127.0.0.1", "localhost"]

MEGABYTES = 32  # of a picture, at most

MOST = 100  # neighbours

# Nothing from elsewhere, whatever the library would ask for. It compiles templates, and has scripts in the page.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval'; img-src 'self' data:; frame-ancestors 'none'"

PAGES = Path(__file__).parents[1] / "pages"

MultiPartParser.spool_max_size = MEGABYTES << 20  # beyond it files would go to the disk


def listening(port: int) -> socket.socket:
    """On 127.0.0.1. ValueError where the port is taken."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(("127.0.0.1", port))
        made.listen()
    except OSError as error:
        made.close()
        raise ValueError(f"--port {port}: {error.strerror}; --port 0 takes any that is free") from None
    return made


def serve(demo: Demo, socket: socket.socket) -> None:
    """Until Ctrl-C or SIGTERM, which come on as KeyboardInterrupt."""
    app = FastAPI(openapi_url=None)

    @app.get("/picture/{item}")
    def picture(item: int) -> Response:
        """By number: nobody asks for a path."""
        if not 0 <= item < demo.index.about.rows:
            return Response(status_code=404)
        try:
            return Response(small_picture(demo.content(item)), media_type="image/webp")
        except (BadPicture, OSError):
            return Response(status_code=404)

    @app.middleware("http")
    async def guarded(request: Request, call_next: Any) -> Response:
        if request.method == "POST" and not 0 <= int(request.headers.get("content-length", -1)) <= MEGABYTES << 20:
            return Response(status_code=413)
        response = await call_next(request)
        response.headers["content-security-policy"] = POLICY
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    with ThreadPoolExecutor(1) as thread:

        @ui.page("/", title="dml demo", favicon="🔍", dark=None)
        def page() -> None:
            Page(demo, thread)

        ui.run_with(app, language="en-US", tailwind=False, show_welcome_message=False)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[socket])


class Page:
    """What one visitor sees: a picture, and how it is ranked. thread: answers one question after the other."""

    def __init__(self, demo: Demo, thread: ThreadPoolExecutor):
        self.demo, self.thread = demo, thread
        self.title, self.picture = "", b""
        about, config = demo.index.about, demo.index.model.config
        ui.add_css((PAGES / "style.css").read_text() + (PAGES / "demo.css").read_text())
        with html.header():
            html.h1("Nearest pictures")
            method = " + ".join(config.method).upper() or "no method"
            model = f"{method} over {config.loss.name}, backbone {config.backbone.name}"
            html.p(f"Among {about.rows:,} pictures, by a model trained on {config.data.name}: {model}.").classes("lead")
        self.upload = ui.upload(
            auto_upload=True, max_file_size=MEGABYTES << 20, on_upload=self.uploaded, on_rejected=self.refused
        ).props("accept=image/* no-thumbnails flat")
        self.upload.add_slot("header", (PAGES / "choose.html").read_text())
        self.upload.add_slot("list", "<p>or drop it here, or paste it.</p>")
        ui.add_body_html(f"<script>const uploader = {self.upload.id};{(PAGES / 'demo.js').read_text()}</script>")
        with html.div().classes("choices"):
            ways = ["structure-aware", "plain"] if about.structure else ["plain"]
            with html.fieldset():
                html.legend("Ranking")
                self.way = ui.radio(ways, value=ways[0], on_change=self.rank).props("inline")
            most = min(MOST, about.rows)
            self.k = ui.number(
                "Neighbours", value=min(10, most), min=1, max=most, step=1, precision=0, on_change=self.rank
            ).props("debounce=300 outlined dense")
        self.status = ui.label().classes("status").props("role=status")
        self.found = html.section().props('aria-label="Neighbours"')

    async def uploaded(self, event: UploadEventArguments) -> None:
        self.upload.reset()
        self.title, self.picture = event.file.name, await event.file.read()
        await self.rank()

    def refused(self) -> None:
        self.tell(f"No picture, or one of more than {MEGABYTES} MB.", wrong=True)

    async def clicked(self, title: str, item: int) -> None:
        try:
            self.picture = await asyncio.to_thread(self.demo.content, item)
        except (BadPicture, OSError) as error:
            return self.tell(str(error), wrong=True)
        self.title = title
        await self.rank()
        self.asked.run_method("focus")

    async def rank(self) -> None:
        """Show the neighbours of the picture, if there is one."""
        if not self.picture or self.k.value is None or self.k.out_of_limits:
            return
        self.tell("searching ...")
        title, ask = self.title, partial(self.demo.ask, self.picture, int(self.k.value), self.way.value == "plain")
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self.thread, ask)
        except BadPicture as error:
            self.found.clear()
            return self.tell(f"{title}: {error.bad[0][1]}", wrong=True)
        took = answer["milliseconds"]
        self.tell(f"Embedded in {took['embed']:.1f} ms, searched in {took['search']:.1f} ms.")
        self.found.clear()
        with self.found:
            self.show(title, answer)

    def tell(self, text: str, wrong: bool = False) -> None:
        self.status.set_text(text)
        self.status.classes(add="wrong" if wrong else "", remove="" if wrong else "wrong")

    def show(self, title: str, answer: dict[str, Any]) -> None:
        with html.div().classes("asked"):
            html.img(src=f"data:image/webp;base64,{base64.b64encode(answer['shown']).decode()}", alt=f"Query: {title}")
            self.asked = html.h2(f"Nearest to {title}, {answer['ranking']}").props("tabindex=-1")
        with html.ol().classes("hits"):
            for hit in answer["hits"]:
                self.neighbour(hit)

    def neighbour(self, hit: dict[str, Any]) -> None:
        score = "distance" if "distance" in hit else "similarity"
        name = hit["label"] or hit["path"] or f"picture {hit['id']}"
        with html.li(), html.button(type="button").on("click", partial(self.clicked, name, hit["id"])):
            html.img(src=f"/picture/{hit['id']}", alt=name, loading="lazy", width=SIDE, height=SIDE)
            html.span(f"{hit['place']}. {name}").classes("name")
            html.span(f"{score} {hit[score]:.4f}").classes("note")
            if hit["path"] and hit["label"]:
                html.span(hit["path"]).classes("note")
