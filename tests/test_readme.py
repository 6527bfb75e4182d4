"""The README against what it describes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from streamlit.config import get_config_options

from trsp_core import config, methods, shell

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PIP_AND_LLAMA_CPP = ("--no-deps", "--outfile", "--outtype")
DOCKER = ("--build-arg",)
COMMANDS = re.findall(r"^python -m trsp_core (.+?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_there_are_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    shell.parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[0] in ("list", "methods", "families", "doctor")])
def test_every_quick_command_runs(command, tmp_path):
    words = [sys.executable, "-m", "trsp_core", *shlex.split(command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={"TRSP_RUNS": str(tmp_path)} | _path())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def _path() -> dict[str, str]:
    import os

    return {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TRSP_HOME")}


def test_the_table_of_methods_is_the_registry():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", README, re.MULTILINE))
    assert set(rows) == set(methods.names())
    for method in methods.all_methods().values():
        assert rows[method.name].lower() == method.summary.rstrip(".").lower()


def test_its_lesson_can_be_loaded():
    from trsp_core import lessons

    (example,) = (text for text in re.findall(r"```json\n(.+?)```", README, re.DOTALL) if '"steps"' in text)
    assert len(lessons.load(example).steps) == 2


def test_every_flag_it_names_exists():
    known = {k.flag for k in config.KNOBS.values()} | {"--preset", "--json", "--out"}
    known |= {f"--{name}" for name in get_config_options() if name.startswith("server.")}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w.-]+", README)) - known <= {
        "--plan",
        "--grid",
        "--scheduler",
        "--nthreads",
        "--task",
        "--accept-terms",
        "--write",
        "--dtype",
        "--push",
        "--help",
        *PIP_AND_LLAMA_CPP,
        *DOCKER,
    }


def test_the_make_targets_and_files_it_names_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"`?make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"`((?:trsp_core|tests|pages|assets|benchmarks)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture
