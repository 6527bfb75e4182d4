"""A small model hub on this machine: what the hub's client asks of the real one, from folders, with its misfortunes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 16384  # bytes of a weight file that are sent at once
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server serves and how badly; what it was asked.

    Attributes:
        models: hub id to the folder of its files.
        gated: ids whose files are refused to whoever brings no token.
        delay: seconds before each answer; `pace` seconds between two pieces of a weight file.
        cuts: after so many bytes of a weight file the connection breaks, once for each entry.
        sent: bytes of weight files; `asked` are the requests, "GET /path bytes=...".
    """

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    delay: float = 0.0
    pace: float = 0.0
    cuts: list[int] = field(default_factory=list)
    sent: int = 0
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.url`, in threads of this process."""

    class Answer(_Answer):
        told = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Answer(BaseHTTPRequestHandler):
    told: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self) -> None:
        hub, (path, _, query) = self.told, self.path.partition("?")
        hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        time.sleep(hub.delay)
        if path == "/api/models":
            words = urllib.parse.parse_qs(query)["search"][0].lower().split()
            return self.say([self.info(i) for i in hub.models if all(word in i for word in words)])
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(tree|resolve|revision)/[^/]+(?:/(.+))?)?", path)
        if not found or found[1] not in hub.models:
            return self.refuse(404, "RepoNotFound")
        hub_id, what, file = found.groups()
        if what == "tree":
            return self.say([entry for entry in self.entries(hub_id)])
        if what != "resolve":
            return self.say(self.info(hub_id))
        if hub_id in hub.gated and "Authorization" not in self.headers:
            return self.refuse(401, "GatedRepo")
        if not (hub.models[hub_id] / file).is_file():
            return self.refuse(404, "EntryNotFound")
        return self.send(hub.models[hub_id] / file)

    def entries(self, hub_id: str) -> list[dict]:
        files = sorted(f for f in self.told.models[hub_id].iterdir() if f.is_file())
        return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files]

    def info(self, hub_id: str) -> dict:
        return {
            "id": hub_id,
            "modelId": hub_id,
            "sha": COMMIT,
            "downloads": 1234,
            "gated": "manual" if hub_id in self.told.gated else False,
            "tags": ["safetensors", "license:apache-2.0"],
            "safetensors": {"parameters": {"F32": 60_000}, "total": 60_000},
            "siblings": [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in self.entries(hub_id)],
        }

    def say(self, values) -> None:
        content = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, file: Path) -> None:
        content, first = file.read_bytes(), 0
        whole = len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first = int(asked[1])
            content = content[first : int(asked[2] or whole) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{whole}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if file.suffix != ".safetensors" or (asked and asked[2]):  # a header alone is no download
            self.wfile.write(content)
            return
        end = self.told.cuts.pop(0) if self.told.cuts else len(content)
        with contextlib.suppress(OSError):  # whoever asked is gone
            for start in range(0, end, PIECE):
                piece = content[start : min(start + PIECE, end)]
                self.wfile.write(piece)
                self.told.sent += len(piece)
                time.sleep(self.told.pace)
        if end < len(content):
            self.close_connection = True


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
