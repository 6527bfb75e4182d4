"""README.md and docs/ against what they describe."""

import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import click
import pytest
from streamlit.config import get_config_options

from pages.ui.paper import departures
from pages.ui.tour import lessons
from tests import ROOT
from trsp_core import formatting
from trsp_core.cli import main
from trsp_core.experiments import grid_results, plan_results, studies
from trsp_core.pruning import methods, transfers
from trsp_core.runs import replay
from trsp_core.runs.store import Run, Store
from trsp_core.schema import config
from trsp_core.schema.events import DOMAINS

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in (README, *DOCS)}
ALL = "\n".join(PAGES.values())
LINKED = {**PAGES, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text("utf-8")}
NAMES = ("cli", "methods", "results", "benchmarks", "architecture", "models-and-texts", "deploy", "export", "api")
PIP_AND_LLAMA_CPP = ("--no-deps", "--outfile", "--outtype")
DOCKER = ("--build-arg",)
COMMANDS = sorted(set(re.findall(r"^python -m trsp_core (.+?)(?:\s+#.*)?$", ALL, re.MULTILINE)))
NUMBER = r"(\d+(?:,\d{3})*(?:\.\d+)?)"
PAIR = re.compile(f"{NUMBER} / {NUMBER}")


def test_the_readme_is_read_in_one_sitting():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120]
    generated = "docs/models-and-texts.md"
    lines = [line for name, text in PAGES.items() if name != generated for line in text.splitlines()]
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_the_readme_leads_to_every_page_of_the_docs():
    assert {file.stem for file in DOCS} == {*NAMES, "teaching"}
    for file in DOCS:
        assert f"](docs/{file.name})" in PAGES["README.md"], file.name


# -- links


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    heads = (head.strip().lower() for head in re.findall(r"^#+ (.+)$", prose, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in heads}


def dead_links(text: str, place: Path) -> list[str]:
    """Relative links of `text`, a file at `place`, that lead to no file, or to no heading of it."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (place.parent / name).resolve() if name else place
        if re.match(r"[a-z]+:", target):
            continue
        inside = text if file == place else file.read_text("utf-8") if file.suffix == ".md" and file.is_file() else ""
        if not file.is_file() or (anchor and anchor not in anchors(inside)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("name", LINKED)
def test_every_link_and_anchor_leads_somewhere(name):
    assert dead_links(LINKED[name], ROOT / name) == []


@pytest.mark.parametrize("target", ["docs/absent.md", "docs/deploy.md#no-such-name", "#nowhere", "assets/absent.png"])
def test_a_dead_link_is_found(target):
    assert dead_links(f"# Here\n[a]({target}) [b](#here) [c](docs/deploy.md#names)", README) == [target]


def test_what_the_product_says_of_the_docs_is_there():
    """Messages name a page of the docs, and a heading in quotes before it."""
    files = [*(ROOT / "pages").rglob("*.py"), *(ROOT / "trsp_core").rglob("*.py")]
    files += [ROOT / name for name in ("app.py", "Dockerfile", "Makefile", "CONTRIBUTING.md")]
    sources = {file: file.read_text("utf-8").replace('"\n    "', "").replace('\\"', '"') for file in files}
    named = [(file, page) for file, text in sources.items() for page in re.findall(r"docs/[\w-]+\.md", text)]
    assert {file.name for file, _ in named} >= {"middleware.py", "Dockerfile", "CONTRIBUTING.md"}
    assert not [(file.name, page) for file, page in named if page not in PAGES]
    for file, text in sources.items():
        for head, page in re.findall(r'[Ss]ee "([^"]+)" in (docs/[\w-]+\.md)', text):
            assert re.search(rf"^#+ {re.escape(head)}$", PAGES[page], re.MULTILINE), (file.name, head)


# -- commands, flags, files


def test_the_departures_from_the_paper_are_those_of_its_page():
    section = PAGES["docs/methods.md"].split("## Where we depart from the paper")[1].split("\n## ")[0]
    assert departures.markdown() in section
    sides = [config.PRESETS["paper"].get(name, config.KNOBS[name].default) for _, name, *_ in departures.ROWS]
    assert sides == ["output", True, "model", "l2", "constant", 1.0, 0.0], "what `--preset paper` sets"


def test_there_are_commands():
    assert len(COMMANDS) >= 15
    block = PAGES["README.md"].split("## Five commands")[1].split("```")[1]
    assert len(re.findall(r"^python -m trsp_core ", block, re.MULTILINE)) == 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "get", lambda self, name: Run(self.root / name))
    (tmp_path / "grid.json").write_text('{"name": "mine", "axes": {"seed": [0]}}')
    words = [str(tmp_path / "grid.json") if word == "FILE" else word for word in shlex.split(command)]
    name, loaded, words = main.shell.resolve_command(click.Context(main.shell), words)
    assert loaded.make_context(name, words)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[0] in ("list", "methods", "families", "doctor")])
def test_every_quick_command_runs(command, tmp_path):
    words = [sys.executable, "-m", "trsp_core", *shlex.split(command)]
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TRSP_HOME")}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={"TRSP_RUNS": str(tmp_path)} | kept)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_table_of_commands_is_the_shells(capsys):
    assert main.main(["--help"]) == 0
    listed = re.findall(r"^ {2}([a-z]+)(?: {2}|$)", capsys.readouterr().out.split("Commands:")[1], re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["docs/cli.md"], re.MULTILINE)
    assert sorted(rows) == sorted(listed)


def test_every_flag_they_name_exists():
    known = {k.flag for k in config.KNOBS.values()} | {"--preset", "--json", "--out"}
    known |= {f"--{name}" for name in get_config_options() if name.startswith("server.")}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w.-]+", ALL)) - known <= {
        "--plan",
        "--grid",
        "--scheduler",
        "--results",
        "--nthreads",
        "--task",
        "--from",
        "--accept-terms",
        "--write",
        "--dtype",
        "--push",
        "--help",
        "--steer",
        "--pause",
        "--step",
        "--go",
        "--end-stage",
        *PIP_AND_LLAMA_CPP,
        *DOCKER,
    }


def test_the_make_targets_and_files_they_name_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"(?:`|^)make ([a-z]+)", ALL, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"`((?:trsp_core|tests|pages|assets|benchmarks|docs)/[\w/.-]+)`", ALL):
        assert (ROOT / name).exists(), name


# -- tables and figures


def test_the_table_of_methods_is_the_registry():
    chapter, rest = PAGES["docs/methods.md"].split("## Transfers")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", chapter, re.MULTILINE))
    assert set(rows) == set(methods.names())
    moves = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", rest, re.MULTILINE))
    assert set(moves) == set(transfers.names())
    for transfer in transfers.all_transfers().values():
        assert moves[transfer.name].lower() == transfer.summary.rstrip(".").lower()
    for method in methods.all_methods().values():
        assert rows[method.name].lower() == method.summary.rstrip(".").lower()
    assert f"{len(rows) - 1} other ways to choose layers" in PAGES["README.md"]


def test_the_tables_are_those_of_the_records():
    words = [sys.executable, "-m", "benchmarks._table", "--check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_sentences_about_the_plans_follow_from_the_records():
    results = " ".join(PAGES["docs/results.md"].split())
    for plan, one, other, digits in (
        ("ablation", "trsp", "direct", 2),
        ("ablation", "trsp", "delete_first", 2),
        ("ablation", "fade", "delete_first", 3),
        ("methods", "trsp", "sleb", 2),
        ("methods", "trsp", "shortgpt", 2),
    ):
        found = plan_results.compared(plan_results.load(plan_results.shipped(plan)), one, other)
        for domain in DOMAINS:
            value, low, high = (f"{v:.{digits}f}" for v in (found[domain].value, found[domain].low, found[domain].high))
            assert f"{value} [{low}, {high}]" in results, (one, other, domain)


def test_the_sentences_about_transfers_follow_from_the_record():
    results = " ".join(PAGES["docs/results.md"].split("## Which transfer?")[1].split("\n## ")[0].split())
    record = plan_results.load(plan_results.shipped("transfers"))
    for one, other in (
        ("refit", "none_30"),
        ("refit_10", "none_90"),
        ("refit_10", "none_10"),
        ("refit_30", "none_30"),
        ("refit_30", "penalty_30"),
        ("linear_map", "direct"),
        ("rebuild", "direct"),
        ("magnitude", "direct"),
    ):
        ratios = plan_results.compared(record, one, other)
        cells = [f"{ratios[d].value:.2f} [{ratios[d].low:.2f}, {ratios[d].high:.2f}]" for d in DOMAINS]
        assert f"{cells[0]}, {cells[1]}" in results, (one, other)
    readme = " ".join(PAGES["README.md"].split())
    home, away = (plan_results.compared(record, "refit_30", "none_30")[d].value for d in DOMAINS)
    assert f"comes to {home:.2f} (held out {away:.2f}) times the control's" in readme
    ahead = {f"{100 * (1 - plan_results.compared(record, 'refit_10', 'none_90')[d].value):.0f}" for d in DOMAINS}
    assert len(ahead) == 1
    assert f"in the same *time* it is {ahead.pop()} % ahead" in readme


def test_what_is_said_of_refit_over_splits_follows_from_the_record():
    text = " ".join(PAGES["README.md"].split("## What was measured")[1].split("##")[0].split())
    sweep = grid_results.load(ROOT / "assets" / "evidence" / "sweeps" / "splits.json")
    study = studies.read(sweep)
    rows = {row.arm: row for row in study.rows}
    cells = []
    for domain in DOMAINS:
        assert studies.ratio(rows["refit_60"], rows["none_60"], domain).interval.high < 1, "not ahead for sure"
        figure = studies.ratio(rows["refit_60"], rows["none_216"], domain)  # in the same time
        cells.append(studies.in_words(figure, formatting.ratio))
    times = [formatting.ratio(studies.over_dense(study, rows["refit_60"], domain).interval.value) for domain in DOMAINS]
    assert f"over {len(study.splits)} splits" in text.replace("three", "3")
    assert f"is at {cells[0]} (held out {cells[1]}) times the control in the same time" in text
    assert f"{times[0]} and {times[1]} times the dense model" in text


def test_the_headline_follows_from_the_records():
    text = " ".join(PAGES["README.md"].split("## What was measured")[1].split("##")[0].split())
    record = plan_results.load(plan_results.shipped("ablation"))
    home, away = (plan_results.compared(record, "trsp", "direct")[d].value for d in DOMAINS)
    assert f"{home:.2f} times the perplexity of deleting at once (held out {away:.2f} times)" in text
    home, away = (plan_results.compared(record, "trsp", "delete_first")[d].value for d in DOMAINS)
    assert f"{home:.2f} times the control's perplexity (held out {away:.2f} times)" in text
    home, away = (plan_results.compared(record, "fade", "delete_first")[d].value for d in DOMAINS)
    assert f"{home:.2f}" == f"{away:.2f}"
    assert f"it comes to {home:.2f} times" in text
    record = plan_results.load(plan_results.shipped("methods"))
    others = [row.name for row in record.rows if row.name not in ("dense", "trsp")]
    assert f"{len(others)} other choices" in text
    for domain in DOMAINS:
        ratios = {name: plan_results.compared(record, "trsp", name)[domain] for name in others}
        assert max(ratios, key=lambda name: ratios[name].value) == "sleb"
        assert max(ratio.value for ratio in ratios.values()) < 1
        assert (ratios["sleb"].high > 1) == (domain == "calibration")  # within the noise, or not


def recorded(name: str) -> set[tuple[str, str]]:
    """What a recorded sweep has measured: pairs of perplexities, calibration domain and held-out domain, as written."""
    sweep = grid_results.load(ROOT / "assets" / "evidence" / "sweeps" / f"{name}.json")
    pairs = [losses for point in sweep.points for losses in (point.losses, point.direct)]
    pairs += [{d: sweep.dense[point.blocks[d]] for d in DOMAINS} for point in sweep.points]
    values = [[math.exp(statistics.fmean(losses[d])) for d in DOMAINS] for losses in pairs if losses]
    return {(f"{home:,.{digits}f}", f"{away:,.{digits}f}") for home, away in values for digits in (0, 1)}


@pytest.mark.parametrize(
    ("section", "sweeps"),
    [
        ("How long, and in which way?", ("length", "long", "longest", "seeds", "variants")),
        ("How strong a λ₁?", ("path", "map")),
        ("How many steps a round, and which gate?", ("choice", "rounds")),
        ("What of stage 2's own settings?", ("transfer",)),
        ("In parts, or one layer at a time?", ("rounds",)),
    ],
)
def test_every_pair_of_figures_of_a_sweep_was_recorded(section, sweeps):
    text = PAGES["docs/results.md"].split(f"## {section}\n")[1].split("\n## ")[0]
    written = set(PAIR.findall(" ".join(text.split())))
    known = set().union(*map(recorded, sweeps))
    assert len(written) >= 5
    elsewhere = {("19.5", "37.9"), ("19.1", "32.3")} if section.startswith("How long") else set()  # of the run of Quick
    assert written - known - elsewhere == set()


# -- examples


def test_the_lesson_can_be_loaded():
    blocks = re.findall(r"```json\n(.+?)```", PAGES["docs/teaching.md"], re.DOTALL)
    (example,) = (text for text in blocks if '"steps"' in text)
    assert len(lessons.load(example).steps) == 2


PYTHON = re.findall(r"```python\n(.+?)```", PAGES["docs/api.md"], re.DOTALL)


@pytest.mark.parametrize("example", PYTHON)
def test_the_examples_name_what_there_is(example):
    compile(example, "docs/api.md", "exec")
    exec("\n".join(re.findall(r"^from .+$", example, re.MULTILINE)), {})


def test_the_recorded_run_can_be_read_as_the_example_does(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = (text for text in PYTHON if "demo_run" in text)
    exec(example, {})
    assert capsys.readouterr().out.startswith(f"finished {sorted(Run(replay.FOLDER).state().chosen)}")
