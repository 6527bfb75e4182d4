"""Input that is too much: lines of 100 MB, words without end, archives that unfold to gigabytes."""

import json
import time
import tracemalloc
import zipfile

import pytest

from pages.ui.app_state import uploads
from tests import story
from trsp_core.data import corpora
from trsp_core.errors import TrspError
from trsp_core.evaluation import questions
from trsp_core.export import checkpoint
from trsp_core.runs import store
from trsp_core.runs.store import Store

LONG = 100_000_000  # bytes


@pytest.fixture
def long_file(tmp_path):
    """A .jsonl of one line of 100 MB."""
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * LONG + b'"}\n')
    return path


@pytest.mark.parametrize("read", [lambda p: corpora.read(str(p)), lambda p: questions.read(str(p), "news", 5)])
def test_a_file_with_a_line_of_100_mb_is_refused_unread(long_file, read):
    tracemalloc.start()
    try:
        with pytest.raises(TrspError, match="MB"):
            read(long_file)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_visitor_cannot_bring_one(long_file, tmp_path):
    with pytest.raises(TrspError, match="MB"):
        uploads.keep(long_file.read_bytes(), long_file.name, tmp_path / "runs")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.jsonl"))


def test_a_text_that_is_one_word_is_cut_into_pieces_that_a_tokenizer_can_take(tmp_path):
    path = tmp_path / "word.txt"
    path.write_bytes(b"a" * 3_000_000 + bytes(str(list(range(400_000))).replace(" ", ""), "ascii"))
    corpus = corpora.read(str(path))
    assert max(map(len, corpus.articles)) <= corpora.PIECE + corpora.LONGEST_WORD
    assert sum(map(len, corpora.pieces(path.read_text()))) == path.stat().st_size, "nothing is lost where it is cut"


def test_an_event_of_100_mb_is_left_out_and_the_others_are_read(tmp_path):
    run = story.write(Store(tmp_path), "finished")
    before = run.state()
    with run.events_file.open("rb") as file:
        lines = file.readlines()
    junk = b'{"n": 1, "text": "' + b"a" * LONG + b'"}\n'
    run.events_file.write_bytes(b"".join([*lines[:3], junk, *lines[3:]]))
    began = time.process_time()
    assert run.state() == before
    assert time.process_time() - began < 20, "it was not parsed"
    assert max(map(len, lines)) < store.MAX_LINE / 10


def test_no_archive_unfolds_to_gigabytes(tmp_path):
    run = story.write(Store(tmp_path), "finished")
    run.exports_folder.mkdir()
    bomb = zipfile.ZipFile(run.exports_folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9)
    with bomb, bomb.open("bomb/proof.json", "w", force_zip64=True) as proof:
        proof.write(b'{"told": "')
        for _ in range(200):
            proof.write(b"A" * 1_000_000)
        proof.write(b'"}')
    with zipfile.ZipFile(run.exports_folder / "sound.zip", "w") as packed:
        packed.writestr("sound/proof.json", json.dumps({"told": "It answers alike."}))
    for name in ("torn", "empty"):
        content = (run.exports_folder / "sound.zip").read_bytes()
        (run.exports_folder / f"{name}.zip").write_bytes(content[:-9] if name == "torn" else b"")
    tracemalloc.start()
    try:
        assert [a.told for a in checkpoint.archives(run)] == ["It answers alike."]
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
