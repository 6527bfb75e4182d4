"""When a page in a browser is as it will stay: waited for as long as it takes, and no longer."""

from __future__ import annotations

DRAWN = """() => {
  const all = selector => [...document.querySelectorAll(selector)];
  return all('[data-testid=stApp][data-test-script-state=notRunning]').length > 0
    && all('[data-testid=stMarkdown], [data-testid=stHeading]').length > 0
    && all('[data-testid=stSkeleton]').length === 0
    && all('[data-testid=stVegaLiteChart]').every(chart => !chart.offsetParent || chart.querySelector('svg, canvas'));
}"""


def until_drawn(page) -> None:
    """Wait until the script of `page` has ended and each of its charts that can be seen is there."""
    page.wait_for_function(DRAWN)
