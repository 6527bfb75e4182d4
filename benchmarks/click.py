"""What a person waits for on Compare: from the click on Write to the first token on the screen, one column, the model
warm, the server real and the browser a real Chromium (playwright, a development package).
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
from typing import Any

from benchmarks import Row, row
from benchmarks.generation import PROMPT
from trsp_core.config import RunConfig
from trsp_core.errors import TrspError
from trsp_core.events import RunFinished
from trsp_core.record import record
from trsp_core.store import Store

CLICKS, AIM, PORT = 8, 0.5, 8599
ROOT = Path(__file__).parent.parent
CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
WATCH = """() => {
  const button = document.querySelector('.st-key-write button');
  window.waited = null;
  button.addEventListener('click', () => { window.clicked = performance.now(); }, {once: true, capture: true});
  const look = () => {
    const box = document.querySelector('.st-key-text-0');
    const text = box ? box.innerText : '';
    if (window.clicked && /(^|\\s)1?[0-9] tokens?\\b/.test(text) && text.includes('▌')) {
      window.waited = performance.now() - window.clicked;
    } else { requestAnimationFrame(look); }
  };
  window.clicked = null;
  requestAnimationFrame(look);
}"""


def run() -> Iterator[Row]:
    """The first two clicks load and warm the model; they do not count."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise TrspError("This benchmark needs playwright.", "Install requirements-dev.txt.") from error
    browser = next((path for path in CHROMIUM if Path(path).exists()), None)
    if browser is None:
        raise TrspError("This benchmark needs Chromium.", "Install it with the system's package manager.")
    with tempfile.TemporaryDirectory() as folder, _served(Path(folder)) as address, sync_playwright() as driver:
        tab = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        tab.set_default_timeout(120_000)
        tab.goto(address)
        tab.locator(".st-key-compare-prompt textarea").fill(PROMPT)
        tab.keyboard.press("Control+Enter")
        waits = [_click(tab) for _ in range(CLICKS + 2)][2:]
    yield row("click_to_first_token_seconds", waits, AIM, "lower", columns=1, clicks=len(waits))


def _click(tab: Any) -> float:
    """Seconds from the click to the first token."""
    write = tab.locator(".st-key-write button:enabled", has_text="Write")
    write.wait_for()
    time.sleep(1.0)  # nothing is under way
    tab.evaluate(WATCH)
    write.click()
    tab.wait_for_function("window.waited !== null")
    waited = tab.evaluate("window.waited") / 1000
    tab.locator(".st-key-write button:enabled", has_text="Write").wait_for()
    return waited


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """Address of Compare on a fresh server, with a finished run that kept no model: the dense one alone is offered."""
    made = Store(folder).create(RunConfig())
    record(made, (event for event in [RunFinished(0)]))
    command = [
        sys.executable,
        "-m",
        "streamlit",
        "run",
        "app.py",
        "--server.headless",
        "true",
        "--server.port",
        str(PORT),
    ]
    environment = {**os.environ, "TRSP_RUNS": str(folder)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(300):
                try:
                    with urllib.request.urlopen(f"http://localhost:{PORT}/_stcore/health", timeout=1):
                        break
                except OSError:
                    time.sleep(0.1)
            yield f"http://localhost:{PORT}/compare?run={made.id}"
        finally:
            server.terminate()
