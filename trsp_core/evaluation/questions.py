"""Reads questions that a language model can answer by likelihood: multiple choice from a JSONL file, and last words of
passages.

Each line of a file is an object `{"query", "choices", "gold"}`; or, where the choice stands in the middle of a
sentence, `{"context_options", "continuation", "gold"}` (the format of MosaicML's evaluation gauntlet). Imports no
torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from trsp_core import formatting, paths
from trsp_core.data import corpora, encodings
from trsp_core.errors import TrspError

LAST_WORD = "last_word"  # the task that is made from a text
MOST_BYTES = 50_000_000  # of a file; the largest of the tasks named here has 12 MB
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
_WORD = re.compile(r"[A-Za-z]{4,}")
PASSAGE = (30, 90)  # words before the last one


@dataclass(frozen=True)
class Question:
    """A question with one or several choices. A single choice is right if the model would write it.

    Attributes:
        contexts: what the model reads before each choice.
        continuations: what it is asked about: one for each context, beginning with its space.
        gold: number of the right choice, from 0.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


def read(task: str, text: str, limit: int | None = None) -> list[Question]:
    """The questions of `task`: `last_word`, or the path of a JSONL file.

    Args:
        text: the text from which last words are taken: a name or a path, as in a run's settings.
        limit: how many questions to read at most, 1 or more; None for all.

    Raises:
        TrspError: no such file, no question in it, a line that is none, a text that cannot be used, or a limit below 1.
    """
    check_limit(limit)
    if task == LAST_WORD:
        return last_words(text, limit)
    remedy = f"Give a JSONL file, {LAST_WORD}, or a task that `eval --help` names."
    path = paths.file(task, "task", remedy, MOST_BYTES)
    content, _ = encodings.decode(paths.content(path, MOST_BYTES), path.name)
    lines = [line for line in encodings.lines(content) if line.strip()][:limit]
    questions = [_question(line, path.name, number) for number, line in enumerate(lines, 1)]
    if not questions:
        raise TrspError(f"{path.name} holds no questions.", "Give a file with one question a line.")
    return questions


def check_limit(limit: int | None) -> None:
    """Raise TrspError if `limit` is below 1, so that no question would be left."""
    if limit is not None and limit < 1:
        raise TrspError(
            f"{formatting.count(limit)} questions were asked for.", "Ask for 1 or more, or leave the limit out for all."
        )


def _question(line: str, name: str, number: int) -> Question:
    try:
        document: dict[str, Any] = json.loads(line)
        gold = document["gold"]
        if "choices" in document:
            if not isinstance(document["choices"], list) or not all(isinstance(c, str) for c in document["choices"]):
                raise ValueError("choices")
            choices = [" " + choice.strip() for choice in document["choices"]]
            contexts, continuations = [prompt(document["query"])] * len(choices), choices
        else:
            contexts = [str(option).rstrip() for option in document["context_options"]]
            continuations = [" " + str(document["continuation"]).strip()] * len(contexts)
        if type(gold) is not int or not 0 <= gold < len(contexts) or min(map(len, contexts)) == 0:
            raise ValueError("gold")
        "".join([*contexts, *continuations]).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrspError(
            f"Line {number} of {name} is no question.",
            'Write {"query", "choices", "gold"}, or {"context_options", "continuation", "gold"}.',
        ) from error
    return Question(tuple(contexts), tuple(continuations), gold)


def prompt(query: str) -> str:
    """The context to put before the choices of a query. One that begins with "Question:" gets a last line "Answer:"."""
    query = query.rstrip()
    marked = query.startswith("Question:") and not query.endswith("Answer:")
    return query + "\nAnswer:" if marked else query


def last_words(text: str, limit: int | None = None) -> list[Question]:
    """Passages of whole sentences whose last word the model has to write, in the manner of LAMBADA (arXiv:1606.06031);
    at most one from an article.

    In LAMBADA, people have checked that the word can be guessed from the passage, and not from its last sentence. Here
    it only has to stand in the passage before, a rough stand-in: the figures compare models, and cannot be compared
    with LAMBADA's.

    Raises:
        TrspError: the text cannot be read, or has no such passage.
    """
    corpus = corpora.read(text)
    passages = []
    for article in corpus.reserved or corpus.articles:
        passage = _passage(article)
        if passage:
            passages.append(passage)
        if limit and len(passages) >= limit:
            break
    if not passages:
        raise TrspError(f"No passage of {text[:60]} ends on a word that stood before.", "Take a longer text.")
    return passages


def _passage(article: str) -> Question | None:
    """The first passage of an article that begins with a sentence, has a length in `PASSAGE`, and ends in a word that
    stood in it before; None where there is none."""
    sentences = _SENTENCE.split(" ".join(article.split()))
    for start in range(len(sentences)):
        words: list[str] = []
        for sentence in sentences[start:]:
            words += sentence.split()
            if len(words) > PASSAGE[1]:
                break
            last = words[-1].rstrip(".!?\"'")
            earlier_words = {word.strip(".,;:!?\"'()") for word in words[:-1]}
            if len(words) > PASSAGE[0] and _WORD.fullmatch(last) and last in earlier_words:
                return Question((" ".join(words[:-1]),), (" " + last,), 0)
    return None
