"""Fixtures that more than one test file needs."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a tiny random Llama with its tokenizer."""
    from tests import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "tiny-llama")
