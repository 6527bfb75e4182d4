"""The door of the server: who comes in, to what, and with how much. Middleware around Streamlit's own routes.

- **Host and Origin.** A page of another site whose name is made to point here (DNS rebinding) comes with that name, and
  is turned away; so is a page of another site that writes to us or opens a connection.
- **Routes.** Of Streamlit's inner ones those that a browser needs, by name; no metrics, no interface for agents.
- **Messages.** Of a browser's those that pages need. Among the others is one that empties the caches of the server for
  all, the queue of runs with them.
- **Bytes.** A file that is brought is counted before it is read, for its visitor and for all.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator

import streamlit as st
from google.protobuf.message import DecodeError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from streamlit import runtime
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager

from trsp_core.errors import TrspError
from trsp_core.runs import limits

INNER = ("health", "host-config", "stream", "upload_file", "bidi-components")
MESSAGES = ("rerun_script", "stop_script", "app_heartbeat", "file_urls_request", "backend_operation_request")
WRITING = ("POST", "PUT", "PATCH", "DELETE")
_HOST = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9_.-]{1,253}))(?::\d{1,5})?")
UPLOAD = re.compile(r"/_stcore/upload_file/([^/]+)/([^/]+)/?$")
FRAMING = 1_000_000  # bytes that a form has beside its file, at most
LEAST = 20_000  # bytes that a file counts for at least: an empty one takes room too
NOT_HERE = "There is nothing here.\n"
ANOTHER_NAME = (
    'This server does not go by this name. Who runs it can add the name: --server.allowedHosts=NAME (see "Names" in '
    "docs/deploy.md).\n"
)
ANOTHER_SITE = "This came from a page of another site.\n"
TOO_MANY = "Too many pages are open from your network address.\n"
FULL = "There is no room for this file now: your share, or that of all, is in use. Close other tabs, or wait.\n"
TOO_LARGE = "This file is too large.\n"


def middleware() -> list[Middleware]:
    """The door, for `st.App`. Ends the process where the environment leaves open what the limits are."""
    try:
        limits.check_environment()
    except TrspError as error:
        sys.exit(str(error))
    return [Middleware(Door)]


class Door:
    """Counts each visitor's open tabs and the bytes of the files that he has here. There is one a server."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self._tabs: Counter[str] = Counter()
        self._files: dict[tuple[str, str, int], tuple[str, int, bool]] = {}
        self._numbers = itertools.count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        if refusal := _refusal(connection):
            await refusal(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._connect(connection, receive, send)
        elif scope["method"] == "PUT" and (address := UPLOAD.search(scope["path"])):
            await self._receive(connection, address[1], address[2], receive, send)
        else:
            await self._app(scope, receive, send)

    async def _connect(self, connection: HTTPConnection, receive: Receive, send: Send) -> None:
        """Open a tab, if its visitor may have one more. Messages that pages do not need are dropped."""

        async def messages() -> Message:
            while True:
                message = await receive()
                if message["type"] != "websocket.receive" or _is_known(message.get("bytes")):
                    return message

        visitor = _visitor(connection)
        if self._tabs[visitor] >= limits.current().connections_per_visitor:
            await PlainTextResponse(TOO_MANY, 429)(connection.scope, receive, send)
            return
        self._tabs[visitor] += 1
        try:
            await self._app(connection.scope, messages, send)
        finally:
            self._tabs[visitor] -= 1
            if not self._tabs[visitor]:
                del self._tabs[visitor]

    async def _receive(self, connection: HTTPConnection, session: str, file: str, receive: Receive, send: Send) -> None:
        """Receive a file. Room for it is reserved before its first byte is read, and freed if it does not stay."""
        most = min(limits.current().upload_bytes, st.get_option("server.maxUploadSize") * 2**20) + FRAMING
        length = connection.headers.get("content-length", "")
        size = int(length) if length.isascii() and length.isdigit() and len(length) < 16 else most
        if size > most:
            await PlainTextResponse(TOO_LARGE, 413)(connection.scope, receive, send)
            return
        remaining = most

        async def counted() -> Message:
            nonlocal remaining
            message = await receive()
            remaining -= len(message.get("body", b""))
            if remaining < 0:
                raise HTTPException(413, TOO_LARGE)
            return message

        with self._room(_visitor(connection), session, file, max(size, LEAST)) as there:
            if there:
                await self._app(connection.scope, counted, send)
            else:
                await PlainTextResponse(FULL, 413)(connection.scope, receive, send)

    @contextlib.contextmanager
    def _room(self, visitor: str, session: str, file: str, size: int) -> Iterator[bool]:
        """Reserve `size` bytes while the file arrives. Yields whether there were as many left."""
        bounds = limits.current()
        self._forget()
        own = sum(held for who, held, _ in self._files.values() if who == visitor)
        every = sum(held for _, held, _ in self._files.values())
        if own + size > bounds.visitor_bytes or every + size > bounds.held_bytes:
            yield False
            return
        key = session, file, next(self._numbers)
        self._files[key] = visitor, size, True
        try:
            yield True
        finally:
            self._files[key] = visitor, size, False
            self._forget()

    def _forget(self) -> None:
        """Drop the files that Streamlit no longer holds: their tab has gone, or another has come in their place."""
        manager = runtime.get_instance().uploaded_file_mgr
        assert isinstance(manager, MemoryUploadedFileManager)
        storage = manager.file_storage
        newest = {key[:2]: key for key in self._files}
        for key, (_, _, coming) in list(self._files.items()):
            session, file, _ = key
            if not coming and (file not in storage.get(session, {}) or newest[key[:2]] != key):
                del self._files[key]


def _visitor(connection: HTTPConnection) -> str:
    return limits.visitor(
        connection.client.host if connection.client else None, "x-forwarded-for" in connection.headers
    )


def _refusal(connection: HTTPConnection) -> PlainTextResponse | None:
    """Why somebody is turned away at once; None where he is not."""
    host, origin = connection.headers.get("host", ""), connection.headers.get("origin")
    if not host_is_ours(host):
        return PlainTextResponse(ANOTHER_NAME, 403)
    writes = connection.scope["type"] == "websocket" or connection.scope["method"] in WRITING
    if writes and origin is not None and not _origin_is_ours(origin, host):
        return PlainTextResponse(ANOTHER_SITE, 403)
    _, inner, rest = connection.scope["path"].partition("/_stcore")
    if inner and rest.strip("/").split("/")[0] not in INNER:
        return PlainTextResponse(NOT_HERE, 404)
    return None


def host_is_ours(host: str) -> bool:
    """Whether this server goes by the name in a Host header.

    By its own machine's names always; by `server.allowedHosts`; where none are named, by its address, by any address if
    it listens at all of them (nobody else can have an address point here), by the name of its Space, and in a demo by
    any name: it is for everybody, and there is nothing behind it that its visitors may not do.
    """
    name = _name(host)
    if not name:
        return False
    if name == "localhost" or _is_loopback(name):
        return True
    if patterns := [pattern.strip().lower().rstrip(".") for pattern in st.get_option("server.allowedHosts")]:
        return any(p in ("*", name) or (p.startswith("*.") and name.endswith(p[1:])) for p in patterns)
    address = (st.get_option("server.address") or "").strip("[]").lower()
    ours = (address, st.get_option("browser.serverAddress"), os.environ.get("SPACE_HOST", "").lower())
    if limits.current().demo or name in ours:
        return True
    at_all = address in ("", "0.0.0.0", "::")  # noqa: S104  # nosec B104 - compared, not listened at
    return at_all and _is_address(name)


def _origin_is_ours(origin: str, host: str) -> bool:
    patterns = [pattern.strip().lower().rstrip("/") for pattern in st.get_option("server.corsAllowedOrigins")]
    scheme, _, where = origin.lower().partition("://")
    return bool(scheme in ("http", "https") and where and (where == host.lower() or origin.lower() in patterns))


def _name(host: str) -> str:
    """The name in a Host header without its port; "" where it is none."""
    match = _HOST.fullmatch(host.lower())
    return (match[1] or match[2]).rstrip(".") if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def _is_known(data: bytes | None) -> bool:
    """Whether a message is one that pages need, or none at all: Streamlit closes the connection then."""
    if data is None:
        return True
    try:
        return BackMsg.FromString(data).WhichOneof("type") in MESSAGES
    except DecodeError:
        return True
