"""Writes files so that no reader, kill or power cut meets them half written; measures folders and free room."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path

from trsp_core import formatting
from trsp_core.errors import TrspError


def sync(path: Path) -> None:
    """Wait until the disk holds what was written to a file, or the list of names in a folder (fsync), so that a power
    cut cannot undo it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have nothing to do for a folder
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """`sync` `folder` and all files and folders in it."""
    for path, _, names in os.walk(folder):
        for name in names:
            sync(Path(path, name))
        sync(Path(path))


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace the content of the file `path`, text as UTF-8: a reader sees the old content or the new, never a part,
    also after a kill or a power cut at any instant."""
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
    """Create `folder`, and check that its disk has `least_bytes` free.

    Args:
        remedy: of the refusal.

    Raises:
        TrspError: it cannot be created, or fewer bytes are free there.
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
    """Bytes of all files in `folder` and the folders below it. Files may come and go meanwhile; 0 where there is no
    such folder."""
    total = 0
    for path, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(path, file)).st_size
            except FileNotFoundError:
                continue
    return total
