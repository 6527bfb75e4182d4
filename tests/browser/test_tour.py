"""Home and the tour in a real browser: a replay without flicker or jumps, and the whole way through two minutes."""

from __future__ import annotations

import re

import pytest

from pages.ui.tour import lessons
from tests.browser.test_run import CHARTS, address, opened, tab  # noqa: F401 - a fixture

pytestmark = pytest.mark.browser
expect = pytest.importorskip("playwright.sync_api").expect

PLACES = (
    "() => [...document.querySelectorAll('[data-testid=stVegaLiteChart], .st-key-player, h3')]"
    ".map(node => Math.round(node.getBoundingClientRect().top))"
)

SETTLED = f"""() => {{
  const places = JSON.stringify(({PLACES})());
  window.frames_as_they_are = places === window.places_before ? (window.frames_as_they_are || 0) + 1 : 0;
  window.places_before = places;
  return window.frames_as_they_are >= 10;
}}"""


def settled(tab) -> list[int]:  # noqa: F811
    """Where things are, once all charts are there and nothing has moved for ten frames."""
    tab.wait_for_function(SETTLED, polling="raf")
    return tab.evaluate(PLACES)


def moment(tab) -> str:  # noqa: F811
    return tab.locator(".st-key-player-moment input").input_value()


def test_the_replay_moves_at_once_and_its_charts_stay_the_same_nodes(tab, server):  # noqa: F811
    """Tagged nodes are found again after ten updates of each, and nothing on the page has moved meanwhile."""
    tab.goto(server.url)
    tab.locator(CHARTS).nth(5).wait_for()
    tab.locator(".st-key-player-speed button", has_text="4×").click()
    places = settled(tab)
    tab.evaluate(f"document.querySelectorAll({CHARTS!r}).forEach(node => node.dataset.mark = 'first')")
    told = set()
    for _ in range(10):
        before = moment(tab)
        if tab.get_by_role("button", name="Play again").count():  # a slow machine takes longer strides
            break
        moved = "document.querySelector('.st-key-player-moment input').value != old"
        ended = "[...document.querySelectorAll('button')].some(one => one.innerText.includes('Play again'))"
        tab.wait_for_function(f"old => {moved} || {ended}", arg=before)
        told.add(tab.locator(".st-key-player-sentence").inner_text())
    assert tab.locator(f"{CHARTS}[data-mark=first]").count() == 6, "a chart was drawn anew instead of updated"
    expect(tab.get_by_role("button", name="Play again")).to_be_visible()
    expect(tab.locator(".st-key-player-sentence")).to_contain_text("8 of 30 layers are gone")
    assert tab.locator(f"{CHARTS}[data-mark=first]").count() == 6, "a chart was drawn anew at the end"
    assert tab.evaluate(PLACES) == places, "something has moved on the page"
    assert len(told) > 1


def test_the_replay_is_paused_and_scrubbed_by_keyboard_alone_and_two_tabs_have_their_own(tab, browser, server):  # noqa: F811
    tab.goto(server.url)
    tab.locator(CHARTS).nth(5).wait_for()
    settled(tab)
    tab.get_by_role("button", name="Pause").focus()
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="Play", exact=True)).to_be_visible()
    slider = tab.locator(".st-key-player-moment input")
    slider.focus()
    tab.keyboard.press("End")
    expect(tab.locator(".st-key-player-sentence")).to_contain_text("8 of 30 layers are gone")
    tab.keyboard.press("Home")
    expect(tab.locator(".st-key-player-sentence")).to_contain_text("stack of layers")
    tab.keyboard.press("ArrowRight")
    expect(slider).to_have_value("0.5")
    with opened(browser) as second:
        second.goto(server.url)
        expect(second.get_by_role("button", name="Pause")).to_be_visible()
    expect(slider).to_have_value("0.5")


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_the_whole_two_minute_tour_is_walked(browser, server, width, theme):
    """From Home by its button to Finish, with a refresh and a detour on the way; nothing is wider than the screen."""
    lesson = lessons.shipped()["two-minutes"]
    with opened(browser, width, color_scheme=theme) as page:
        page.goto(server.url)
        page.get_by_role("button", name=lesson.title).click()
        for n, step in enumerate(lesson.steps, 1):
            bar = page.locator(".st-key-guide")
            expect(bar).to_contain_text(f"{n} of {len(lesson.steps)}")
            expect(bar).to_contain_text(step.title)
            expect(page).to_have_url(re.compile(f"lesson=two-minutes&step={n}|step={n}&lesson=two-minutes"))
            if n == 2:
                page.reload()
                expect(bar).to_contain_text(step.title)
            if n == 3:
                page.goto(address(server, "runs", lesson="two-minutes", step="3"))
                page.locator(".st-key-guide-here button").click()
                expect(page.locator(".st-key-player")).to_be_visible()
            page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for(state="attached")
            assert page.locator("[data-testid=stException]").count() == 0, step.title
            assert page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth") <= width, step.title
            if step.page == "layers":
                expect(page.locator(".st-key-layer-0 button")).to_contain_text("0")
            page.locator(".st-key-guide-next button").click()
        expect(page.locator(".st-key-guide")).to_have_count(0)
        expect(page).not_to_have_url(re.compile("lesson="))
