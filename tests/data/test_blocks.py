"""Texts, their split by article, and token blocks."""

import itertools
import json
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from trsp_core.data import blocks as data
from trsp_core.data import corpora
from trsp_core.data.corpora import Corpus
from trsp_core.errors import TrspError
from trsp_core.pruning.validate import from_values
from trsp_core.schema.config import RunConfig

SMALL = {"block_length": 16, "measure_length": 24, "measure_blocks": 4, "calibration_blocks": 10, "probe_blocks": 2}


def settings(**changes) -> RunConfig:
    return from_values({**SMALL, **changes})


def articles(count: int, words: int = 60, mark: str = "a") -> list[str]:
    """Articles whose words tell which article they are of."""
    return [" ".join(f"{mark}{n}w{i}" for i in range(words)) for n in range(count)]


@pytest.fixture
def file(tmp_path):
    def write(content: str | bytes, name: str = "mine.txt") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


class Words:
    """A tokenizer of whole words, each with an id of its own; `bos` as Gemma's and OPT's do it."""

    def __init__(self, bos: bool = False):
        self.ids: dict[str, int] = {}
        self.bos = [7] if bos else []

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False, verbose=True):
        found = [self.ids.setdefault(word, 1000 + len(self.ids)) for word in text.split()]
        return type("Encoding", (), {"input_ids": (self.bos if add_special_tokens else []) + found})

    def articles_in(self, blocks) -> set[str]:
        names = {v: k for k, v in self.ids.items()}
        return {names[i].partition("w")[0] for i in blocks.flatten().tolist() if i in names}


def test_no_article_is_both_trained_on_and_measured(file):
    path, tokenizer = file("\n\n".join(articles(40))), Words()
    made = data.prepare(settings(text=path, heldout=path), tokenizer)
    sides = [tokenizer.articles_in(made.calibration), *(tokenizer.articles_in(b) for b in made.measure.values())]
    assert all(sides)
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert "same text" in made.notes[0]


@given(
    count=st.integers(8, 60), words=st.integers(1, 80), seed=st.integers(0, 5), measure=st.integers(1, 30),
    calibrate=st.integers(1, 60), same=st.booleans(),
)  # fmt: skip
def test_a_split_is_disjoint_whatever_is_asked_for(count, words, seed, measure, calibrate, same):
    config = RunConfig(
        block_length=8, measure_length=12, measure_blocks=measure, calibration_blocks=calibrate, seed=seed
    )
    one = Corpus(tuple(articles(count, words)))
    other = one if same else Corpus(tuple(articles(count, words, "b")))
    tokenizer = Words()
    try:
        sides = data.cut(config, {"calibration": one, "heldout": other}, lambda t: tokenizer(t).input_ids, [])
    except TrspError:  # too short
        assert count * words < 2 * (12 + 12 + 8 + 3 * words)
        return
    seen: set[int] = set()
    for side in sides:
        ids = {i for block in side.blocks for i in block}
        assert not ids & seen
        assert all(len(block) == side.length for block in side.blocks)
        assert 1 <= len(side.blocks) <= (measure if side.role == "measure" else calibrate)
        seen |= ids


def test_what_is_trained_on_does_not_depend_on_how_much_is_measured(file):
    path, tokenizer, calibrations = file("\n\n".join(articles(40))), Words(), []
    for measure_blocks in (2, 4, 12, 100):
        config = settings(text=path, measure_blocks=measure_blocks)
        calibrations.append(data.prepare(config, tokenizer).calibration.tolist())
    assert all(blocks == calibrations[0] for blocks in calibrations)


def test_blocks_are_what_the_events_say_of_them(file):
    path = file(tiny.text(600))
    made = data.prepare(settings(text=path, heldout="news"), tiny.tokenizer())
    assert tuple(made.calibration.shape) == (10, 16)
    assert {d: tuple(b.shape) for d, b in made.measure.items()} == {"calibration": (4, 24), "heldout": (4, 24)}
    assert [(e.domain, e.role) for e in made.events] == [
        ("calibration", "measure"), ("heldout", "measure"), ("calibration", "calibration"),
    ]  # fmt: skip
    last = made.events[-1]
    assert (last.blocks, last.block_length, last.tokens) == (10, 16, 160)
    assert last.fingerprint == data.fingerprint(made.calibration.tolist())
    assert made.names == {"calibration": "mine.txt", "heldout": "news"}


def test_equal_seeds_cut_equal_blocks_and_others_do_not(file):
    path = file(tiny.text(600))
    prints = [
        [e.fingerprint for e in data.prepare(settings(text=path, heldout=path, seed=seed), tiny.tokenizer()).events]
        for seed in (0, 0, 1)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_measuring_spreads_over_articles(file):
    path, tokenizer = file("\n\n".join(articles(40, words=400))), Words()
    made = data.prepare(settings(text=path, heldout="news", measure_blocks=8), tokenizer)
    assert len(tokenizer.articles_in(made.measure["calibration"])) >= 8


def test_a_tokenizer_that_begins_texts_with_bos_begins_blocks_with_it(file):
    path = file("\n\n".join(articles(40)))
    made = data.prepare(settings(text=path, heldout=path), Words(bos=True))
    for blocks in (made.calibration, *made.measure.values()):
        assert (blocks[:, 0] == 7).all()
        assert (blocks[:, 1:] != 7).all()
    plain = data.prepare(settings(text=path, heldout=path), Words())
    assert (plain.calibration != 7).all()


def test_fewer_blocks_than_asked_are_told(file):
    path = file("\n\n".join(articles(20)))
    made = data.prepare(settings(text=path, heldout="news", calibration_blocks=5000), Words())
    assert 0 < len(made.calibration) < 5000
    assert any(f"{len(made.calibration)} of 5000 blocks" in note for note in made.notes)


def test_a_text_without_divisions_is_cut_and_the_reader_told(file):
    path = file(" ".join(articles(1, words=4000)))
    made = data.prepare(settings(text=path, heldout="news"), Words())
    assert len(made.calibration) == 10
    assert any("cut into pieces" in note for note in made.notes)


@given(st.text(alphabet="ab \n\t\u00e9", min_size=1, max_size=400))
def test_pieces_lose_nothing(content):
    assert "".join(corpora.pieces(content)) == content


def test_wikitext_headings_divide_a_file_into_articles(file):
    one = "\n".join(f" = Title {n} = \n\n Words of it . \n\n = = Part = = \n\n More {n} . \n" for n in range(9))
    found = corpora.read(file(one)).articles
    assert len(found) == 9
    assert all("Part" in article for article in found)


def test_json_lines_hold_one_article_each_and_repeats_count_once(file):
    lines = [json.dumps({"text": f"story {n % 10}"}) for n in range(20)]
    assert len(corpora.read(file("\n".join(lines) + "\n\n", "a.jsonl")).articles) == 10


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"", "a.txt", "empty"),
        (b" \n\n \t", "a.txt", "empty"),
        (b"caf\xe9 au lait", "a.txt", "not UTF-8: byte 3"),
        (b"\xff\xfea\x00b", "a.txt", "not UTF-8: it begins as UTF-16"),
        (b"text", "a.pdf", "'.pdf'"),
        (b'{"text": "a"}\n{"txt": "b"}', "a.jsonl", "line 2"),
        (b'{"text": "a"}\n{"text": 3}', "a.jsonl", "line 2"),
        (b'{"text": "a"}\n["text"]', "a.jsonl", "line 2"),
        (b'{"text": "a"}\nnot json', "a.jsonl", "line 2: no JSON"),
        (b"[" * 100_000, "a.jsonl", "line 1"),
        (b'{"text": "  "}', "a.jsonl", "holds no text"),
        (b"far too short", "a.txt", "too short"),
    ],
)
def test_a_bad_file_is_refused_before_any_model(file, content, name, said):
    path = file(content, name)
    with pytest.raises(TrspError) as caught:
        data.check(settings(text=path))
    assert said in caught.value.message
    assert caught.value.remedy


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (str(tmp_path), "/dev/zero", str(tmp_path / "pipe.txt")):
        with pytest.raises(TrspError, match="no file"):
            data.check(settings(text=path))
    with pytest.raises(TrspError, match="Did you mean wikipedia"):
        data.check(settings(text="wikpedia"))
    with pytest.raises(TrspError, match="no text"):
        data.check(settings(text="a" * 3000))


def test_a_file_too_large_is_refused_unread(file, monkeypatch):
    monkeypatch.setattr(corpora, "MAX_FILE", 10)
    with pytest.raises(TrspError, match="at most"):
        data.check(settings(text=file("more than ten characters")))


def test_a_text_of_less_than_a_block_names_both_numbers(file, tiny_model):
    path = file("\n\n".join(f"Short story number {n}." for n in range(30)))
    config = settings(text=path, heldout="news", block_length=500, measure_length=300)
    with pytest.raises(TrspError, match=r"too short: [\d,]+ (tokens|bytes).* one block needs (500|300|800)"):
        data.check(config, tiny_model / "tokenizer.json")
    with pytest.raises(TrspError, match="too short"):
        data.prepare(config, tiny.tokenizer())


def test_batches_pass_over_all_blocks_before_any_comes_again():
    batches = first(20, data.order(10, 3, seed=1))
    assert len(batches) == 20
    assert all(len(batch) == 3 for batch in batches)
    stream = [i for batch in batches for i in batch]
    for start in range(0, 60, 10):
        assert sorted(stream[start : start + 10]) == list(range(10))
    assert batches == first(20, data.order(10, 3, seed=1)) != first(20, data.order(10, 3, seed=2))
    assert first(2, data.order(1, 4, seed=0)) == [[0] * 4] * 2


def first(count, batches):
    return list(itertools.islice(batches, count))


def test_wikipedia_reads_as_plain_prose_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_HOME", str(tmp_path))
    found = corpora.read("wikipedia").articles
    assert len(found) > 80
    assert all(len(article) >= corpora.MIN_ARTICLE for article in found)
    for mark in ("''", "==", "[[", "{{", "{|", "()", "( ", " ,", "#REDIRECT", "File:"):
        assert sum(article.count(mark) for article in found) <= 20, mark
    monkeypatch.setattr("gensim.corpora.wikicorpus.extract_pages", None)
    assert corpora.read("wikipedia").articles == found


def test_markup_is_cleaned_line_by_line():
    left = (
        "\n\n'''Paris''' (; ) is the ''capital'' of France ( , French) and its largest city by far.\n\n==History==\n"
        "File:a.jpg|A caption that is long enough to be taken for prose by its length\n* short\n: 1\n"
        "*An entry of a list that is long enough to be a sentence of its own, and says something to the reader.\n"
        "== See also ==\nA line below a heading that ends the article, which is long enough for prose.\n"
    )
    assert corpora.clean(left).split("\n\n") == [
        "Paris is the capital of France (French) and its largest city by far.",
        "An entry of a list that is long enough to be a sentence of its own, and says something to the reader.",
    ]


def test_hub_texts_measure_on_their_own_test_part(monkeypatch):
    asked = []

    class Rows(list):
        def take(self, n):
            return self[:n]

    def load_dataset(repository, subset, split, **how):
        asked.append((repository, subset, split, how))
        if "wikitext" in repository:
            return Rows({"text": f" = {split} {n // 3} = \n" if n % 3 == 0 else f"{split} {n} .\n"} for n in range(60))
        return Rows({"text": f"{split} {n}"} for n in range(9000))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    wikitext, c4 = corpora.read("wikitext2"), corpora.read("c4")
    assert len(wikitext.articles) == len(wikitext.reserved) == 20
    assert (len(c4.articles), len(c4.reserved)) == (3000, 500)
    assert all(how.get("streaming") for name, *_, how in asked if "c4" in name)
    both = Corpus(tuple(articles(30)), tuple(articles(30, mark="r")))
    words = Words()
    sides = data.cut(settings(), {"calibration": both, "heldout": both}, lambda t: words(t).input_ids, [])
    names = {v: k[0] for k, v in words.ids.items()}
    assert [{names[i] for b in s.blocks for i in b} for s in sides] == [{"r"}, {"r"}, {"a"}]


def test_a_hub_out_of_reach_says_what_works_without(monkeypatch):
    def load_dataset(*args, **how):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(TrspError, match="ConnectionError") as caught:
        corpora.read("wikitext2")
    assert "wikipedia" in caught.value.remedy


def test_the_order_of_articles_does_not_depend_on_python(file):
    assert data.shuffled(list("abcdef"), 3) == random.Random(3).sample(list("abcdef"), 6)
