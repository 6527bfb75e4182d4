"""`eval`: zero-shot tasks on one model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from trsp_core import formatting
from trsp_core.cli import output, run_figures
from trsp_core.cli.command import command
from trsp_core.errors import TrspError
from trsp_core.evaluation import intervals, questions, tasks
from trsp_core.evaluation.questions import Question
from trsp_core.schema.config import KNOBS
from trsp_core.schema.knobs import whole
from trsp_core.surgery import families

TASK_HELP = f"JSONL files of questions, last_word, or from the hub {', '.join(tasks.TASKS)}"
TEXT = KNOBS["heldout"].default


@command("eval")
@click.argument("model", metavar="RUN|MODEL", help="a run whose model was kept, or a model as for run")
@click.option("--task", "first_tasks", required=True, multiple=True, metavar="TASK [TASK]...", help=TASK_HELP)
@click.argument("more_tasks", nargs=-1, metavar="[TASK]...", help="what follows the first task of --task")
@click.option("--limit", metavar="N", help="only the first N questions of each task, 1 or more")
@click.option("--text", default=TEXT, help=f"where last words are taken from ({TEXT})")
def main(
    model: str,
    first_tasks: Sequence[str],
    more_tasks: Sequence[str],
    limit: str | None,
    text: str,
    as_json: bool,
) -> None:
    name = _model_of(model)
    most = None if limit is None else whole("--limit", limit)
    sets = {
        task: tasks.read(task, most) if task in tasks.TASKS else questions.read(task, text, most)
        for task in (*first_tasks, *more_tasks)
    }
    rows = _answer(name, sets)
    output.show_either(rows, formatting.table(_cells(rows)), as_json)


def _answer(name: str, sets: dict[str, list[Question]]) -> list[dict[str, Any]]:
    """The answers of the model `name`, and their accuracies, to the questions of each task.

    Raises:
        TrspError: the model cannot be loaded, or a question holds a token that it has no row for.
    """
    from trsp_core.evaluation import multiple_choice  # torch comes in here
    from trsp_core.models import loading

    model, tokenizer = loading.load(name)
    text_config = model.config.get_text_config(decoder=True)
    longest = families.context(text_config) or 2048
    for task_questions in sets.values():
        multiple_choice.refuse(tokenizer, task_questions, text_config.vocab_size)
    rows = []
    for task, task_questions in sets.items():
        answers = []
        for answer in multiple_choice.answer(model, tokenizer, task_questions, longest):
            answers.append(answer)
            if len(answers) % 50 == 0:
                output.tell(f"{task}: {len(answers)} of {len(task_questions)}")
        accuracy, by_bytes = map(vars, multiple_choice.accuracy(answers))
        row = {"task": Path(task).stem, "questions": len(answers), "accuracy": accuracy, "accuracy_by_bytes": by_bytes}
        rows.append(row | {"chosen": [answer.chosen for answer in answers]})
    return rows


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Shares of right answers with their 95 % intervals."""

    def share(interval: dict[str, float]) -> str:
        return formatting.interval(interval["value"], interval["low"], interval["high"], formatting.percent)

    head = ["task", "questions", f"right ({intervals.direction('accuracy')})", "right, by bytes"]
    return [head] + [
        [row["task"], str(row["questions"]), share(row["accuracy"]), share(row["accuracy_by_bytes"])] for row in rows
    ]


def _model_of(name: str) -> str:
    """The folder of the model of a run, which is named by its id or its folder; or the name itself.

    Raises:
        TrspError: the run kept no model.
    """
    try:
        run = run_figures.find(name)
        run.config()  # a model's folder has a config.json too, of another kind
    except TrspError:
        return name
    if not run.model_folder.is_dir():
        raise TrspError(f"Run {name} kept no model.", "Run it again with --save-model true.")
    return str(run.model_folder)
