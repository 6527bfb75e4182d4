"""Names, numbers and places that cannot be: refused before any work, in the shell, on the page and at the workbench."""

import errno
import json
import math
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from tests import ROOT, story
from tests.pages.test_pages import open_page
from trsp_core import paths
from trsp_core.cli import main as shell_main
from trsp_core.errors import TrspError, disk_full
from trsp_core.evaluation import questions, tasks
from trsp_core.models import catalog
from trsp_core.paths import runs_root
from trsp_core.runs import limits
from trsp_core.runs.recorder import record
from trsp_core.runs.store import Run, Store
from trsp_core.schema import messages as an
from trsp_core.schema.config import KNOBS
from trsp_core.schema.knobs import number, whole
from trsp_core.workbench.worker import RequestHandler

NO_PATHS = ["x" * 300, "~nobody-here", "~nobody-here/a.json", "a\0b", "/" + "y/" * 3000, "\udcff"]
NO_FILES = [*NO_PATHS, "/dev/full", "/", "/dev/null/x", "/nowhere/a.json"]
NO_NUMBERS = ["nan", "inf", "-inf", "1e999", "9" * 5000, "", "0x10"]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    return story.write(Store(tmp_path / "runs"), "finished")


@pytest.mark.parametrize("name", NO_PATHS)
def test_what_can_be_no_path_is_refused(name):
    for read in (paths.named, paths.writable, lambda n: paths.file(n, "plan", "Take another.")):
        with pytest.raises(TrspError) as caught:
            read(name)
        assert caught.value.remedy
        str(caught.value).encode()
    assert paths.folder(name) is None
    assert not catalog.is_ready(name)


@pytest.mark.parametrize("name", NO_FILES)
def test_every_flag_with_a_path_refuses_what_cannot_be_one(run, name, capsys):
    commands = [["run", knob, name] for knob in ("--model", "--text", "--heldout")]
    commands += [["compare", "--plan", name], ["sweep", "--grid", name]]
    commands += [["eval", "nowhere", "--task", name], ["eval", name, "--task", "last_word"],
                 ["eval", "nowhere", "--task", "last_word", "--text", name]]  # fmt: skip
    commands += [["resume", name], ["show", name], ["export", name], ["report", name, "--out", "a.html"]]
    for command in commands:
        assert shell_main.main(command) == 2, command
        told = capsys.readouterr()
        assert told.err.strip(), command
        assert not told.out, command


@pytest.mark.parametrize("name", [*NO_PATHS, "/dev/null", "/", "/dev/null/x", "x" * 250])
def test_no_work_is_done_for_a_place_that_cannot_be_written(run, name, capsys, monkeypatch):
    for worker in (
        "trsp_core.runs.process.finish",
        "trsp_core.experiments.runner.work",
        "trsp_core.export.checkpoint.export",
    ):
        monkeypatch.setattr(worker, lambda *given, **more: pytest.fail("work was begun"))
    grid = run.folder / "grid.json"
    grid.write_text(json.dumps({"name": "mine", "axes": {"seed": [0]}}))
    kept = ["report", str(run.folder)], ["curves", str(run.folder)], ["compare", "--plan", "ablation"]
    for command in (*kept, ["sweep", "--grid", str(grid)]):
        assert shell_main.main([*command, "--out", name]) == 2, command
        assert capsys.readouterr().err.strip()
    if name in NO_PATHS:
        assert shell_main.main(["export", str(run.folder), "--out", name]) == 2
        assert shell_main.main(["run", "--preset", "quick", "--model", "nowhere", "--out", name]) == 2
    assert not os.path.isfile("/dev/null")


def test_a_device_is_never_replaced_by_a_file(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TrspError, match="a folder or a device"):
        paths.writable(str(tmp_path / "pipe"))
    assert paths.writable(str(tmp_path / "new" / "a.json"), makes_folders=True).name == "a.json"
    with pytest.raises(TrspError, match="not there"):
        paths.writable(str(tmp_path / "new" / "a.json"))


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_every_flag_with_a_number_refuses_what_is_none(value, capsys):
    for knob in KNOBS.values():
        if knob.kind in (int, float):
            assert shell_main.main(["run", f"{knob.flag}={value}"]) == 2, knob.flag
    assert shell_main.main(["eval", "nowhere", "--task", "last_word", f"--limit={value}"]) == 2
    assert "--limit: " in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, True, "x", [1]])
def test_what_is_no_number_is_none_anywhere(value):
    for read in (whole, number):
        with pytest.raises(TrspError, match=r"Seed: .* was given, expected"):
            read("Seed", value)
    assert whole("Seed", 3.0) == whole("Seed", "3") == 3
    with pytest.raises(TrspError):
        number("Seed", 10**400)


@pytest.mark.parametrize("limit", [0, -1, -2, -3])
def test_a_limit_below_one_is_refused(limit, tmp_path, capsys):
    file = tmp_path / "asked.jsonl"
    file.write_text('{"query": "Q?", "choices": ["a", "b"], "gold": 1}\n' * 5)
    for read in (lambda: questions.read(str(file), "news", limit), lambda: questions.read("last_word", "news", limit),
                 lambda: tasks.read("piqa", limit)):  # fmt: skip
        with pytest.raises(TrspError, match="Ask for 1 or more"):
            read()
    assert shell_main.main(["eval", "nowhere", "--task", str(file), "--limit", str(limit)]) == 2
    assert "1 or more" in capsys.readouterr().err


ENDLESS = [math.nan, math.inf, -math.inf, 10**400, -1, 1e308]


def hostile_requests() -> list[an.Request]:
    sound = an.Variant("smollm2-135m")
    found: list[an.Request] = []
    for name in [*NO_PATHS, "/dev/full", "/"]:
        column = an.Variant(name)
        found += [an.Generate([column], "The river"), an.Trace([column], "a", "b"), an.WhatIf(name, [1]),
                  an.Importance(column), an.Influence(column)]  # fmt: skip
    for value in ENDLESS:
        fields = ("temperature", "top_p", "seed", "new_tokens")
        found += [an.Generate([sound], "The river", **{field: value}) for field in fields]
        found += [an.WhatIf("smollm2-135m", [1], sample_tokens=value), an.WhatIf("smollm2-135m", [value])]
    found += [an.Generate([sound] * 500, "x"), an.WhatIf("smollm2-135m", [1] * 500)]
    many = an.Variant("smollm2-135m", removed=list(range(5000)))
    found += [an.Generate([many], "x"), an.Generate([sound], "x" * 10**6)]
    return found


def test_every_request_that_cannot_be_is_refused_at_the_workbench(run):
    bench = RequestHandler()
    for request in hostile_requests():
        with pytest.raises(TrspError) as caught:
            an.check(request)
            limits.DEMO.check_request(request, run.folder)
            next(iter(bench.answer(request)))
        assert caught.value.remedy


def test_eval_takes_a_runs_folder_as_export_does(run, tmp_path, tiny_model, capsys):
    (run.folder / "model").symlink_to(tiny_model)
    file = tmp_path / "asked.jsonl"
    file.write_text('{"query": "The river", "choices": ["a", "b"], "gold": 1}\n')
    told = []
    for name in (run.id, str(run.folder), str(tiny_model)):
        assert shell_main.main(["eval", name, "--task", str(file), "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1] == told[2]
    (run.folder / "model").unlink()
    assert shell_main.main(["eval", str(run.folder), "--task", str(file)]) == 2
    assert "kept no model" in capsys.readouterr().err


def test_no_number_in_a_field_ends_the_page(page_store):
    """The browser bounds what is typed; a client that does not would end the page inside the toolkit, at int(inf)."""
    app = open_page("run")
    for value in (math.inf, math.nan, 1e308, 0.5):
        for field in app.number_input:
            field.set_value(value)
        app.run()
        assert not app.exception, value
        assert all(math.isfinite(field.value) for field in app.number_input)
        assert any("was given, expected" in error.value for error in app.error), value
        assert app.get_by_key("start").disabled
    for field in app.number_input:
        field.set_value(float(KNOBS[field.key.removeprefix("knob-")].default))
    app.run()
    assert not app.error


def test_a_page_refuses_a_name_that_can_be_none(page_store):
    for name in ("x" * 300, "~nobody-here", "/" + "y/" * 1900):
        app = open_page("run", model=name, text=name, heldout=name)
        assert any("There is no model" in error.value for error in app.error), name


def test_of_five_hundred_models_to_compare_three_are_taken(page_store):
    run = story.write(page_store, "finished")
    app = open_page("compare", run=run.id)
    field = app.get_by_key("compare-models")
    field.set_value([field.options[n % len(field.options)] for n in range(500)]).run()
    assert not app.exception
    open_page("layers", run=run.id, off=",".join(map(str, range(500))))


FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]


@pytest.mark.parametrize("number", FULL)
def test_a_full_disk_is_known_by_its_number_wherever_it_stands(number):
    words = os.strerror(number)
    assert disk_full(OSError(number, words))
    assert disk_full(OSError(number, "in another language"))
    assert disk_full(SafetensorError(f"Error while serializing: I/O error: {words} (os error {number})"))
    behind = RuntimeError("could not save")
    behind.__cause__ = OSError(number, words)
    assert disk_full(behind)
    assert not disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not disk_full(SafetensorError("I/O error: Permission denied (os error 13)"))
    assert not disk_full(ValueError(f"os error {number}8"))


@pytest.mark.parametrize("number", FULL)
def test_a_run_whose_weights_find_no_room_says_that_the_disk_is_full(tmp_path, number):
    def work():
        yield from ()
        raise SafetensorError(f"Error while serializing: I/O error: ({os.strerror(number)}) (os error {number})")

    ended = record(Run(tmp_path), work())
    assert ended.failure is not None
    assert ended.failure.message == "The disk is full."


def test_safetensors_itself_tells_the_number(tmp_path):
    """What the text looks like that `disk_full` reads, from a process whose files may not grow."""
    code = f"""
import resource, torch
from safetensors.torch import save_file
from trsp_core.errors import disk_full
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    save_file({{"x": torch.zeros(10000)}}, {str(tmp_path / "full")!r})
except Exception as error:
    print(type(error).__name__, disk_full(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[1:] == ["True"], done


@pytest.mark.parametrize("name", ["x" * 300, "~nobody_there/x", "a\0b"])
def test_a_folder_of_runs_that_cannot_be_is_a_refusal(name, monkeypatch):
    monkeypatch.setattr("os.environ", {**os.environ, "TRSP_RUNS": name})
    with pytest.raises(TrspError, match="TRSP_RUNS"):
        runs_root()
