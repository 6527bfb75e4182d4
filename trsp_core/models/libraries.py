"""Contexts for calls of the libraries that read a model's files: their progress bars are hidden, and their errors
become refusals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trsp_core.errors import TrspError, is_short_memory

ARCHITECTURE = "Choose a model whose architecture this version of transformers knows."
CONFIG = "Put its config.json right, or choose a model that this version of transformers knows."
TOKENIZER = "Save its tokenizer again with this version of transformers, or choose another model."


@contextlib.contextmanager
def refused_as(name: str, remedy: str = ARCHITECTURE) -> Iterator[None]:
    """Inside, turn any error into a TrspError, but for lack of memory. Only for calls of libraries: for a model that
    they do not know, or that is damaged, they raise any of Python's errors, and so would a bug of ours.

    Args:
        name: what is being read, the subject of the message.
    """
    try:
        yield
    except Exception as error:
        if is_short_memory(error):
            raise
        if isinstance(error, ImportError):
            remedy = "Install what is named there, or choose another model."
        raise TrspError(f"{name} could not be loaded: {type(error).__name__}: {str(error)[:300]}", remedy) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, the libraries write no progress bars to stderr."""
    from transformers.utils import logging

    were = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder. A stranger's has to pass `tokenizer_check.check` before it is opened here.

    Raises:
        TrspError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    with quiet(), refused_as(f"The tokenizer in {folder}", TOKENIZER):
        return AutoTokenizer.from_pretrained(  # nosec B615 - a folder of this machine
            folder, trust_remote_code=False, local_files_only=True
        )
