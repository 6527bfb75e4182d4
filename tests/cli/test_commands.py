"""The command line: help for every knob, exit codes, JSON on stdout, words on stderr, a readable run in the end."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import click
import pytest

from tests import ROOT, tiny
from trsp_core.cli import main, run_figures
from trsp_core.pruning import methods, validate
from trsp_core.runs.store import Run, Store
from trsp_core.schema import config, run_state, turns
from trsp_core.schema.run_state import RunState

SMALL = shlex.split(
    "--block-length 16 --measure-length 24 --measure-blocks 3 --calibration-blocks 12 --probe-every 2 --probe-blocks 2 "
    "--stage1-steps 2 --stage2-steps 3 --ratio 0.4 --speed-repeats 1 --sample-tokens 3"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Folders of our own for runs and cache."""
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TRSP_HOME", str(tmp_path / "home"))
    return tmp_path


def trsp(*words, **how):
    """The shell in a process of its own, started."""
    return subprocess.Popen(
        [sys.executable, "-m", "trsp_core", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def said(*words) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that ends by itself."""
    child = trsp(*words)
    out, err = child.communicate(timeout=300)
    return child.returncode, out, err


def pruning(tiny_model, text, *more):
    return ("run", "--model", str(tiny_model), "--text", text, "--heldout", text, *SMALL, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """A finished run by the shell: its folder, stdout and stderr."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "text.txt").write_text(tiny.text(1200), "utf-8")
    run = folder / "runs" / "the-run"
    code, out, err = said(*pruning(tiny_model, str(folder / "text.txt"), "--json", "--out", str(run)))
    assert code == 0, err
    return run, out, err


def test_a_run_prints_its_summary_as_json_and_nothing_else(finished):
    _, out, err = finished
    figures = json.loads(out)
    assert figures["run"] == "the-run"
    assert sorted(figures["removed"] + figures["kept"]) == list(range(tiny.L))
    assert figures["parameters"]["pruned"] < figures["parameters"]["dense"]
    for domain in ("calibration", "heldout"):
        assert set(figures["perplexity"][domain]) == {"dense", "direct", "trained", "pruned"}
    assert set(figures["speed"]) == {"dense", "pruned", "ceiling"}
    assert figures["seconds"]["total"] > 0
    assert figures["peak_bytes"] > 0
    for phase in ("load", "choose 0/4", "transfer 0/3", "left"):
        assert phase in err
    assert "%|" not in err
    assert "it/s" not in err


def test_bars_of_other_libraries_stay_out_of_stderr():
    code = "import trsp_core\n" + "".join(
        f"from {module} import tqdm\n[step for step in tqdm(range(3))]\n"
        for module in ("huggingface_hub.utils", "transformers.utils.logging", "datasets.utils.tqdm")
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stderr == ""


def test_the_folder_of_a_shell_run_is_any_runs_folder(finished):
    run, out, _ = finished
    read = Run(run)
    assert read.status() == "finished"
    assert json.loads(out)["perplexity"] == run_state.summary(read.state())["perplexity"]
    assert (read.model_folder / "model.safetensors").is_file()


def test_show_and_list_tell_of_it(finished, monkeypatch, capsys):
    run, out, _ = finished
    monkeypatch.setenv("TRSP_RUNS", str(run.parent))
    for name in ("the-run", str(run)):
        assert main.main(["show", name]) == 0
        shown = capsys.readouterr().out
        assert "finished" in shown
        assert "python -m trsp_core run --model" in shown
    assert main.main(["show", "the-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["stage2_steps"] == 3
    assert shown["removed"] == json.loads(out)["removed"]
    assert main.main(["list", "--json"]) == 0
    assert [r["run"] for r in json.loads(capsys.readouterr().out)] == ["the-run"]
    assert main.main(["list"]) == 0
    assert "the-run  finished" in capsys.readouterr().out


def test_every_knob_has_a_flag_with_its_help(capsys):
    assert main.main(["run", "-h"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for knob in config.KNOBS.values():
        assert knob.flag in told
        assert knob.label in told


def test_flags_are_read_as_the_page_reads_its_form():
    words = ["--one-shot", "--no-neighbours", "false", "--layers=-1", "--lambda-2", "1e-3"]
    name, loaded, words = main.shell.resolve_command(click.Context(main.shell), ["run", *words])
    flags = loaded.make_context(name, words).params
    values = {name: value for name, value in flags.items() if name in config.KNOBS and value is not None}
    assert values == {"one_shot": "true", "no_neighbours": "false", "layers": "-1", "lambda_2": "1e-3"}
    settings = validate.from_values({name: value for name, value in values.items() if name != "layers"})
    assert (settings.one_shot, settings.no_neighbours, settings.lambda_2) == (True, False, 1e-3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ratio", "0"], "removes nothing"),
        (["--ratio", "1"], "removes everything"),
        (["--ratio", "0.05"], "rounds to none"),
        (["--ratio", "x", "--seed", "-4"], "--seed"),
        (["--model", "nowhere"], "no model 'nowhere'"),
        (["--model", str(ROOT / "tests")], "no config.json"),
        (["--model", "{pickled}"], "only as pickled files"),
        (["--model", "nobody/nothing"], "could not be had from the hub"),
        (["--text", "nowhere.txt"], "no text 'nowhere.txt'"),
        (["--text", "{empty}"], "is empty"),
        (["--text", "{latin}"], "not UTF-8"),
        (["--text", "{short}"], "too short"),
        (["--block-length", "600"], "reads at most 512"),
        (["--method", "manual", "--layers", "9"], "does not exist"),
    ],
)
def test_bad_input_ends_with_two_and_leaves_no_run(words, expected, here, tiny_model, capsys):
    for name, content in {"empty": b"", "latin": b"\xe9t\xe9", "short": b"A few words."}.items():
        (here / f"{name}.txt").write_bytes(content)
        words = [w.replace("{" + name + "}", str(here / f"{name}.txt")) for w in words]
    pickled = shutil.copytree(tiny_model, here / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    words = [w.replace("{pickled}", str(pickled)) for w in words]
    model = [] if "--model" in words else ["--model", str(tiny_model)]
    assert main.main(["run", *SMALL, *model, *words]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""
    assert not (here / "runs").exists()


def test_unknown_words_end_with_two():
    for words in (["run", "--nonsense"], ["prune"], [], ["show"], ["run", "--rat", "0.2"]):
        assert main.main(words) == 2


def test_a_run_folder_that_is_taken_or_missing_is_refused(finished, tiny_model, text, capsys):
    run, _, _ = finished
    assert main.main([*pruning(tiny_model, text), "--out", str(run)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main.main(["show", "../x"]) == 2


def test_a_folder_that_cannot_be_written_is_told_by_the_flag_that_named_it(here, tiny_model, text, capsys):
    assert main.main([*pruning(tiny_model, text), "--out", "/proc/a-run"]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_a_model_too_large_for_memory_is_refused_with_the_numbers(here, tiny_model, text, monkeypatch, capsys):
    monkeypatch.setattr("trsp_core.machine.available_memory", lambda: 100_000_000)
    assert main.main([*pruning(tiny_model, text)]) == 2
    assert "100 MB are free" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_cancelled_readable_run(number, here, tiny_model, text):
    child = trsp(*pruning(tiny_model, text, "--stage2-steps", "100000", "--json"), env={**os.environ})
    end = time.monotonic() + 120
    while time.monotonic() < end:
        runs = Store().runs()
        if runs and runs[0].state().gap_steps:
            break
        time.sleep(0.1)
    child.send_signal(number)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    run = Store().runs()[0]
    assert run.status() == "cancelled"
    assert json.loads(out)["ended"] == "cancelled"
    assert run.summary()["chosen"]


def test_a_run_that_fails_ends_with_three_and_says_why(here, tiny_model, text):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_model, here / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    code, out, err = said(*pruning(broken, text, "--json"))
    assert code == 3
    assert "step 1 of stage 1" in err
    figures = json.loads(out)
    assert figures["failure"]["remedy"]
    assert figures["perplexity"]["calibration"] == {"dense": None}


def test_lists_describe_what_is_there(capsys):
    assert main.main(["methods", "--json"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out)] == list(methods.names())
    assert main.main(["families", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert any("llama" in f["model_types"] for f in told["families"])
    assert {"model_type": "llama", "architecture": "LlamaForCausalLM", "outcome": "supported", "reason": ""} in told[
        "sweep"
    ]["outcomes"]
    assert main.main(["methods"]) == 0
    assert methods.get("trsp").title in capsys.readouterr().out


def test_the_doctor_looks_and_touches_nothing(here, capsys):
    assert main.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["models"]["smollm2-135m"] == "not fetched"
    assert set(report["texts"]) == set(config.TEXTS)
    assert report["machine"]["cores"] == os.cpu_count()
    assert not (here / "home").exists()
    assert main.main(["doctor"]) == 0
    assert "machine" in capsys.readouterr().out


def test_an_empty_list_says_how_to_begin(here, capsys):
    assert main.main(["list"]) == 0
    assert "--preset quick" in capsys.readouterr().out


def test_fetching_tells_its_progress_or_why_not(here, tiny_model, capsys):
    assert main.main(["fetch", str(tiny_model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fraction"] == 1.0
    assert main.main(["fetch", "nowhere"]) == 2


def test_only_run_imports_torch():
    code = "import sys\nfrom trsp_core.cli.main import main\n"
    code += "codes = [main([w]) for w in ('list', 'methods', 'families', 'doctor')]\n"
    code += "sys.exit(any(codes) or 'torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_progress_is_one_line():
    assert run_figures.progress(RunState()) == "[  0%] start"
    now = RunState(
        at=50.0, phases=[{"name": "choose", "seconds": 200.0}], phase="choose", phase_number=0, units=80, done=20
    )
    assert run_figures.progress(now) == "[ 25%] choose 20/80, about 2:30 left"


def test_its_version_and_what_was_meant(capsys):
    for words, part in (
        (["--version"], "trsp-explorer 0.1.0"),
        (["run", "--lamda-1", "3"], "'--lambda-1'"),
        (["run", "--lamda-1", "3"], "Did you mean"),
        (["rnu"], "Did you mean 'run'?"),
    ):
        assert main.main(words) == (0 if words == ["--version"] else 2)
        told = capsys.readouterr()
        assert part in told.out + told.err


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"hidden_size": 33}, "The config of"),
        ("config.json", {"model_type": "surprise"}, "The config of"),
        ("tokenizer_config.json", {"bos_token": 5}, "The tokenizer in"),
    ],
)
def test_what_transformers_cannot_read_is_refused_before_there_is_a_run(
    file, changes, words, tiny_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    model = shutil.copytree(tiny_model, tmp_path / "model")
    document = json.loads((model / file).read_text("utf-8"))
    (model / file).write_text(json.dumps(document | changes))
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(1200), "utf-8")

    command = ["run", "--model", str(model), "--text", str(text), "--heldout", str(text), *SMALL]
    assert main.main(command) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_python_without_the_packages_says_what_to_do():
    code = "import runpy, sys; sys.modules['psutil'] = None; sys.argv = ['trsp_core', 'list']; "
    code += "runpy.run_module('trsp_core', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "psutil is not installed for this Python. Run `make setup`, then `. .venv/bin/activate`.\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--lambda-1", "0.1"], "is not running"),
        ([], "Nothing is to be turned"),
        (["--lambda-1", "-3"], "0 to 100"),
        (["--stage2-steps", "many"], "a whole number"),
        (["--seed", "3"], "No such option"),
    ],
)
def test_a_knob_that_cannot_be_turned_is_refused(finished, capsys, words, part):
    assert main.main(["steer", str(finished[0]), *words]) == 2
    assert part in capsys.readouterr().err
    assert not (finished[0] / "steer.jsonl").exists()


@pytest.mark.parametrize("word", ["lambda_1=3", "3:1:lambda_1=3", "1:1:seed=3", "1:1:lambda_1=1e9", "1:1:lambda_1=x"])
def test_a_turn_that_is_none_is_refused_before_there_is_a_run(here, tiny_model, text, word, capsys):
    assert main.main([*pruning(tiny_model, text), "--steer", word]) == 2
    assert capsys.readouterr().err
    assert not (here / "runs").exists()


@pytest.mark.slow
def test_a_steered_run_that_is_killed_and_resumed_is_what_its_command_repeats(here, tiny_model, text):
    """Three real processes: one that is paused, steered and killed; one that resumes it; one that repeats it."""
    folders = [here / name for name in ("run", "again")]
    command = pruning(tiny_model, text, "--stage2-steps", "60", "--probe-every", "50")
    child = trsp(*command, "--steer", "1:1:lambda_1=2.0", "--out", str(folders[0]))
    run = Run(folders[0])
    while not run.held():
        assert child.poll() is None
        time.sleep(0.05)
    assert main.main(["steer", str(run.folder), "--pause"]) == 0
    while not run.state().paused:
        time.sleep(0.05)
    assert main.main(["steer", str(run.folder), "--lambda-2", "500", "--step"]) == 0
    while len(run.state().turns) < 1 + any(t.name == "lambda_1" for t in run.state().turns):
        time.sleep(0.05)
    child.kill()
    child.communicate()
    assert said("resume", str(run.folder))[0] == 0
    state = run.state()
    assert state.ended == "finished"
    assert {turn.name for turn in state.turns} == {"lambda_1", "lambda_2"}
    words = shlex.split(turns.command(run.config(), state.turns).partition(" run ")[2])
    assert said("run", *words, "--out", str(folders[1]))[0] == 0
    models = [(folder / "model" / "model.safetensors").read_bytes() for folder in folders]
    assert models[0] == models[1]
