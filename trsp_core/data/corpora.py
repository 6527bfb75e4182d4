"""Reads texts: each source becomes a `Corpus` of articles. Knows no tokenizer and no model.

gensim and datasets are imported inside the functions that need them.
"""

from __future__ import annotations

import bz2
import difflib
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trsp_core import paths
from trsp_core.data import encodings
from trsp_core.errors import TrspError
from trsp_core.files import write_atomic
from trsp_core.schema.config import TEXTS

FROM_HUB = ("wikitext2", "c4")  # the others come with the installed packages
MAX_FILE = 50_000_000  # bytes of a person's own text
MIN_ARTICLE = 1_000  # characters of a Wikipedia article, cleaned
FEW = 8  # articles; a text with fewer is cut into pieces, so that it can be split into what is trained and measured
PIECE = 4_000  # characters of a piece of a text without any division
LONGEST_WORD = 1_000  # characters; a longer stretch without white space is cut

_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = "lee_background.cor"
_CLEANED = "wikipedia-1.json"  # the number goes up when cleaning changes
_END_SECTIONS = re.compile(
    r"(see also|references|notes|footnotes|external links|further reading|bibliography|sources|citations|works cited)"
)


@dataclass(frozen=True)
class Corpus:
    """The articles of one text, each of them once.

    Attributes:
        articles: for calibration; where nothing is reserved, some of them for measuring.
        reserved: the text's own test part, for measuring only; () where it has none.
        note: a sentence that a reader of the run should see, or "".
    """

    articles: tuple[str, ...]
    reserved: tuple[str, ...] = ()
    note: str = ""


def is_named(text: str) -> bool:
    """Whether `text` is the name of a text in `config.TEXTS`; otherwise it is taken for a path."""
    return text in TEXTS


def read(text: str) -> Corpus:
    """The articles of `text`: a name in `config.TEXTS`, or the path of a .txt or .jsonl file.

    Raises:
        TrspError: it cannot be fetched, or is a file that `own` refuses.
    """
    if text == "wikipedia":
        return Corpus(_wikipedia())
    if text == "news":
        from gensim.test.utils import datapath

        return Corpus(_once(Path(datapath(_NEWS)).read_text("utf-8").splitlines()))
    if text == "wikitext2":
        return _wikitext2()
    if text == "c4":
        return _c4()
    return own(text)


@functools.cache
def fingerprint(text: str) -> str:
    """16 hex digits that tell whether two installations read the same articles for "wikipedia" or "news": of the file
    that they come from, and of how it is cleaned. "" for other texts, and where the file is missing. Loads nothing."""
    name = {"wikipedia": _WIKIPEDIA, "news": _NEWS}.get(text)
    package = importlib.util.find_spec("gensim")
    if name is None or package is None or not package.submodule_search_locations:
        return ""
    try:
        content = (Path(package.submodule_search_locations[0]) / "test" / "test_data" / name).read_bytes()
    except OSError:
        return ""
    cleaning = _CLEANED if text == "wikipedia" else ""
    return hashlib.sha256(cleaning.encode() + content).hexdigest()[:16]


def own(text: str) -> Corpus:
    """The articles of a person's own file, `text` being its path.

    Raises:
        TrspError: there is no such file, it is too large, empty, neither .txt nor .jsonl, in an encoding that is not
            sure, or has a line of JSON that is no object with a text.
    """
    near = difflib.get_close_matches(text, TEXTS, n=1, cutoff=0.5)
    suggestion = f"Did you mean {near[0]}? " if near else ""
    remedy = f"{suggestion}Take {', '.join(TEXTS)}, or the path of a .txt or .jsonl file."
    path = paths.file(text, "text", remedy, MAX_FILE)
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise TrspError(f"{path.name} ends in {path.suffix or 'nothing'!r}.", "Save the text as .txt or .jsonl.")
    content, note = encodings.decode(paths.content(path, MAX_FILE), path.name)
    if not content.strip():
        raise TrspError(f"{path.name} is empty.", "Give a text with some pages of prose.")
    corpus = parse(content, path)
    return replace(corpus, note=" ".join(filter(None, (note, corpus.note))))


def parse(content: str, path: Path) -> Corpus:
    """The articles in the `content` of the file `path`.

    A .jsonl file has an object on each line, of which "text", "content" or the chat "messages" are an article. Any
    other is divided at headings `= Title =` where it has several, else at blank lines. Where fewer than `FEW` articles
    come of that, they are cut into pieces.

    Raises:
        TrspError: a line is no object with a text, or all texts are empty.
    """
    if path.suffix.lower() == ".jsonl":
        articles = _once(_json_lines(content, path.name))
        if not articles:
            raise TrspError(f"{path.name} holds no text: each one is empty.", f"Give each line {_OBJECT}.")
    else:
        articles = _once(divide(content))
        if len(articles) < 2:
            articles = _once(re.split(r"\n\s*\n", content))
    if len(articles) >= FEW:
        return Corpus(articles)
    note = (
        f"{path.name} has fewer than {FEW} articles, so it was cut into pieces: of two neighbours one may be "
        "trained on and the other measured, which flatters the figures of this domain."
    )
    return Corpus(_once(piece for article in articles for piece in pieces(article)), note=note)


def divide(content: str) -> list[str]:
    """The articles of a text in WikiText's form, each beginning with a line `= Title =`; [] unless there are two."""
    articles: list[list[str]] = []
    for line in encodings.lines(content):
        if re.fullmatch(r"\s*= (?!=).*[^=\s] =\s*", line):
            articles.append([])
        if articles:
            articles[-1].append(line)
    return ["\n".join(lines) for lines in articles] if len(articles) > 1 else []


def pieces(content: str) -> list[str]:
    """`content` cut into pieces of about `PIECE` characters, or shorter ones so that there are about 16. Each cut is at
    the next white space; inside a word, if that goes on for more than `LONGEST_WORD` characters."""
    size = max(1, min(PIECE, len(content) // 16))
    cut, start = [], 0
    while start < len(content):
        end = min(start + size, len(content))
        most = min(end + LONGEST_WORD, len(content))
        while end < most and not content[end].isspace():
            end += 1
        cut.append(content[start:end])
        start = end
    return cut


def clean(markup: str) -> str:
    """The prose in what `gensim.corpora.wikicorpus.filter_wiki` leaves of a Wikipedia article: paragraphs, with a blank
    line between two. Headings, captions, short entries of lists, remains of tables, and the sections after the prose
    (references and the like) are left out."""
    paragraphs: list[str] = []
    skipping = False
    for line in markup.splitlines():
        line = line.strip()
        heading = re.fullmatch(r"(=+)\s*(.*?)\s*=+", line)
        if heading:
            skipping = (skipping and len(heading[1]) > 2) or bool(_END_SECTIONS.fullmatch(heading[2].lower()))
            continue
        if skipping or re.match(r"(file|image|category):|[|!{}]", line, re.I):
            continue
        listed = re.match(r"[*#:;]+\s*", line)
        prose = _tidy(line[listed.end() :] if listed else line)
        if len(prose) >= (80 if listed else 40):
            paragraphs.append(prose)
    return "\n\n".join(paragraphs)


def _tidy(line: str) -> str:
    """`line` without marks of emphasis, and without the brackets and spaces that removed templates leave behind."""
    line = re.sub(r"'{2,}", "", line)
    line = re.sub(r"\(\s*[,;:]\s*", "(", line)
    line = re.sub(r"\s*\(\s*[,;:\s]*\)", "", line)
    line = re.sub(r"[ \t\u00a0]+", " ", line)
    return re.sub(r" ([,.;:!?)])", r"\1", line).strip()


def _once(articles: Iterable[str]) -> tuple[str, ...]:
    """The articles in order, stripped of white space, without empty ones and exact repetitions."""
    return tuple(dict.fromkeys(a for a in (article.strip() for article in articles) if a))


def _wikipedia() -> tuple[str, ...]:
    """The articles of Wikipedia that come with gensim, cleaned. They are kept in the cache folder, since parsing takes
    two seconds."""
    cache_file = paths.home() / "texts" / _CLEANED
    try:
        return tuple(json.loads(cache_file.read_text("utf-8")))
    except (OSError, ValueError):
        pass
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    from gensim.test.utils import datapath

    with bz2.BZ2File(datapath(_WIKIPEDIA)) as dump:
        cleaned = [
            clean(filter_wiki(raw))
            for _, raw, _ in extract_pages(dump, ("0",))  # type: ignore[arg-type]
            if not re.match(r"\s*#redirect", raw, re.I)
        ]
    articles = _once(a for a in cleaned if len(a) >= MIN_ARTICLE)
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache_file, json.dumps(articles, ensure_ascii=False))
    except OSError:  # a cache folder that cannot be written costs two seconds a run, nothing else
        return articles
    return articles


def _wikitext2() -> Corpus:
    """WikiText-2, raw, from the hub: its training part for calibration, its test part for measuring."""
    parts = {}
    for split in ("train", "test"):
        rows = _from_hub("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        parts[split] = _once(divide("".join(row["text"] for row in rows)))
    return Corpus(parts["train"], parts["test"])


def _c4() -> Corpus:
    """The first documents of C4, English, from the hub: of its training part for calibration, of its validation part
    for measuring."""
    train = _from_hub("c4", "allenai/c4", "en", split="train", streaming=True, most=3000)
    test = _from_hub("c4", "allenai/c4", "en", split="validation", streaming=True, most=500)
    return Corpus(_once(row["text"] for row in train), _once(row["text"] for row in test))


def _from_hub(text: str, repository: str, subset: str, most: int | None = None, **how: object) -> list[dict]:
    """The first `most` rows of a data set on the hub; None for all.

    Args:
        text: its name in `TEXTS`, for the message.
        how: further arguments of `datasets.load_dataset`.

    Raises:
        TrspError: whatever went wrong: the hub's client raises a dozen types of errors.
    """
    try:
        from datasets import load_dataset

        rows = load_dataset(repository, subset, **how)  # type: ignore[arg-type]  # nosec B615 - data, never code
        return list(rows if most is None else rows.take(most))  # type: ignore[union-attr, call-arg]
    except Exception as error:
        raise TrspError(
            f"{TEXTS[text]} could not be had: {type(error).__name__}: {str(error)[:200]}",
            "Check the network, or take wikipedia, news or a file of your own, which need none.",
        ) from error


_OBJECT = 'an object with a "text", a "content", or chat "messages"'


def _json_lines(content: str, name: str) -> list[str]:
    articles = []
    for n, line in enumerate(encodings.lines(content), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrspError(f"{name}, line {n}: no JSON.", f"Write {_OBJECT} on each line.") from error
        article = _article(entry)
        if article is None:
            raise TrspError(f"{name}, line {n}: no object with a text.", f"Write {_OBJECT} on each line.")
        articles.append(article.encode("utf-8", "replace").decode("utf-8"))  # JSON can spell halves of letters
    return articles


def _article(entry: Any) -> str | None:
    """The article in the JSON of a line: its "text", else its "content", else its chat "messages", with a blank line
    between two; None where it has none of them."""
    if not isinstance(entry, dict):
        return None
    for name in ("text", "content"):
        if entry.get(name) is not None:
            return entry[name] if isinstance(entry[name], str) else None
    if not isinstance(entry.get("messages"), list):
        return None
    texts = [_message(message) for message in entry["messages"]]
    return None if None in texts else "\n\n".join(filter(None, texts))


def _message(message: Any) -> str | None:
    """The text of a chat message: its "content", or the texts in it where that is a list of parts; "" where it is null,
    as in calls of tools. None where this is no message."""
    if not isinstance(message, dict) or "content" not in message:
        return None
    content = message["content"]
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "\n\n".join(part["text"] for part in content if isinstance(part.get("text"), str))
    return "" if content is None else content if isinstance(content, str) else None
