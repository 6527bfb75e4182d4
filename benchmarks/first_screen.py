"""What a visitor waits for on a server that has just started: from the address to a picture that moves. The seconds
until the server answers stand beside it. A real server, a real Chromium (playwright), nobody else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import Row, row
from benchmarks._web import PATIENCE, chromium, server

SERVERS, AIM, PORT = 5, 2.5, 8598  # seconds from the address to a second frame
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
    ready, drawn, moved = [], [], []
    with chromium() as browser:
        for _ in range(SERVERS):
            with tempfile.TemporaryDirectory() as folder, server(Path(folder), PORT) as (address, seconds):
                ready.append(seconds)
                tab = browser.new_context(viewport={"width": 1280, "height": 720}).new_page()
                tab.set_default_timeout(PATIENCE)
                tab.add_init_script(f"({WATCH})()")
                tab.goto(address)
                tab.wait_for_function("window.moved !== null")
                drawn.append(tab.evaluate("window.drawn") / 1000)
                moved.append(tab.evaluate("window.moved") / 1000)
                tab.context.close()
    yield row(
        "first_screen_seconds_to_moving_picture",
        moved,
        AIM,
        "lower",
        seconds_to_first_picture=[round(s, 2) for s in drawn],
        seconds_until_server_answers=[round(s, 2) for s in ready],
        servers=SERVERS,
    )
