"""A run is a folder: `config.json`, `events.jsonl` (append-only, the truth), `env.json`, `stderr.log`, `model/`,
and where it was asked for `trained-model/` (after stage 2, before deletion).

`proof.safetensors` holds what the model in memory computed (see `evaluation.verification`), `exports/` what was made to
be downloaded. Besides: `cancel` (asks the run to stop), `steer.jsonl` (asks it to turn knobs: `runs.steering`),
`queued` (waits for its turn), `lock` (held by the process that runs it, so that its death is seen at once, whoever
looks; it says which process that is), `exit.json` (how that process ended), `summary.json` (made from the events, to list many runs fast), `keep` (it is not deleted for its age),
`interrupted` (the next server goes on with it), `exports.lock` (held by the process that makes something in `exports/`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from trsp_core.schema import config as configs
from trsp_core.schema import codec, events, run_state
from trsp_core.pruning import validate
from trsp_core.schema.config import RunConfig
from trsp_core.errors import TrspError
from trsp_core import files
from trsp_core.paths import runs_root
from trsp_core.schema.run_folder import RunFolder
from trsp_core.schema.run_state import Line, RunState

STATUSES = ("queued", "running", *run_state.ENDED, "lost")
MAX_LINE = 4_000_000  # bytes of an event in events.jsonl; the longest that is written has some kilobytes
MOST = 100_000_000  # events of a run; the longest has some ten thousand
HOLDING = 20  # times that a lock is tried, for a second in all
_SCRAPS = (  # what a run's process may leave half-written; safetensors writes to .tmpXXXXXX first
    ".reserve", ".*.partial", ".tmp??????", ".summary.json.*", ".env.json.*", ".exit.json.*",
)  # fmt: skip
_WHOLE_FILES = (  # what a run's process writes whole
    "events.jsonl", "env.json", "summary.json", "exit.json", "stderr.log", "lock", "cancel", "steer.jsonl", "model",
    "trained-model",
    "unproved-model", "unproved-trained-model", "proof.safetensors", "resume.safetensors", "rounds.safetensors",
)  # fmt: skip
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{3,80}")


@contextlib.contextmanager
def _lock(path: Path, attempts: int, busy: str, kind: int = fcntl.LOCK_EX) -> Iterator[BinaryIO]:
    """Hold the lock on the file `path`, open to append. Raises TrspError: it stays `busy`, a sentence."""
    with path.open("ab") as file:
        for attempt in range(attempts):  # a reader that looks whether it is held takes it for an instant
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except OSError as error:
                if attempt == attempts - 1:
                    raise TrspError(busy, "Wait for it, or stop it.") from error
                time.sleep(0.05)
        yield file


def _locked(file: Path) -> bool:
    """Whether a living process holds the lock on `file`."""
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none yet, or it is no file
        return False
    return False


@dataclass(frozen=True)
class Exit:
    """How a run's process ended: what `exit.json` holds."""

    returncode: int


@dataclass(frozen=True)
class _LockNote:
    """What a lock file holds: which process has it, and the rest as in `Holder`."""

    pid: int
    parent: int
    queued: bool
    began: float


@dataclass(frozen=True)
class Holder:
    """The process that holds a run's lock.

    Attributes:
        process: it lives, and it is the one that has the lock open.
        parent: id of the process that started it.
        queued: a server started it.
        began: when, in seconds since the epoch.
    """

    process: psutil.Process
    parent: int
    queued: bool
    began: float


@dataclass(frozen=True)
class Run(RunFolder):
    """One run's folder. Nothing is cached here: each call reads what is on disk now."""

    def config(self) -> RunConfig:
        """Raises TrspError: config.json is missing, damaged or from a newer version."""
        try:
            text = (self.folder / "config.json").read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TrspError(f"Run {self.id} has no readable config.json.", "Start the run again.") from error
        return validate.from_json(text)

    def read(self, offset: int = 0, number: int | None = None) -> tuple[list[Line], int]:
        """The events from byte `offset` on, and the offset to read on from.

        A torn last line waits for its end. Lines that are no events, too long, out of range, or told before are left
        out; an `EventsMissing` stands for numbers that are missing. The new offset is the old one where the file
        cannot be read now, and 0 where the file is shorter than that: it is another file then.

        Args:
            number: of the first event to come, `RunState.count` of who has read up to `offset`; None takes any.
        """
        try:
            with self.events_file.open("rb") as file:
                if offset > os.fstat(file.fileno()).st_size:
                    return [], 0
                file.seek(offset)
                data = file.read()
        except OSError:  # none yet, or it is no file, or the disk does not answer
            return [], offset
        end, expected = data.rfind(b"\n") + 1, number if offset else 0
        lines: list[Line] = []
        for raw in data[:end].split(b"\n"):
            if not raw or len(raw) > MAX_LINE:
                continue
            try:
                n, at, event = events.from_line(raw.decode("utf-8"))
            except (TrspError, UnicodeDecodeError):
                continue
            if not 0 <= n < MOST:
                continue
            expected = n if expected is None else expected
            if n > expected:
                lines.append((expected, at, events.EventsMissing(expected, n - expected)))
            if n >= expected:
                lines.append((n, at, event))
                expected = n + 1
        return lines, offset + end

    def state(self) -> RunState:
        """The fold of all events so far."""
        return run_state.fold(RunState(), self.read()[0])

    def status(self, ended: str | None = None) -> str:
        """One of `STATUSES`. `running` until its process lets go of it, `cancelled` also where it was asked to stop and
        died before it said so. `lost`: there is no ending, and no process holds the run.

        Args:
            ended: `RunState.ended`, where the caller has folded the events already.
        """
        if self.held():
            return "running"
        ended = self.state().ended if ended is None else ended
        if ended:
            return ended
        if (self.folder / "queued").exists():
            return "queued"
        return "cancelled" if self.cancelled() else "lost"

    def held(self) -> bool:
        """Whether a living process runs this run (on this machine, or through a file system with locks)."""
        return _locked(self.folder / "lock")

    def waits_or_runs(self) -> bool:
        """Whether it is in a queue, or a process is at it: a cheap look, for the status there are more."""
        return (self.folder / "queued").exists() or self.held()

    def holder(self) -> Holder | None:
        """Who holds the run; None where nobody does, or on another machine, or where it cannot be known for sure."""
        try:
            note = codec.decode((self.folder / "lock").read_text("utf-8"), _LockNote)
            process, lock = psutil.Process(note.pid), os.path.realpath(self.folder / "lock")
            if self.held() and lock in {file.path for file in process.open_files()}:  # the number may be another's now
                return Holder(process, note.parent, note.queued, note.began)
        except (OSError, ValueError, OverflowError, psutil.Error):  # psutil.Process overflows beyond a C int
            pass
        return None

    def hint(self) -> str:
        """Why a lost run ended, as far as it is known: a sentence."""
        try:
            code = codec.decode((self.folder / "exit.json").read_text("utf-8"), Exit).returncode
        except (OSError, ValueError):
            return "Its process ended without a word: the machine may have been restarted."
        if code == -9:
            return "Its process was killed, most likely because the machine ran out of memory."
        return f"Its process ended with code {code}; stderr.log in the run folder may say why."

    def busy(self) -> bool:
        """Whether it waits or runs, or something of it is being exported."""
        return self.held() or (self.folder / "queued").exists() or self.exported()

    def is_kept(self) -> bool:
        """Whether somebody wants it to stay, however old it gets."""
        return (self.folder / "keep").exists()

    def keep(self, on: bool) -> None:
        """Protect it from being deleted for its age; with `on` False, no longer."""
        if on:
            (self.folder / "keep").touch()
        else:
            (self.folder / "keep").unlink(missing_ok=True)

    def touched(self) -> float:
        """When something was told last, in seconds since the epoch."""
        for file in (self.events_file, self.folder / "config.json"):
            with contextlib.suppress(OSError):
                return file.stat().st_mtime
        return 0.0

    def cancel(self, reason: str = "") -> None:
        """Ask the run to stop at its next event.

        Args:
            reason: a sentence for the reader, where it was not a person who stopped it.

        Raises:
            TrspError: its folder cannot be written.
        """
        try:
            (self.folder / "cancel").write_text(reason, "utf-8")
        except OSError as error:
            raise TrspError(
                f"The run folder {self.folder} cannot be written: {error.strerror}.",
                "Give this program the right to write there, or end the run's process.",
            ) from error

    def cancel_reason(self) -> str:
        """Why it was asked to stop; nothing where a person did."""
        try:
            return (self.folder / "cancel").read_text("utf-8")[:500]
        except (OSError, UnicodeDecodeError):
            return ""

    def litter(self) -> list[Path]:
        """What a killed process left half-written, or a finished run does not need any more."""
        scraps = [p for pattern in _SCRAPS for p in self.folder.glob(pattern)]
        points = self.points
        return scraps + (points if points and self.state().ended == "finished" else [])

    def tidy(self) -> None:
        """Remove the `litter`; the caller holds the run, or keeps it at rest."""
        for part in self.litter():
            _remove(part)

    def vanish(self) -> None:
        """Remove what a process wrote after the folder was deleted under it; nothing else."""
        if not (self.folder / "config.json").exists():
            for part in (*self.litter(), *self.points, *(self.folder / name for name in _WHOLE_FILES)):
                _remove(part)
            with contextlib.suppress(OSError):  # it is gone, or holds what is not the run's
                self.folder.rmdir()

    def exported(self) -> bool:
        """Whether a living process makes something in `exports/`."""
        return _locked(self.folder / "exports.lock")

    @contextlib.contextmanager
    def exporting(self) -> Iterator[None]:
        """Hold the lock of `exports/`, which is made where there is none; what a killed process left there is removed.

        Raises:
            TrspError: another process holds it.
        """
        busy = f"Something of run {self.id} is being exported already."
        with _lock(self.folder / "exports.lock", HOLDING, busy):
            self.exports_folder.mkdir(exist_ok=True)
            for part in self.exports_folder.glob(".*"):
                _remove(part)
            yield

    def tidy_exports(self) -> None:
        """Remove what a killed process left half-written in `exports/`, unless a living one is at it."""
        if any(self.exports_folder.glob(".*")):
            with contextlib.suppress(TrspError, OSError), self.exporting():  # who holds it tidies up
                pass

    def size(self) -> int:
        """Bytes on disk."""
        total = 0
        for path, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # they come and go
                    total += os.stat(os.path.join(path, name)).st_size
        return total

    def summary(self) -> dict[str, Any]:
        """`state.summary`, from `summary.json` where the run has ended, it is there, and no event was touched since."""
        try:
            file = self.folder / "summary.json"
            if self.events_file.stat().st_mtime_ns <= file.stat().st_mtime_ns:
                return run_state.read_summary(file.read_text("utf-8"))
        except (OSError, ValueError):
            pass
        return run_state.summary(self.state())

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the run's lock: while this lasts it counts as running.

        Raises:
            TrspError: another process holds it.
        """
        with self._lock(HOLDING) as file:
            queued = (self.folder / "queued").exists()
            note = _LockNote(os.getpid(), os.getppid(), queued, time.time())
            file.truncate(0)
            file.write(codec.encode(note).encode())
            file.flush()
            (self.folder / "queued").unlink(missing_ok=True)
            yield

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[bool]:
        """Whether no process is at the run, and it can be written; while this lasts, none can begin, and it does not
        count as running."""
        with contextlib.ExitStack() as locks:
            try:
                locks.enter_context(self._lock(4, fcntl.LOCK_SH))
                free = True
            except (TrspError, OSError):
                free = False
            yield free

    def _lock(self, attempts: int, kind: int = fcntl.LOCK_EX) -> contextlib.AbstractContextManager[BinaryIO]:
        return _lock(self.folder / "lock", attempts, f"Run {self.id} is running already.", kind)


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


class Store:
    """All runs under one folder."""

    def __init__(self, root: Path | None = None):
        self.root = root or runs_root()

    def create(self, config: RunConfig, folder: Path | None = None) -> Run:
        """A new run folder with its config.

        Args:
            folder: where, instead of a new unguessable name under `root`.

        Raises:
            TrspError: the folder holds a run already, or cannot be written.
        """
        elsewhere = folder is not None and folder.parent != self.root
        folder = folder or self.root / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(8)}"
        if (folder / "config.json").exists():
            raise TrspError(f"{folder} holds a run already.", "Choose a new folder.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.write_atomic(folder / "config.json", configs.to_json(config))
            files.sync(folder.parent)
        except OSError as error:
            raise TrspError(
                f"The run folder {folder} cannot be written: {error.strerror}.",
                f"Free some space, or {'choose another' if elsewhere else 'set TRSP_RUNS to a'} folder that can be written.",
            ) from error
        return Run(folder)

    def get(self, run_id: str) -> Run:
        """The run called `run_id`.

        Raises:
            TrspError: no such run, or no run's name.
        """
        folder = self.root / run_id if _RUN_ID.fullmatch(run_id) else None
        if folder is None or folder.is_symlink() or not (folder / "config.json").is_file():
            raise TrspError(f"There is no run {run_id[:80]!r} here.", "Look for it in the list of runs, or start a new one.")
        return Run(folder)

    def adopt(self, folder: Path, run_id: str) -> Run:
        """The run `run_id`, copied from `folder` if it is not here: one that ships with the program.

        Raises:
            TrspError: the folder of runs cannot be written.
        """
        with contextlib.suppress(TrspError):
            return self.get(run_id)
        temporary = self.root / f".new-{run_id}-{secrets.token_hex(4)}"
        try:
            shutil.copytree(folder, temporary)
            temporary.rename(self.root / run_id)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another was quicker
                raise TrspError(
                    f"The recorded run cannot be copied to {self.root}: {error.strerror}.",
                    "Free some space, or set TRSP_RUNS to a folder that can be written.",
                ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return self.get(run_id)

    def runs(self) -> list[Run]:
        """All runs, newest first by name."""
        if not self.root.is_dir():
            return []
        names = [e.name for e in os.scandir(self.root) if e.is_dir(follow_symlinks=False)]
        return [
            Run(self.root / name)
            for name in sorted(names, reverse=True)
            if _RUN_ID.fullmatch(name) and (self.root / name / "config.json").is_file()
        ]

    def models(self, latest: int = 30) -> list[str]:
        """The models of the `latest` runs, each once."""
        names = []
        for run in self.runs()[:latest]:
            with contextlib.suppress(TrspError):
                names.append(run.config().model)
        return list(dict.fromkeys(names))

    def delete(self, run_id: str) -> None:
        """Remove the run and all it holds.

        Raises:
            TrspError: no such run, or it is running.
        """
        run = self.get(run_id)
        if run.held():
            raise TrspError(f"Run {run_id} is running.", "Stop it first.")
        if run.exported():
            raise TrspError(f"Something of run {run_id} is being exported.", "Wait for it, or stop it.")
        doomed = self.root / f".deleted-{run_id}"
        with run.at_rest() as free:
            if not free and run.held():  # it was begun a moment ago
                raise TrspError(f"Run {run_id} is running.", "Stop it first.")
            run.folder.rename(doomed)  # gone from every list at once, whatever happens to the rest
        shutil.rmtree(doomed)
