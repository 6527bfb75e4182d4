"""A run's exports, streamed from disk by a route of their own beside the pages. Streamlit's download button would
hold the whole file in the server's memory, for as long as a tab is open."""

from __future__ import annotations

import re
from urllib.parse import quote

import streamlit as st
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from trsp_core.errors import TrspError
from trsp_core.runs.store import Run, Store

_NAME = re.compile(r"[\w-][\w.-]{0,200}\.(zip|html|csv)")
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def routes() -> list[Route]:
    """The route, under the base path that the server was given."""
    base = st.get_option("server.baseUrlPath").strip("/")
    return [Route(f"{f'/{base}' if base else ''}/files/{{run}}/{{name}}", send)]


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
