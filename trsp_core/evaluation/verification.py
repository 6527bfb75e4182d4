"""Proves that a checkpoint is the model that the run had in memory.

While the model is in memory, `keep` writes what it computes on a fixed text to a file. Later `checking` lets a fresh
process with stock transformers (`stock_process.py`) load the checkpoint and answer the same question, and compares.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsp_core import formatting, subprocesses
from trsp_core.data.blocks import NEW_TOKENS, PROOF_TEXT, PROOF_TOKENS
from trsp_core.errors import TrspError
from trsp_core.subprocesses import ChildFailed

GPU_ROOM = 1_500_000_000  # bytes of GPU memory that a process takes beside the weights
POLL = 0.2  # seconds between two looks at the fresh process

# How far logits may lie apart by rounding alone, as a share of the largest logit: what another order of sums, or
# another number format, does to numbers of this size. In one format on one machine the difference is 0; with a wrong
# layer it is 0.1 and more. Packed weights count as bfloat16, in which some CPUs multiply them.
ROUNDING = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
TIE = 0.2  # the share of that by which two logits may differ and still come in the other order with a cache


@dataclass(frozen=True)
class Proof:
    """How the checkpoint's model, in a fresh process, compares with the model in memory.

    Attributes:
        dtype, memory_dtype: number format of the checkpoint, and of the model in memory.
        tokens: how many tokens of the fixed text logits are compared on.
        same_ids: whether the checkpoint's tokenizer cuts the text into the same ids.
        largest_difference, largest_logit: of the logits, over all tokens and the whole vocabulary.
        kl: KL(in memory, checkpoint), mean nats a token.
        same_likeliest: at how many of the tokens both hold the same next token for the likeliest.
        new_tokens: how many tokens were written greedily.
        same_text: whether the model in memory had written the same ones.
        cached_equals_uncached: whether the checkpoint's model writes the same tokens with a key-value cache and
            without.
        tie: how much the logits of the two tokens differ where they first part; None where they do not.
    """

    dtype: str
    memory_dtype: str
    tokens: int
    same_ids: bool
    largest_difference: float
    largest_logit: float
    kl: float
    same_likeliest: int
    new_tokens: int
    same_text: bool
    cached_equals_uncached: bool
    tie: float | None

    @property
    def rounding(self) -> float:
        """How far two logits may lie apart by rounding, in the coarser of the two formats."""
        return max(ROUNDING.get(d, ROUNDING["bfloat16"]) for d in (self.dtype, self.memory_dtype)) * self.largest_logit

    @property
    def problems(self) -> list[str]:
        """Why this is no proof; empty where it is one."""
        problems = []
        if not self.same_ids:
            problems.append("its tokenizer cuts the text otherwise")
        if not self.largest_difference <= self.rounding:  # so that not-a-number is a problem too
            problems.append(
                f"its logits differ by {formatting.figure(self.largest_difference)} from those of the model in memory"
            )
        if not self.cached_equals_uncached and not (self.tie is not None and self.tie <= TIE * self.rounding):
            problems.append("it writes another text with a key-value cache than without")
        elif self.dtype == self.memory_dtype == "float32" and not (self.same_text and self.cached_equals_uncached):
            problems.append("it writes another text than the model in memory")
        return problems

    @property
    def sentence(self) -> str:
        """What was compared and how it came out, in sentences."""
        equal = (
            f"differ by at most {formatting.figure(self.largest_difference)} from"
            if self.largest_difference
            else "are bit for bit"
        )
        format_ = "" if self.dtype == self.memory_dtype else f", written as {self.dtype},"
        figures = [f"largest logit {formatting.ratio(self.largest_logit)}"]
        if self.largest_difference:
            figures.append(f"KL {formatting.figure(self.kl)} nats a token")
            figures.append(f"the same likeliest token at {self.same_likeliest} of {self.tokens}")
        ending = "are the same with a key-value cache and without."
        if not self.cached_equals_uncached:
            ending = (
                "part with a key-value cache and without at a tie: the two logits lie "
                f"{formatting.figure(self.tie or 0)} apart."
            )
        return (
            f"A fresh process with stock transformers loaded this checkpoint{format_} and its logits on {self.tokens} "
            f"tokens {equal} those of the model that the run had in memory in {self.memory_dtype} "
            f"({'; '.join(figures)}). {self.new_tokens} tokens written greedily {ending}"
        )


def keep(model: Any, tokenizer: Any, target: Path) -> None:
    """Write what `model`, as it is in memory, computes on the fixed text to the file `target`, whole or not at all.
    Where its context is short, it reads and writes fewer tokens."""
    import torch
    from safetensors.torch import save_file

    from trsp_core.evaluation import generation, stock_process
    from trsp_core.surgery import families

    read, new_tokens = generation.fitted(
        families.context(model.config.get_text_config(decoder=True)), PROOF_TOKENS, NEW_TOKENS
    )
    ids = stock_process.tokens(tokenizer, PROOF_TEXT, read)
    answer = {
        "ids": ids[0],
        "logits": stock_process.logits(model, ids),
        "text": torch.tensor(stock_process.continuation(model, ids, new_tokens, cached=True)),
    }
    facts = {
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": "auto" if len(set(getattr(model, "hf_device_map", {}).values())) > 1 else model.device.type,
        "threads": str(torch.get_num_threads()),
    }
    temporary = target.with_name(f".{target.name}.partial")
    save_file(answer, temporary, facts)
    temporary.replace(target)


def check(folder: Path, reference: Path) -> Proof:
    """As `checking`, but waits until the proof is there."""
    waiting = checking(folder, reference)
    while True:
        try:
            next(waiting)
        except StopIteration as end:
            return end.value


def checking(folder: Path, reference: Path) -> Generator[None, None, Proof]:
    """Let a fresh process load the checkpoint in `folder`, and compare what it computes with what `keep` wrote to
    `reference`. A generator that returns the proof; it yields None while it waits, and closing it ends the process.

    Raises:
        TrspError: `reference` is missing or damaged, or the process cannot load the checkpoint, for example for lack of
            memory or of the device.
    """
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(reference, framework="np") as file:
            facts = file.metadata()
            ids, memory, text = (file.get_tensor(name) for name in ("ids", "logits", "text"))
    except (OSError, SafetensorError) as error:
        raise TrspError(
            "This run kept no record of what its model computed, so nothing could be proved.",
            "Run it again with this version and --save-model true.",
        ) from error
    question = {
        "text": PROOF_TEXT,
        "tokens": len(ids),
        "new_tokens": len(text),
        "device": _device(facts["device"], folder),
    }
    with tempfile.TemporaryDirectory() as scratch:
        answer = yield from _ask(folder, Path(scratch) / "logits", question | {"threads": int(facts["threads"])})
        logits = np.fromfile(Path(scratch) / "logits", dtype=np.float32)
    if logits.size != memory.size or answer["foreign"]:
        raise TrspError(
            f"The fresh process gave {logits.size} logits, {memory.size} were expected.", "Please report this."
        )
    logits = logits.reshape(memory.shape).astype(np.float64)
    p, q = _log_softmax(memory.astype(np.float64)), _log_softmax(logits)
    return Proof(
        dtype=answer["dtype"],
        memory_dtype=facts["dtype"],
        tokens=len(ids),
        same_ids=answer["ids"] == ids.tolist(),
        largest_difference=float(np.abs(logits - memory).max()),
        largest_logit=float(np.abs(memory).max()),
        kl=max(float((np.exp(p) * (p - q)).sum(axis=-1).mean()), 0.0),
        same_likeliest=int((logits.argmax(axis=-1) == memory.argmax(axis=-1)).sum()),
        new_tokens=len(text),
        same_text=answer["cached"] == text.tolist(),
        cached_equals_uncached=answer["cached"] == answer["uncached"],
        tie=answer["tie"],
    )


def _device(recorded: str, folder: Path) -> str:
    """The device on which the fresh process computes: that of the model in memory, or "cpu" where the GPU has no room
    for a second model."""
    if recorded != "cuda":
        return recorded
    import torch

    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    full = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 1.2 * size + GPU_ROOM
    return "cpu" if full else recorded


def _ask(folder: Path, target: Path, question: dict[str, Any]) -> Generator[None, None, dict[str, Any]]:
    """The answer of a fresh process that has no code of ours, asks no hub, and ends when this process does. Yields
    while it waits."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("stock_process.py")), str(folder), str(target)]
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_TOKEN", "PYTHON"))}
    bounds = {"variables": variables | {"HF_HUB_OFFLINE": "1"}, "folder": folder}
    answer: dict[str, Any] = {}
    try:
        with contextlib.closing(subprocesses.answers(command, question, pause=POLL, **bounds)) as answers:
            for line in answers:
                answer = line or answer
                yield
    except ChildFailed as failure:
        raise _not_loaded(failure) from failure
    return answer


def _not_loaded(failure: ChildFailed) -> TrspError:
    if failure.code == -signal.SIGKILL or failure.short_of_memory:
        return TrspError(
            "A fresh process that was to load the model ran out of memory.", "Free some memory, then try again."
        )
    reason = failure.reason.splitlines()[-1][:300]
    return TrspError(f"A fresh process could not load the model: {reason}.", "Please report this.")


def _log_softmax(logits: Any) -> Any:
    """Log-probabilities (N, V) from logits (N, V), arrays of numpy."""
    import numpy as np

    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
