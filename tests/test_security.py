"""Tools that look for holes: in our own code, in what we depend on, in the image's recipe. Each finding is mended, or
explained at its line (`# nosec`, `# hadolint ignore=`, with the reason)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

BIN = Path(sys.executable).parent
REFUSED = ("ConnectionError", "Max retries exceeded", "ServiceError", "timed out", "HTTPError")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_bandit_finds_nothing_that_is_not_explained():
    done = run("bandit", "-q", "-c", "pyproject.toml", "-r", "trsp_core", "pages", "app.py", "-f", "json")
    found = json.loads(done.stdout)
    assert not found["errors"]
    assert len(found["metrics"]) > 100, "bandit looked at too few files"
    assert [f"{r['filename']}:{r['line_number']} {r['test_id']} {r['issue_text']}" for r in found["results"]] == []


def test_each_exception_for_bandit_names_its_rule_and_its_reason():
    files = [*(ROOT / "trsp_core").rglob("*.py"), *(ROOT / "pages").rglob("*.py"), ROOT / "app.py"]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines() if "# nosec" in line]
    assert lines
    assert [line for line in lines if not re.search(r"# nosec B\d{3} - \S+", line)] == []


@pytest.mark.slow
@pytest.mark.parametrize("service", ["pypi", "osv"])
def test_no_known_hole_in_what_we_depend_on(service):
    done = run(
        "pip-audit", "-r", "requirements.lock", "--no-deps", "--disable-pip",
        "--vulnerability-service", service, "--progress-spinner", "off", "--format", "json",
    )  # fmt: skip
    if not done.stdout.strip() and any(word in done.stderr for word in REFUSED):
        pytest.skip("no service for advisories can be reached from here")
    packages = json.loads(done.stdout)["dependencies"]
    assert {"starlette", "tornado", "numpy", "tokenizers"} <= {p["name"] for p in packages}, "the top level alone"
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        pytest.skip("the package index here has no advisories")
    holes = [
        f"{p['name']} {p['version']}: {v['id']}, mended in {v['fix_versions']}" for p in audited for v in p["vulns"]
    ]
    assert holes == []
    assert len(audited) == len(packages), "not every package could be looked up"


@pytest.mark.slow
def test_the_image_is_written_as_its_linter_wants():
    done = run("hadolint", "--no-color", "--failure-threshold", "info", "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr
