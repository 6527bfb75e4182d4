"""A link to a page, when nobody has been at the server before: the page is there at the first visit."""

from __future__ import annotations

import pytest

from tests.browser.test_run import opened
from tests.conftest import serving

pytestmark = pytest.mark.browser
REFUSALS = """
window.refusals = [];
new MutationObserver(() => {
  if (document.body?.innerText.match(/page not found/i)) window.refusals.push(location.href);
}).observe(document, {subtree: true, childList: true, characterData: true});
"""


def test_each_page_opens_by_its_address_on_a_fresh_server_and_nothing_is_fetched_from_elsewhere(browser, tmp_path):
    (runs := tmp_path / "runs").mkdir()
    with serving(runs) as server, opened(browser) as tab:
        addresses: list[str] = []
        tab.on("request", lambda request: addresses.append(request.url))
        tab.add_init_script(REFUSALS)
        for name, title in (
            ("evidence", "Evidence"),  # the first one of all
            ("run", "New run"),
            ("layers", "Layers"),
            ("compare", "Compare"),
            ("runs", "Runs"),
            ("paper", "The paper"),
            ("home", "Prune a language model while you watch"),  # by its other address
        ):
            tab.goto(f"{server.url}/{name}")
            tab.get_by_role("heading", name=title, exact=True).wait_for()
            tab.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for(state="attached")
            assert tab.evaluate("window.refusals") == []
            addresses.append(tab.evaluate("document.querySelector('link[rel~=icon]').href"))  # fetched unseen
        assert [url for url in addresses if not url.startswith((server.url, "data:", "blob:"))] == []
