"""What strangers write is text on every page: no markup, formula, icon, link or script comes of it."""

from __future__ import annotations

import dataclasses
import json
import re
import urllib.parse
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from pages.ui.style import words
from tests import ROOT, story, studies
from tests.pages.test_pages import open_page
from trsp_core.experiments import grid_results
from trsp_core.experiments.grid_results import Sweep
from trsp_core.export import html_report, model_card
from trsp_core.runs.store import Run, Store
from trsp_core.schema import events as ev
from trsp_core.schema import messages as an

SETTINGS = {"evidence-part": "How the settings matter"}  # a part of a page that is not open at first
PAGES = sorted(file.stem for file in (ROOT / "pages" / "views").glob("*.py"))
PLANTED = (
    "<img src=x onerror=window.planted=1>**bold9**$x9$:material/skull:[link9](javascript:window.planted=2)"
    "https://planted.example :red[red9] `code9` a9@planted.example -> |"
)
MARKUP = ("<img", "**bold9**", "$x9$", ":material/skull", "](javascript", "https://planted", ":red[red9]", "`code9`")
AS_THEY_ARE = ("code", "text", "selectbox", "arrow", "dataframe", "vega", "multiselect")  # never Markdown
CONFIG = dataclasses.replace(
    story.CONFIG, model=PLANTED, text=f"{PLANTED}.txt", heldout=f"{PLANTED}.jsonl", prompt=PLANTED, stage2_steps=10
)


def planted(value: Any, name: str = "") -> Any:
    """An event with `PLANTED` in each text that pages do not look up by its value."""
    changed = {
        f.name: PLANTED
        for f in dataclasses.fields(value)
        if isinstance(getattr(value, f.name), str) and f.name not in ("state", "domain", "role", "fingerprint")
    }
    if isinstance(value, ev.PhaseStarted) and value.name in ("choose", "transfer"):
        return value
    return dataclasses.replace(value, **changed)


def tell(ending: ev.Event) -> Generator[ev.Event, None, None]:
    """The story told by a stranger, who planned phases of that name too."""
    *told, _ = story.tell()
    yield ev.RunPlanned([{"name": PLANTED, "seconds": 10.0}, *({"name": n, "seconds": 1.0} for n in story.PLAN)], 1)
    yield from (planted(event) for event in told[1:])
    yield ev.LayersScored(PLANTED, [0.1] * story.L)
    yield ending


def write(store: Store, ending: ev.Event) -> Run:
    """A run whose every text is planted; one that failed keeps a comparison too."""
    run = store.create(CONFIG)
    with run.events_file.open("w", encoding="utf-8") as file:
        for n, event in enumerate(tell(ending)):
            file.write(ev.to_line(event, n, n * 0.5) + "\n")
    columns = [an.Variant(PLANTED, label=f"{n} {PLANTED}") for n in range(2)]
    asked = an.Generate(columns, PLANTED, chat=True)
    lines = [json.loads(an.pack("", line)) for line in (asked, *_answers())]
    (run.folder / "comparisons").mkdir()
    (run.folder / "comparisons" / f"{'a' * 12}.json").write_text(json.dumps(lines), "utf-8")
    return run


def _answers() -> Iterator[an.Answer]:
    pieces = [[" same", f" {PLANTED}", " c"], [" same", f" {PLANTED} other", " d"]]
    for n in range(2):
        yield an.PromptRead(n, 3, False)
        for i, piece in enumerate(pieces[n]):
            yield an.TokenGenerated(n, 10 * n * i + i, piece, 0.1 * (i + 1))
        yield an.ColumnFinished(n, 3, "length", 10.0, 5.0, 0.6)
    for t in range(2):
        for n in range(2):
            other = [[PLANTED, "y"]] * 3
            yield an.TextTraced(t, n, [1, 2, 3], pieces[t], [0.5] * 3, other, [[0.5, 0.1]] * 3, [0.1] * 3, 9.0)


FAILED = ev.RunFailed(PLANTED, PLANTED, PLANTED)


def sweep_record(root: Path) -> None:
    """Records of a sweep and of a study on this machine, planted."""
    for sweep in (grid_results.load(grid_results.shipped() / "length.json"), studies.transfers(range(9))):
        plant(sweep, root)


def plant(sweep: Sweep, root: Path) -> None:
    arms = {name: f"{name} {PLANTED}" for name in sweep.arms}
    told = [dataclasses.replace(p, title=PLANTED) for p in sweep.points]
    protocol = dict.fromkeys(sweep.protocol, PLANTED)
    made = dataclasses.replace(
        sweep,
        name=f"planted_{sweep.name}",
        title=PLANTED,
        model=PLANTED,
        made=PLANTED,
        arms=arms,
        points=told,
        protocol=protocol,
    )
    grid_results.write(made, grid_results.local(root) / f"{made.name}.json")


@pytest.fixture
def store(page_store) -> Store:
    return page_store


def protos(block: Any) -> Iterator[tuple[str, str]]:
    """Type and content of every element below `block`."""
    for child in block.children.values():
        if hasattr(child, "children"):
            proto = getattr(child, "proto", None)
            yield child.type or "", str(proto) if proto is not None else ""
            yield from protos(child)
        else:
            yield child.type, re.sub(r"\\(.)", r"\1", str(child.proto))


def unescaped(app: AppTest) -> list[str]:
    """Elements whose text would be read as markup. In a proto's text each backslash stands doubled."""
    found = []
    for kind, content in (pair for root in (app.main, app.sidebar) for pair in protos(root)):
        if not any(kind.startswith(spared) for spared in AS_THEY_ARE):
            found += [
                f"{kind}: {mark} in {content[:300]}"
                for mark in MARKUP
                if re.search(rf"(?<!\\){re.escape(mark)}", content)
            ]
    return found


@pytest.mark.parametrize("ending", [ev.RunFinished(10**9), FAILED], ids=["finished", "failed"])
@pytest.mark.parametrize("name", PAGES)
def test_no_page_takes_a_strangers_words_for_markup(store, name, ending):
    run = write(store, ending)
    sweep_record(store.root)
    for query in (
        {},
        {"run": run.id},
        {"run": run.id, "kept": "a" * 12},
        {"run": PLANTED},
        {"model": PLANTED},
        SETTINGS,
    ):
        assert not unescaped(open_page(name, **query)), query


def test_every_mark_is_escaped():
    shown = words.plain(PLANTED)
    assert not [mark for mark in MARKUP if re.search(rf"(?<!\\){re.escape(mark)}", shown)]
    assert shown.replace("\\", "").replace("\u2060", "") == PLANTED


def test_a_report_and_a_card_hold_no_markup_of_strangers(store):
    for ending in (ev.RunFinished(10**9), FAILED):
        run = write(store, ending)
        page = html_report.html(run)
        assert "<img" not in page
        assert "<script" not in page
        assert re.findall(r"<a\b|javascript:(?!window)|\son\w+=[^&]", re.sub(r"&lt;.*?&gt;", "", page)) == []
        assert "default-src 'none'" in page
        assert "&lt;img src=x onerror" in page
    assert "<img" not in model_card.name(CONFIG, run.state(), "float32")
    assert not set("<>/$`|") & set(model_card.name(CONFIG, run.state(), "float32"))


@pytest.mark.browser
def test_in_a_browser_it_is_text_too(server, browser):
    """The pages as a browser draws them: what is planted has done nothing, and can be read. Each with what it reads of
    its address."""
    store = Store(server.runs)
    run, other = write(store, ev.RunFinished(10**9)), write(store, FAILED)
    sweep_record(store.root)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)
    tab = context.new_page()
    of_one_run = [{"run": run.id}, {"run": other.id}, {"run": PLANTED}]
    queries = {name: [{"run": run.id}] for name in PAGES} | dict.fromkeys(("run", "layers", "compare"), of_one_run)
    queries["run"] = [*of_one_run, {"model": PLANTED}]
    queries["compare"] = [*of_one_run, {"run": run.id, "kept": "a" * 12}]
    try:
        for name in PAGES:
            for query in queries[name]:
                tab.goto(f"{server.url}/{'' if name == 'home' else name}?{urllib.parse.urlencode(query)}")
                tab.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for()
                tab.wait_for_timeout(700)  # no condition fits: a chart of what is planted may stay undrawn
                assert tab.evaluate("window.planted") is None
                assert tab.locator("[data-testid=stException]").count() == 0
                for markup in (
                    "img[src='x']",
                    ":is(strong, b, em):has-text('bold9'):not(:has-text('**bold9**'))",
                    ".katex:has(annotation:text-is('x9'))",  # the Paper page has equations of its own
                    "a[href*='planted.example']",
                    "a[href^=javascript]",
                    "span[role=img][aria-label*=skull]",
                    "[class*=markdown-color]:has-text('red9'):not(:has-text(':red[red9]'))",
                    "code:text-is('code9')",
                ):
                    shown = tab.locator(f"[data-testid=stMain] {markup}")
                    assert shown.count() == 0, (name, query, markup, shown.first.evaluate("e => e.outerHTML")[:500])
    finally:
        context.close()
        for made in (run, other):
            store.delete(made.id)
        for file in grid_results.local(store.root).glob("planted_*.json"):
            file.unlink()
