"""The one error that people see. Anything else that is raised is a bug, and shows its trace in the run."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one knob.

    Attributes:
        knob: its name.
        message: what was given and what was expected.
        remedy: what to do, in the imperative.
    """

    knob: str
    message: str
    remedy: str


class TrspError(Exception):
    """A refusal that a person can act on.

    Args:
        message: what was given and what was expected, in one or two sentences.
        remedy: what to do next, in the imperative.
        problems: the single faults behind it, when several knobs are wrong at once.
    """

    def __init__(self, message: str, remedy: str, problems: Sequence[Problem] = ()):
        super().__init__(message)
        self.message = _showable(message)
        self.remedy = _showable(remedy)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}"


def _showable(text: str) -> str:
    """`text` with a question mark for each half of a letter (a lone surrogate): JSON can spell such halves, but no page
    and no terminal can show them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def is_ours(error: BaseException) -> bool:
    """Whether our own code raised `error`, and not a library that it called: then it is a bug, which no user can mend.
    An OSError never counts as ours, since it says that the system refused something."""
    frames = traceback.extract_tb(error.__traceback__)
    return not isinstance(error, OSError) and bool(frames) and Path(frames[-1].filename).is_relative_to(HERE)


def is_short_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out. On a CPU torch has no error type for that, so its message counts."""
    is_torch = type(error).__name__ == "OutOfMemoryError"
    return is_torch or isinstance(error, MemoryError) or "allocate memory" in str(error)


def refuse(problems: Sequence[Problem]) -> None:
    """Raise one `TrspError` that carries all `problems`; do nothing where there are none."""
    if not problems:
        return
    first = problems[0]
    if len(problems) == 1:
        raise TrspError(first.message, first.remedy, problems)
    raise TrspError(
        f"{len(problems)} settings cannot be used: " + " ".join(p.message for p in problems),
        " ".join(dict.fromkeys(p.remedy for p in problems)),
        problems,
    )


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, in one's share of it, or in a file
_FULL_IN_TEXT = re.compile(
    "|".join([rf"(?:os error |\[Errno )(?:{'|'.join(map(str, _FULL))})\b", *(re.escape(os.strerror(n)) for n in _FULL)])
)


def disk_full(error: BaseException) -> bool:
    """Whether a full disk caused `error`, or an error that led to it. The system's error number tells; where a library
    such as safetensors wraps the system's error in a text of its own, the number or the words in that text."""
    chain: list[BaseException] = []
    behind: BaseException | None = error
    while behind is not None and behind not in chain:
        chain.append(behind)
        behind = behind.__cause__ or behind.__context__
    return any(
        one.errno in _FULL if isinstance(one, OSError) and one.errno else bool(_FULL_IN_TEXT.search(str(one)))
        for one in chain
    )
