"""The multiple-choice tasks that pruning papers report, read from the model hub: where each is, and how a row of it
becomes a question. Prompts, choices and splits are those of lm-evaluation-harness, zero-shot. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trsp_core.errors import TrspError
from trsp_core.evaluation.questions import Question, check_limit

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        title: its name for people.
        repository, subset, split: what `datasets.load_dataset` takes: a hub id (or a folder laid out like one), the
            name of a configuration in it, and the labelled part that is scored.
        ask: turns a row into a question.
    """

    title: str
    repository: str
    subset: str | None
    split: str
    ask: Callable[[Row], Question]


def read(name: str, limit: int | None = None) -> list[Question]:
    """The questions of the task `name`, a key of `TASKS`.

    Args:
        limit: how many to read at most, 1 or more; None for all.

    Raises:
        TrspError: the data set is neither on a hub that can be reached nor in its cache, a row is not as expected, or
            the limit is below 1.
    """
    check_limit(limit)
    task = TASKS[name]
    try:
        from datasets import load_dataset

        rows: Any = load_dataset(task.repository, task.subset, split=task.split)  # nosec B615 - data, never code
    except Exception as error:  # its client raises a dozen types, all told as one refusal
        raise TrspError(
            f"{task.title} could not be had from {task.repository}: {type(error).__name__}: {str(error)[:200]}",
            "Check the network, or give a JSONL file of its questions as the task.",
        ) from error
    count = len(rows) if limit is None else min(limit, len(rows))
    questions = []
    for number in range(count):
        try:
            questions.append(task.ask(rows[number]))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise TrspError(
                f"Row {number} of {task.title} is not as expected: {type(error).__name__}: {str(error)[:100]}",
                "Check that the data set is the one meant, or give a JSONL file of its questions as the task.",
            ) from error
    return questions


def question(contexts: Sequence[str], continuations: Sequence[str], gold: int) -> Question:
    """A question with a context for each choice. White space at the end of a context is moved to the beginning of its
    continuation.

    Raises:
        ValueError: there is no choice `gold`.
    """
    if not 0 <= gold < len(contexts):
        raise ValueError(f"choice {gold} of {len(contexts)}")
    bare = [context.rstrip() for context in contexts]
    opened = [c[len(b) :] + f" {text}" for c, b, text in zip(contexts, bare, continuations, strict=True)]
    return Question(tuple(bare), tuple(opened), gold)


def chosen(context: str, choices: Sequence[str], gold: int) -> Question:
    """A question whose choices all follow the same context."""
    return question([context] * len(choices), choices, gold)


def _arc(row: Row) -> Question:
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    return chosen(f"Question: {row['question']}\nAnswer:", texts, labels.index(row["answerKey"]))


def _piqa(row: Row) -> Question:
    return chosen(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _winogrande(row: Row) -> Question:
    """A row of WinoGrande. The choice stands in the middle of the sentence: so the contexts differ, and what follows
    the choice is scored."""
    before, after = row["sentence"].split("_", 1)
    options = [before + row[name] for name in ("option1", "option2")]
    return question(options, [after.strip()] * 2, int(row["answer"]) - 1)


def _hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return chosen(_unmarked(context), [_unmarked(ending) for ending in row["endings"]], int(row["label"]))


def _unmarked(text: str) -> str:
    """`text` without the marks that pages of WikiHow have left in HellaSwag."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _boolq(row: Row) -> Question:
    return chosen(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(row["answer"]))


def _mmlu(row: Row) -> Question:
    about = row["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    lines = [f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True)]
    return chosen("\n".join([head + row["question"].strip(), *lines, "Answer:"]), "ABCD", int(row["answer"]))


TASKS: dict[str, Task] = {
    "arc_easy": Task("ARC, easy", "allenai/ai2_arc", "ARC-Easy", "test", _arc),
    "arc_challenge": Task("ARC, challenge", "allenai/ai2_arc", "ARC-Challenge", "test", _arc),
    "piqa": Task("PIQA", "baber/piqa", None, "validation", _piqa),
    "winogrande": Task("WinoGrande", "allenai/winogrande", "winogrande_xl", "validation", _winogrande),
    "hellaswag": Task("HellaSwag", "Rowan/hellaswag", None, "validation", _hellaswag),
    "boolq": Task("BoolQ", "google/boolq", None, "validation", _boolq),
    "mmlu": Task("MMLU", "cais/mmlu", "all", "test", _mmlu),
}
