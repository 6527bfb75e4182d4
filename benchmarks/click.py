"""What a person waits for on Compare: from the click on Write to the first token on the screen, one column, the model
warm, the server real and the browser a real Chromium (playwright, a development package).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import Row, row
from benchmarks._web import PATIENCE, chromium, server
from benchmarks.generation import PROMPT
from trsp_core.runs.recorder import record
from trsp_core.runs.store import Store
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import RunFinished

CLICKS, AIM, PORT = 8, 0.5, 8599
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
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), PORT) as (address, _), chromium() as browser:
        made = Store(Path(folder)).create(RunConfig())
        record(made, (event for event in [RunFinished(0)]))  # it kept no model: the dense one alone is offered
        tab = browser.new_page()
        tab.set_default_timeout(PATIENCE)
        tab.goto(f"{address}/compare?run={made.id}")
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
