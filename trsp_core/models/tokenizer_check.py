"""Checks that a model's tokenizer opens, and cuts a text, within bounds of time and memory.

A tokenizer is in effect a program by whoever made the model (replacements, regular expressions), and Python cannot
interrupt the library that runs it. So a child process with bounds runs it first, `python -m
trsp_core.models.tokenizer_check`; a tokenizer is opened elsewhere only if it has passed there. Loads no torch, except
in that child for tokenizers that transformers has to read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trsp_core import formatting, subprocesses
from trsp_core.errors import TrspError
from trsp_core.models import libraries
from trsp_core.models.inspection import MAX_JSON, Facts
from trsp_core.subprocesses import ChildFailed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_BYTES = 2_000_000_000  # of memory that the child may take; the largest tokenizers take some 0.5 GB
CPU_SECONDS = 20  # of processor time that it may take
SECONDS = 120.0  # that it may take in all: on a busy machine it gets a part of a processor
AT_ONCE = 2  # children that run at once for this process; whoever comes later waits
SAMPLE = (
    "In 1807 the lighthouse was rebuilt in stone, aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!  "
    "AAAAAAAA 00000000 ........ \t\n\n(x+y)*z == {'a': [1, 2]}; naïve déjà-vu, 東京, Москва, 😀."
)
REMEDY = "Choose another model, or save its tokenizer again from where it works."

_slots = threading.BoundedSemaphore(AT_ONCE)


def check(facts: Facts) -> None:
    """Run a model's tokenizer on a sample of text in a bounded child process. Once it has passed, it is run again only
    if its files change.

    Raises:
        TrspError: the tokenizer cannot be opened, fails, or goes beyond a bound.
    """
    ask("trsp_core.models.tokenizer_check", facts, {})


def ask(module: str, facts: Facts, question: dict[str, Any], files: Iterable[str] = ()) -> None:
    """Let a bounded child process, `python -m MODULE`, check something about a model and its tokenizer. What has passed
    is checked again only if a file changes.

    Args:
        module: the name of a module that calls `answering` when it is run.
        question: what the child gets beside the model's name, folder and rows of the embedding; values are JSON.
        files: paths of files on which the answer depends, beside those of the model.

    Raises:
        TrspError: the child refused, or went beyond a bound.
    """
    own = [str(file) for file in sorted(facts.folder.iterdir()) if file.suffix != ".safetensors"]
    whole = {"name": facts.name, "folder": str(facts.folder), "rows": facts.vocabulary, **question}
    _passed(module, json.dumps(whole), tuple(_identity(file) for file in [*own, *files]))


def answering(answer: Callable[[dict[str, Any]], None]) -> int:
    """The child's side of `ask`: call `answer` with the question, and return the exit code.

    Args:
        answer: returns nothing where all is well; raises a TrspError to refuse.
    """

    def work(**question: Any) -> Iterator[dict[str, Any]]:
        with panics_refused(question["name"]):
            answer(question)
        yield {}

    return subprocesses.serve(work)


def refuse(ids: Iterable[int], rows: int, what: str) -> None:
    """Raise TrspError if one of the token `ids` has no row in an embedding with `rows` rows.

    Args:
        what: whose ids they are, the subject of the message: "The prompt".
    """
    highest = max(ids, default=-1)
    if highest >= rows:
        raise TrspError(
            f"{what} holds token id {formatting.count(highest)}, and the model's embedding has "
            f"{formatting.count(rows)} rows, for ids below that: "
            "tokens were added to the tokenizer, and the model was not resized.",
            "Resize it (model.resize_token_embeddings(len(tokenizer))) and save both, or leave these tokens out.",
        )


def highest(tokenizer: Any) -> int:
    """The highest id that a tokenizer of transformers can give."""
    return max(tokenizer.get_vocab().values(), default=-1)


@contextlib.contextmanager
def panics_refused(name: str) -> Iterator[None]:
    """Inside, turn a panic of the library tokenizers into a TrspError. It is written in Rust, and its panics are no
    `Exception`.

    Args:
        name: of the model.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _failed(name, f"it breaks down: {_line(error)}") from error


def _identity(path: str) -> tuple[str, int, int, int] | None:
    """What changes when a file changes: path, bytes, time and inode; None where there is no such file."""
    try:
        status = Path(path).expanduser().stat()
    except (OSError, ValueError, RuntimeError):
        return None
    return path, status.st_size, status.st_mtime_ns, status.st_ino


@functools.lru_cache(maxsize=64)  # an exception is not kept: a machine may be less busy the next time
def _passed(module: str, question: str, identity: tuple) -> None:
    """Let a child answer `question`, in JSON; raises TrspError as in `ask`. `identity` is of the files that it reads,
    so that only the same question about the same files is not asked again."""
    alone = {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    variables = subprocesses.environment() | alone | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    bounds = {"most_bytes": MOST_BYTES, "cpu_seconds": CPU_SECONDS, "variables": variables}
    values = json.loads(question)
    try:
        with _slots:
            deque(subprocesses.answers(subprocesses.module(module), values, SECONDS, **bounds), maxlen=0)
    except ChildFailed as failure:
        raise _judged(values["name"], failure) from failure


def _judged(name: str, failure: ChildFailed) -> Exception:
    """The error that the bad end of a child means: a TrspError where the tokenizer is at fault, else a RuntimeError."""
    if failure.late:
        return _failed(name, f"it takes more than {formatting.duration(SECONDS)} to cut a text")
    if failure.code == -signal.SIGXCPU:
        return _failed(name, f"it computes for more than {CPU_SECONDS} s to cut a text")
    if failure.short_of_memory:
        return _failed(name, f"it takes more than {formatting.size(MOST_BYTES)} of memory to cut a text")
    if failure.code < 0:
        return _failed(name, f"a process that cuts a text with it ends by {signal.Signals(-failure.code).name}")
    return RuntimeError(f"The check of a tokenizer failed: {failure.ending}\n{failure.stderr[-4000:]}")


def _failed(name: str, why: str) -> TrspError:
    """The TrspError for the tokenizer of the model `name`."""
    return TrspError(f"The tokenizer of {name} cannot be used: {why}.", REMEDY)


def _line(error: BaseException) -> str:
    """The message of `error` in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def tokens_of(name: str, folder: Path) -> dict[str, int]:
    """Open the tokenizer in `folder` and cut the sample with it; returns the ids of all its tokens, by token. To be
    called in a bounded child.

    Raises:
        TrspError: it cannot be opened, or fails.
    """
    file = folder / "tokenizer.json"
    return _fast(name, file) if file.is_file() else _slow(folder)


def _fast(name: str, file: Path) -> dict[str, int]:
    """As `tokens_of`, for a tokenizer.json, which the library tokenizers reads alone."""
    from tokenizers import Tokenizer

    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(file))
        tokenizer.encode(SAMPLE)
    except MemoryError:
        raise
    except Exception as error:  # it raises no other type
        raise _failed(name, _line(error)) from error
    return tokenizer.get_vocab(with_added_tokens=True)


def _slow(folder: Path) -> dict[str, int]:
    """As `tokens_of`, for the older forms, which transformers has to read."""
    tokenizer = libraries.load_tokenizer(folder)
    tokenizer(SAMPLE)
    return tokenizer.get_vocab()


def added(folder: Path, known: dict[str, int]) -> list[int]:
    """The ids of the tokens that the files beside tokenizer.json add to the tokens `known` from it."""
    config = _document(folder / "special_tokens_map.json") | _document(folder / "tokenizer_config.json")
    ids = [int(key) for key in _parts(config.get("added_tokens_decoder"), keys=True) if key.isdecimal()]
    ids += [i for i in _document(folder / "added_tokens.json").values() if isinstance(i, int)]
    special = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        special += _parts(config.get(key))
    tokens = {token.get("content") if isinstance(token, dict) else token for token in special}
    new = [token for token in tokens if isinstance(token, str) and token not in known]
    return [*ids, *range(len(known), len(known) + len(new))]  # new tokens get the ids that come next


def _parts(value: Any, keys: bool = False) -> list[Any]:
    """The entries of a list, or the values of an object (its keys, if `keys`, and then nothing of a list); [] of
    anything else."""
    if isinstance(value, dict):
        return list(value if keys else value.values())
    return value if isinstance(value, list) and not keys else []


def _document(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none or it cannot be read, which loading will report."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if file.stat().st_size <= MAX_JSON:
            document = json.loads(file.read_text("utf-8"))
            return document if isinstance(document, dict) else {}
    return {}


def _answer(question: dict[str, Any]) -> None:
    """What the child of `check` does; raises TrspError as that says."""
    tokens_of(question["name"], Path(question["folder"]))


if __name__ == "__main__":
    sys.exit(answering(_answer))
