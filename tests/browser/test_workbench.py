"""Layers by hand and a comparison in a real browser, on a tiny model, with the real workbench."""

from __future__ import annotations

import re

import pytest

from tests import story, tiny
from tests.browser.test_run import address, started, tab  # noqa: F401 - a fixture

pytestmark = pytest.mark.browser
expect = pytest.importorskip("playwright.sync_api").expect


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """Slow enough that a refresh meets it in the middle of a text."""
    return tiny.save(tmp_path_factory.mktemp("models") / "deep-llama", n_layers=160)


def finished(tab, server, model, **settings) -> str:  # noqa: F811
    run = started(tab, server, model, {**story.SMALL, "save_model": "true", **settings})
    expect(tab.get_by_text("layers are gone")).to_be_visible()
    return run


def test_layers_are_toggled_and_figures_change(tab, server, tiny_model):  # noqa: F811
    run = finished(tab, server, tiny_model)
    tab.goto(address(server, "layers", run=run))
    part = tab.get_by_role("tab", name="Try it yourself")
    part.wait_for()
    tab.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for(state="attached")
    part.click()
    expect(part).to_have_attribute("aria-selected", "true")
    perplexity = tab.locator("[data-testid=stMetric]", has_text="Perplexity of one block, calibration")
    tab.locator(".st-key-layer-1 button").click()
    expect(perplexity).to_be_visible()
    expect(tab.get_by_text("Removed: 1.", exact=False)).to_be_visible()
    before = perplexity.inner_text()
    tab.locator(".st-key-layer-3 button").focus()
    tab.keyboard.press("Enter")
    expect(tab.get_by_text("Removed: 1, 3.", exact=False)).to_be_visible()
    expect(perplexity).not_to_have_text(before, use_inner_text=True)
    assert "off=1%2C3" in tab.url or "off=1,3" in tab.url
    tab.get_by_role("button", name="Undo").click()
    expect(tab.get_by_text("Removed: 1.", exact=False)).to_be_visible()
    expect(perplexity).to_have_text(before, use_inner_text=True)
    tab.reload()  # the set is in the address
    expect(tab.get_by_text("Removed: 1.", exact=False)).to_be_visible()
    expect(perplexity).to_have_text(before, use_inner_text=True)


def test_a_comparison_survives_a_refresh_in_the_middle(tab, server, deep_model):  # noqa: F811
    run = finished(tab, server, deep_model, method="manual", layers="3", stage2_steps="1", importance_blocks="0")
    tab.goto(address(server, "compare", run=run))
    tab.locator(".st-key-write button").click()
    tab.wait_for_url(re.compile("[?&]ask="))
    expect(tab.locator(".st-key-text-1")).to_contain_text("token")
    tab.reload()
    expect(tab.locator(".st-key-stop-writing button")).to_be_enabled()  # still in the middle of it
    expect(tab.get_by_text("Token by token")).to_be_visible()
    expect(tab.locator(".st-key-text-0")).to_contain_text("tokens/s")
    tab.get_by_role("button", name="Keep with this run").click()
    tab.wait_for_url(re.compile("[?&]kept="))
    expect(tab.get_by_text("Kept comparison")).to_be_visible()
    tab.reload()
    expect(tab.get_by_text("Kept comparison")).to_be_visible()
