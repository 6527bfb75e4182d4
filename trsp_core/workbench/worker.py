"""The child's end of the workbench: requests in on one pipe, answers out on the other, one request at a time.

A request is answered by a generator. After each answer (a token, or one text through the model) the loop looks whether
the request was cancelled, and closes the generator if so.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from functools import singledispatchmethod
from typing import TextIO

from trsp_core.errors import TrspError, is_short_memory
from trsp_core.schema import messages
from trsp_core.schema.messages import Answer, Request, Variant
from trsp_core.subprocesses import answer_pipe
from trsp_core.workbench import side_by_side
from trsp_core.workbench.model_cache import Model, ModelCache
from trsp_core.workbench.what_if import study_of

Answers = Iterator[Answer | None]
WAITED = 1.5  # wall clock over processor time of an answer that had to wait for the cores
REST, LONGEST_REST = 3.0, 12.0  # times the time of that answer, and seconds
LAST_CALL = 8.0  # seconds to end by itself once nobody listens any more


class RequestHandler:
    """Answers requests with the models of a cache."""

    def __init__(self) -> None:
        self.cache = ModelCache()

    @singledispatchmethod
    def answer(self, request: Request) -> Answers:
        """Answers to `request`, without the ending.

        Raises:
            TrspError: it cannot be answered; message and remedy say why.
        """
        raise TypeError(f"the workbench does not know {type(request).__name__}")

    @answer.register
    def _(self, request: messages.Generate) -> Answers:
        return side_by_side.stream(request, self.cache)

    @answer.register
    def _(self, request: messages.Trace) -> Answers:
        return side_by_side.trace(request, self.cache)

    @answer.register
    def _(self, request: messages.WhatIf) -> Answers:
        model = yield from self._take(Variant(request.model))
        study = study_of(request, model)
        if request.figures:
            yield from study.measure(request.removed)
        if request.sample_tokens:
            yield from study.sample(request.removed, request.prompt, request.sample_tokens)

    @answer.register
    def _(self, request: messages.Importance) -> Answers:
        model = yield from self._take(request.model)
        yield from study_of(request, model).importance()

    @answer.register
    def _(self, request: messages.Influence) -> Answers:
        model = yield from self._take(request.model)
        yield from study_of(request, model).influence()

    @answer.register
    def _(self, request: messages.Prepare) -> Answers:
        model = yield from self._take(Variant(request.model))
        if request.text:
            study = study_of(request, model)
            yield None
            study.figures(frozenset())

    def forget(self) -> None:
        """Give all memory back."""
        self.cache.clear()

    def _take(self, variant: Variant) -> Iterator[Answer | None]:
        new = variant.model not in self.cache.models
        model: Model = self.cache.take(variant)
        if new:
            yield model.ready()
        return model


class Loop:
    """Reads requests from `lines` in a thread of its own, so that a cancel is seen while another is being answered.

    Args:
        second: others come first on this machine, see `rested`.
    """

    def __init__(self, handler: RequestHandler, lines: TextIO, out: TextIO, second: bool = False):
        self._handler, self._lines, self._out, self._second = handler, lines, out, second
        self._requests: queue.Queue[tuple[str, Request] | None] = queue.Queue()
        self._stopped: set[str] = set()
        self._alone = threading.Event()

    def run(self) -> None:
        """Answer until `lines` ends."""
        threading.Thread(target=self._listen, name="requests", daemon=True).start()
        while (entry := self._requests.get()) is not None:
            ticket, request = entry
            self._tell(ticket, self.respond(ticket, request))
            self._stopped.discard(ticket)

    def cancel(self, ticket: str) -> None:
        """Stop the request with `ticket` after its next answer."""
        self._stopped.add(ticket)

    def respond(self, ticket: str, request: Request) -> Answer:
        """Write the answers to `request`, and return its ending."""
        began = time.perf_counter()
        try:
            generator = self._handler.answer(request)
            for answer in rested(generator) if self._second else generator:
                if answer is not None:
                    self._tell(ticket, answer)  # also one that nobody waits for any more: the work is done
                if ticket in self._stopped or self._alone.is_set():
                    generator.close()  # type: ignore[attr-defined]
                    return messages.Stopped()
        except TrspError as error:
            return messages.Refused(error.message, error.remedy)
        except Exception as error:
            if is_short_memory(error):
                self._handler.forget()
                return messages.Refused(
                    "The machine ran out of memory.", "Take fewer or smaller models, then ask again."
                )
            trace = "".join(traceback.format_exception(error))[-20_000:]
            return messages.Broken(f"{type(error).__name__}: {error}", "This is a bug: please report it.", trace)
        return messages.Answered(round(time.perf_counter() - began, 3))

    def _tell(self, ticket: str, answer: Answer) -> None:
        try:
            self._out.write(messages.pack(ticket, answer) + "\n")
            self._out.flush()
        except OSError:
            self._alone.set()

    def _listen(self) -> None:
        for line in self._lines:
            ticket, request = messages.unpack(line)
            if isinstance(request, messages.Cancel):
                self.cancel(ticket)
            elif isinstance(request, Request):
                self._requests.put((ticket, request))
        self._alone.set()
        self._requests.put(None)
        time.sleep(LAST_CALL)
        os._exit(0)  # whatever still computes computes for nobody


def rested(answers: Answers) -> Answers:
    """Pass on `answers`, with a rest after each that had to wait for the cores. Two processes that share cores are both
    slow: they empty each other's caches, and a product waits for its slowest part."""
    wall, cpu = time.monotonic(), time.process_time()
    for answer in answers:
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        yield answer
        if wall > WAITED * cpu:
            time.sleep(min(REST * wall, LONGEST_REST))
        wall, cpu = time.monotonic(), time.process_time()


def serve(second: bool = False) -> int:
    """Serve on this process's standard pipes, as `Loop` does."""
    out = answer_pipe()
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    Loop(RequestHandler(), sys.stdin, out, second).run()
    return 0


if __name__ == "__main__":
    sys.exit(serve())
