"""What is asked of the system for memory: nothing changes but the memory held, and where it cannot be done, nothing."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from trsp_core import malloc
from trsp_core.surgery import quantization

MEGABYTES = 24
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what is mapped")


@pytest.fixture
def mapped(tmp_path):
    """Numbers in a file, and as they lie in it."""
    file, numbers = tmp_path / "model.safetensors", torch.randn(MEGABYTES, 2**18)
    save_file({"numbers": numbers}, file)
    with safe_open(file, "pt") as opened:
        return file, numbers, opened.get_tensor("numbers")


def held() -> float:
    """Megabytes of files that this process has in memory."""
    told = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in told if line.startswith("RssFile")) / 1024


@linux
def test_a_file_that_was_read_is_let_go_of_and_read_again(mapped):
    _, numbers, there = mapped
    assert torch.equal(there, numbers)
    full = held()
    malloc.let_go_of_files(".safetensors")
    assert full - held() > 0.9 * MEGABYTES
    assert torch.equal(there, numbers)


@linux
def test_other_files_are_left_alone(mapped):
    assert torch.equal(mapped[2], mapped[1])
    full = held()
    malloc.let_go_of_files(".gguf")
    assert full - held() < 1


@linux
def test_a_model_is_no_longer_tied_to_its_file_and_holds_it_no_second_time(mapped, monkeypatch):
    file, numbers, there = mapped
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    for module, half in zip(model, there.chunk(2), strict=True):
        module.weight = nn.Parameter(half)
    monkeypatch.setattr(quantization, "AT_ONCE", 2**20)
    assert there.sum().isfinite()
    full = held()
    quantization.settle(model)
    assert full - held() > 0.9 * MEGABYTES
    with file.open("r+b") as stream:  # somebody writes to it
        stream.seek(2**20)
        stream.write(bytes(2**20))
    assert torch.equal(torch.cat([module.weight for module in model]), numbers)


def test_where_the_library_cannot_nothing_happens(monkeypatch):
    def missing(_):
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    for ask in (malloc.hold_steady, malloc.share_heaps, malloc.give_back):
        ask()
    malloc.let_go_of_files(".safetensors")
