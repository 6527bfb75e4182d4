"""Questions by likelihood: the file format, last words, and scores against sums by hand."""

from __future__ import annotations

import json

import pytest
import torch

from tests import tiny
from trsp_core.cli import main as shell_main
from trsp_core.errors import TrspError
from trsp_core.evaluation import multiple_choice, questions
from trsp_core.evaluation.questions import Question

LINES = [
    {"query": "Question: What crosses?\n", "choices": ["the river", "a machine in the garden", "year"], "gold": 1},
    {"query": "The city", "choices": ["keeps", "finds"], "gold": 0},
    {"context_options": ["The river", "The garden in which"], "continuation": "crosses the letter.", "gold": 1},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES), "utf-8")
    return path


def test_both_forms_of_a_line_are_read(file):
    first, second, third = questions.read(str(file), "news")
    assert first == Question(
        ("Question: What crosses?\nAnswer:",) * 3, (" the river", " a machine in the garden", " year"), 1
    )
    assert second.contexts == ("The city",) * 2
    assert third == Question(("The river", "The garden in which"), (" crosses the letter.",) * 2, 1)
    assert len(questions.read(str(file), "news", limit=2)) == 2


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", "{}", '{"query": "a", "choices": [], "gold": 0}',
             '{"query": "a", "choices": ["b"], "gold": 1}', '{"query": 3, "choices": ["b"], "gold": 0}',
             '{"query": "a", "choices": "ab", "gold": 1}', '{"query": "a", "choices": [1, null], "gold": 0}',
             '{"query": "a", "choices": ["b", "c"], "gold": true}']
)  # fmt: skip
def test_a_line_that_is_no_question_is_named(line, tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps(LINES[0]) + "\n" + line, "utf-8")
    with pytest.raises(TrspError, match="Line 2 of asked"):
        questions.read(str(path), "news")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for name in ("nowhere.jsonl", str(tmp_path), str(tmp_path / "empty")):
        with pytest.raises(TrspError) as caught:
            questions.read(name, "news")
        assert caught.value.remedy


def test_last_words_are_words_that_stood_before_in_a_passage_of_whole_sentences(tmp_path):
    path = tmp_path / "text.txt"
    tale = " ".join(["A gardener kept an old machine by the river and spoke of it to all who came there."] * 3)
    path.write_text(
        "\n\n".join(f"In the year {n} it was so. {tale} Nobody saw the machine." for n in range(9)), "utf-8"
    )
    asked = questions.read("last_word", str(path), limit=5)
    assert 1 <= len(asked) <= 5
    assert asked[0].continuations == (" there",)
    for question in asked:
        (context,), (word,) = question.contexts, question.continuations
        assert word.strip() in context
        assert questions.PASSAGE[0] <= len(context.split()) <= questions.PASSAGE[1]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_likelihoods_are_the_sums_of_each_tokens_log_probability(model_type, file):
    """Whole batches, filled up on the right, give what each sequence gives alone, token by token."""
    model, tokenizer = tiny.build(model_type), tiny.tokenizer()
    asked = questions.read(str(file), "news")
    for question, answered in zip(asked, multiple_choice.answer(model, tokenizer, asked, 512), strict=True):
        by_hand = []
        for context, continuation in zip(question.contexts, question.continuations, strict=True):
            ids, n = multiple_choice.encode(tokenizer, context, continuation)
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            by_hand.append(sum(logs[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids))))
        assert answered.nats == pytest.approx(by_hand, rel=1e-4)
        sizes = [len(c.strip()) for c in question.continuations]
        assert answered.chosen == max(range(len(by_hand)), key=lambda i: by_hand[i])
        assert answered.chosen_by_bytes == max(range(len(by_hand)), key=lambda i: by_hand[i] / sizes[i])


def test_a_single_choice_is_right_if_the_model_would_write_it():
    model, tokenizer = tiny.build(), tiny.tokenizer()
    context = "The river crosses the"
    ids = tokenizer(context).input_ids
    with torch.no_grad():
        likeliest = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
    written = tokenizer.decode([likeliest])
    joined = tokenizer(context + written).input_ids
    asked = [Question((context,), (" qqq",), 0)]
    if joined == [*ids, likeliest]:  # the text comes back as that token
        asked.append(Question((context,), (written,), 0))
    chosen = [a.chosen for a in multiple_choice.answer(model, tokenizer, asked, 512)]
    assert chosen == [-1, 0][: len(asked)]


def test_of_a_long_context_the_end_counts():
    model, tokenizer = tiny.build(), tiny.tokenizer()
    long = "The river crosses the garden. " * 20
    (short,) = multiple_choice.answer(model, tokenizer, [Question((long,) * 2, (" city", " letter"), 0)], 16)
    assert len(short.nats) == 2


def test_accuracy_counts_both_ways():
    answers = [
        multiple_choice.AnsweredQuestion(0, 1, 0, (0.0, 0.0)),
        multiple_choice.AnsweredQuestion(1, 1, 1, (0.0, 0.0)),
    ]
    plain, by_bytes = multiple_choice.accuracy(answers)
    assert (plain.value, by_bytes.value) == (1.0, 0.5)


def test_the_shell_answers_with_intervals(file, tiny_model, capsys):
    assert shell_main.main(["eval", str(tiny_model), "--task", str(file)]) == 0
    assert "asked" in capsys.readouterr().out
    assert shell_main.main(["eval", str(tiny_model), "--task", str(file), "--limit", "2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["questions"] == 2
    assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
    assert shell_main.main(["eval", "no-such-model", "--task", str(file)]) == 2


@pytest.mark.slow
def test_lm_eval_agrees_on_the_same_items(file):
    """The harness of the field, given the same model and pairs: the same log-likelihoods, so the same predictions."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny.build(), tiny.tokenizer()
    asked = questions.read(str(file), "news")
    pairs = [p for q in asked for p in zip(q.contexts, q.continuations, strict=True)]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=512).loglikelihood(
        [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)], disable_tqdm=True
    )
    ours = [value for a in multiple_choice.answer(model, tokenizer, asked, 512) for value in a.nats]
    assert ours == pytest.approx([value for value, _ in theirs], rel=1e-4)
