"""What a model is worth: perplexity with its protocol, speed with its spread, and what this machine could do at
most."""

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

ROWS = 64  # of logits compared at once
TOKENS_AT_ONCE = 256  # of a measuring pass: wide enough for the matrix units; the logits of a large V stay small
TOKENS_ON_GPU = 2048  # the same: Python asks for fewer passes
SPARING_ON_GPU = 8192  # and where not all logits are held


def block_losses(
    model: nn.Module, blocks: Tensor, watch: Callable[[Tensor], None] | None = None
) -> Iterator[list[float]]:
    """Mean nats per predicted token of each block of `blocks` (N, T), a few blocks at a time, in order.

    Every block is its own context: T - 1 tokens are predicted in each.

    Args:
        watch: gets the logits (B, T, V) of each few blocks.
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
    """How many of `blocks` (N, T) go through a model on `device` together."""
    on_gpu = SPARING_ON_GPU if sparing else TOKENS_ON_GPU
    return max(1, (TOKENS_AT_ONCE if device.type == "cpu" else on_gpu) // blocks.shape[1])


def whole_batches(blocks: Tensor, count: int, device: torch.device) -> int:
    """The least number of first blocks that hold `count`, and that pass through a model on `device` as they would among
    all of `blocks` (N, T), where they are watched."""
    wide = _at_once(blocks, device, sparing=False)
    return min(-(-count // wide) * wide, len(blocks))


class Reference:
    """What the dense model predicts on the first blocks of each domain, kept to tell how far another model is from
    it. Kept in a file without a name, not in memory, since training needs that.

    Args:
        blocks: how many of each domain; each keeps (T - 1, V) log-probabilities in float16, which rounds single ones
            by less than 0.01 nats to either side, and their mean over thousands of tokens by much less.
    """

    def __init__(self, blocks: int):
        self.blocks = blocks
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - gone with this object
        self._begins: dict[str, list[int]] = {}  # byte at which each block of a domain begins

    def watch(self, domain: str) -> tuple[Callable[[Tensor], None], list[float]]:
        """For `block_losses`: the first time in a domain it keeps what it sees; from then on it fills the list with
        mean KL(dense, model) in nats a token, of each block."""
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
        """The next rows of the file, log-probabilities (N, V) for logits `like` (N, V)."""
        data = bytearray(self._file.read(2 * like.numel()))
        return torch.frombuffer(data, dtype=torch.float16).view(like.shape).to(like.device).float()


def divergence(p: Tensor, logits: Tensor) -> float:
    """Mean over N tokens of KL(p, softmax(logits)), in nats, from log-probabilities p (N, V) and logits (N, V)."""
    q = logits.float().log_softmax(-1)
    return max((p.exp() * (p - q)).sum(dim=-1).double().mean().item(), 0.0)


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean of per-block losses (blocks of equal length); infinity where it is beyond a float."""
    try:
        return math.exp(statistics.fmean(losses))
    except OverflowError:
        return math.inf


def time_once(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Tokens per second of one prefill of `prompt` (1, T), and of decoding `new_tokens` after it, greedily, cached."""
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
    """Median, and [lowest, highest]."""
    return statistics.median(values), [min(values), max(values)]


def matrix_rate(seconds: float = 0.3) -> float:
    """GFLOP/s of float32 matrix products on the CPU, best of a short measurement."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best, until = 0.0, time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < until:
            began = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * 1024**3 / (time.perf_counter() - began) / 1e9)
    return best


def peak_bytes() -> int:
    """The most memory that this process has held: resident bytes, or on a GPU its allocated bytes where they are
    more."""
    return max(_resident(), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def _resident() -> int:
    """Where Linux tells: what getrusage has there is no less than the process that started this one had held."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parameter_bytes(model: nn.Module) -> tuple[int, int]:
    """Number of parameters, each counted once, and the bytes they take; of packed ones what they stand for, and what
    they take with their scales."""
    sizes = [quantization.size_of(p) for p in model.parameters()]
    return sum(count for count, _ in sizes), sum(size for _, size in sizes)


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
