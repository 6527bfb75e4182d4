"""Tasks from the hub: its layout in a local folder through the real loader, prompts against lm-evaluation-harness."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from tests import ROOT, tiny
from trsp_core.cli import main as shell_main
from trsp_core.errors import TrspError
from trsp_core.evaluation import multiple_choice, questions, tasks
from trsp_core.evaluation.questions import Question

ARC = {"id": "x", "question": "What crosses the city?", "choices": {"text": ["a letter", "the river", "year"],
       "label": ["A", "B", "C"]}, "answerKey": "B"}  # fmt: skip
ROWS = {
    "arc_easy": [ARC, ARC | {"choices": {"text": ["no", "so"], "label": ["1", "2"]}, "answerKey": "1"}],
    "arc_challenge": [ARC | {"answerKey": "C"}],
    "piqa": [{"goal": "How to cross a river?", "sol1": "Swim.", "sol2": "Wait for it to pass.", "label": 0}],
    "winogrande": [
        {"sentence": "The river met the city and _ was wet.", "option1": "the river", "option2": "the city",
         "answer": "2"}
    ],
    "hellaswag": [
        {"activity_label": "Gardening", "ctx_a": "The garden keeps a letter.", "ctx_b": "the machine",
         "endings": ["finds it [title] Then", "moves.", "is [step] gone.", "crosses"], "label": "2"}
    ],
    "boolq": [{"question": "is the river wet", "passage": "The river is wet.", "answer": True}],
    "mmlu": [
        {"question": "Which one? ", "subject": "high_school_rivers", "choices": ["a", "b", "c", "d"], "answer": 3}
    ],
}  # fmt: skip
EXPECTED = {
    "arc_easy": Question(("Question: What crosses the city?\nAnswer:",) * 3, (" a letter", " the river", " year"), 1),
    "piqa": Question(("Question: How to cross a river?\nAnswer:",) * 2, (" Swim.", " Wait for it to pass."), 0),
    "winogrande": Question(
        ("The river met the city and the river", "The river met the city and the city"), (" was wet.",) * 2, 1
    ),
    "hellaswag": Question(
        ("Gardening: The garden keeps a letter. The machine",) * 4,
        (" finds it. Then", " moves.", " is gone.", " crosses"),
        2,
    ),
    "boolq": Question(("The river is wet.\nQuestion: is the river wet?\nAnswer:",) * 2, (" no", " yes"), 1),
    "mmlu": Question(
        (
            "The following are multiple choice questions (with answers) about high school rivers.\n\n"
            "Which one?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
        )
        * 4,
        (" A", " B", " C", " D"),
        3,
    ),
}


def lay_out(folder: Path, name: str) -> Path:
    """A folder as the hub's repository of this task: parquet files by config and split, and the card that names them;
    BoolQ as JSON lines, the hub's other plain form."""
    task, subset = tasks.TASKS[name], tasks.TASKS[name].subset or "default"
    ending = "jsonl" if name == "boolq" else "parquet"
    place = folder / name / subset / f"{task.split}-00000-of-00001.{ending}"
    place.parent.mkdir(parents=True)
    if ending == "jsonl":
        place.write_text("\n".join(json.dumps(row) for row in ROWS[name]), "utf-8")
    else:
        Dataset.from_list(ROWS[name]).to_parquet(place)
    (folder / name / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n  - split: {task.split}\n"
        f"    path: {subset}/{task.split}-*\n---\n",
        "utf-8",
    )
    return folder / name


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Every task, with its repository in a local folder and the loader's cache beside it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, task in list(tasks.TASKS.items()):
        folder = lay_out(tmp_path / "hub", name)
        monkeypatch.setitem(tasks.TASKS, name, dataclasses.replace(task, repository=str(folder)))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", tasks.TASKS)
def test_rows_of_the_hubs_layout_become_questions(name, hub):
    asked = tasks.read(name)
    assert len(asked) == len(ROWS[name])
    if name in EXPECTED:
        assert asked[0] == EXPECTED[name]
    for question in asked:
        assert len(question.contexts) == len(question.continuations) > question.gold >= 0
        assert all(c == c.rstrip() for c in question.contexts)
        assert all(c.startswith(" ") for c in question.continuations)


def test_a_limit_takes_the_first(hub):
    assert tasks.read("arc_easy", 1) == tasks.read("arc_easy")[:1]


def test_the_shell_takes_a_task_by_its_name(hub, tiny_model, capsys):
    command = ["eval", str(tiny_model), "--task", "arc_easy", "winogrande", "--json"]
    assert shell_main.main(command) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["task"], first["questions"]) == ("arc_easy", 2)
    assert (second["task"], second["questions"]) == ("winogrande", 1)


def test_white_space_that_ends_a_context_opens_the_continuation():
    assert tasks.chosen("It is ", ["so"], 0) == Question(("It is",), ("  so",), 0)


@pytest.mark.parametrize("row", [{}, ARC | {"answerKey": "Z"}, ARC | {"choices": None}])
def test_a_row_of_another_kind_is_named(row, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(ROWS, "arc_easy", [ARC, {"question": None} | row])
    folder = lay_out(tmp_path, "arc_easy")
    monkeypatch.setitem(tasks.TASKS, "arc_easy", dataclasses.replace(tasks.TASKS["arc_easy"], repository=str(folder)))
    with pytest.raises(TrspError, match="Row 1 of ARC, easy") as caught:
        tasks.read("arc_easy")
    assert "JSONL" in caught.value.remedy


def test_without_a_hub_the_error_says_what_to_do(tiny_model, tmp_path):
    command = [sys.executable, "-m", "trsp_core", "eval", str(tiny_model), "--task", "piqa"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=offline)
    assert done.returncode == 2
    assert "PIQA could not be had from" in done.stderr
    assert "give a JSONL file" in done.stderr


@pytest.mark.slow
class TestAgainstTheHarness:
    """The harness of the field, a development dependency that takes seconds to import."""

    @pytest.mark.parametrize("name", EXPECTED)
    def test_prompts_choices_and_answers_are_its_own(self, name, hub):
        """Its task files, rendered for the same rows."""
        for row, asked in zip(ROWS[name], tasks.read(name), strict=True):
            contexts, continuations, gold = rendered(name, row)
            assert asked == tasks.question(contexts, continuations, gold)

    def test_predictions_are_its_own(self, hub, tmp_path):
        """The same model and questions through its whole way: the same choice of each, plainly; and the same sums."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        choices = ["the river", "a garden", "1900"]
        lines = [
            {"query": f"Question: What {verb} the {noun}?\nAnswer:", "choices": choices, "gold": 0}
            for noun in ("city", "letter", "machine", "year")
            for verb in ("crosses", "keeps", "finds", "moves", "holds")
        ]
        file = tmp_path / "asked.jsonl"
        file.write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
        (tmp_path / "asked.yaml").write_text(
            f"task: asked\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\n"
            "  cache_dir: " + str(tmp_path / "cache") + "\n"
            'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{query}}"\ndoc_to_choice: choices\n'
            "doc_to_target: gold\nmetric_list:\n  - metric: acc\n",
            "utf-8",
        )
        model, tokenizer = tiny.build(), tiny.tokenizer()
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=512)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=harness, tasks=["asked"], num_fewshot=0, bootstrap_iters=0, log_samples=True, task_manager=manager
        )
        samples = sorted(found["samples"]["asked"], key=lambda sample: sample["doc_id"])
        asked = questions.read(str(file), "news")
        ours = list(multiple_choice.answer(model, tokenizer, asked, 512))
        assert len(ours) == len(samples) == len(lines)
        for answered, sample in zip(ours, samples, strict=True):
            theirs = [float(value) for (value, _), *_ in sample["resps"]]
            assert answered.nats == pytest.approx(theirs, rel=1e-4)
            assert answered.chosen == max(range(len(theirs)), key=lambda i: theirs[i])
            assert (answered.chosen == answered.gold) == bool(sample["acc"])
        plain, _ = multiple_choice.accuracy(ours)
        assert plain.value == pytest.approx(found["results"]["asked"]["acc,none"])


FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "mmlu": "mmlu/default/_default_template_yaml",
}


def rendered(name: str, row: dict) -> tuple[list[str], list[str], int]:
    """Contexts, continuations and the right choice of a row, by the harness's own task files and functions."""
    import yaml
    from lm_eval.utils import apply_template

    root = Path(str(importlib.util.find_spec("lm_eval").submodule_search_locations[0])) / "tasks"
    if name == "winogrande":
        theirs = _module(root / "winogrande" / "preprocess_winogrande.py")
        return theirs.doc_to_choice(row), [theirs.doc_to_target(row)] * 2, theirs.doc_to_text(row)
    if name == "hellaswag":
        (doc,) = _module(root / "hellaswag" / "utils.py").process_docs(Dataset.from_list([row]))
        return [doc["query"]] * len(doc["choices"]), doc["choices"], doc["gold"]
    row = row | ({"label": int(row["answer"])} if name == "boolq" else {})  # GLUE's copy of it counts
    how = yaml.safe_load((root / FILES[name]).read_text("utf-8"))
    head = ""
    if name == "mmlu":
        file = (root / "mmlu/default/mmlu_abstract_algebra.yaml").read_text("utf-8").replace('"include"', "include")
        head = yaml.safe_load(file)["description"].replace("abstract algebra", row["subject"].replace("_", " "))
    choices, target = how["doc_to_choice"], how["doc_to_target"]
    if isinstance(choices, str):
        choices = ast.literal_eval(apply_template(choices, row))
    gold = int(apply_template(target, row)) if "{{" in target else int(row[target])
    return [head + apply_template(how["doc_to_text"], row)] * len(choices), choices, gold


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
