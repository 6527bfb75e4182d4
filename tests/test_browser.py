"""The app in a real browser, with a real run in its own process."""

from __future__ import annotations

import re
import urllib.parse

import pytest

from tests import story

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

SLOW = {**story.SMALL, "stage1_steps": "4000", "stage2_steps": "4000", "probe_every": "50"}
CHART = "[data-testid=stVegaLiteChart] :is(svg, canvas)"


@pytest.fixture
def tab(browser):
    """A tab that fails the test where a page shows an exception."""
    context = browser.new_context(viewport={"width": 1280, "height": 720})
    page = context.new_page()
    page.set_default_timeout(60_000)
    yield page
    assert page.locator("[data-testid=stException]").count() == 0
    context.close()


def address(server, name: str, **query: str) -> str:
    return f"{server.url}/{name}?{urllib.parse.urlencode(query)}"


def started(tab, server, tiny_model, settings: dict[str, str]) -> str:
    """Fill the form by its address, press Start; the run's id."""
    tab.goto(address(server, "run", model=str(tiny_model), ratio="0.4", **settings))
    tab.get_by_role("button", name="Start", exact=True).click()
    tab.wait_for_url(re.compile(r"[?&]run="))
    return urllib.parse.parse_qs(urllib.parse.urlparse(tab.url).query)["run"][0]


def test_a_run_is_watched_live_without_flicker_survives_its_tabs_and_is_stopped(tab, browser, server, tiny_model):
    """A link straight to the form of a fresh server; charts that stay the same nodes; refresh; second tab; Stop."""
    run = started(tab, server, tiny_model, SLOW)
    expect(tab.get_by_text("Page not found")).to_have_count(0)
    expect(tab.get_by_text("Stage 1: learning the layer weights")).to_be_visible(timeout=60_000)
    tab.locator(CHART).first.wait_for()
    tab.evaluate(f"document.querySelectorAll({CHART!r}).forEach((node, n) => node.dataset.seen = n)")
    count = tab.locator(CHART).count()
    clock = tab.locator("[data-testid=stMetric]", has_text="Time so far")
    for _ in range(3):
        before = clock.inner_text()
        expect(clock).not_to_have_text(before, use_inner_text=True, timeout=15_000)
    assert tab.locator(f"{CHART}[data-seen]").count() == count, "a chart was drawn anew instead of updated"

    tab.reload()
    expect(tab.get_by_text(run)).to_be_visible()
    second = browser.new_context().new_page()
    second.goto(address(server, "run", run=run))
    expect(second.get_by_text(run)).to_be_visible(timeout=30_000)
    second.context.close()

    tab.get_by_role("button", name="Stop").click()
    expect(tab.get_by_text("This run was stopped")).to_be_visible(timeout=60_000)
    tab.get_by_role("button", name="Change", exact=True).click()
    expect(tab.get_by_role("button", name="Start", exact=True)).to_be_enabled()


def test_a_run_goes_on_without_a_tab_and_its_result_is_there_for_all_pages(tab, browser, server, tiny_model):
    run = started(tab, server, tiny_model, story.SMALL)
    tab.goto("about:blank")
    for theme in ("light", "dark"):
        for width in (1280, 390):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme)
            page = context.new_page()
            page.goto(address(server, "run", run=run))
            expect(page.get_by_text(re.compile("2 of 5 layers are gone"))).to_be_visible(timeout=90_000)
            for name in ("run", "layers", "runs", ""):
                page.goto(address(server, name, run=run))
                page.locator("[data-testid=stMarkdown]").first.wait_for(timeout=30_000)
                page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for(state="attached")
                assert page.locator("[data-testid=stException]").count() == 0, (theme, width, name)
                wide = page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth")
                assert wide <= width, (theme, width, name)
            context.close()
