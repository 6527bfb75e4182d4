"""Work in a child process that talks in JSON lines: a question on its stdin, answers on its stdout. Exports, downloads,
checks, proofs and the workbench all use this protocol.

Each line is an object. `{"message", "fraction"}` tells how far the work is, `{"error", "remedy"}` refuses the question,
and any other is an answer. The parent's side is `answers` for one question and `Child` for many; the child's side is
`serve`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from trsp_core import formatting, paths, process_limits
from trsp_core.errors import TrspError

GRACE = 10.0  # seconds that a child has to clear up once it is asked to end
PAUSE = 1.0  # seconds of silence after which whoever waits gets a chance to stop
MOST_LINE_BYTES = 64_000_000
MOST_STDERR_BYTES = 20_000  # of the end of stderr, which is all that is kept
SHORT_MEMORY = ("MemoryError", "OutOfMemory", "allocate memory", "memory allocation")  # on stderr: it got no memory


@dataclass(frozen=True)
class Progress:
    """How far the work is: a sentence, and the share that is done, 0 to 1."""

    message: str
    fraction: float


class ChildFailed(Exception):
    """Says how a child ended: badly, too late, or with a line that is no JSON object. `Child.close` returns one for any
    ending; one whose code is 0 and whose fault is "" is no failure.

    Attributes:
        code: its exit code; minus the signal's number where a signal killed it.
        stderr: the last 20 kB that it wrote there.
        late: it was ended because its time was over.
        fault: what was wrong with its lines; "" if nothing.
    """

    def __init__(self, code: int, stderr: str = "", late: bool = False, fault: str = ""):
        super().__init__(fault or f"code {code}: {stderr}")
        self.code, self.stderr, self.late, self.fault = code, stderr, late, fault

    @property
    def short_of_memory(self) -> bool:
        """Whether its stderr says that it got no more memory."""
        return any(words in self.stderr for words in SHORT_MEMORY)

    @property
    def ending(self) -> str:
        """How it ended, in words that can follow a colon."""
        if self.code == -signal.SIGKILL:
            return "it was killed, most likely because the machine ran out of memory"
        return self.fault or f"exit code {self.code}"

    @property
    def reason(self) -> str:
        """Why it ended: the last 500 characters of its stderr, or its `ending` where that is empty."""
        return self.stderr[-500:] or self.ending


class Child:
    """A child process that reads lines on its stdin and writes lines on its stdout. It dies with the thread that
    started it (see `process_limits.held`). Only one thread may read; any thread may send to it or end it.

    Args:
        command: the program and its arguments.
        most_bytes, cpu_seconds: bounds of its memory and its processor time; 0 for none.
        variables: its environment; None for that of this process, from which it finds this program.
        folder: its working folder; None for that of this process.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        most_bytes: int = 0,
        cpu_seconds: int = 0,
        variables: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ):
        self.process = subprocess.Popen(
            process_limits.held(command, most_bytes, cpu_seconds),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # an interrupt from the keyboard is for this process, which ends that one
            env=environment() if variables is None else variables,
            cwd=folder,
        )
        self._lines: deque[bytes] = deque()
        self._line, self._stderr = bytearray(), bytearray()  # what has come of the next line, and the end of stderr
        self._sending = threading.Lock()
        self._pipes = selectors.DefaultSelector()
        for pipe in (self.process.stdout, self.process.stderr):
            self._pipes.register(pipe, selectors.EVENT_READ)  # type: ignore[arg-type]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, line: str) -> None:
        """Send `line`, which must hold no newline. Nothing is raised where the process is gone: `read` then returns
        None."""
        content = line.encode() + b"\n"
        with self._sending, contextlib.suppress(OSError, ValueError):
            while content:
                content = content[os.write(self.process.stdin.fileno(), content) :]  # type: ignore[union-attr]

    def read(self, seconds: float) -> str | None:
        """The next line, without its newline; None once there are no more.

        Raises:
            TimeoutError: none came within `seconds`.
            ChildFailed: a line is longer than `MOST_LINE_BYTES`; the process has been ended.
        """
        deadline = time.monotonic() + seconds
        while not self._lines and self._listens():
            seconds_left = deadline - time.monotonic()
            if seconds_left > 0:
                self._take(seconds_left)
            elif self.alive:
                raise TimeoutError
            elif not self._take(0.0):  # it is dead, and what it had started holds its pipes
                break
            if len(self._line) > MOST_LINE_BYTES:
                self.end()
                raise ChildFailed(0, fault=f"it wrote a line of more than {formatting.size(MOST_LINE_BYTES)}")
        if not self._lines and self._line:  # a last line without its end
            self._lines.append(bytes(self._line))
            self._line.clear()
        return self._lines.popleft().decode("utf-8", "replace") if self._lines else None

    def end(self, grace: float = 0.0) -> None:
        """End it, and all processes that it has started.

        Args:
            grace: seconds that it has to clear up after it is asked to end; 0 kills at once.
        """
        process_limits.end(self.process, grace)
        with self._sending, contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]

    def close(self) -> ChildFailed:
        """`end` it without grace, close its pipes, and return how it ended. Only the thread that reads may call
        this."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PAUSE if not self._listens() else 0)  # one that has closed its pipes is about to end
        self.end()
        while self._listens() and self._take(0.0):
            pass
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()  # type: ignore[union-attr]
        self._pipes.close()
        return ChildFailed(self.process.returncode, self._stderr.decode("utf-8", "replace").strip())

    def _listens(self) -> bool:
        """Whether one of its pipes is still open, so that more may come."""
        return bool(self._pipes.get_map())

    def _take(self, seconds: float) -> bool:
        """Take in what it has written to stdout and stderr, waiting `seconds` for it at most; False if nothing came."""
        ready = self._pipes.select(seconds)
        for key, _ in ready:
            part = os.read(key.fd, 65536)
            if not part:
                self._pipes.unregister(key.fileobj)
            elif key.fileobj is self.process.stderr:
                self._stderr = (self._stderr + part)[-MOST_STDERR_BYTES:]
            else:
                *whole, rest = part.split(b"\n")
                for end in whole:
                    self._lines.append(bytes(self._line + end))
                    self._line.clear()
                self._line += rest
        return bool(ready)


def environment() -> dict[str, str]:
    """The environment variables of a child: those of this process, and a PYTHONPATH by which it finds this program from
    any working folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(paths.ROOT), os.environ.get("PYTHONPATH", "")])}


def module(name: str) -> list[str]:
    """The command that runs the module called `name`, such as "trsp_core.models.hub", with this Python."""
    return [sys.executable, "-m", name]


def answers(
    command: Sequence[str],
    question: Mapping[str, Any],
    seconds: float = math.inf,
    grace: float = 0.0,
    pause: float = PAUSE,
    **bounds: Any,
) -> Generator[dict[str, Any] | None]:
    """Start a child, ask it one question, and yield each object that it writes, but for a refusal; yield None after
    each `pause` seconds of silence. Closing the generator ends the child.

    Args:
        command: the program and its arguments.
        question: the object that it reads on stdin.
        seconds: the most that it may take.
        grace: seconds that it has to clear up where it is ended.
        bounds: further arguments of `Child`.

    Raises:
        TrspError: the child refused the question.
        ChildFailed: it ended badly, wrote something else than objects, or took too long.
        OSError: it cannot be started.
    """
    child, deadline, last = Child(command, **bounds), time.monotonic() + seconds, {}
    try:
        child.send(json.dumps(question))
        while True:
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                raise ChildFailed(-signal.SIGKILL, late=True)
            try:
                line = child.read(min(pause, seconds_left))
            except TimeoutError:
                yield None
                continue
            if line is None:
                break
            last = _object(line)
            if "error" not in last:
                yield last
    except BaseException:
        child.end(grace)
        child.close()
        raise
    failure = child.close()
    if "error" in last:
        raise TrspError(last["error"], last["remedy"])
    if failure.code:
        raise failure


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ChildFailed(0, fault=f"it wrote {line[:80]!r}, which is no JSON object")
    return value


def run(name: str, seconds: float = math.inf, **question: Any) -> Generator[Progress]:
    """Let a child run the module called `name` with `question`, and yield its progress; in each second of silence the
    last one again. Closing the generator stops it.

    Args:
        seconds: the most that it may take.

    Raises:
        TrspError: the child refused, took too long, or ended badly.
    """
    progress = None
    try:
        for line in answers(module(name), question, seconds, GRACE):
            progress = Progress(line["message"], float(line["fraction"])) if line else progress
            if progress:
                yield progress
    except ChildFailed as failure:
        if failure.late:
            raise TrspError(
                f"It took more than {formatting.setting(seconds / 60)} minutes, and was ended.",
                "Try again when less goes on here.",
            ) from failure
        raise TrspError(f"The work failed: {failure.reason}.", "Try again.") from failure


def serve(work: Callable[..., Iterable[Progress | dict[str, Any]]]) -> int:
    """The child's side of `answers`: read the question from stdin, call `work` with its entries as arguments, and write
    each thing that it yields as a line.

    Returns:
        The exit code: 0 where all went well, 1 after a refusal (a TrspError of `work`), 130 where it was asked to end.
    """
    out = answer_pipe()
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def write(line: Mapping[str, Any]) -> None:
        out.write(json.dumps(line, default=str) + "\n")
        out.flush()

    try:
        for item in work(**json.loads(sys.stdin.readline())):
            write(asdict(item) if isinstance(item, Progress) else item)
    except TrspError as error:
        write({"error": error.message, "remedy": error.remedy})
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def answer_pipe() -> TextIO:
    """The child's stdout, for the lines of the protocol alone: whatever else prints there goes to stderr from now
    on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out
