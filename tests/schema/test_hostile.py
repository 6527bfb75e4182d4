"""Input from strangers: every format that is read, damaged in every way. What comes out is a value or a `TrspError`
with a remedy; nothing else is raised, and nothing is written outside the folder of runs.

Each law is tried a few times in the fast set, and at least 10,000 times in the slow one, which prints how often.
"""

from __future__ import annotations

import base64
import copy
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from pages.ui.app_state import file_routes, uploads
from pages.ui.tour import lessons
from tests import ROOT, story
from tests import studies as made_up
from tests.models.test_models import CONFIG as MODEL
from tests.models.test_models import shard, weights
from trsp_core import formatting
from trsp_core.cli import run_figures
from trsp_core.data import corpora
from trsp_core.errors import TrspError
from trsp_core.evaluation import questions
from trsp_core.experiments import grid_results, grids, plan_results, plans, studies
from trsp_core.export import model_card
from trsp_core.models import inspection
from trsp_core.pruning import validate
from trsp_core.runs.store import STATUSES, Run, Store
from trsp_core.schema import codec, run_state
from trsp_core.schema import config as configs
from trsp_core.schema import events as ev
from trsp_core.schema import messages as an
from trsp_core.schema.config import KNOBS, RunConfig
from trsp_core.schema.run_state import RunState
from trsp_core.workbench import transcript

MANY = 10_000
LETTERS = st.characters()  # surrogates too: JSON can spell them, and no file can hold them
HOSTILE = st.sampled_from(
    [
        None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**400), 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf,
        "", " ", "0", "x" * 5000, "../../etc/passwd", "/dev/zero", "~root", "a\x00b", "\ud800", "\u202e", "\r\n", "٣",
        "<img src=x onerror=alert(1)>", "{}", [], {}, [[]], [None], {"": None}, "9" * 5000, "1e999", "nan", [1] * 30,
    ]
)  # fmt: skip
VALUE = HOSTILE | st.integers() | st.floats() | st.text(LETTERS, max_size=20)
DEEP = [{"a": {"b": [None, {"": -1}]}}, [[[[]]], {"x": "\ud800"}], {"__class__": [math.nan]}, [{}] * 3]
JSON = VALUE | st.sampled_from(DEEP)


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """The path of every node of decoded JSON, the root's first."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@st.composite
def damaged(draw, documents: st.SearchStrategy[Any]) -> Any:
    """One of `documents` with a few of its nodes replaced, taken out, doubled or renamed; most of it stays sound."""
    document = copy.deepcopy(draw(documents))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        place = draw(st.sampled_from(places(document)))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                document = copy.deepcopy(draw(JSON))
            continue
        holder = document
        for key in place[:-1]:
            holder = holder[key]
        change = draw(st.sampled_from(["value", "value", "value", "gone", "twice", "name"]))
        if change == "value":
            holder[place[-1]] = copy.deepcopy(draw(JSON))
        elif change == "gone":
            del holder[place[-1]]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[place[-1]]))
        elif change == "name":
            holder[draw(st.text(LETTERS, max_size=8))] = holder.pop(place[-1])
    return document


@st.composite
def torn(draw, contents: st.SearchStrategy[bytes]) -> bytes:
    """One of `contents`, in half of the cases cut, overwritten or filled with other bytes."""
    content = draw(contents)
    kind = draw(st.sampled_from(["whole", "whole", "cut", "over", "in", "bytes"]))
    if kind == "whole":
        return content
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    at = draw(st.integers(0, len(content)))
    if kind == "cut":
        return content[:at]
    more = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\x00", b"\n", b"\xff\xfe", b"[" * 50_000]))
    return content[:at] + more + content[at + (len(more) if kind == "over" else 0) :]


def as_bytes(documents: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return torn(documents.map(lambda document: json.dumps(document).encode()))


def lines(documents: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[bytes]:
    return torn(
        st.lists(documents, max_size=most).map(lambda many: "".join(json.dumps(d) + "\n" for d in many).encode())
    )


def refused_or(read: Callable[[], Any]) -> Any:
    """What `read` gives; None where it refuses, and says what to do next."""
    try:
        return read()
    except TrspError as error:
        told = error
    assert told.message, "a refusal without a message"
    assert told.remedy, "a refusal without a remedy"
    str(told).encode()  # a page and a terminal have to be able to show it
    return None


TOLD = [json.loads(ev.to_line(event, n, n * 0.5)) for n, event in enumerate(story.tell())]
ONE_OF_EACH = list({line["event"]: line for line in TOLD}.values())
SETTINGS = [
    {"schema": configs.SCHEMA, "settings": config.as_dict()}
    for config in (RunConfig(), story.CONFIG, story.NARROW, RunConfig(method="manual", layers="3, 13-15"))
]
GRID = json.loads((ROOT / "benchmarks" / "grids" / "length.json").read_text("utf-8"))
COLUMNS = [an.Variant("smollm2-135m", removed=[1], label="Dense")] * 2
ASKED: list[an.Request] = [
    an.Generate(COLUMNS, "The river"),
    an.Trace(COLUMNS, "The river", " crosses the city"),
    an.WhatIf("smollm2-135m", [1, 2]),
    an.Importance(COLUMNS[0]),
    an.Influence(COLUMNS[0]),
    an.Cancel(),
]
ANSWERED: list[an.Request | an.Answer] = [
    ASKED[0],
    an.PromptRead(0, 3, False),
    an.TokenGenerated(0, 5, " a", 0.1),
    an.TokenGenerated(1, 6, " b", 0.2),
    an.ColumnFinished(0, 1, "length", 10.0, 5.0, 0.0),
    an.TextTraced(0, 1, [5], [" a"], [0.5], [[" a"]], [[0.5]], [0.1], 0.7),
    an.Answered(1.0),
]


def config_file(content: bytes, folder: Path) -> None:
    """A run's config: what is read can be written, and comes back equal."""
    run = Run(folder)
    (folder / "config.json").write_bytes(content)
    config = refused_or(run.config)
    if config is not None:
        copied = Store(folder / "runs").create(config)
        assert copied.config() == config
        shutil.rmtree(copied.folder)
        refused_or(lambda: validate.from_values(config.as_dict()))
        config.as_command().encode()
        model_card.script(config).encode()


def event_lines(content: bytes, folder: Path) -> None:
    """A run's events: any bytes fold to a state that can be told."""
    run = Run(folder)
    run.events_file.write_bytes(content)
    read, end = run.read()
    assert 0 <= end <= len(content)
    assert run.read(end) == ([], end)
    folded = run_state.fold(RunState(), read)
    assert folded.count == (read[-1][0] + 1 if read else 0)
    assert 0 <= folded.fraction <= 1
    json.dumps(codec.plain(run_state.summary(folded)), ensure_ascii=False).encode()
    assert run_figures.progress(folded)
    assert run_figures.account({"run": "x", **run_state.summary(folded)})


RUN_FILES = ("config.json", "events.jsonl", "summary.json", "exit.json", "env.json", "queued", "cancel", "lock")
KEPT = "comparisons/0123456789ab.json"


def run_folder(case: tuple[str, str, bytes], folder: Path) -> None:
    """A run's folder, one of its files replaced by bytes, by a folder, or by a link out of it."""
    name, kind, content = case
    run = Run(folder / "run-0000")
    shutil.rmtree(run.folder)
    shutil.copytree(folder / "sound", run.folder)
    target = run.folder / name
    target.unlink(missing_ok=True)
    if kind == "bytes":
        target.write_bytes(content)
    elif kind == "folder":
        target.mkdir()
    elif kind == "link":
        target.symlink_to("/dev/null")
    elif kind == "lost link":
        target.symlink_to("nowhere")
    for found in Store(folder).runs():
        if found.folder.name == "sound":  # beside the other one, and the same in every case
            continue
        refused_or(found.config)
        folded = found.state()
        assert found.status(folded.ended) in STATUSES
        told = found.summary()
        assert set(told) == set(run_state.summary(RunState()))
        assert run_figures.account({"run": found.id, **told})
        assert found.hint()
        assert found.size() >= 0
        plans.belongs(found)
        for kept in transcript.comparisons(found):
            if answered := refused_or(lambda kept=kept, found=found: transcript.read(found, kept)):
                transcript.markdown(transcript.gather(*answered)).encode()
    Store(folder).models()
    runs, plan = Store(folder).runs(), plans.read("ablation")
    refused_or(lambda: plan_results.gather(plan, plans.earlier_ends(plan, runs) | plans.ends(plan, runs)))


def upload(case: tuple[str, bytes], folder: Path) -> None:
    """A visitor's file: kept under `uploads` with a name of ours, or refused; then read as a text, or refused."""
    name, content = case
    kept = refused_or(lambda: uploads.keep(content, name, folder))
    if kept is not None:
        assert kept.parent == folder / "uploads"
        assert kept.suffix in uploads.SUFFIXES
        corpus = refused_or(lambda: corpora.read(str(kept)))
        if corpus is not None:
            assert corpus.articles
            "".join(corpus.articles).encode()
        questions_of(kept)
        kept.unlink()


def lesson_file(content: bytes, folder: Path) -> None:
    """A teacher's file."""
    lesson = refused_or(lambda: lessons.load(content))
    if lesson is not None:
        assert lessons.load(lessons.to_json(lesson)) == lesson


def lesson_link(word: Any, folder: Path) -> None:
    """A lesson in an address."""
    lesson = refused_or(lambda: lessons.find(str(word)))
    if lesson is not None:
        assert lesson.steps


def question_lines(content: bytes, folder: Path) -> None:
    """A task's file."""
    (folder / "task.jsonl").write_bytes(content)
    questions_of(folder / "task.jsonl")


def questions_of(file: Path) -> None:
    for question in refused_or(lambda: questions.read(str(file), "news", 20)) or ():
        assert len(question.contexts) == len(question.continuations) > question.gold
        "".join([*question.contexts, *question.continuations]).encode()


def address(parameters: dict[str, str], folder: Path) -> None:
    """What stands after the question mark: settings, a run, a kept comparison, a file to download."""
    for name, value in parameters.items():
        if name in KNOBS:
            typed, problem = KNOBS[name].parse(value)
            assert problem is None or (problem.message and problem.remedy)
            assert isinstance(typed, KNOBS[name].kind)
        refused_or(lambda value=value: Store(folder).get(value))
        refused_or(lambda value=value: transcript.read(Run(folder / "sound"), value))
        asked = Request({"type": "http", "method": "GET", "path_params": {"run": value, "name": value}, "headers": []})
        assert file_routes.send(asked).status_code == 404
    refused_or(lambda: validate.from_values(parameters))


def request_line(content: bytes, folder: Path) -> None:
    """A request to the workbench: refused as a line, refused by a limit, or one whose parts are what they should be."""
    read = refused_or(lambda: an.unpack(content.decode("utf-8", "replace")))
    if read is None:
        return
    ticket, record = read
    an.pack(ticket, record).encode()
    if isinstance(record, an.Request):
        refused_or(lambda: an.check(record))


def kept_comparison(content: bytes, folder: Path) -> None:
    """A comparison that is kept with a run."""
    (folder / "comparisons").mkdir(exist_ok=True)
    (folder / KEPT).write_bytes(content)
    for name in transcript.comparisons(Run(folder)):
        answered = refused_or(lambda name=name: transcript.read(Run(folder), name))
        if answered:
            found = transcript.gather(*answered)
            transcript.markdown(found).encode()


def plan_file(content: bytes, folder: Path) -> None:
    """A plan: its names make folders' names."""
    (folder / "plan.json").write_bytes(content)
    plan = refused_or(lambda: plans.read(str(folder / "plan.json")))
    if plan is not None:
        for variation in plan.variations:
            name = plans.name_of(plan, variation, RunConfig())
            assert Path(name).name == name
            plans.needs(plan, variation)
        (plan.title + "".join(v.title for v in plan.variations)).encode()


def grid_file(content: bytes, folder: Path) -> None:
    """A grid."""
    (folder / "grid.json").write_bytes(content)
    grid = refused_or(lambda: grids.read(str(folder / "grid.json")))
    if grid is not None:
        assert 0 < len(grid.plan.variations) <= grids.MOST
        assert set(grid.points) == {v.name for v in grid.plan.variations}


def record_file(content: bytes, folder: Path) -> None:
    """A record of runs, with the intervals that are made of it."""
    (folder / "record.json").write_bytes(content)
    record = refused_or(lambda: plan_results.load(folder / "record.json"))
    if record is not None:
        formatting.table(plan_results.cells(record)).encode()
        plan_results.to_json(record).encode()


def sweep_file(content: bytes, folder: Path) -> None:
    """A record of a sweep."""
    (folder / "sweep.json").write_bytes(content)
    sweep = refused_or(lambda: grid_results.load(folder / "sweep.json"))
    if sweep is not None:
        formatting.table(grid_results.cells(sweep)).encode()
        [sweep.command(point) for point in sweep.points]
        grid_results.to_json(sweep).encode()
        study = studies.read(sweep)
        for cells in (studies.cells, studies.spread_cells, studies.ratio_cells):
            formatting.table(cells(study) if study else []).encode()


def model_folder(case: tuple[str, bytes], folder: Path) -> None:
    """A model's folder, one of its files replaced by bytes: facts whose layers add up, or a refusal."""
    name, content = case
    keep = (folder / name).read_bytes() if (folder / name).exists() else None
    (folder / name).write_bytes(content)
    try:
        facts = refused_or(lambda: inspection.read(folder, "a model"))
    finally:
        (folder / name).unlink() if keep is None else (folder / name).write_bytes(keep)
    if facts is not None:
        assert 1 <= facts.n_layers == len(facts.layer_parameters) <= inspection.MAX_LAYERS
        assert 0 < sum(facts.layer_parameters) <= facts.parameters
        assert facts.parameters < 2**63


@st.composite
def headed(draw, headers: st.SearchStrategy[Any]) -> bytes:
    """A safetensors file whose header says one thing and whose length may say another."""
    header = json.dumps(draw(headers)).encode()
    length = draw(st.sampled_from([len(header)] * 4 + [0, 1, len(header) + 1, 10**6, 2**40, 2**63, 2**64 - 1]))
    return draw(torn(st.just(struct.pack("<Q", length) + header + bytes(draw(st.sampled_from([0, 300, 2000]))))))


def _header() -> dict[str, Any]:
    entries, end = {}, 0
    for name, shape in weights().items():
        size = 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return entries


INDEX = {"weight_map": dict.fromkeys(weights(), "model.safetensors")}
NAMES = st.text(LETTERS, max_size=12) | st.sampled_from(
    [
        "a.txt",
        "../../a.txt",
        "/etc/a.jsonl",
        "a\x00.txt",
        "\n.jsonl",
        "a.txt/..",
        ".txt",
        "con.JSONL",
        "x" * 300 + ".txt",
    ]
)
TEXT_FILES = (
    st.binary(max_size=300)
    | torn(st.sampled_from([b"PK\x03\x04" + bytes(40), zlib.compress(bytes(10**6)), "Ein Text.\n\n".encode("utf-16")]))
    | lines(damaged(st.sampled_from([{"text": "A river."}, {"query": "Q?", "choices": ["a", "b"], "gold": 1}])))
    | st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))
)
PARAMETERS = st.dictionaries(
    st.sampled_from([*KNOBS, "run", "kept", "ask", "off"]) | st.text(max_size=6),
    st.text(max_size=20) | HOSTILE.map(str) | st.sampled_from(["true", "0.3", "sound", "0123456789ab"]),
    max_size=4,
)
FORMATS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, Path], None]]] = {
    "config": (as_bytes(damaged(st.sampled_from(SETTINGS))), config_file),
    "events": (lines(damaged(st.sampled_from(ONE_OF_EACH))), event_lines),
    "run folder": (
        st.tuples(
            st.sampled_from([*RUN_FILES, KEPT, "queued"]),
            st.sampled_from(["bytes"] * 6 + ["folder", "link", "lost link", "gone"]),
            as_bytes(damaged(st.sampled_from([*SETTINGS, run_state.summary(RunState()), {"returncode": -9}])))
            | lines(damaged(st.sampled_from(ONE_OF_EACH)), 3),
        ),
        run_folder,
    ),
    "upload": (st.tuples(NAMES, TEXT_FILES), upload),
    "questions": (
        lines(
            damaged(
                st.sampled_from(
                    [
                        {"query": "Q?", "choices": ["a", "b"], "gold": 1},
                        {"context_options": ["A", "B"], "continuation": "c", "gold": 0},
                    ]
                )
            )
        ),
        question_lines,
    ),
    "address": (PARAMETERS, address),
    "workbench": (as_bytes(damaged(st.sampled_from([json.loads(an.pack("t", r)) for r in ASKED]))), request_line),
    "kept comparison": (
        as_bytes(damaged(st.just([json.loads(an.pack("", r)) for r in ANSWERED]))),
        kept_comparison,
    ),
    "lesson": (
        as_bytes(damaged(st.sampled_from([json.loads(lessons.to_json(v)) for v in lessons.shipped().values()]))),
        lesson_file,
    ),
    "lesson link": (
        damaged(st.sampled_from([lessons.pack(v) for v in lessons.shipped().values()]))
        | st.binary(max_size=200).map(lambda b: lessons.PACKED + base64.urlsafe_b64encode(zlib.compress(b)).decode()),
        lesson_link,
    ),
    "plan": (as_bytes(damaged(st.just(plans.built_in()["ablation"]))), plan_file),
    "grid": (as_bytes(damaged(st.just(GRID | {"axes": {"stage2_steps": [60], "seed": [0]}}))), grid_file),
    "evidence": (as_bytes(damaged(st.deferred(lambda: st.just(_small_record())))), record_file),
    "sweep": (as_bytes(damaged(st.deferred(lambda: st.just(_small_sweep())))), sweep_file),
    "study": (as_bytes(damaged(st.deferred(lambda: st.just(_small_study())))), sweep_file),
    "model": (
        st.tuples(st.just("config.json"), as_bytes(damaged(st.just(MODEL))))
        | st.tuples(st.just("model.safetensors"), headed(damaged(st.just(_header()))))
        | st.tuples(st.just("tokenizer_config.json"), as_bytes(damaged(st.just({"chat_template": "{{ x }}"})))),
        model_folder,
    ),
    "model index": (
        st.tuples(st.just("model.safetensors.index.json"), as_bytes(damaged(st.just(INDEX)))),
        model_folder,
    ),
}


def _small_record() -> dict[str, Any]:
    document = json.loads((ROOT / "assets" / "evidence" / "ablation.json").read_text("utf-8"))
    for row in document["rows"]:
        row["losses"] = {domain: losses[:3] for domain, losses in row["losses"].items()}
    return document | {"rows": document["rows"][:3]}


def _small_sweep() -> dict[str, Any]:
    document = json.loads((ROOT / "assets" / "evidence" / "sweeps" / "length.json").read_text("utf-8"))
    for point in document["points"]:
        for losses in (point["losses"], point["direct"]):
            losses.update({domain: values[:3] for domain, values in losses.items()})
    document["dense"] = {k: v[:3] for k, v in document["dense"].items()}
    return document | {"points": document["points"][:2]}


def _small_study() -> dict[str, Any]:
    document = json.loads(grid_results.to_json(made_up.transfers(range(2))))
    return document | {"points": document["points"][:4]}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder inside an otherwise empty one: a sound run, the run that is damaged, a model."""
    folder = tmp_path / "inside"
    sound = story.write(Store(folder), "finished").folder
    sound.rename(folder / "sound")
    (folder / "sound" / "comparisons").mkdir()
    comparison_lines = [json.loads(an.pack("", r)) for r in ANSWERED]
    (folder / "sound" / KEPT).write_text(json.dumps(comparison_lines))
    shutil.copytree(folder / "sound", folder / "run-0000")
    return folder


def many(cases: int, strategy: st.SearchStrategy, law: Callable[[Any], None]) -> int:
    """Try `law` on so many cases, the same ones each time; how many they were."""
    tried = 0

    @settings(
        max_examples=cases, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def hold(case):
        nonlocal tried
        tried += 1
        law(case)

    hold()
    return tried


@pytest.mark.parametrize("cases", [25, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_is_a_value_or_a_refusal_with_a_remedy(name, cases, place, monkeypatch, capsys):
    strategy, law = FORMATS[name]
    folder = place
    monkeypatch.setenv("TRSP_RUNS", str(folder))
    if law is model_folder:
        folder = place / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(MODEL))
        (folder / "tokenizer.json").write_text("{}")
        shard(folder / ("shard.safetensors" if name == "model index" else "model.safetensors"), weights())

    tried = many(cases, strategy, lambda case: law(case, folder))
    assert tried >= cases
    assert os.listdir(place.parent) == ["inside"], "something was written outside the folder of runs"
    with capsys.disabled():
        if cases == MANY:
            print(f"\n{name}: {tried:,} cases")
