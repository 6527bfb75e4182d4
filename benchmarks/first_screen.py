"""What a visitor waits for on a server that has just started: from the address to a picture that moves. The seconds
until the server answers stand beside it. A real server, a real Chromium (playwright), nobody else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import Row, row
from benchmarks.click import CHROMIUM, ROOT
from trsp_core.errors import TrspError

SERVERS, AIM, PORT = 5, 3.0, 8598  # seconds from the address to a second frame
WATCH = """() => {
  window.drawn = window.moved = null;
  let first = null;
  const look = () => {
    const picture = document.querySelector('[data-testid=stVegaLiteChart] :is(canvas, svg)');
    const moment = document.querySelector('.st-key-player-moment input');
    if (picture && moment) {
      if (window.drawn === null) { window.drawn = performance.now(); first = moment.value; }
      if (moment.value !== first) { window.moved = performance.now(); return; }
    }
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}"""


def run() -> Iterator[Row]:
    """Each visit is the first one of its server; the browser's cache is empty too."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise TrspError("This benchmark needs playwright.", "Install requirements-dev.txt.") from error
    browser = next((path for path in CHROMIUM if Path(path).exists()), None)
    if browser is None:
        raise TrspError("This benchmark needs Chromium.", "Install it with the system's package manager.")
    ready, drawn, moved = [], [], []
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for _ in range(SERVERS):
            with tempfile.TemporaryDirectory() as folder, _fresh(Path(folder)) as seconds:
                ready.append(seconds)
                tab = chromium.new_context(viewport={"width": 1280, "height": 720}).new_page()
                tab.set_default_timeout(120_000)
                tab.add_init_script(f"({WATCH})()")
                tab.goto(f"http://localhost:{PORT}")
                tab.wait_for_function("window.moved !== null")
                drawn.append(tab.evaluate("window.drawn") / 1000)
                moved.append(tab.evaluate("window.moved") / 1000)
                tab.context.close()
        chromium.close()
    yield row(
        "first_screen_seconds_to_moving_picture",
        moved,
        AIM,
        "lower",
        seconds_to_first_picture=[round(s, 2) for s in drawn],
        seconds_until_server_answers=[round(s, 2) for s in ready],
        servers=SERVERS,
    )


@contextmanager
def _fresh(folder: Path) -> Iterator[float]:
    """A new server without any run; yields the seconds until it answered."""
    words = ["-m", "streamlit", "run", "app.py", "--server.headless", "true", "--server.port", str(PORT)]
    environment, began = {**os.environ, "TRSP_RUNS": str(folder)}, time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            for _ in range(600):
                try:
                    with urllib.request.urlopen(f"http://localhost:{PORT}/_stcore/health", timeout=1):
                        break
                except OSError:
                    time.sleep(0.05)
            else:
                raise TrspError(f"The server did not answer on port {PORT}.", "Look whether another program has it.")
            yield time.perf_counter() - began
        finally:
            server.terminate()
