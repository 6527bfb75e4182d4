"""Texts that visitors bring: stored once under their file's name and one made from their content, beside the runs that
read them. What no run reads is removed after a while (`retention`)."""

from __future__ import annotations

import hashlib
import re
import threading
from pathlib import Path

from trsp_core import formatting
from trsp_core.data import corpora, encodings
from trsp_core.errors import TrspError
from trsp_core.files import write_atomic
from trsp_core.runs import limits

SUFFIXES = (".txt", ".jsonl")
MOST_NAME = 40  # characters that are kept of a file's name
OPENING = 120  # characters of a text that are shown as they were read
_UNSAFE = re.compile(r"[^A-Za-z0-9]+")
_lock = threading.Lock()
_brought: dict[Path, str] = {}  # what this server has stored, and for whom


def keep(content: bytes, name: str, root: Path, visitor: str = "") -> Path:
    """Store `content` under `root`, in a file whose name begins with letters and digits of `name`, and ends as it does.

    Raises:
        TrspError: wrong kind, too large, no room, or none left for this visitor.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise TrspError(f"A file of kind {suffix or 'unknown'} was given.", "Bring a .txt or a .jsonl file.")
    limits.current().refuse_upload(len(content))
    folder = root / "uploads"
    key = hashlib.sha256(content).hexdigest()[:20]
    file = folder / f"{_UNSAFE.sub('-', Path(name).stem)[:MOST_NAME].strip('-') or 'text'}.{key}{suffix}"
    try:
        with _lock:
            folder.mkdir(parents=True, exist_ok=True)
            sizes = {f: f.stat().st_size for f in folder.iterdir()}
            file = next((f for f in sizes if f.name.endswith(f"{key}{suffix}")), file)
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


def title(file: Path) -> str:
    """What the visitor called the stored `file`, as far as its name was kept."""
    name, _, key = file.stem.rpartition(".")
    return f"{name or key[:6]}{file.suffix}"


def in_words(content: bytes, name: str) -> str:
    """How much text a file holds that is about to be kept, and how it begins: two sentences.

    Raises:
        TrspError: no text, or one that cannot be divided into articles.
    """
    text, _ = encodings.decode(content, name[:80])
    articles = corpora.parse(text, Path(name[-80:])).articles
    count = sum(len(article.split()) for article in articles)
    opening = " ".join(articles[0][:OPENING].split()) if articles else ""
    parts = f"{'piece' if len(articles) == 1 else 'pieces'} of text"
    return f"{formatting.count(count)} words in {len(articles)} {parts}. It begins: “{opening}…”"


def is_upload(text: str, root: Path) -> bool:
    return Path(text).parent == root / "uploads"
