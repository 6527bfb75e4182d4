"""A process that has loaded torch and forks: each fork runs the shell's real `main` in a session of its own, a moment
after it is asked, where a new interpreter would take seconds. For tests that kill hundreds of them. The process that
proves a kept model is forked too: the real `stock_process.py`, loading the real checkpoint, in an interpreter that is
not new.

    python -m tests.zygote SOCKET
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests import ROOT

STOCK = "stock_process.py"


class Forked:
    """A forked process, with what the core uses of `subprocess.Popen`."""

    def __init__(self, where: str, words: list[str], fds: tuple[int, int, int]):
        self._where, self.returncode = where, None
        self.pid = _ask(where, {"words": words}, fds)
        self.stdin: Any = None
        self.stdout: Any = None
        self.stderr: Any = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(self._where, {"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (60 if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout or 60)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)


@contextlib.contextmanager
def started(folder: Path) -> Iterator[str]:
    """The socket of a zygote that lives in `folder`; with it everything that it forked has to be gone at the end."""
    where = str(folder / "z")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRSP_HOME": str(folder / "home")}
    child = subprocess.Popen([sys.executable, "-m", "tests.zygote", where], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 120
    while not os.path.exists(where):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield where
    left = [p for p in psutil.Process(child.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
    child.kill()
    child.wait()
    for process in left:
        process.kill()
    assert left == []


def start_run(where: str, run: Any) -> Forked:
    """Instead of `process.start`."""
    null = os.open(os.devnull, os.O_RDWR)
    with (run.folder / "stderr.log").open("ab") as log:
        try:
            return Forked(where, ["worker", str(run.folder)], (null, null, log.fileno()))
        finally:
            os.close(null)


def piped(where: str, words: list[str]) -> Forked:
    """Instead of `subprocess.Popen` with three pipes."""
    (in_r, in_w), (out_r, out_w), (err_r, err_w) = os.pipe(), os.pipe(), os.pipe()
    child = Forked(where, words, (in_r, out_w, err_w))
    for fd in (in_r, out_w, err_w):
        os.close(fd)
    child.stdin = os.fdopen(in_w, "wb", 0)
    child.stdout, child.stderr = (os.fdopen(fd, "rb", 0) for fd in (out_r, err_r))
    return child


def proving(where: str, real: Any) -> Any:
    """Instead of the core's `subprocess.Popen`: forks what is to run STOCK, and starts all else as ever."""

    def begin(command: list[str], **given: Any) -> Any:
        names = [Path(word).name for word in command]
        return piped(where, command[names.index(STOCK) :]) if STOCK in names else real(command, **given)

    return begin


def _main(words: list[str], where: str) -> int:
    """Be the process that `words` ask for."""
    from trsp_core.cli import main as shell
    from trsp_core.runs import worker

    if Path(words[0]).name != STOCK:
        subprocess.Popen = proving(where, subprocess.Popen)
        return worker.main(words[1]) if words[0] == "worker" else shell.main(words)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trsp_core"]:
        del sys.modules[name]  # a stranger has none of ours
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
    return 0


def _ask(where: str, message: dict[str, Any], fds: tuple[int, ...] = ()) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.connect(where)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        line.sendmsg([json.dumps(message).encode()], rights)
        return json.loads(line.recv(4096))


def serve(where: str) -> None:
    """Answer requests, one a connection, until killed."""
    import torch  # noqa: F401
    import transformers.generation
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from trsp_core.cli import main  # noqa: F401
    from trsp_core.pruning import engine  # noqa: F401
    from trsp_core.workbench import worker  # noqa: F401

    ended: dict[int, int] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.bind(where)
        door.listen(64)
        while True:
            line, _ = door.accept()
            message, fds, _, _ = socket.recv_fds(line, 65536, 3)
            if not message:  # the same
                line.close()
                continue
            asked = json.loads(message)
            if "poll" in asked:
                pid = asked["poll"]
                if pid not in ended:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        ended[pid] = os.waitstatus_to_exitcode(status)
                _answer(line, ended.get(pid))
                continue
            pid = os.fork()
            if pid == 0:
                os.setsid()
                line.close()
                door.close()
                for target, fd in enumerate(fds):
                    os.dup2(fd, target)
                for fd in fds:
                    os.close(fd)
                code = 1
                try:
                    code = _main(asked["words"], where)
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            for fd in fds:
                os.close(fd)
            _answer(line, pid)


def _answer(line: socket.socket, value: int | None) -> None:
    """Who asked may have been killed meanwhile: that is what the tests are for."""
    with contextlib.suppress(OSError), line:
        line.sendall(json.dumps(value).encode())


if __name__ == "__main__":
    serve(sys.argv[1])
