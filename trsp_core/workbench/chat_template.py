"""A model's chat template, rendered within bounds of time and memory. It is a program of whoever made the model, run in
jinja's sandbox, which limits what it can reach and neither how long it takes nor how much memory. No torch.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from trsp_core import formatting
from trsp_core.errors import TrspError

LONGEST = 100_000  # characters of a template; the longest of well-known models have some 20,000
SECONDS = 5.0  # of processor time to render it
MOST_BYTES = 512_000_000  # of memory, beside what the process has already
MOST_WRITTEN = 200_000  # bytes of the rendered prompt
REMEDY = "Leave the chat template out, or choose another model."


def render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """The prompt that the tokenizer's chat template makes of `messages`, the answer's beginning included. For the main
    thread, which alone can be interrupted.

    Raises:
        TrspError: the template is too long, takes too long or too much memory, writes too much, or fails.
    """
    if len(str(tokenizer.chat_template)) > LONGEST:
        raise TrspError(f"This model's chat template has more than {formatting.count(LONGEST)} characters.", REMEDY)
    prompt, failure = "", ""
    try:
        with _bounded():
            prompt = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except _Overdue:
        failure = "its time is over"
    except Exception as error:  # of a program that is not ours: any of Python's
        failure = " ".join([type(error).__name__, *str(error).split()])[:200]
    if failure:  # raised out here, since the error's own trace holds on to all that the template has made
        gc.collect()
        raise TrspError(
            f"This model's chat template fails, or does not end within "
            f"{formatting.duration(SECONDS)} and {formatting.size(MOST_BYTES)}: {failure}.",
            REMEDY,
        )
    if len(prompt.encode("utf-8", "replace")) > MOST_WRITTEN:
        raise TrspError(f"This model's chat template writes more than {formatting.count(MOST_WRITTEN)} bytes.", REMEDY)
    return prompt


class _Overdue(BaseException):
    """Time is up. No `Exception`: jinja swallows those while it computes constants in advance."""


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Inside, this process gets at most so much time and memory.

    Raises:
        _Overdue, MemoryError: it wants more.
    """

    def interrupt(*_: object) -> None:
        raise _Overdue

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, interrupt)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MOST_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)
