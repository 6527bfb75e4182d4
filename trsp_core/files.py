"""Files that a reader, a kill or a power cut never meets half written; the size of a folder, and room for more."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path

from trsp_core import formatting
from trsp_core.errors import TrspError


def sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk, whatever becomes of the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have nothing to do for a folder
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """`sync` all that lies in `folder`."""
    for path, _, names in os.walk(folder):
        for name in names:
            sync(Path(path, name))
        sync(Path(path))


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` so that a reader, or a kill at any instant, sees the old one or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_room(folder: Path, least_bytes: int, remedy: str) -> None:
    """Create `folder`.

    Raises:
        TrspError: it cannot be written, or fewer than `least_bytes` are free there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise TrspError(f"The cache folder {folder} cannot be written: {error.strerror}.", remedy) from error
    if free < least_bytes:
        raise TrspError(
            f"{formatting.size(least_bytes)} are needed in {folder}, {formatting.size(free)} are free.", remedy
        )


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
