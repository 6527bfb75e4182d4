"""Texts that visitors bring: stored once under a name made from their content, beside the runs that read them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trsp_core import encodings, limits
from trsp_core.errors import TrspError
from trsp_core.store import write_atomic

SUFFIXES = (".txt", ".jsonl")


def keep(content: bytes, name: str, root: Path) -> Path:
    """Store `content` under `root`; the visitor's file `name` gives the suffix alone.

    Raises:
        TrspError: wrong kind, too large, no room.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise TrspError(f"A file of kind {suffix or 'unknown'} was given.", "Bring a .txt or a .jsonl file.")
    limits.current().refuse_upload(len(content))
    folder = root / "uploads"
    file = folder / f"{hashlib.sha256(content).hexdigest()[:20]}{suffix}"
    try:
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            stored = sum(f.stat().st_size for f in folder.iterdir())
            if stored + len(content) > limits.current().stored_bytes:
                raise TrspError("The space for uploaded texts is used up.", "Give the path of a file on this machine.")
            write_atomic(file, content)
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
