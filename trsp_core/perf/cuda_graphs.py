"""Passes as CUDA graphs: what a GPU is asked for is recorded once, and asked for again in one piece.

A step is some thousand small kernels, and unless the model is large Python takes longer to ask for them than the GPU to
run them.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from trsp_core.errors import TrspError

WAITS = "called a synchronizing CUDA operation"  # torch's words
COMPILES = "_inductor"  # where that is done once, before anything is recorded


class Recorded:
    """`work`, a function of token ids (B, T) that gives a tensor: on a GPU recorded at its second call and replayed
    from then on, elsewhere called as it is.

    What else `work` reads has to be tensors that change in place, and what it does in Python alone happens no more once
    it is recorded. Batches of another shape are not replayed, and what cannot be recorded (it waits for the GPU, or
    there is no memory for a second copy of its tables) is not either.

    Args:
        model: what it passes through; one that is spread over several devices is not recorded.
        learns: parameters whose `grad`, None before, it leaves behind.

    Attributes:
        graph: the recording; None while there is none.
        refusal: why it is not recorded; "" where it is, or was not tried.
        spoiled: why nothing is recorded any more in this process: after a recording that failed torch gives no memory
            back.
    """

    spoiled = ""

    def __init__(self, work: Callable[[Tensor], Tensor], model: nn.Module, learns: Collection[nn.Parameter] = ()):
        self.work, self._learns = work, list(learns)
        devices = {p.device for p in model.parameters()}
        self.refusal = "" if len(devices) == 1 and next(iter(devices)).type == "cuda" else "no single CUDA device"
        self._calls = 0
        self._stream: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self._ids = self._output = torch.empty(0)
        self._grads: list[Tensor | None] = []

    def __call__(self, ids: Tensor) -> Tensor:
        if self.graph is None:
            self.refusal = self.refusal or Recorded.spoiled
        if self.refusal or (self.graph and ids.shape != self._ids.shape):
            return self.work(ids)
        self._calls += 1
        if self._calls == 1:
            return self._beside(ids)
        if self.graph is None and not self._record(ids):
            return self.work(ids)
        assert self.graph is not None
        self._ids.copy_(ids)
        self.graph.replay()
        for parameter, grad in zip(self._learns, self._grads, strict=True):
            parameter.grad = grad
        return self._output.clone()

    def _beside(self, ids: Tensor) -> Tensor:
        """The work itself, on a stream beside the usual one: what the libraries set up at first is not recorded. Looks
        whether it waits for the GPU."""
        stream, mode = torch.cuda.Stream(ids.device), torch.cuda.get_sync_debug_mode()
        self._stream = stream
        stream.wait_stream(torch.cuda.current_stream(ids.device))
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(stream), one_sequence_a_block():
                    result = self.work(ids)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream(ids.device).wait_stream(stream)
        for one in messages:
            if WAITS not in str(one.message):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
            elif COMPILES not in one.filename:
                self.refusal = f"{one.filename}, line {one.lineno}, waits for the GPU"
        return result

    def _record(self, ids: Tensor) -> bool:
        """Whether it could be recorded; if not, all is as before."""
        stream, self._ids = torch.cuda.current_stream(ids.device), ids.clone()
        try:
            self.graph = self._recording()
        except (RuntimeError, TrspError) as error:  # torch's own are of the first, lack of memory too
            self.refusal = Recorded.spoiled = str(error).partition("\n")[0] or type(error).__name__
        self._grads = [parameter.grad for parameter in self._learns]
        if self.refusal:
            self._grads = []
            for parameter in self._learns:
                parameter.grad = None
            torch.cuda.set_stream(stream)  # torch leaves it at the recording's,
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # and random numbers waiting for the end of one
                ids.clone()
            gc.collect()
            torch.cuda.empty_cache()
        return not self.refusal

    def _recording(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream), one_sequence_a_block():
            self._output = self.work(self._ids)
        return graph


@contextlib.contextmanager
def one_sequence_a_block() -> Iterator[None]:
    """transformers asks of each pass whether several texts are packed into a sequence, which means to wait for the GPU;
    while it is recorded it takes that for granted, and other kernels. In a block there is one, so its answer is None.
    """
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
