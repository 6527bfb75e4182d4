"""The app in a real browser, with a real run in its own process."""

from __future__ import annotations

import contextlib
import re
import urllib.parse
import zipfile

import pytest

from tests import story

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

WAIT = 600_000  # milliseconds: for what will happen, on however busy a machine
expect.set_options(timeout=WAIT)
LONG = {**story.SMALL, "stage1_steps": "30", "stage2_steps": "100000", "probe_every": "50"}
CHARTS = "[data-testid=stVegaLiteChart] :is(svg, canvas)"


@pytest.fixture
def tab(server, browser):
    """A tab that fails the test where a page shows an exception; it is closed before what it started is stopped."""
    with opened(browser) as page:
        yield page
        assert page.locator("[data-testid=stException]").count() == 0


@contextlib.contextmanager
def opened(browser, width: int = 1280, **how):
    """A tab of its own."""
    context = browser.new_context(viewport={"width": width, "height": 720}, **how)
    context.set_default_timeout(WAIT)
    try:
        yield context.new_page()
    finally:
        context.close()


def address(server, name: str, **query: str) -> str:
    return f"{server.url}/{name}?{urllib.parse.urlencode(query)}"


def started(tab, server, tiny_model, settings: dict[str, str]) -> str:
    """Fill the form by its address, press Start; the run's id."""
    tab.goto(address(server, "run", model=str(tiny_model), ratio="0.4", **settings))
    tab.get_by_role("button", name="Start", exact=True).click()
    tab.wait_for_url(re.compile(r"[?&]run="))
    return urllib.parse.parse_qs(urllib.parse.urlparse(tab.url).query)["run"][0]


def mark(tab, name: str) -> None:
    """Write `name` on the nodes of the six charts, which are to be found again."""
    tab.locator(CHARTS).nth(5).wait_for()
    tab.evaluate(f"name => document.querySelectorAll({CHARTS!r}).forEach(node => node.dataset.mark ||= name)", name)


def marked(tab, name: str) -> int:
    """How many charts still stand on a node that was marked so."""
    return tab.locator(f"{CHARTS}[data-mark={name!r}]").count()


def test_a_run_is_watched_live_without_flicker_survives_its_tabs_and_is_stopped(tab, browser, server, tiny_model):
    """A link straight to the form of a fresh server; charts that stay the same nodes; refresh; second tab; Stop."""
    run = started(tab, server, tiny_model, LONG)
    expect(tab.get_by_text("Page not found")).to_have_count(0)
    mark(tab, "start")
    expect(tab.get_by_text("Stage 2: moving the knowledge")).to_be_visible()
    stages = tab.get_by_role("heading", name=re.compile("^Stage [12]:"))
    expect(stages.first).to_contain_text("Stage 2")
    mark(tab, "stage 2")
    assert marked(tab, "start") == 4, "a chart was drawn anew on the way from the start to stage 2"
    clock = tab.locator("[data-testid=stMetric]", has_text="Time so far")
    for _ in range(10):
        before = clock.inner_text()
        expect(clock).not_to_have_text(before, use_inner_text=True)
    assert (marked(tab, "start"), marked(tab, "stage 2")) == (4, 2), "a chart was drawn anew instead of updated"

    tab.reload()
    expect(tab.get_by_text(run)).to_be_visible()
    with opened(browser) as second:
        second.goto(address(server, "run", run=run))
        expect(second.get_by_text(run)).to_be_visible()

    tab.get_by_role("button", name="Stop").click()
    expect(tab.get_by_text("This run was stopped")).to_be_visible()
    tab.get_by_role("button", name="Change", exact=True).click()
    expect(tab.get_by_role("button", name="Start", exact=True)).to_be_enabled()


def test_a_run_goes_on_without_a_tab_and_its_result_is_there_for_all_pages(tab, browser, server, tiny_model):
    run = started(tab, server, tiny_model, story.SMALL)
    tab.goto("about:blank")
    for theme in ("light", "dark"):
        for width in (1280, 390):
            with opened(browser, width, color_scheme=theme) as page:
                page.goto(address(server, "run", run=run))
                expect(page.get_by_text(re.compile("2 of 5 layers are gone"))).to_be_visible()
                for name in ("run", "layers", "runs", ""):
                    page.goto(address(server, name, run=run))
                    page.locator("[data-testid=stMarkdown]").first.wait_for()
                    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for(state="attached")
                    assert page.locator("[data-testid=stException]").count() == 0, (theme, width, name)
                    wide = page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth")
                    assert wide <= width, (theme, width, name)


def test_a_finished_run_is_exported_and_downloaded(tab, server, tiny_model, tmp_path):
    """From Start to a proved checkpoint, a report and curves on the visitor's disk, by the page's own links."""
    run = started(tab, server, tiny_model, story.SMALL | {"save_model": "true", "stage2_steps": "0"})
    for button, link in (
        ("Export the model", "Download tiny-llama-trsp-3-of-5-float32.zip"),
        ("Make: Curves, CSV", "Curves, CSV"),
        ("Make: HTML report", "HTML report"),
    ):
        tab.get_by_role("button", name=button).click()
        address = tab.get_by_role("link", name=link).evaluate("link => link.href")
        answer = tab.context.request.get(address)
        assert answer.headers["content-disposition"].startswith("attachment")
        (tmp_path / address.rpartition("/")[2]).write_bytes(answer.body())
    expect(tab.get_by_text("are bit for bit those of the model that the run had in memory")).to_be_visible()
    with zipfile.ZipFile(tmp_path / "tiny-llama-trsp-3-of-5-float32.zip") as packed:
        assert packed.testzip() is None
        assert any(name.endswith("/model.safetensors") for name in packed.namelist())
    assert (tmp_path / "curves.csv").read_text().startswith("curve,")
    tab.goto(f"file://{tmp_path / 'report.html'}")
    expect(tab.locator("svg").first).to_be_visible()
    assert run in tab.locator("body").inner_text()
