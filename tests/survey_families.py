"""Every causal language model of transformers against the contract that pruning rests on.

    python -m tests.survey_families [MODEL_TYPE ...]   say how each fares
    python -m tests.survey_families --write            all of them, into assets/families.json and the docs;
                                                      with MODEL_TYPE, those anew and the others as recorded

Each is built and tried in a process of its own, with a limit on its memory and its time. What it keeps is loaded by
stock transformers in another, forked from one that has loaded transformers already.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests import ROOT, tiny, zoo, zygote
from trsp_core.errors import TrspError
from trsp_core.evaluation import generation
from trsp_core.models import architectures, libraries
from trsp_core.models.architectures import FamilyRecord, Outcome
from trsp_core.pruning import engine, validate
from trsp_core.schema import events
from trsp_core.surgery import discovery, hooks, removal
from trsp_core.surgery.stack import Stack

PAGE = ROOT / "docs" / "models-and-texts.md"
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
GONE = [1, 4]
MOST_BYTES, MOST_SECONDS = 6 << 30, 120
RUN = {
    "block_length": 16,
    "measure_length": 16,
    "measure_blocks": 2,
    "calibration_blocks": 8,
    "probe_every": 2,
    "probe_blocks": 1,
    "importance_blocks": 1,
    "stage1_steps": 1,
    "stage2_steps": 2,
    "ratio": 0.25,
    "protect_first": 2,
    "protect_last": 3,
    "speed_repeats": 0,
    "sample_tokens": 3,
    "kl_blocks": 1,
    "threads": 1,
}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def gates_at_one_are_identity(stack: Stack) -> None:
    ids, ones = tiny.ids(), torch.ones(len(stack.layers))
    before = logits(stack.model, ids)
    for kind in ("branch", "output"):
        with hooks.gated(stack, ones, kind, range(len(ones))):
            assert torch.equal(logits(stack.model, ids), before), kind


def gates_at_zero_and_skips_are_removal(stack: Stack) -> None:
    ids, weights = tiny.ids(), torch.ones(len(stack.layers))
    weights[GONE] = 0
    with hooks.gated(stack, weights, "branch", GONE):
        gated = logits(stack.model, ids)
    with hooks.skipped(stack, GONE):
        skipped = logits(stack.model, ids)
    with removal.removed(stack, GONE):
        removed = logits(stack.model, ids)
    assert torch.equal(gated, skipped), "a gate at zero is no skip"
    assert torch.equal(skipped, removed), "a skip is no removal"
    assert not torch.allclose(removed, logits(stack.model, ids), atol=1e-4), "these layers did nothing anyway"


def deletion_shrinks_by_exactly_the_layers(stack: Stack) -> None:
    count = sum(p.numel() for p in stack.model.parameters())
    layers = sum(p.numel() for i in GONE for p in stack.layers[i].parameters())
    with removal.removed(stack, GONE):
        assert sum(p.numel() for p in stack.model.parameters()) == count - layers


def removable(stack: Stack, sets: list[list[int]]) -> Iterator[list[int]]:
    """Those of `sets` that `surgery.removed` does not refuse; it may refuse all but GONE and none."""
    for gone in sets:
        try:
            with removal.removed(stack, gone):
                pass
        except TrspError:
            if gone in ([], GONE):
                raise
        else:
            yield gone


def reloaded_it_is_equal(stack: Stack) -> None:
    for gone in removable(stack, [GONE, [0, 3]]):
        with tempfile.TemporaryDirectory() as folder:
            with removal.removed(stack, gone):
                before = logits(stack.model, tiny.ids())
                weights = {name: w.clone() for name, w in stack.model.state_dict().items()}
                stack.model.save_pretrained(folder)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        reloaded, report = loaded
        assert not any(report.values()), f"keys: {report}"
        assert len(discovery.find(reloaded).layers) == len(stack.layers) - len(gone)
        assert all(torch.equal(w, weights[name]) for name, w in reloaded.state_dict().items())
        near = torch.allclose(logits(reloaded.eval(), tiny.ids()), before, atol=1e-4)  # experts add up in any order
        assert near, f"logits without {gone}"


def cached_generation_is_uncached_generation(stack: Stack) -> None:
    for gone in removable(stack, [[], GONE, [0, 3]]):
        with removal.removed(stack, gone):
            tokens = list(generation.tokens(stack.model, tiny.ids(rows=1), 14))
            ids = torch.cat([tiny.ids(rows=1), torch.tensor([tokens])], dim=1)
            for token, uncached in zip(reversed(tokens), logits(stack.model, ids)[0, :-1].flip(0), strict=False):
                assert uncached.max() - uncached[token] < 1e-3, f"without {gone}: {tokens}"


def all_is_as_it_was(stack: Stack) -> None:
    ids, config = tiny.ids(), stack.text_config.to_dict()
    before = logits(stack.model, ids)
    modules = _state(stack.model)
    for change in (hooks.skipped(stack, GONE), removal.removed(stack, GONE)):
        with contextlib.suppress(KeyError), change:
            logits(stack.model, ids)
            raise KeyError
        assert torch.equal(logits(stack.model, ids), before)
    assert stack.text_config.to_dict() == config
    assert _state(stack.model) == modules


def _state(model: nn.Module) -> dict[str, Any]:
    """Plain values of all modules."""
    return {
        f"{name}.{key}": value if isinstance(value, (int, str, float)) else repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, str, float, list, tuple)) and not key.startswith("_")
    }


def a_whole_run_ends(stack: Stack) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(tiny.text(600), "utf-8")
        config = validate.from_values({**RUN, "text": str(text), "heldout": str(text), "model": "tiny"})
        before = logits(stack.model, tiny.ids())
        stack.model.config.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        tokenizer = libraries.load_tokenizer(Path(folder))  # the class that transformers gives to this family
        told = list(engine.execute(config, Path(folder), (stack.model, tokenizer)))
        assert isinstance(told[-1], events.RunFinished)
        assert torch.equal(logits(stack.model, tiny.ids()), before)
        saved = AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
        removed = next(e for e in told if isinstance(e, events.LayersRemoved))
        assert sum(p.numel() for p in saved.parameters()) == removed.parameters


LAWS = (
    gates_at_one_are_identity,
    gates_at_zero_and_skips_are_removal,
    deletion_shrinks_by_exactly_the_layers,
    all_is_as_it_was,
    reloaded_it_is_equal,
    cached_generation_is_uncached_generation,
    a_whole_run_ends,
)


def outcome(model_type: str) -> Outcome:
    """How `model_type` fares, tried here and now."""
    name = zoo.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    architecture = name if isinstance(name, str) else name[0]
    try:
        model = zoo.build(model_type)
    except Exception as error:
        return Outcome(model_type, architecture, "not built", _brief(error))
    try:
        stack = discovery.find(model)
    except TrspError as refusal:
        kind = "refused" if zoo.is_decoder(model) else "no decoder"
        return Outcome(model_type, architecture, kind, refusal.message)
    for law in LAWS:
        try:
            law(stack)
        except Exception as error:
            return Outcome(model_type, architecture, "failed", f"{law.__name__}: {_brief(error)}")
    return Outcome(model_type, architecture, "supported", "")


def survey(model_types: tuple[str, ...] = zoo.MODEL_TYPES) -> Iterator[Outcome]:
    """The outcome of each, in a process of its own."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    discovery.find(zoo.build("llama"))  # what all import is imported once
    with tempfile.TemporaryDirectory() as folder, zygote.started(Path(folder)) as where:
        for model_type in model_types:
            yield _apart(model_type, where)


def _apart(model_type: str, where: str) -> Outcome:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(model_type, where, theirs))
    child.start()
    theirs.close()
    try:
        if ours.poll(MOST_SECONDS):
            return ours.recv()
        return Outcome(model_type, "", "failed", f"nothing was heard of it for {MOST_SECONDS} s")
    except EOFError:
        return Outcome(model_type, "", "failed", "its process died")
    finally:
        child.kill()
        child.join()


def _child(model_type: str, where: str, told: Connection) -> None:
    subprocess.Popen = zygote.proving(where, subprocess.Popen)  # type: ignore[misc, assignment]
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    told.send(outcome(model_type))


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"


def markdown(found: FamilyRecord) -> str:
    """The account of a survey in the docs."""
    count = {outcome: len(found.of(outcome)) for outcome in ("supported", "refused", "no decoder", "not built")}
    decoders = count["supported"] + count["refused"] + len(found.of("failed"))
    lines = [
        f"Of the {len(found.outcomes)} causal language models of transformers {found.transformers}, {decoders} are "
        f"decoder-only and can be built here; {count['supported']} of these ({found.share:.0%}) are supported.",
        "",
        f"**Supported** ({count['supported']}): {_listed(o.model_type for o in found.of('supported'))}.",
    ]
    titles = {"refused": "Refused", "no decoder": "Refused, not decoder-only", "not built": "Not buildable here"}
    for outcome, title in titles.items():
        groups = [f"{_listed(types)}: {reason}" for reason, types in found.groups(outcome).items()]
        lines += ["", f"**{title}** ({count[outcome]}):", "", *(f"- {group}." for group in groups)]
    return "\n".join(lines)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def write(found: FamilyRecord) -> None:
    """Put the record and its account in their places."""
    outcomes = ",\n".join(json.dumps(dataclasses.asdict(o), ensure_ascii=False) for o in found.outcomes)
    text = f'{{"transformers": "{found.transformers}", "outcomes": [\n{outcomes}\n]}}\n'
    architectures.RECORD.write_text(text, "utf-8")
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(found)}\n{END}{rest.split(END)[1]}", "utf-8")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.survey_families", description=__doc__)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--write", action="store_true", help="write the record and its account in the docs")
    arguments = parser.parse_args(words)
    wanted, found = tuple(arguments.model_types) or zoo.MODEL_TYPES, []
    for told in survey(wanted):
        found.append(told)
        print(told.model_type, told.outcome, told.reason, flush=True)
    if arguments.write:
        known = {o.model_type: o for o in architectures.recorded().outcomes} if arguments.model_types else {}
        known |= {o.model_type: o for o in found}
        write(FamilyRecord(transformers.__version__, tuple(known[t] for t in zoo.MODEL_TYPES if t in known)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
