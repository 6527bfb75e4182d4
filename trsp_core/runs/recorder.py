"""The one writer of a run's events: drains a generator into `events.jsonl`, and ends it well or badly, but in
writing."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Generator
from importlib import metadata

from trsp_core.schema import codec, run_state
from trsp_core.schema import events
from trsp_core.errors import TrspError, disk_full, is_short_memory
from trsp_core.schema.events import Event
from trsp_core.files import sync, write_atomic
from trsp_core.schema.run_state import RunState
from trsp_core.runs.store import Run

RESERVE = 64 * 1024  # bytes held free for a run's last words
OUT_OF_MEMORY = events.RunFailed("The machine ran out of memory.", "Choose a smaller model, shorter blocks or fewer.", "")
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "gensim", "datasets", "bitsandbytes")


class Deleted(Exception):
    """The run folder was removed while the run went on."""


def record(
    run: Run, generator: Generator[Event, None, None], watch: Callable[[RunState, Event], None] | None = None
) -> RunState:
    """Write each event of `generator` to the run folder as it happens; return the final state.

    A `cancel` file or KeyboardInterrupt closes the generator and ends the run with `RunCancelled`; a `TrspError` or any
    other exception ends it with `RunFailed`. A full disk stops the run; what was written before stays readable. A run
    that has events already, resumed, goes on behind them. When a phase begins, all events before it have been synced to the
    disk: a power cut does not lose them.

    Args:
        watch: called after each event with the state so far, for a progress line.

    Raises:
        TrspError: another process is at the run; or its folder was deleted meanwhile, and nothing of it is left.
    """
    try:
        return _record(run, generator, watch)
    except Deleted as error:
        run.vanish()
        raise TrspError(f"The folder of run {run.id} was deleted while it ran.", "Start a new run.") from error


def _record(
    run: Run, generator: Generator[Event, None, None], watch: Callable[[RunState, Event], None] | None
) -> RunState:
    """Raises Deleted: the folder is gone."""
    began = time.monotonic()
    with run.hold(), run.events_file.open("ab", buffering=0) as file:
        sync(run.folder)
        folded = _so_far(run, file)
        earlier = folded.at

        def write(event: Event) -> None:
            at = earlier + time.monotonic() - began
            append(file, events.to_line(event, folded.count, at).encode() + b"\n")
            if isinstance(event, events.PhaseStarted | events.ModelSaved):
                os.fsync(file.fileno())
            run_state.fold(folded, [(folded.count, at, event)])
            if watch:
                watch(folded, event)

        try:
            with contextlib.suppress(OSError):  # as much as there is
                (run.folder / ".reserve").write_bytes(os.urandom(RESERVE))
            write_atomic(run.folder / "env.json", codec.encode(environment(), indent=1))
            for event in generator:
                write(event)
                if run.cancelled() and not isinstance(event, events.ENDINGS):
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            generator.close()
            write(events.RunCancelled(folded.phase, run.cancel_reason()))
        except TrspError as error:
            write(events.RunFailed(error.message, error.remedy, ""))
        except MemoryError:
            write(OUT_OF_MEMORY)
        except Exception as error:  # a bug, unless the disk is full: its trace belongs to the run
            generator.close()
            write(_full_disk(run) if disk_full(error) else bug(error))
        finally:
            generator.close()
            (run.folder / ".reserve").unlink(missing_ok=True)
        os.fsync(file.fileno())
        _there(file)
        folded = run.state()  # as whoever reads it later will find it
        write_atomic(run.folder / "summary.json", codec.encode(run_state.summary(folded), indent=1))
    return folded


def add(run: Run, event: Event) -> None:
    """Append one event to a run that no process is at; the caller holds it."""
    with run.events_file.open("ab", buffering=0) as file:
        folded = _so_far(run, file)
        append(file, events.to_line(event, folded.count, folded.at).encode() + b"\n")
        os.fsync(file.fileno())


def _so_far(run: Run, file: io.FileIO) -> RunState:
    """The state up to now. A torn last line is ended, and so left out for good."""
    lines, offset = run.read()
    if file.tell() > offset:
        append(file, b"\n")
    return run_state.fold(RunState(), lines)


def environment() -> dict[str, str]:
    """Versions and machine, for whoever repeats the run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        **versions,
    }


def bug(error: Exception) -> events.RunFailed:
    """The end of a run that met an error of this program, or for which memory ran out."""
    if is_short_memory(error):
        return OUT_OF_MEMORY
    trace = "".join(traceback.format_exception(error))[-20_000:]
    return events.RunFailed(f"{type(error).__name__}: {error}", "This is a bug: please report it with the trace.", trace)


def _full_disk(run: Run) -> events.RunFailed:
    """Make room by dropping the reserve and what the model has taken, then say what happened."""
    (run.folder / ".reserve").unlink(missing_ok=True)
    for part in run.folder.glob("*model*"):
        shutil.rmtree(part, ignore_errors=True)
    return events.RunFailed("The disk is full.", "Free some space, delete old runs, or turn off keeping the model.", "")


def _there(file: io.FileIO) -> int:
    """Bytes of `file`. Raises Deleted: it is gone from its folder."""
    now = os.fstat(file.fileno())
    if not now.st_nlink:
        raise Deleted
    return now.st_size


def append(file: io.FileIO, data: bytes) -> None:
    """All of `data` at the end of `file`, or nothing of it: a disk that fills up leaves no half line.

    Raises:
        Deleted: the file is gone from its folder.
    """
    size, rest = _there(file), memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise
