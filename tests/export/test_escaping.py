"""What strangers wrote steers nothing on its way out: a terminal, a report, a table, a card get it letter by letter.

Real outputs are made of a run, a record and a plan in which every text is hostile.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import json
import re
import unicodedata
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pages.ui.style import words
from tests import ROOT, story
from tests.export import test_export
from tests.pages.test_shown_as_text import planted
from trsp_core import escaping, formatting
from trsp_core.cli import arguments, main
from trsp_core.evaluation import verification
from trsp_core.experiments import grid_results
from trsp_core.export import curves_csv, html_report, model_card
from trsp_core.runs.store import Run, Store
from trsp_core.schema import events as ev
from trsp_core.schema import messages as an
from trsp_core.schema.run_state import RunState
from trsp_core.workbench import transcript

HOSTILE = (
    "=cmd|'/c calc'!A1\x1b]0;owned\x07\x1b[2J\x9b31m\x9d0;x\x9c\x7f"
    "\u202egnp.exe\u2066iso\u2069\u200f\u2028\ufeff\U000e0041"
    "````sh\nrm -rf ~\n````\r| **bold** [x](javascript:1) <script>1</script> $x$ https://planted.example"
)


def steers(text: str) -> list[str]:
    """Letters that a terminal or a reader of bidirectional text would obey, but for newlines and tabs."""
    obeyed = {c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} - {"\n", "\t"}
    turning = {c for c in text if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF")}
    turning |= {
        c for c in text if c in "\u2066\u2067\u2068\u2069\u200e\u200f\u061c\ufeff" or 0xE0000 <= ord(c) < 0xE0080
    }
    return sorted(map(hex, map(ord, obeyed | turning)))


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """A run whose every text is hostile; one that failed, with a trace."""
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path))
    monkeypatch.setattr("tests.pages.test_shown_as_text.PLANTED", HOSTILE)
    config = dataclasses.replace(
        story.CONFIG, model=HOSTILE, text=f"{HOSTILE}.txt", heldout=f"{HOSTILE}.jsonl", prompt=HOSTILE
    )
    made = Store(tmp_path).create(config)
    *told, _ = story.tell()
    importance = ev.LayersScored(HOSTILE, [0.1] * story.L)
    events = [*(planted(event) for event in told), importance, ev.RunFailed(HOSTILE, HOSTILE, f"Trace:\n{HOSTILE}")]
    with made.events_file.open("w", encoding="utf-8") as file:
        for n, event in enumerate(events):
            file.write(ev.to_line(event, n, n * 0.5) + "\n")
    (made.folder / "env.json").write_text(json.dumps({"torch": HOSTILE, HOSTILE: "1"}), "utf-8")
    return made


def said(capsys, *command: str) -> str:
    """What a command says on both streams."""
    main.main(list(command))
    out, err = capsys.readouterr()
    return out + err


def test_the_hostile_text_is_hostile():
    assert len(steers(HOSTILE)) == 14


@pytest.mark.parametrize("command", ["list", "show", "show twice", "resume", "eval", "export"])
def test_a_terminal_gets_letters_alone(command, run, capsys):
    asked = {
        "show": ["show", run.id],
        "show twice": ["show", run.id, "--json"],
        "resume": ["resume", HOSTILE],
        "eval": ["eval", HOSTILE, "--task", HOSTILE],
        "export": ["export", run.id],
    }
    text = said(capsys, *asked.get(command, [command]))
    assert text.strip()
    assert steers(text) == []


def test_a_refusal_of_the_command_line_gets_letters_alone(capsys):
    for wrong in (["run", HOSTILE], ["run", f"--{HOSTILE}", "x"], [HOSTILE], ["run", "--preset", HOSTILE]):
        with pytest.raises(SystemExit):
            main.main(wrong)
        assert steers(capsys.readouterr().err) == []


def test_json_for_a_terminal_steers_nothing_and_says_the_same(run, capsys):
    text = said(capsys, "list", "--json")
    assert steers(text) == []
    (figures,) = json.loads(text)
    assert figures["failure"]["message"] == HOSTILE


def test_a_name_forges_no_line_of_a_table(run, capsys):
    assert len(said(capsys, "list").splitlines()) <= 1 + len(HOSTILE) // 25
    first, *_ = said(capsys, "list").splitlines()
    assert first.startswith(run.id)
    assert not any(line.startswith("rm -rf") for line in said(capsys, "list").splitlines())


def test_titles_of_plans_and_grids(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    plan = {"name": "p", "title": HOSTILE, "variations": [{"name": "a", "title": HOSTILE}], "base": {"model": "./none"}}
    grid = {"name": "g", "title": HOSTILE, "base": {"model": HOSTILE}, "axes": {"seed": [0]},
            "arms": [{"name": "a", "title": HOSTILE}]}  # fmt: skip
    for kind, content in (("compare --plan", plan), ("sweep --grid", grid)):
        (tmp_path / "file.json").write_text(json.dumps(content), "utf-8")
        text = said(capsys, *kind.split(), str(tmp_path / "file.json"))
        assert text.strip()
        assert steers(text) == []
    record = grid_results.load(grid_results.shipped() / "length.json")
    record = dataclasses.replace(record, points=[dataclasses.replace(p, title=HOSTILE) for p in record.points])
    table = formatting.table(grid_results.cells(record))
    assert steers(table) == []
    assert not [line for line in table.splitlines() if line.startswith("rm -rf")]


def test_a_phase_steers_no_line_of_progress():
    shown = arguments.progress(RunState(phase=HOSTILE))
    assert steers(shown) == []
    assert "\n" not in shown


def test_a_spreadsheet_computes_nothing(run, tmp_path, capsys):
    said(capsys, "curves", run.id, "--out", str(tmp_path / "c.csv"))
    text = (tmp_path / "c.csv").read_text("utf-8")
    assert steers(text) == []
    rows = list(csv.reader(io.StringIO(text)))
    assert len(rows) > 50
    for row in rows[1:]:
        assert len(row) == len(curves_csv.HEAD)
        assert not [cell for cell in row if re.match(r"[=+\-@\t\r]", cell) and not re.fullmatch(r"-?[\d.e+-]+", cell)]
        float(row[5] or 0)


@pytest.mark.parametrize("head", ["=", "+", "-", "@", "\t=", "\r=", "\n=", " =", "＝"])
def test_a_cell_is_text_or_a_number(head):
    assert escaping.csv(f"{head}1+1").startswith("'")
    assert [escaping.csv(v) for v in (-1.5, 3, None, True, "loss")] == [-1.5, 3, None, True, "loss"]


def test_a_report_shows_letters_alone(run):
    page = html_report.html(run)
    assert steers(page) == []
    assert "<script" not in page
    assert "\\x1b" in page
    assert "\\u202e" in page


def blocks(text: str) -> list[Any]:
    """Tokens of Markdown, tables and raw HTML among it."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    return [part for token in tokens for part in (token, *(token.children or ()))]


def test_a_card_holds_no_markup_of_strangers(run):
    config, state = run.config(), run.state()
    found = dataclasses.replace(verification.Proof(**test_export.FOUND), dtype=HOSTILE)
    exported = {"model_type": HOSTILE, HOSTILE: [1, 2, 1, 2], "layer_types": [HOSTILE, "b", "a", "b"]}
    text = model_card.write(config, state, found, HOSTILE, exported, "float32")
    assert steers(text) == []
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    assert set(yaml.safe_load(front)) <= {"library_name", "pipeline_tag", "base_model", "license", "tags"}
    parts = blocks(body)
    assert [p.content for p in parts if p.type in ("html_block", "html_inline")] == []
    assert [p.attrs for p in parts if p.type in ("link_open", "image")] == []
    fences = [p for p in parts if p.type == "fence"]
    assert [f.info for f in fences] == ["python", "sh", "python"]
    assert escaping.lines(HOSTILE) in fences[1].content.replace("'\\''", "'")
    assert "RunConfig(" in fences[2].content
    compile(fences[2].content, "card", "exec")
    assert not [p for p in parts if p.type == "strong_open"]


def test_a_recipe_names_its_base_as_a_text(run):
    config = dataclasses.replace(run.config(), model=f"/models/{HOSTILE} # x: - no")
    recipe = model_card.mergekit(config, run.state(), "float32")
    assert steers(recipe) == []
    named = {source["model"] for part in yaml.safe_load(recipe)["slices"] for source in part["sources"]}
    assert len(named) == 1
    assert named.pop().startswith("./")


def test_the_licence_of_a_card_is_a_text(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for word in ("no", "null", "1e3", "2024-01-01", "apache-2.0"):
        (folder / "README.md").write_text(f"---\nlicense: {word}\n---\n", "utf-8")
        config = dataclasses.replace(story.CONFIG, model=str(folder))
        text = model_card.write(config, RunState(), verification.Proof(**test_export.FOUND), "t", {}, "float32")
        assert yaml.safe_load(text.split("---")[1])["license"] == word


def test_a_comparison_to_paste_holds_no_markup_of_strangers():
    asked = an.Generate([{"model": "m", "label": HOSTILE}], HOSTILE)
    found = transcript.gather(asked, [an.TokenGenerated(0, 1, HOSTILE, 0.1)])
    text = transcript.markdown(found)
    assert steers(text) == []
    parts = blocks(text)
    assert [p.content for p in parts if p.type == "fence"] == [escaping.lines(HOSTILE) + "\n"] * 2
    assert not [p for p in parts if p.type in ("html_block", "html_inline", "link_open", "image", "table_open")]


@given(st.text() | st.text("`\n~=-#[](): <>|\x1b\u202e", max_size=30))
def test_any_text_comes_through_each_outlet_as_text(text):
    assert steers(escaping.line(text)) == []
    assert "\n" not in escaping.line(text)
    assert json.loads(escaping.json(text)) == text
    whole = text.encode("utf-8", "replace").decode()
    assert yaml.safe_load(f"a: {escaping.yaml(whole)}") == {"a": whole}
    (fence,) = blocks(escaping.fenced(text, "text"))
    assert fence.content == (escaping.lines(text) if text.endswith("\n") else escaping.lines(text) + "\n")
    inside = blocks(f"**{escaping.markdown(text)}.**")
    allowed = {"paragraph_open", "paragraph_close", "inline", "text", "text_special", "strong_open", "strong_close"}
    assert {p.type for p in inside} <= allowed
    assert steers(words.plain(text)) in ([], ["0x2060"])
    assert steers(words.lines(text)) in ([], ["0x2060"])
    assert steers(escaping.html(text)) == []


def test_what_is_printed_goes_through_an_outlet():
    """Every print of the shell, every cell of a table and every text of a report is handed to one of them."""
    shown = {"escaping.line", "escaping.lines", "escaping.html", "escaping.csv"}
    for file in sorted((ROOT / "trsp_core").rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        prints = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]
        assert not prints or file.parent.name == "cli", file
        for call in prints:
            text = ast.unparse(call)
            assert any(outlet in text for outlet in shown) or text.startswith("print('\\r' + line"), text
    for name, outlet in {
        "export/html_report.py": "escaping.html",
        "export/curves_csv.py": "escaping.csv",
        "export/model_card.py": "escaping.markdown",
    }.items():
        assert outlet in (ROOT / "trsp_core" / name).read_text("utf-8")
