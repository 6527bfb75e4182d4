"""The run that ships with the app: `assets/demo_run`, with its layers weighed before and after, and what its dense,
deleted and pruned model write after each ready prompt."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pages.ui.compare.prompts import IN_TEMPLATE, PROMPTS
from trsp_core import formatting, paths
from trsp_core.errors import TrspError
from trsp_core.files import write_atomic
from trsp_core.runs import replay
from trsp_core.runs.store import Run
from trsp_core.schema import codec, messages, run_state
from trsp_core.schema.messages import Answer, Generate, Importance, Variant
from trsp_core.workbench import transcript, weighing
from trsp_core.workbench.weighing import Weighing
from trsp_core.workbench.worker import RequestHandler

FLAGS = ("--preset", "quick", "--seed", "0")
FILES = ("config.json", "env.json", "events.jsonl")
NEW_TOKENS = 48  # of each text
LABELS = ("Dense", "Deleted at once", "Pruned")
_FOREIGN = re.compile(r"/(home|root|tmp|Users|mnt|work)\b|localhost|@[\w-]+\.")  # what names a machine


def record(folder: str | None, flags: list[str], shipped: Path = replay.FOLDER) -> str:
    """Make the record from the finished run in `folder`, or from a new one with these `flags`; returns what it holds.

    Raises:
        TrspError: the run did not finish, keeps no model, or names a machine.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            new = Path(place) / "run"
            command = [sys.executable, "-m", "trsp_core", "run", *flags, "--out", str(new)]
            if subprocess.run(command, check=False).returncode:
                raise TrspError("The run failed.", "See above.")
            return record(str(new), flags, shipped)
    run = Run(paths.named(folder, "run folder"))
    if absent := missing(run, texts=False):
        raise TrspError(f"The run lacks {', '.join(absent)}.", "Let it finish, and keep its model (--save-model).")
    new = shipped.with_name(f".{shipped.name}-new")
    shutil.rmtree(new, ignore_errors=True)
    (new / "comparisons").mkdir(parents=True)
    for name in FILES:
        shutil.copy(run.folder / name, new / name)
    (new / "summary.json").write_text(codec.encode(run_state.summary(run.state()), indent=1) + "\n", "utf-8")
    handler = RequestHandler()
    if "trained" not in run.state().importance:
        weighing.keep(Run(new), weighed(run, handler))
    for n, kind in enumerate(PROMPTS):
        lines = [messages.to_values("", entry) for entry in comparison(run, kind, handler)]
        write_atomic(new / "comparisons" / f"{n + 1:012x}.json", codec.encode(lines))
    if absent := missing(Run(new)):
        raise TrspError(f"The record lacks: {', '.join(absent)}.", "This is a bug.")
    shutil.rmtree(shipped, ignore_errors=True)
    new.rename(shipped)
    return f"{shipped.name}: " + ", ".join(
        f"{name} {formatting.size(size)}" for name, size in sizes(Run(shipped)).items()
    )


def comparison(run: Run, kind: str, handler: RequestHandler) -> Iterator[Generate | Answer]:
    """The request for the texts of all three models of `run` after the ready prompt of this kind, and its answers.
    Nothing in them says where the model was."""
    config, state = run.config(), run.state()
    assert state.removed is not None
    columns = [
        Variant(config.model, label=LABELS[0]),
        Variant(config.model, removed=sorted(state.chosen), label=LABELS[1]),
        Variant(str(run.model_folder), base=config.model, kept=state.removed.kept, label=LABELS[2]),
    ]
    request = Generate(columns, PROMPTS[kind], chat=kind in IN_TEMPLATE, new_tokens=NEW_TOKENS)
    yield replace(request, columns=[*columns[:2], replace(columns[2], model="", base="")])
    for answer in handler.answer(request):
        if answer is not None and not isinstance(answer, messages.ModelReady):
            yield answer


def weighed(run: Run, handler: RequestHandler) -> Weighing:
    """The layers of the dense and of the pruned model of `run`, each left out alone."""
    config, figures = run.config(), []
    for variant in (Variant(config.model), Variant(str(run.model_folder))):
        request = Importance(variant, config.text, config.heldout, config.seed)
        figures.append([round(v, 6) for v in weighing.rises([a for a in handler.answer(request) if a])])
    return Weighing(*figures)


def missing(run: Run, texts: bool = True) -> list[str]:
    """What a run lacks that ships: names of parts; with `texts` False, of those that a run makes itself."""
    state, absent = run.state(), []
    if state.ended != "finished" or state.removed is None:
        absent.append("an ending")
    if not texts:
        return absent + ([] if (run.model_folder / "config.json").is_file() else ["its model"])
    if "trained" not in state.importance and weighing.read(run, state) is None:
        absent.append("layers weighed before and after")
    prompts = set()
    for name in transcript.comparisons(run):
        request, answers = transcript.read(run, name)
        whole = transcript.gather(request, answers)
        if tuple(c.label for c in whole.columns) == LABELS and len(whole.traces) == len(LABELS) ** 2:
            prompts.add(request.prompt)
    absent += [f"texts after the prompt {kind}" for kind, prompt in PROMPTS.items() if prompt not in prompts]
    words = "\n".join(p.read_text("utf-8") for p in run.folder.rglob("*.json*"))
    return absent + (["words that name no machine"] if _FOREIGN.search(words) else [])


def sizes(run: Run) -> dict[str, int]:
    """Bytes of each part."""
    parts = [name for name in (*FILES, "summary.json", weighing.FILE) if (run.folder / name).is_file()]
    texts = sum(p.stat().st_size for p in (run.folder / "comparisons").iterdir())
    return {**{name: (run.folder / name).stat().st_size for name in parts}, "comparisons": texts}
