"""The wheel: installed elsewhere, it runs without the checkout. And the interface that `import trsp_core` gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib

import pytest

import trsp_core
from tests import ROOT, story, tiny
from tests.test_laws import CORE, HEAVY, imports, loaded_by
from trsp_core.errors import TrspError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
IMPORTED_AS = {"charset-normalizer": "charset_normalizer", "torch-pruning": "torch_pruning",
               "vl-convert-python": "vl_convert"}  # fmt: skip


def declared() -> set[str]:
    """Names under which what pyproject.toml declares is imported, extras included."""
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    names = {part.partition(">")[0].partition("=")[0].strip() for group in groups for part in group}
    return {IMPORTED_AS.get(name, name) for name in names}


def test_all_that_is_imported_is_declared():
    there = {name for file in CORE for name in imports(file)}
    assert there - set(sys.stdlib_module_names) - {"trsp_core"} <= declared()


def test_every_package_is_in_the_wheel():
    packages = {".".join(file.relative_to(ROOT).parent.parts) for file in CORE if file.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | {"trsp_core.assets"}


def test_the_interface_is_all_there_and_loads_torch_for_pruning_alone():
    for name in trsp_core.__all__:
        assert getattr(trsp_core, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = trsp_core.nonsense
    light = [name for name in trsp_core.__all__ if name not in ("execute",)]
    assert loaded_by(f"from trsp_core import {', '.join(light)}") & set(HEAVY) == set()


def test_prune_yields_the_events_of_a_run_and_keeps_nothing_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(1200), "utf-8")
    settings = {**story.SMALL, "text": str(text), "heldout": str(text), "save_model": False, "threads": 1}
    settings = {name: value for name, value in settings.items() if name != "ratio"}
    loaded = (tiny.build(), tiny.tokenizer())
    names = [type(event).__name__ for event in trsp_core.prune("tiny", ratio=0.4, loaded=loaded, **settings)]
    assert names[-1] == "RunFinished"
    assert "LayersRemoved" in names
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    with pytest.raises(TrspError, match="no setting 'ratoi'"):
        trsp_core.prune("tiny", ratoi=0.4)


@pytest.mark.slow
def test_the_wheel_runs_from_another_folder(tmp_path, tiny_model):
    """Into a folder of its own, beside the dependencies that are installed here."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"  # a build leaves its scraps where it is made
    for name in ("trsp_core", "assets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(place), str(wheel)], check=True, cwd=tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(1200), "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(place), "TRSP_RUNS": str(tmp_path / "runs")}

    def trsp(*words: str) -> str:
        command = [sys.executable, str(place / "bin" / "trsp"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "llama" in trsp("families")
    assert "TRSP" in trsp("methods")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in story.SMALL.items() if name != "ratio"]
    out = tmp_path / "out"
    trsp("run", "--model", str(tiny_model), "--text", str(text), "--heldout", str(text), "--ratio", "0.4", *flags,
         "--save-model", "true", "--out", str(out))  # fmt: skip
    assert (out / "model" / "model.safetensors").is_file()
    code = "import trsp_core; from trsp_core.runs import replay; print(trsp_core.__file__, replay.FOLDER.is_dir())"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [str(place / "trsp_core" / "__init__.py"), "True"]
