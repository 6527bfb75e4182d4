"""A model's chat template, rendered within bounds. It is a program of whoever made the model, in jinja's sandbox, which
limits what it can reach and not how long it takes or how much memory: so a child process renders it. No torch.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from trsp_core import formatting
from trsp_core.errors import TrspError

LONGEST = 100_000  # characters of a template; the longest of well-known models have some 20,000
SECONDS = 5  # to render it
MOST_BYTES = 512_000_000  # of memory, beside what the process has already
MOST_WRITTEN = 200_000  # bytes of the rendered prompt
REMEDY = "Leave the chat template out, or choose another model."


def render(tokenizer: Any, said: Sequence[dict[str, str]]) -> str:
    """The prompt that the tokenizer's chat template makes of `said`, the answer's beginning included.

    Raises:
        TrspError: the template is too long, takes too long or too much memory, writes too much, or fails.
    """
    template = tokenizer.chat_template
    if len(str(template)) > LONGEST:
        raise TrspError(f"This model's chat template has more than {formatting.count(LONGEST)} characters.", REMEDY)
    made = within(
        lambda: tokenizer.apply_chat_template(list(said), add_generation_prompt=True, tokenize=False).encode()
    )
    if made is None:
        raise TrspError(
            f"This model's chat template fails, or does not end within {SECONDS} s, {formatting.size(MOST_BYTES)} and "
            f"{formatting.count(MOST_WRITTEN)} bytes of text.",
            REMEDY,
        )
    return made.decode("utf-8", "replace")


def within(work: Callable[[], bytes]) -> bytes | None:
    """What `work` gives in a copy of this process that is killed at the bounds above; None where it does not end well.

    The copy shares this process's memory until it writes to it, and leaves without flushing or closing anything.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ended = 1
        try:
            most = psutil.Process().memory_info().vms + MOST_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            made = work()
            if len(made) <= MOST_WRITTEN:
                os.set_blocking(writing, True)
                while made:
                    made = made[os.write(writing, made) :]
                ended = 0
        finally:
            os._exit(ended)  # also past an error, whatever it is
    os.close(writing)
    parts, deadline = [], time.monotonic() + 2 * SECONDS  # a busy machine gives less than a second in a second
    try:
        while select.select([reading], [], [], max(deadline - time.monotonic(), 0))[0]:
            part = os.read(reading, 65_536)
            if not part:
                break
            parts.append(part)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL) if time.monotonic() >= deadline else None
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return b"".join(parts) if status == 0 else None
