"""Texts that visitors bring: stored once under a name made from their content, beside the runs that read them. What no
run reads is removed after a while (`retention`)."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from trsp_core.data import encodings
from trsp_core.errors import TrspError
from trsp_core.files import write_atomic
from trsp_core.runs import limits

SUFFIXES = (".txt", ".jsonl")
_lock = threading.Lock()
_brought: dict[Path, str] = {}  # what this server has stored, and for whom


def keep(content: bytes, name: str, root: Path, visitor: str = "") -> Path:
    """Store `content` under `root`; the visitor's file `name` gives the suffix alone.

    Raises:
        TrspError: wrong kind, too large, no room, or none left for this visitor.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise TrspError(f"A file of kind {suffix or 'unknown'} was given.", "Bring a .txt or a .jsonl file.")
    limits.current().refuse_upload(len(content))
    folder = root / "uploads"
    file = folder / f"{hashlib.sha256(content).hexdigest()[:20]}{suffix}"
    try:
        with _lock:
            folder.mkdir(parents=True, exist_ok=True)
            sizes = {f: f.stat().st_size for f in folder.iterdir()}
            for gone in _brought.keys() - sizes:
                del _brought[gone]
            if file in sizes:
                file.touch()  # it is wanted anew
            else:
                own = sum(sizes[f] for f, who in _brought.items() if who == visitor)
                limits.current().refuse_stored(len(content), own, sum(sizes.values()))
                write_atomic(file, content)
                _brought[file] = visitor
    except OSError as error:
        raise TrspError(
            f"The file could not be stored: {error.strerror}.", "Free some space, then try again."
        ) from error
    return file


def how_read(content: bytes, name: str) -> str:
    """How the characters of a file are told that is about to be kept: a sentence, "" where it is plain UTF-8.

    Raises:
        TrspError: too large, no text, or in an encoding that is not sure.
    """
    limits.current().refuse_upload(len(content))
    return encodings.decode(content, name[:80])[1]


def is_upload(text: str, root: Path) -> bool:
    return Path(text).parent == root / "uploads"
