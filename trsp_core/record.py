"""The one writer of a run's events: drains a generator into `events.jsonl`, and ends it well or badly, but in
writing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Generator
from importlib import metadata

from trsp_core import events as ev
from trsp_core import state
from trsp_core.errors import TrspError, disk_full, is_short_memory
from trsp_core.events import Event
from trsp_core.state import RunState
from trsp_core.store import Run, write_atomic

RESERVE = 64 * 1024  # bytes held free for a run's last words
OUT_OF_MEMORY = ev.RunFailed("The machine ran out of memory.", "Choose a smaller model, shorter blocks or fewer.", "")
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "gensim", "datasets", "bitsandbytes")


def record(
    run: Run, generator: Generator[Event, None, None], watch: Callable[[RunState, Event], None] | None = None
) -> RunState:
    """Write each event of `generator` to the run folder as it happens; return the final state.

    A `cancel` file or KeyboardInterrupt closes the generator and ends the run with `RunCancelled`; a `TrspError` or any
    other exception ends it with `RunFailed`. A full disk stops the run; what was written before stays readable. A run
    that has events already, resumed, goes on behind them.

    Args:
        watch: called after each event with the state so far, for a progress line.
    """
    began = time.monotonic()
    with run.hold(), run.events_file.open("ab", buffering=0) as file:
        folded, number = _so_far(run, file)
        earlier = folded.at

        def write(event: Event) -> None:
            nonlocal number
            at = earlier + time.monotonic() - began
            _append(file, ev.to_line(event, number, at).encode() + b"\n")
            state.fold(folded, [(number, at, event)])
            number += 1
            if watch:
                watch(folded, event)

        try:
            with contextlib.suppress(OSError):  # as much as there is
                (run.folder / ".reserve").write_bytes(os.urandom(RESERVE))
            write_atomic(run.folder / "env.json", json.dumps(environment(), indent=1))
            for event in generator:
                write(event)
                if run.cancelled() and not isinstance(event, ev.ENDINGS):
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            generator.close()
            write(ev.RunCancelled(folded.phase, run.cancel_reason()))
        except TrspError as error:
            write(ev.RunFailed(error.message, error.remedy, ""))
        except MemoryError:
            write(OUT_OF_MEMORY)
        except Exception as error:  # a bug, unless the disk is full: its trace belongs to the run
            generator.close()
            write(_full_disk(run) if disk_full(error) else _bug(error))
        finally:
            generator.close()
            (run.folder / ".reserve").unlink(missing_ok=True)
        os.fsync(file.fileno())
        write_atomic(run.folder / "summary.json", json.dumps(ev.plain(state.summary(folded)), indent=1))
    return folded


def add(run: Run, event: Event) -> None:
    """Append one event to a run that no process is at; the caller holds it."""
    with run.events_file.open("ab", buffering=0) as file:
        folded, number = _so_far(run, file)
        _append(file, ev.to_line(event, number, folded.at).encode() + b"\n")
        os.fsync(file.fileno())


def _so_far(run: Run, file: io.FileIO) -> tuple[RunState, int]:
    """The state up to now and the number of the next event. A torn last line is ended, and so left out for good."""
    lines, offset = run.read()
    if file.tell() > offset:
        _append(file, b"\n")
    return state.fold(RunState(), lines), max((n for n, _, _ in lines), default=-1) + 1


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


def _bug(error: Exception) -> ev.RunFailed:
    if is_short_memory(error):
        return OUT_OF_MEMORY
    trace = "".join(traceback.format_exception(error))[-20_000:]
    return ev.RunFailed(f"{type(error).__name__}: {error}", "This is a bug: please report it with the trace.", trace)


def _full_disk(run: Run) -> ev.RunFailed:
    """Make room by dropping the reserve and what the model has taken, then say what happened."""
    (run.folder / ".reserve").unlink(missing_ok=True)
    for part in run.folder.glob("*model*"):
        shutil.rmtree(part, ignore_errors=True)
    return ev.RunFailed("The disk is full.", "Free some space, delete old runs, or turn off keeping the model.", "")


def _append(file: io.FileIO, data: bytes) -> None:
    """All of `data` at the end of `file`, or nothing of it: a disk that fills up leaves no half line."""
    size, rest = os.fstat(file.fileno()).st_size, memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise
