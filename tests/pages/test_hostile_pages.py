"""Pages before strangers' addresses and damaged run folders: whatever stands there, a page shows itself or a refusal.

The parsers behind the pages are tried far oftener, in `test_hostile`; a page takes a hundred times as long. Each test
prints how many pages it opened.
"""

from __future__ import annotations

import json
import random
import shutil

import pytest
import streamlit
from hypothesis import strategies as st

from tests import ROOT, story
from tests.pages.test_pages import open_page
from tests.schema.test_hostile import (
    HOSTILE,
    KEPT,
    LETTERS,
    ONE_OF_EACH,
    SETTINGS,
    TOLD,
    as_bytes,
    damaged,
    lines,
    many,
)
from trsp_core.experiments import grid_results
from trsp_core.runs.store import Store
from trsp_core.schema import messages as an
from trsp_core.schema import run_state as states
from trsp_core.schema.config import KNOBS
from trsp_core.schema.run_state import RunState

PAGES = sorted(file.stem for file in (ROOT / "pages" / "views").glob("*.py"))
FEW, MANY = 6, 300
PARAMETERS = st.dictionaries(
    st.sampled_from(["run", "kept", "ask", "off", *KNOBS]) | st.text(LETTERS, max_size=6),
    (st.text(max_size=20) | HOSTILE.map(str) | st.sampled_from(["sound", "0,1,99999", "-1", "0.3", "true", "a" * 12])),
    max_size=4,
)


@pytest.fixture
def store(page_store) -> Store:
    return page_store


def opened(name: str, parameters: dict[str, str]) -> None:
    open_page(name, **{k: v for k, v in parameters.items() if k and "\x00" not in k + v})


@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_page_opens_at_any_address(store, cases, capsys):
    run = story.write(store, "finished")
    run.folder.rename(store.root / "sound")

    def law(case):
        name, parameters = case
        opened(name, {k.encode("utf-8", "replace").decode(): v.encode("utf-8", "replace").decode() for k, v in
                      parameters.items()})  # an address is decoded in this way  # fmt: skip

    tried = many(cases, st.tuples(st.sampled_from(PAGES), PARAMETERS), law)
    with capsys.disabled():
        print(f"\naddresses of pages: {tried} pages")


@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_page_shows_a_damaged_run(store, cases, capsys):
    sound = story.write(store, "finished").folder
    sound.rename(store.root / ".sound")
    files = [
        ("config.json", as_bytes(damaged(st.sampled_from(SETTINGS)))),
        ("events.jsonl", st.integers(0, 2**32).map(_other_events)),
        ("events.jsonl", lines(damaged(st.sampled_from(ONE_OF_EACH)), 30)),
        ("summary.json", as_bytes(damaged(st.just(states.summary(RunState()))))),
        ("exit.json", as_bytes(damaged(st.just({"returncode": -9})))),
        (KEPT, as_bytes(damaged(st.just([json.loads(an.pack("", an.Generate([an.Variant("x")], "The river")))])))),
    ]
    cases_of = st.sampled_from(files).flatmap(lambda pair: st.tuples(st.just(pair[0]), pair[1]))

    def law(case):
        name, (file, content) = case
        folder = store.root / "run-0000"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(store.root / ".sound", folder)
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
        streamlit.cache_resource.clear()
        opened(name, {"run": folder.name, **({"kept": "0123456789ab"} if file == KEPT else {})})

    tried = many(cases, st.tuples(st.sampled_from(PAGES), cases_of), law)
    with capsys.disabled():
        print(f"\ndamaged runs: {tried} pages")


def _other_events(seed: int) -> bytes:
    """A whole story in which each event is as it should be by itself, and some do not fit the others."""
    draw = random.Random(seed)
    told = json.loads(json.dumps(TOLD))
    for line in draw.sample(told, draw.randint(1, 4)):
        for name, value in line.items():
            if name in ("n", "at", "event") or draw.random() < 0.4:
                continue
            if isinstance(value, list) and value and not isinstance(value[0], dict):
                line[name] = draw.choice([[], value[:1], value * 2, [draw.choice([0, -1, 2**62, 10**6])] * len(value)])
            elif isinstance(value, bool | dict | list):
                continue
            elif isinstance(value, int):
                line[name] = draw.choice([0, -1, 1, 2**62, 10**9])
            elif isinstance(value, float):
                line[name] = draw.choice([0.0, -1.0, None, 1e300, 1e-300])
            else:
                line[name] = draw.choice(["", "trained", "<b>*x*</b>", "x" * 3000])
    if draw.random() < 0.3:
        draw.shuffle(told)
    if draw.random() < 0.3:
        told = draw.sample(told, draw.randint(1, len(told)))
    return "".join(json.dumps(line) + "\n" for line in told).encode()


@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY // 3, marks=pytest.mark.slow)])
def test_the_evidence_page_shows_a_damaged_record(store, cases, capsys):
    document = json.loads((grid_results.shipped() / "length.json").read_text("utf-8"))
    folder = grid_results.local(store.root)
    folder.mkdir(parents=True)

    def law(content):
        (folder / "own.json").write_bytes(content)
        streamlit.cache_resource.clear()
        for part in ("How the settings matter", "Over splits"):
            opened("evidence", {"evidence-part": part})

    tried = many(cases, as_bytes(damaged(st.just(document | {"name": "own", "title": "Own"}))), law)
    with capsys.disabled():
        print(f"\ndamaged records: {tried} pages")
