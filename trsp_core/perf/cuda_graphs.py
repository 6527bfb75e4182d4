"""Records passes as CUDA graphs: the kernels that a pass asks of a GPU are recorded once, then asked for in one piece.

A training step is some thousand small kernels. Unless the model is large, Python takes longer to ask for them than the
GPU takes to run them.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from trsp_core.errors import TrspError

WAITS = "called a synchronizing CUDA operation"  # torch's warning, when Python waits for the GPU
COMPILES = "_inductor"  # in the paths of files that do so once, while they compile, and not in the recording


class Recorded:
    """A function of token ids that on a GPU is recorded at its second call, and replayed from then on. Elsewhere, for
    batches of another shape, and where recording fails, it is called as it is.

    Whatever else `work` reads has to be tensors that change in place; what it does in Python alone no longer happens
    once it is recorded. Recording fails if `work` waits for the GPU, or if memory for its tensors is short.

    Args:
        work: takes token ids (B, T), returns a tensor.
        model: the model that it passes through; one on several devices is not recorded.
        learns: the parameters whose `grad` is None before `work`, and set by it.

    Attributes:
        graph: the recording; None while there is none.
        refusal: why it is not recorded; "" where it is, or has not been tried yet.
        spoiled: why nothing more is recorded in this process: once a recording has failed, torch does not give its
            memory back; "" before.
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
        """Call `work` once on a stream of its own, so that what libraries set up at a first call is not recorded, and
        see whether it waits for the GPU; then `refusal` says where."""
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
        """Record `work` for batches like `ids`, and return whether that succeeded. If not, `refusal` says why, and all
        is as before."""
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
            torch.cuda.set_stream(stream)  # torch has left the recording's stream current;
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # and random numbers wait until some recording ends
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
    """Inside, transformers takes it that each block holds one text, which is so here. Otherwise it looks at each pass
    whether several are packed into a sequence, which waits for the GPU; or, in a recording, assumes that they are, and
    chooses other kernels.
    """
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
