"""Measures perplexity, divergence from the dense model, speed and memory; and how fast this machine multiplies."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from trsp_core.evaluation import generation
from trsp_core.evaluation.losses import next_token_loss
from trsp_core.perf import head_loss, parallel
from trsp_core.surgery import quantization

ROWS = 64  # rows of logits that are compared at once
TOKENS_AT_ONCE = 256  # tokens of a measuring pass on a CPU: enough for its matrix units, and few enough logits
TOKENS_ON_GPU = 2048  # on a GPU: so Python asks for fewer passes
SPARING_ON_GPU = 8192  # on a GPU, where not all logits are held


def block_losses(
    model: nn.Module, blocks: Tensor, watch: Callable[[Tensor], None] | None = None
) -> Iterator[list[float]]:
    """Yield the mean loss, in nats a predicted token, of each block of token ids in `blocks` (N, T), a few blocks at a
    time, in order. Each block is a context of its own, in which T - 1 tokens are predicted.

    Args:
        watch: called with the logits (B, T, V) of each few blocks before their losses are yielded.
    """
    device = next(model.parameters()).device
    sparing = watch is None and head_loss.projects(model, blocks[:1, :8].to(device))

    def losses(batch: Tensor) -> tuple[list[float], Tensor | None]:
        with torch.inference_mode():
            ids = batch.to(device)
            if sparing:
                return head_loss.nats(model, ids).double().mean(dim=1).tolist(), None
            logits = model(input_ids=ids, use_cache=False).logits
            nats = next_token_loss(logits, ids).double().mean(dim=1).tolist()
            return nats, logits if watch else None

    batches = blocks.split(_at_once(blocks, device, sparing))
    wide = parallel.lanes(device, len(batches))
    wide *= 2 if sparing and wide > 1 else 1  # the lanes wait for each other half as often
    for start in range(0, len(batches), wide):
        with head_loss.withheld(model) if sparing else contextlib.nullcontext():
            results = parallel.run([partial(losses, b) for b in batches[start : start + wide]], device)
        for nats, logits in results:
            if watch and logits is not None:
                with torch.inference_mode():
                    watch(logits)
            yield nats


def _at_once(blocks: Tensor, device: torch.device, sparing: bool) -> int:
    """How many of `blocks` (N, T) go through a model on `device` in a pass; `sparing` where not all logits are held."""
    on_gpu = SPARING_ON_GPU if sparing else TOKENS_ON_GPU
    return max(1, (TOKENS_AT_ONCE if device.type == "cpu" else on_gpu) // blocks.shape[1])


def whole_batches(blocks: Tensor, count: int, device: torch.device) -> int:
    """The number of first blocks to measure so that the first `count` get the same figures as among all of `blocks`
    (N, T), to the bit: `count`, rounded up to whole passes of watched blocks on `device`."""
    wide = _at_once(blocks, device, sparing=False)
    return min(-(-count // wide) * wide, len(blocks))


class Reference:
    """Keeps what the dense model predicts on the first blocks of each domain, to tell how far another model is from it.
    It is kept in a file without a name, since memory is needed for training.

    Args:
        blocks: how many blocks of each domain. For each, log-probabilities (T - 1, V) are kept in float16: that rounds
            a single one by less than 0.01 nats to either side, and their mean over thousands of tokens by much less.
    """

    def __init__(self, blocks: int):
        self.blocks = blocks
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - gone with this object
        self._begins: dict[str, list[int]] = {}  # byte at which each block of a domain begins

    def watch(self, domain: str) -> tuple[Callable[[Tensor], None], list[float]]:
        """A function for `watch` of `block_losses`, and a list. The first function for a domain keeps the predictions
        that it sees; each later one adds the mean KL(dense, model) of each kept block, in nats a token, to its list."""
        first = domain not in self._begins
        begins, divergences = self._begins.setdefault(domain, []), []

        def watch(logits: Tensor) -> None:
            for block in logits:
                rows = block[:-1].split(ROWS)
                if first and len(begins) < self.blocks:
                    begins.append(self._file.seek(0, os.SEEK_END))
                    for part in rows:
                        self._file.write(part.float().log_softmax(-1).half().cpu().numpy().tobytes())
                elif not first and len(divergences) < len(begins):
                    self._file.seek(begins[len(divergences)])
                    divergences.append(
                        sum(divergence(self._read(part), part) * len(part) for part in rows) / len(block[:-1])
                    )

        return watch, divergences

    def _read(self, like: Tensor) -> Tensor:
        """The next log-probabilities (N, V) in the file, as many as there are logits in `like` (N, V)."""
        data = bytearray(self._file.read(2 * like.numel()))
        return torch.frombuffer(data, dtype=torch.float16).view(like.shape).to(like.device).float()


def divergence(p: Tensor, logits: Tensor) -> float:
    """KL(p, softmax(logits)) in nats, in the mean over N tokens, from log-probabilities p (N, V) and logits (N, V)."""
    q = logits.float().log_softmax(-1)
    return max((p.exp() * (p - q)).sum(dim=-1).double().mean().item(), 0.0)


def perplexity(losses: Sequence[float]) -> float:
    """The perplexity: exp of the mean of the blocks' losses (blocks of equal length); infinity where that is beyond a
    float."""
    try:
        return math.exp(statistics.fmean(losses))
    except OverflowError:
        return math.inf


def time_once(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Time one reading of `prompt` (1, T), and the writing of `new_tokens` after it, greedily and with a cache; returns
    the tokens a second of each."""
    began = time.perf_counter()
    tokens = generation.tokens(model, prompt, new_tokens + 1)
    next(tokens)
    _synchronise(prompt)
    first = time.perf_counter()
    for _ in tokens:
        pass
    _synchronise(prompt)
    return prompt.shape[1] / (first - began), new_tokens / (time.perf_counter() - first)


def spread(values: Sequence[float]) -> tuple[float, list[float]]:
    """The median of `values`, and their lowest and highest."""
    return statistics.median(values), [min(values), max(values)]


def matrix_rate(seconds: float = 0.3) -> float:
    """GFLOP/s of float32 matrix products on the CPU: the best of those that are done in `seconds`."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best, until = 0.0, time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < until:
            began = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * 1024**3 / (time.perf_counter() - began) / 1e9)
    return best


def peak_bytes() -> int:
    """The most bytes of memory that this process has held so far: in the machine's memory or on a GPU, whichever is
    more."""
    return max(_resident(), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def _resident() -> int:
    """The most bytes that this process has held in the machine's memory. On Linux they are not those of getrusage,
    which are at least what the process that started this one had held."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parameter_bytes(model: nn.Module) -> tuple[int, int]:
    """How many parameters the model has, each counted once, and the bytes that they take. A packed weight counts as
    many as it stands for, and the bytes that it takes with its scales."""
    sizes = [quantization.size_of(p) for p in model.parameters()]
    return sum(count for count, _ in sizes), sum(size for _, size in sizes)


def _synchronise(tensor: Tensor) -> None:
    """Wait until the GPU is done, if `tensor` is on one."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
