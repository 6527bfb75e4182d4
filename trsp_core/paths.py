"""Checks paths that people write, before any work is done: that a path is possible, that a file is there, that one can
be written. Also says where the program, its assets, its cache and its runs are.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from trsp_core import formatting
from trsp_core.errors import TrspError

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # what a child process has to find on its path
ASSETS = PACKAGE / "assets" if (PACKAGE / "assets").is_dir() else ROOT / "assets"  # in a wheel; in a checkout
MOST_JSON = 50_000_000  # bytes of a plan, a grid or a record


def named(text: str, kind: str = "path") -> Path:
    """The absolute path that `text` means, with `~` replaced by the home folder. Nothing has to be there.

    Args:
        kind: what the path is of, for the message, such as "text".

    Raises:
        TrspError: this machine can have no such path: it holds a NUL or half a letter, a name is too long, or `~user`
            names an unknown user.
    """
    try:
        text.encode()  # what is no UTF-8 cannot be shown or kept
        path = Path(text).expanduser().absolute()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.lstat()
    except (OSError, ValueError, RuntimeError) as error:
        why = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
        raise TrspError(
            f"There is no {kind} {text[:80]!r}: {why.rstrip('.')}.", "Give a path that this machine can have."
        ) from error
    return path


def folder(text: str) -> Path | None:
    """The folder that `text` means; None where there is none, or the path is impossible."""
    try:
        path = named(text)
        return path if path.is_dir() else None
    except (TrspError, OSError):
        return None


def file(text: str, kind: str, remedy: str, most_bytes: int = MOST_JSON) -> Path:
    """The path of the file that `text` means, once it is known to be there and not too large.

    Args:
        kind: what it should hold, for the message, such as "plan".
        remedy: what to do where it cannot be used, for the message.

    Raises:
        TrspError: the path is impossible, nothing is there, it is a folder or a device, or it has more than
            `most_bytes`.
    """
    try:
        path = named(text, kind)
        status = path.stat()
    except TrspError as error:
        raise TrspError(error.message, remedy) from error
    except OSError as error:
        why = "" if isinstance(error, FileNotFoundError) else f": {error.strerror}"
        raise TrspError(f"There is no {kind} {text[:80]!r}{why}.", remedy) from error
    if not stat.S_ISREG(status.st_mode):
        raise TrspError(f"{path} is no file but a folder or a device.", remedy)
    if status.st_size > most_bytes:
        size = f"{formatting.size(status.st_size)}, at most {formatting.size(most_bytes)} are read"
        raise TrspError(f"{path.name} has {size}.", "Cut it to a part.")
    return path


def mark(text: str) -> tuple[int, int]:
    """Size and time of change of the file that `text` means, which tell whether it is still the same; zeros where there
    is none."""
    try:
        status = named(text).stat()
    except (TrspError, OSError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


def content(path: Path, most_bytes: int = MOST_JSON) -> bytes:
    """The bytes of a file whose path `file` has checked.

    Raises:
        TrspError: it cannot be read, or has grown beyond `most_bytes`.
    """
    try:
        with path.open("rb") as opened:
            data = opened.read(most_bytes + 1)
    except OSError as error:
        raise TrspError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error
    if len(data) > most_bytes:
        raise TrspError(f"{path.name} has more than {formatting.size(most_bytes)}.", "Cut it to a part.")
    return data


def writable(text: str, makes_folders: bool = False) -> Path:
    """The path of the file that `text` means, once it is known that a file can be written there later: so no work is
    lost to a wrong name. Nothing is written.

    Args:
        makes_folders: whoever writes the file creates missing folders above it, so they need not be there.

    Raises:
        TrspError: the path is impossible, is a folder or a device, or its folder is missing or cannot be written.
    """
    path = named(text, "place")
    try:
        if why := _unwritable(path, makes_folders):
            raise TrspError(f"{path} cannot be written: {why}.", "Choose another place.")
    except OSError as error:
        raise TrspError(f"{path} cannot be written: {error.strerror}.", "Choose another place.") from error
    named(str(path.with_name(f".{path.name}.{'0' * 8}")), "place")  # it is written under such a name first
    return path


def _unwritable(path: Path, makes_folders: bool) -> str:
    """Why no file can be written at `path`, a clause; "" where one can.

    Raises:
        OSError: the system does not let this process look there.
    """
    if path.exists() and not path.is_file():  # a device would be replaced by the file
        return "it is a folder or a device"
    above = path.parent
    while makes_folders and not above.exists():
        above = above.parent
    if not above.is_dir():
        return "its folder is not there"
    return "" if os.access(above, os.W_OK) else "its folder cannot be written"


def home() -> Path:
    """The cache folder: `$TRSP_HOME`, or `~/.cache/trsp-explorer`."""
    return Path(os.environ.get("TRSP_HOME") or Path.home() / ".cache" / "trsp-explorer").absolute()


def runs_root() -> Path:
    """Where runs are kept: `$TRSP_RUNS`, or `runs/` in the working folder.

    Raises:
        TrspError: `$TRSP_RUNS` is no path of this machine.
    """
    return named(os.environ.get("TRSP_RUNS") or "runs", "folder of runs (TRSP_RUNS)")
