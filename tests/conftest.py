"""Fixtures that more than one test file needs."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import psutil
import pytest

from trsp_core.agenda import Agenda
from trsp_core.errands import Errands
from trsp_core.jobs import Jobs
from trsp_core.store import Store

ROOT = Path(__file__).parent.parent

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as trsp_core sets it; tests may load torch first
gc.freeze()
hypothesis.settings.register_profile("here", deadline=None, max_examples=50)  # a busy machine is no failure
hypothesis.settings.load_profile("here")


def pytest_configure(config) -> None:
    """Tests are the same on a machine with a GPU and on one without, but for those marked so: `-m gpu`."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a tiny random Llama with its tokenizer."""
    from tests import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def page_store(tmp_path, monkeypatch) -> Store:
    """A fresh folder of runs, and a server that has seen none and starts no children."""
    import streamlit

    from tests import story

    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("trsp_core.jobs.start", story.no_child)
    monkeypatch.setattr("trsp_core.jobs.Jobs.prepare", lambda jobs: None)
    streamlit.cache_resource.clear()
    return Store()


@pytest.fixture(autouse=True)
def no_queue_outlives_its_test(monkeypatch) -> Iterator[None]:
    """A queue that works on after its test, its stand-ins gone, would start real runs beside all tests that follow."""
    made: list = []

    def told(plain):
        def begin(self, *args, **kwargs):
            made.append(self)
            plain(self, *args, **kwargs)

        return begin

    for kind in (Jobs, Agenda, Errands):
        monkeypatch.setattr(kind, "__init__", told(kind.__init__))
    yield
    for queue in reversed(made):
        queue.close()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            words = child.cmdline()
            if "workbench" not in words and any("trsp_core" in word for word in words):
                child.kill()


@dataclass(frozen=True)
class Server:
    """A running app: its address and its folder of runs."""

    url: str
    runs: Path


@pytest.fixture
def server(served) -> Iterator[Server]:
    """The real app. What the test leaves running or queued is stopped, so that the next one finds an empty queue."""
    yield served
    store, deadline = Store(served.runs), time.monotonic() + 600
    while left := [run for run in store.runs() if run.status() in ("queued", "running")]:
        assert time.monotonic() < deadline, f"these runs do not stop: {left}"
        for run in left:
            run.cancel()
        time.sleep(0.2)


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Server]:
    """One real app for all tests."""
    with serving(tmp_path_factory.mktemp("served-runs")) as made:
        yield made


@contextlib.contextmanager
def serving(runs: Path, base: str = "", **variables: str) -> Iterator[Server]:
    """A real app on a free port, below the path `base`, with more variables in its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={port}"]
    command += ["--server.address=127.0.0.1", *([f"--server.baseUrlPath={base}"] if base else [])]
    environment = {**os.environ, "TRSP_RUNS": str(runs), "OMP_NUM_THREADS": "1", **variables}
    log = (runs.parent / "server.log").open("w")
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}" + (f"/{base}" if base else "")
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/_stcore/health") as answer:
                if answer.read() == b"ok":
                    break
            time.sleep(0.1)
        yield Server(url, runs)
    finally:
        child.terminate()
        child.wait()
        log.close()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium: the system's, or the one that playwright has installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(
                executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
            )
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        yield opened
        opened.close()
