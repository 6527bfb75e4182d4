"""requirements.lock: all that requirements.txt leads to, with checksums. The image installs it, the audit reads it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import ROOT

LOCK = (ROOT / "requirements.lock").read_text("utf-8")
ENTRIES = re.findall(r"^([^#\s][^\n\\]*?)\s*\\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", LOCK, re.MULTILINE)
LOCKED = {canonicalize_name(Requirement(line).name): Requirement(line) for line, _ in ENTRIES}


def named(file: str) -> list[Requirement]:
    lines = (ROOT / file).read_text("utf-8").splitlines()
    return [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip() and line[0] != "-"]


def test_each_pin_is_in_the_lock_at_the_same_version():
    wanted = named("requirements.txt")
    assert len(wanted) > 10
    for pin in wanted:
        assert str(LOCKED[canonicalize_name(pin.name)].specifier) == str(pin.specifier), pin.name


def test_each_line_of_the_lock_is_a_pin_with_checksums():
    rest = LOCK
    for line, hashes in ENTRIES:
        (exact,) = Requirement(line).specifier
        assert exact.operator == "=="
        assert Version(exact.version)
        assert hashes.count("--hash") == len(set(hashes.split()) - {"\\"}), line
        rest = rest.replace(hashes, "")
    assert len(ENTRIES) == len(LOCKED) > 90
    left = [line for line in rest.splitlines() if line and line[0] != "#" and not line.endswith("\\")]
    assert left == []
    assert "//" not in LOCK
    assert "index" not in LOCK


def test_the_lock_names_all_that_is_needed_here():
    """Every package that what is installed leads to, markers of this machine applied; the chain, not the top alone."""
    left, seen = [(pin.name, pin.extras) for pin in named("requirements.txt")], set()
    while left:
        name, extras = left.pop()
        if (name, frozenset(extras)) in seen:
            continue
        seen.add((name, frozenset(extras)))
        assert canonicalize_name(name) in LOCKED, name
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if any(not needed.marker or needed.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                left.append((needed.name, needed.extras))
    assert len(seen) > 80
    for package in ("tornado", "pyarrow", "starlette", "uvicorn", "tokenizers"):
        assert package in {canonicalize_name(name) for name, _ in seen}


def test_wheels_of_other_systems_are_among_the_checksums():
    """Compiled packages have a wheel for each system and Python: far more files than one machine needs."""
    counts = {canonicalize_name(Requirement(line).name): hashes.count("--hash") for line, hashes in ENTRIES}
    for compiled in ("numpy", "safetensors", "tokenizers", "pyarrow", "torch", "pandas"):
        assert counts[compiled] >= 10, compiled


def test_the_image_checks_checksums_and_leaves_cuda_out_where_torch_is_for_cpus(tmp_path):
    recipe = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text("utf-8"))
    installs = re.findall(r"pip install [^&;]*", recipe)
    assert [i for i in installs if "--require-hashes" not in i and "$TORCH_INDEX" not in i] == []
    program = re.search(r"awk '(.*?)' requirements.lock", recipe)[1]
    kept = subprocess.run(["awk", program, "requirements.lock"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(re.findall(r"^([a-z0-9.-]+)==", kept.stdout, re.MULTILINE))
    gone = set(LOCKED) - names
    assert gone
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in gone)
    assert kept.stdout.count("--hash") < LOCK.count("--hash")
    assert not re.search(r"^(nvidia|cuda|triton)", kept.stdout, re.MULTILINE)
