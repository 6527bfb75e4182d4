"""A real server and a real browser, for the benchmarks that need them (playwright, a development package)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trsp_core.errors import TrspError

ROOT = Path(__file__).parent.parent
CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
PATIENCE = 120_000  # milliseconds


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser.

    Raises:
        TrspError: playwright or Chromium is missing.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise TrspError("This benchmark needs playwright.", "Install requirements-dev.txt.") from error
    found = next((path for path in CHROMIUM if Path(path).exists()), None)
    if found is None:
        raise TrspError("This benchmark needs Chromium.", "Install it with the system's package manager.")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def server(runs: Path, port: int) -> Iterator[tuple[str, float]]:
    """Address of a fresh server over the folder `runs`, and the seconds until it answered."""
    words = ["-m", "streamlit", "run", "app.py", "--server.headless", "true", "--server.port", str(port)]
    environment, began = {**os.environ, "TRSP_RUNS": str(runs)}, time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, **quiet) as process:
        try:
            for _ in range(600):
                try:
                    with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=1):
                        break
                except OSError:
                    time.sleep(0.05)
            yield f"http://localhost:{port}", time.perf_counter() - began
        finally:
            process.terminate()
