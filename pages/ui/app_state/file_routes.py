"""A run's exports, streamed from disk by a route of their own beside the pages. Streamlit's download button would
hold the whole file in the server's memory, for as long as a tab is open. And Home's other address, `/home`."""

from __future__ import annotations

import re
from urllib.parse import quote

import streamlit as st
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from trsp_core.errors import TrspError
from trsp_core.runs.store import Run, Store

_NAME = re.compile(r"[\w-][\w.-]{0,200}\.(zip|html|csv)")
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def routes() -> list[Route]:
    """The routes, under the base path that the server was given."""
    base = _base()
    return [Route(f"{base}/files/{{run}}/{{name}}", send), Route(f"{base}/home", to_start)]


def _base() -> str:
    """The base path, such as `/app`; "" where there is none."""
    base = st.get_option("server.baseUrlPath").strip("/")
    return f"/{base}" if base else ""


def to_start(request: Request) -> Response:
    """From `/home`, where people look for Home, to its address; what the query says goes along."""
    query = f"?{request.url.query}" if request.url.query else ""
    return RedirectResponse(f"{_base()}/{query}", 307)


def link(run: Run, name: str) -> str:
    """The address of a file among the run's exports, as seen from any page."""
    return f"files/{quote(run.id)}/{quote(name)}"


def send(request: Request) -> Response:
    """A file among a run's exports, in pieces; ranges are answered too."""
    name = request.path_params["name"]
    try:
        file = Store().get(request.path_params["run"]).exports_folder / name
    except TrspError as error:
        return PlainTextResponse(error.message, 404)
    if not _NAME.fullmatch(name) or file.is_symlink() or not file.is_file():
        return PlainTextResponse("There is no such file with this run.", 404)
    return FileResponse(file, filename=file.name, headers=HEADERS)
