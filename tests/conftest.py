"""Fixtures that more than one test file needs."""

from __future__ import annotations

import contextlib
import functools
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
from types import SimpleNamespace

import hypothesis
import psutil
import pytest

from tests import ROOT
from trsp_core.experiments.plan_queue import PlanQueue
from trsp_core.export.export_queue import ExportQueue
from trsp_core.runs.queue import RunQueue
from trsp_core.runs.store import Store

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as trsp_core sets it; tests may load torch first
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two files beside each other have the cores; sums are in one order
gc.freeze()
hypothesis.settings.register_profile("here", deadline=None, max_examples=50)  # a busy machine is no failure
hypothesis.settings.load_profile("here")


def pytest_configure(config) -> None:
    """Tests are the same on a machine with a GPU and on one without, but for those marked so: `-m gpu`."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


LONGEST = ("families", "hostile", "faults", "export", "quick_run", "grids", "resume", "hostile_pages")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: of two workers that take a file at a time, none is left with one at the end."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _the_pace_of_the_machine_is_measured_once() -> Iterator[None]:
    """A run measures it for 0.3 s to forecast its time: in the hundreds of tiny runs of the tests, most of their time.
    What follows is still a true figure of this machine."""
    if "torch" not in sys.modules:
        yield
        return
    from trsp_core.evaluation import perplexity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "matrix_rate", functools.cache(perplexity.matrix_rate))
        yield


@pytest.fixture(scope="session", autouse=True)
def _installed_packages_are_looked_through_once() -> Iterator[None]:
    """Streamlit's `AppTest` reads what every installed package says of itself each time that a page is run, in search
    of components: more than half of what a page takes."""
    if "streamlit" not in sys.modules:
        yield
        return
    from streamlit.components.v2 import manifest_scanner

    with pytest.MonkeyPatch.context() as patch:
        scan = functools.cache(manifest_scanner.scan_component_manifests)
        patch.setattr(manifest_scanner, "scan_component_manifests", scan)
        yield


@pytest.fixture(autouse=True)
def _every_test_has_the_same_cores() -> None:
    """A run takes all cores for its process, also one of a fixture that many tests share; sums over other parts are
    other sums, to the last bit."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def unproved(monkeypatch) -> None:
    """What a run keeps is taken for proved, without the seconds of a fresh process: for tests that are not about the
    proof, which `test_verification` and `test_export` are."""

    def proved(folder, kept):
        yield from ()
        return SimpleNamespace(problems=[])

    monkeypatch.setattr("trsp_core.evaluation.verification.checking", proved)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a tiny random Llama with its tokenizer."""
    from tests import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """The path of a text of simple English, long enough for runs with `tiny.SETTINGS`."""
    from tests import tiny

    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny.text(1200), "utf-8")
    return str(file)


@pytest.fixture
def page_store(tmp_path, monkeypatch) -> Store:
    """A fresh folder of runs, and a server that has seen none and starts no children."""
    import streamlit

    from tests import story

    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("trsp_core.runs.process.start", story.no_child)
    monkeypatch.setattr("trsp_core.runs.queue.RunQueue.prepare", lambda queue: None)
    streamlit.cache_resource.clear()
    return Store()


@pytest.fixture(autouse=True)
def no_model_is_loaded_ahead(request, monkeypatch) -> None:
    """Pages have a process load the default model before anybody asks; here it would load it beside other tests."""
    if request.path.parent.name != "workbench":
        monkeypatch.setattr("trsp_core.workbench.client.Workbench.prepare", lambda workbench, wanted: None)


@pytest.fixture(autouse=True)
def no_queue_outlives_its_test(monkeypatch) -> Iterator[None]:
    """A queue that works on after its test, its stand-ins gone, would start real runs beside all tests that follow."""
    made: list = []

    def told(plain):
        def begin(self, *args, **kwargs):
            made.append(self)
            plain(self, *args, **kwargs)

        return begin

    for kind in (RunQueue, PlanQueue, ExportQueue):
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
