"""The page of `dml demo`, by NiceGUI. It is served to this machine alone, with the pictures of the index alone."""

import asyncio
import base64
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, Response
from nicegui import html, ui
from nicegui.events import UploadEventArguments
from starlette.formparsers import MultiPartParser
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dml_core.data.pictures import BadPicture
from pipelines.serving.demo import SIDE, Demo, DemoAnswer, make_thumbnail
from pipelines.serving.index import Hit

HOSTS = ["127.0.0.1", "localhost"]

LARGEST_PICTURE = 32 << 20  # bytes

MOST_NEIGHBORS = 100

# Nothing from elsewhere, whatever the library would ask for. It compiles templates, and has scripts in the page.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval'; img-src 'self' data:; frame-ancestors 'none'"

PAGES = Path(__file__).parents[1] / "pages"

MultiPartParser.spool_max_size = LARGEST_PICTURE  # beyond it files would go to the disk


def listen(port: int) -> socket.socket:
    """Listen on a port of 127.0.0.1; 0: any that is free. ValueError where it is taken."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(("127.0.0.1", port))
        server.listen()
    except OSError as error:
        server.close()
        raise ValueError(f"--port {port}: {error.strerror}; --port 0 takes any that is free") from None
    return server


def serve(demo: Demo, server: socket.socket) -> None:
    """Serve the page on a socket that listens, until Ctrl-C or SIGTERM raises KeyboardInterrupt."""
    app = FastAPI(openapi_url=None)

    @app.get("/picture/{item}")
    def picture(item: int) -> Response:
        """Send the picture of an item. By number: nobody can name a path."""
        if not 0 <= item < demo.index.about.rows:
            return Response(status_code=404)
        try:
            return Response(make_thumbnail(demo.content(item)), media_type="image/webp")
        except (BadPicture, OSError) as error:
            logging.getLogger(__name__).warning("the picture of item %d cannot be shown: %s", item, error)
            return Response(status_code=404)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Refuse large uploads, and forbid the page everything from elsewhere."""
        if request.method == "POST" and not 0 <= int(request.headers.get("content-length", -1)) <= LARGEST_PICTURE:
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
        uvicorn.Server(config).run(sockets=[server])


class Page:
    """What one visitor sees: a query, and the pictures nearest to it.

    Attributes:
        title, picture: The query's name and content.
    """

    def __init__(self, demo: Demo, thread: ThreadPoolExecutor):
        """Build the page. thread: answers the queries of all visitors, one after the other."""
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
            auto_upload=True,
            max_file_size=LARGEST_PICTURE,
            on_upload=self.take_upload,
            on_rejected=self.refuse_upload,
        ).props("accept=image/* no-thumbnails flat")
        self.upload.add_slot("header", (PAGES / "choose.html").read_text())
        self.upload.add_slot("list", "<p>or drop it here, or paste it.</p>")
        ui.add_body_html(f"<script>const uploader = {self.upload.id};{(PAGES / 'demo.js').read_text()}</script>")
        with html.div().classes("choices"):
            rankings = ["structure-aware", "plain"] if about.structure else ["plain"]
            with html.fieldset():
                html.legend("Ranking")
                self.ranking = ui.radio(rankings, value=rankings[0], on_change=self.search).props("inline")
            most = min(MOST_NEIGHBORS, about.rows)
            self.k = ui.number(
                "Neighbours", value=min(10, most), min=1, max=most, step=1, precision=0, on_change=self.search
            ).props("debounce=300 outlined dense")
        self.status = ui.label().classes("status").props("role=status")
        self.results = html.section().props('aria-label="Neighbours"')

    async def take_upload(self, event: UploadEventArguments) -> None:
        """Search by a picture that the visitor has chosen, dropped or pasted."""
        self.upload.reset()
        self.title, self.picture = event.file.name, await event.file.read()
        await self.search()

    def refuse_upload(self) -> None:
        """Say why the browser did not send a file."""
        self.show_status(f"No picture, or one of more than {LARGEST_PICTURE >> 20} MB.", is_error=True)

    async def take_item(self, title: str, item: int) -> None:
        """Search by the picture of an item that was clicked."""
        try:
            self.picture = await asyncio.to_thread(self.demo.content, item)
        except (BadPicture, OSError) as error:
            return self.show_status(str(error), is_error=True)
        self.title = title
        await self.search()
        self.heading.run_method("focus")

    async def search(self) -> None:
        """Show the items nearest to the query, if there is one."""
        if not self.picture or self.k.value is None or self.k.out_of_limits:
            return
        self.show_status("searching ...")
        title, plain = self.title, self.ranking.value == "plain"
        ask = partial(self.demo.ask, self.picture, int(self.k.value), plain)
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self.thread, ask)
        except BadPicture as error:
            self.results.clear()
            return self.show_status(f"{title}: {error.bad[0][1]}", is_error=True)
        took = answer["milliseconds"]
        self.show_status(f"Embedded in {took['embed']:.1f} ms, searched in {took['search']:.1f} ms.")
        self.results.clear()
        with self.results:
            self.show_answer(title, answer)

    def show_status(self, text: str, is_error: bool = False) -> None:
        """Show a line above the results."""
        self.status.set_text(text)
        self.status.classes(add="wrong" if is_error else "", remove="" if is_error else "wrong")

    def show_answer(self, title: str, answer: DemoAnswer) -> None:
        """Show the query and the items nearest to it."""
        with html.div().classes("current-query"):
            html.img(
                src=f"data:image/webp;base64,{base64.b64encode(answer['thumbnail']).decode()}", alt=f"Query: {title}"
            )
            self.heading = html.h2(f"Nearest to {title}, {answer['ranking']}").props("tabindex=-1")
        with html.ol().classes("hits"):
            for hit in answer["hits"]:
                self.show_hit(hit)

    def show_hit(self, hit: Hit) -> None:
        """Show one item as a button that searches by it."""
        score = f"distance {hit['distance']:.4f}" if "distance" in hit else f"similarity {hit['similarity']:.4f}"
        name = hit["label"] or hit["path"] or f"picture {hit['id']}"
        with html.li(), html.button(type="button").on("click", partial(self.take_item, name, hit["id"])):
            html.img(src=f"/picture/{hit['id']}", alt=name, loading="lazy", width=SIDE, height=SIDE)
            html.span(f"{hit['place']}. {name}").classes("name")
            html.span(score).classes("note")
            if hit["path"] and hit["label"]:
                html.span(hit["path"]).classes("note")
