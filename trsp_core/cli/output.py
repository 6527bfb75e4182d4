"""What the shell prints: results on stdout, all else on stderr, with each letter of it visible."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trsp_core import escaping, formatting
from trsp_core.errors import TrspError
from trsp_core.files import write_atomic
from trsp_core.schema.codec import plain

SPARSE = 30.0  # seconds between lines of progress where stderr is no terminal


def show(*blocks: str) -> None:
    """Print blocks of lines on stdout."""
    for block in blocks:
        print(escaping.lines(block), flush=True)


def show_json(values: Any, indent: int | None = 1) -> None:
    """Print values as JSON on stdout; a number that is not finite becomes null."""
    show(escaping.json(plain(values), indent))


def show_either(values: Any, text: str, as_json: bool) -> None:
    """Print a result on stdout, as JSON or for people."""
    if as_json:
        show_json(values)
    else:
        show(text)


def sentences(rows: Sequence[dict[str, Any]]) -> str:
    """Records as a table: the name of each, and a sentence for every other field that is not empty."""

    def sentence(value: Any) -> str:
        return (", ".join(value) if isinstance(value, list) else str(value).rstrip(".")) + "."

    return formatting.table([[row["name"], *[" ".join(sentence(v) for v in [*row.values()][1:] if v)]] for row in rows])


def tell(*lines: str) -> None:
    """Print lines on stderr."""
    for line in lines:
        print(escaping.line(line), file=sys.stderr, flush=True)


def tell_progress(message: str, fraction: float, as_json: bool) -> None:
    """Print how far the work is: an object on stdout, or a line on stderr."""
    if as_json:
        show_json({"message": message, "fraction": round(fraction, 3)}, indent=None)
    else:
        tell(f"[{formatting.progress(fraction)}] {message}")


def write_file(path: Path, text: str, as_json: bool) -> None:
    """Write a result to `path`, and print where it is.

    Raises:
        TrspError: it cannot be written.
    """
    try:
        write_atomic(path, text)
    except OSError as error:
        raise TrspError(f"{path} cannot be written: {error.strerror}.", "Choose another place.") from error
    show_either({"file": str(path), "bytes": path.stat().st_size}, str(path), as_json)


class ProgressLine:
    """Progress on stderr. On a terminal what passes is one line, written over; elsewhere a line now and then."""

    def __init__(self) -> None:
        self.live, self._last_time, self._width = sys.stderr.isatty(), 0.0, 0

    def tell(self, line: str, passing: bool) -> None:
        """Print `line`; a `passing` one is written over, or left out, by what comes next."""
        if self.live:
            line = escaping.line(line)
            print("\r" + line.ljust(self._width), end="" if passing else "\n", file=sys.stderr, flush=True)
            self._width = len(line) if passing else 0
        elif not passing or time.monotonic() - self._last_time > SPARSE:
            tell(line)
            self._last_time = time.monotonic()

    def close(self) -> None:
        """Leave the line that is written over."""
        if self.live:
            tell("")
