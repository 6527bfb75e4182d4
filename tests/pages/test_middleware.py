"""What a stranger may send to the server, and with how much: a real server in demo mode, spoken to as no browser would.

Requests are raw HTTP and raw messages over WebSockets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import secrets
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator

import psutil
import pytest
import streamlit as st
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from pages.ui.app_state import middleware
from tests import ROOT
from tests.conftest import Server, serving
from trsp_core.errors import TrspError
from trsp_core.runs import limits
from trsp_core.runs.limits import DEMO, OPEN

IMAGE = {"TRSP_DEMO": "1", "STREAMLIT_SERVER_ENABLE_XSRF_PROTECTION": "false"}  # as the Dockerfile starts it
PROXY = {"FORWARDED_ALLOW_IPS": "127.0.0.1,::1"}
MB = 1_000_000


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Iterator[Server]:
    """A demo behind a proxy on this machine, so that a test can come from any address."""
    with serving(tmp_path_factory.mktemp("demo") / "runs", **IMAGE, **PROXY) as made:
        yield made


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Iterator[Server]:
    """The open mode, listening at this machine alone."""
    with serving(tmp_path_factory.mktemp("own") / "runs", TRSP_DEMO="0") as made:
        yield made


def port(server: Server) -> int:
    found = urllib.parse.urlsplit(server.url).port
    assert found
    return found


def ask(server: Server, method: str, path: str, body: bytes | Iterator[bytes] = b"", **headers: str) -> tuple[int, str]:
    """Status and text of one request; `_` in the name of a header is `-`."""
    line = http.client.HTTPConnection("127.0.0.1", port(server), timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        line.request(method, path, body or None, named, encode_chunked="Transfer-Encoding" in named)
        answer = line.getresponse()
        return answer.status, answer.read(100_000).decode("utf-8", "replace")
    finally:
        line.close()


class Tab:
    """A session as a browser has one, from an address of its own."""

    def __init__(self, server: Server, address: str = "192.0.2.1", **headers: str):
        self.server, self.address = server, address
        self.opened = contextlib.ExitStack()
        opening = connect(
            f"ws://127.0.0.1:{port(server)}/_stcore/stream",
            subprotocols=["streamlit"],  # type: ignore[list-item]
            additional_headers={"X-Forwarded-For": address, **headers},
            max_size=None,
            compression=None,
        )
        self.line: ClientConnection = self.opened.enter_context(opening)
        self.id, self.files = "", set[str]()

    def __enter__(self) -> Tab:
        self.rerun()
        return self

    def __exit__(self, *_: object) -> None:
        """The tab is gone, and its files with it; a server keeps them for two minutes else."""
        for path in self.files:
            ask(self.server, "DELETE", path)
        self.opened.close()

    def send(self, **kinds: bool) -> None:
        self.line.send(BackMsg(**kinds).SerializeToString())

    def rerun(self, page: str = "", query: str = "") -> str:
        """Open a page, and all that it shows, as one text."""
        message = BackMsg()
        message.rerun_script.page_name, message.rerun_script.query_string = page, query
        self.line.send(message.SerializeToString())
        shown = []
        while True:
            told = ForwardMsg.FromString(self.line.recv(60))  # type: ignore[arg-type]
            if told.WhichOneof("type") == "new_session":
                self.id = told.new_session.initialize.session_id or self.id
            elif told.WhichOneof("type") == "delta":
                shown.append(str(told.delta))
            elif told.WhichOneof("type") == "script_finished":
                return "\n".join(shown)

    def bring(self, size: int, file: str = "", **headers: str) -> int:
        """The status that a file of this size is answered with."""
        edge = "edge"
        head = f'--{edge}\r\nContent-Disposition: form-data; name="f"; filename="a.txt"\r\n\r\n'.encode()
        body = head + b"x" * size + f"\r\n--{edge}--\r\n".encode()
        path = f"/_stcore/upload_file/{self.id}/{file or secrets.token_hex(8)}"
        self.files.add(path)
        how = {"Content_Type": f"multipart/form-data; boundary={edge}", "X_Forwarded_For": self.address, **headers}
        if "Transfer_Encoding" in how:
            return ask(self.server, "PUT", path, (body[i : i + 65536] for i in range(0, len(body), 65536)), **how)[0]
        return ask(self.server, "PUT", path, body, **how)[0]


def memory(server: Server) -> int:
    """Bytes that the server holds."""
    (child,) = (c for c in psutil.Process().children() if f"--server.port={port(server)}" in c.cmdline())
    return child.memory_info().rss


# Uploads


def test_files_are_bounded_before_they_are_in_memory(demo):
    with Tab(demo) as warm:  # what the first page and the first upload load
        warm.bring(1000)
    before = memory(demo)
    with Tab(demo, "192.0.2.2") as first, Tab(demo, "192.0.2.2") as second:
        answers = [tab.bring(2 * MB - 1000) for _ in range(10) for tab in (first, second)]
        assert answers.count(204) == 5, "10 MB are one visitor's share, however many tabs he has"
        assert set(answers) == {204, 413}
    with contextlib.ExitStack() as tabs:
        many = [tabs.enter_context(Tab(demo, f"192.0.3.{n}")) for n in range(12)]
        answers = [tab.bring(2 * MB - 1000) for _ in range(4) for tab in many]
        assert answers.count(204) <= 20, "40 MB in all"
        assert answers.count(413) >= 28
    assert memory(demo) - before < 120 * MB


@pytest.mark.parametrize("headers", [{}, {"Transfer_Encoding": "chunked"}])
def test_a_file_that_is_too_large_is_not_read_to_its_end(demo, headers):
    with Tab(demo, f"192.0.4.{len(headers)}") as tab:
        with contextlib.suppress(ConnectionError):  # it may hang up on us first
            assert tab.bring(30 * MB, **headers) == 413
        assert tab.bring(1000, **headers) == 204


def test_room_comes_back_when_a_file_is_replaced_or_taken_away(demo):
    with Tab(demo, "192.0.5.1") as tab:
        assert [tab.bring(2 * MB - 1000, "same") for _ in range(12)] == [204] * 12
        for n in range(12):
            assert tab.bring(2 * MB - 1000, f"f{n}") == 204
            path = f"/_stcore/upload_file/{tab.id}/f{n}"
            assert ask(demo, "DELETE", path)[0] == 204


def test_a_thousand_empty_files_are_files_too(demo):
    with Tab(demo, "192.0.6.1") as tab:
        answers = [tab.bring(0) for _ in range(520)]
    assert answers.count(204) <= 500
    assert answers[-1] == 413


def test_a_file_for_nobodys_session_takes_no_room(demo):
    with Tab(demo, "192.0.7.1") as tab:
        known, tab.id = tab.id, secrets.token_hex(16)
        assert [tab.bring(2 * MB - 1000) for _ in range(8)] == [400] * 8
        tab.id = known
        assert tab.bring(2 * MB - 1000) == 204


def test_the_image_takes_no_larger_messages_than_pages_need(demo):
    with Tab(demo, "192.0.8.1") as tab:
        message = BackMsg()
        message.rerun_script.query_string = "x" * (3 * MB)
        tab.line.send(message.SerializeToString())
        with pytest.raises(WebSocketException):
            while True:
                tab.line.recv(20)
    with Tab(demo, "192.0.8.1") as tab:
        with contextlib.suppress(WebSocketException, ConnectionError):
            tab.line.send(b"x" * (60 * MB))
        with pytest.raises((WebSocketException, ConnectionError)):
            while True:
                tab.line.recv(20)
    assert ask(demo, "GET", "/_stcore/health")[0] == 200


# Names


STRANGE = (
    "evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "localhost@evil.example",
    "8.8.8.8", "[2001:db8::1]", "", "localhost:x", "a b", "%00",
)  # fmt: skip
ENTRIES = (("GET", "/"), ("GET", "/_stcore/health"), ("GET", "/files/x/y.zip"), ("PUT", "/_stcore/upload_file/a/b"))


@pytest.mark.parametrize("host", STRANGE)
def test_a_page_of_another_name_drives_nothing(own, host):
    for method, path in ENTRIES:
        assert ask(own, method, path, Host=host)[0] in (400, 403), (method, path)
    with pytest.raises(WebSocketException):
        Tab(own, Host=host)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST", "localhost."])
def test_its_own_names_are_answered(own, host):
    for name in (host, f"{host}:{port(own)}"):
        assert ask(own, "GET", "/", Host=name)[0] == 200
        assert ask(own, "GET", "/_stcore/health", Host=name)[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "file://", "http://127.0.0.1"])
@pytest.mark.parametrize("mode", ["own", "demo"])
def test_a_page_of_another_site_opens_no_connection_and_writes_nothing(mode, origin, request):
    server = request.getfixturevalue(mode)
    with pytest.raises(WebSocketException):
        Tab(server, Origin=origin)
    assert ask(server, "PUT", "/_stcore/upload_file/a/b", b"x", Origin=origin)[0] == 403
    with Tab(server, Origin=f"http://127.0.0.1:{port(server)}") as tab:
        assert tab.id


NAMES = [
    # address, allowedHosts, demo, Space; what is answered, what is not
    ("localhost", [], OPEN, "", ["localhost", "127.0.0.1", "::1"], ["10.0.0.5", "box.lan"]),
    ("0.0.0.0", [], OPEN, "", ["10.0.0.5", "127.0.0.1"], ["box.lan", "evil.example"]),
    ("10.0.0.5", [], OPEN, "", ["10.0.0.5", "localhost"], ["10.0.0.6", "evil.example"]),
    ("box.lan", [], OPEN, "", ["box.lan"], ["other.lan"]),
    ("0.0.0.0", ["trsp.example", "*.lab.example"], OPEN, "", ["trsp.example", "a.lab.example", "localhost"],
     ["lab.example", "evil.example", "10.0.0.5", "xlab.example"]),
    ("0.0.0.0", [], OPEN, "me-trsp.hf.space", ["me-trsp.hf.space", "10.0.0.5"], ["other.hf.space"]),
    ("0.0.0.0", [], DEMO, "", ["anything.example", "10.0.0.5"], [""]),
    ("0.0.0.0", ["trsp.example"], DEMO, "", ["trsp.example", "localhost"], ["anything.example"]),
]  # fmt: skip


@pytest.mark.parametrize(("address", "named", "bounds", "space", "ours", "others"), NAMES)
def test_the_names_of_a_server(address, named, bounds, space, ours, others, monkeypatch):
    told = {"server.address": address, "server.allowedHosts": named, "browser.serverAddress": "localhost"}
    monkeypatch.setattr(st, "get_option", told.get)
    monkeypatch.setenv("TRSP_DEMO", "1" if bounds is DEMO else "0")
    monkeypatch.setenv("SPACE_HOST", space)
    bracketed = [f"[{host}]" if ":" in host else host for host in ours]
    assert [host for host in bracketed if not middleware.host_is_ours(host)] == []
    assert [host for host in bracketed if not middleware.host_is_ours(f"{host}:8501")] == []
    assert [host for host in others if middleware.host_is_ours(host)] == []


# Routes and messages


INNER = ("metrics", "metrics/", "metrics?families=x", "script-health-check", "agent/openapi.json", "agent/interact", "")


@pytest.mark.parametrize("path", INNER)
def test_strangers_see_nothing_of_the_inner_works(demo, path):
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        assert ask(demo, method, f"/_stcore/{path}")[0] == 404
    assert ask(demo, "GET", "//_stcore/metrics")[0] == 404
    assert "cache_memory" not in ask(demo, "GET", "/x/../_stcore/metrics")[1]
    for needed in ("health", "host-config"):
        assert ask(demo, "GET", f"/_stcore/{needed}")[0] == 200


def test_no_visitor_empties_the_caches_of_all(demo):
    """A second queue would be made at the next look, beside the first."""
    with Tab(demo, "192.0.9.1") as tab:
        tab.rerun("run")
        threads = _threads(demo)
        for _ in range(5):
            tab.send(clear_cache=True)
            tab.send(load_git_info=True)
            tab.send(set_run_on_save=True)
            tab.rerun("run")
        assert _threads(demo) <= threads + 2


def _threads(server: Server) -> int:
    (child,) = (c for c in psutil.Process().children() if f"--server.port={port(server)}" in c.cmdline())
    return child.num_threads()


def test_a_visitor_has_so_many_tabs_and_no_more(demo):
    with contextlib.ExitStack() as tabs:
        for _ in range(100):
            tabs.enter_context(contextlib.closing(Tab(demo, "192.0.10.1").opened))
        with pytest.raises(WebSocketException):
            Tab(demo, "192.0.10.1")
        with Tab(demo, "192.0.10.2") as other:
            assert other.id
    for _ in range(50):
        with contextlib.suppress(WebSocketException), Tab(demo, "192.0.10.1") as tab:
            assert tab.id
            return
        time.sleep(0.1)
    raise AssertionError("closed tabs count for ever")


# Visitors


def test_a_visitor_is_an_address_and_not_a_tab(monkeypatch):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.0/8")
    for address, known in {
        "203.0.113.9": "203.0.113.9",
        "::ffff:203.0.113.9": "203.0.113.9",
        "127.0.0.1": "here",
        "::1": "here",
        "2001:db8:1:2ff::1": "2001:db8:1:200::/56",
        "2001:db8:1:200:ffff::9": "2001:db8:1:200::/56",
        "fe80::1%eth0": "fe80::/56",
        "": "unknown",
        "x" * 500: "unknown",
    }.items():
        assert limits.visitor(address, True) == known
        assert limits.visitor(address, False) == known
    assert limits.visitor(None, False) == "unknown"


@pytest.mark.parametrize("proxies", ["", " ", None])
def test_a_header_counts_only_where_its_proxy_is_named(proxies, monkeypatch):
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if proxies is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", proxies)
    assert {limits.visitor(f"203.0.113.{n}", True) for n in range(9)} == {"behind a proxy"}


def test_who_writes_his_own_address_is_known_all_the_same(demo):
    """The proxy appends the true address; what stands before it is the visitor's own word."""
    with contextlib.ExitStack() as tabs:
        many = [tabs.enter_context(Tab(demo, f"198.51.100.{n}, 192.0.11.1")) for n in range(8)]
        assert [tab.bring(2 * MB - 1000) for tab in many].count(204) == 5


# Switches


UNCLEAR = [
    ({"TRSP_DEMO": "ja"}, "TRSP_DEMO"),
    ({"TRSP_DEMO": "1", "FORWARDED_ALLOW_IPS": "*"}, "FORWARDED_ALLOW_IPS"),
    ({"TRSP_DEMO": "2"}, "TRSP_DEMO"),
    ({"TRSP_DEMO": "-1"}, "TRSP_DEMO"),
    ({"TRSP_DEMO": "1.0"}, "TRSP_DEMO"),
    ({"FORWARDED_ALLOW_IPS": "10.0.0.1/8"}, "FORWARDED_ALLOW_IPS"),
    ({"FORWARDED_ALLOW_IPS": "10.0.0.0/8;10.1.0.0/16"}, "FORWARDED_ALLOW_IPS"),
]


@pytest.mark.parametrize(("variables", "told"), UNCLEAR)
def test_limits_that_are_not_clear_are_refused_and_never_guessed(variables, told, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrspError, match=told) as refused:
        limits.check_environment()
    assert refused.value.remedy
    with pytest.raises(SystemExit, match=told):
        middleware.middleware()


@pytest.mark.parametrize(("variables", "told"), UNCLEAR[:2])
def test_a_server_whose_limits_are_not_clear_does_not_start(variables, told, tmp_path):
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", "--server.port=0"]
    environment = {**os.environ, "TRSP_RUNS": str(tmp_path), **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["1", "true", "YES", " on ", "demo"])
def test_words_that_turn_the_demo_on(word, monkeypatch):
    monkeypatch.setenv("TRSP_DEMO", word)
    assert limits.current() is DEMO


@pytest.mark.parametrize("word", ["0", "false", "No", "off ", "", "open"])
def test_words_that_turn_the_demo_off(word, monkeypatch):
    monkeypatch.setenv("TRSP_DEMO", word)
    assert limits.current() is OPEN


def test_each_limit_of_a_demo_is_a_limit():
    """A field that is new, and that the demo leaves as wide as the open mode, has to be named here."""
    same = {f.name for f in dataclasses.fields(DEMO) if getattr(DEMO, f.name) == getattr(OPEN, f.name)}
    assert same <= {"places", "workers"}
