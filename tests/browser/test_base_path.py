"""The app below a path of a larger site, as a proxy would show it: pages, links between them, downloads."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest

from tests import story
from tests.conftest import serving
from trsp_core.runs.store import Store

pytestmark = pytest.mark.browser
BASE = "tools/trsp"


def test_pages_links_and_downloads_work_below_a_base_path(browser, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    run = story.write(Store(runs), "finished")
    run.exports_folder.mkdir()
    (run.exports_folder / "report.html").write_text("<p>A report</p>")
    with serving(runs, BASE) as server:
        context = browser.new_context()
        context.set_default_timeout(120_000)
        tab = context.new_page()
        missing: list[str] = []
        tab.on("response", lambda answer: missing.append(answer.url) if answer.status >= 400 else None)
        try:
            tab.goto(f"{server.url}/run?run={run.id}")
            tab.get_by_text("layers are gone").first.wait_for()
            tab.get_by_role("link", name="See its layers, before and after").click()
            tab.wait_for_url(f"{server.url}/layers?*run={run.id}*")
            tab.get_by_role("link", name="Runs", exact=True).first.click()
            tab.wait_for_url(f"{server.url}/runs*")
            tab.locator(f".st-key-row-{run.id}").get_by_role("link", name="Open").click()
            tab.wait_for_url(f"{server.url}/run?*run={run.id}*")
            tab.get_by_text("layers are gone").first.wait_for()
            assert tab.locator("[data-testid=stException]").count() == 0
            here = tab.evaluate("name => new URL(name, document.baseURI).href", f"files/{run.id}/report.html")
            assert here.startswith(f"{server.url}/files/")
            with urllib.request.urlopen(here) as answer:
                assert answer.read() == b"<p>A report</p>"
                assert "attachment" in answer.headers["Content-Disposition"]
            assert [url for url in missing if "/_stcore/" not in url] == []  # it looks there for where its base is
        finally:
            context.close()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}/files/{run.id}/..%2fconfig.json")
        assert refused.value.code in (400, 404)
