"""A run, from a config to a pruned model, as one generator of events. `execute` is its table of contents; read from top
to bottom, this file is the method.

    for event in execute(config): ...

Closing the generator at any event leaves a model that was passed in as it was, to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trsp_core import machine
from trsp_core.data import blocks, special_tokens, text_check
from trsp_core.errors import TrspError, refuse
from trsp_core.evaluation import generation, measurements, perplexity, saving
from trsp_core.models import loading, tokenizer_check
from trsp_core.models.inspection import Facts
from trsp_core.pruning import methods, transfers, validate
from trsp_core.pruning.lab import Lab
from trsp_core.pruning.stage2 import transfer
from trsp_core.schema import events as ev
from trsp_core.schema.config import RunConfig, count_to_remove
from trsp_core.schema.events import Event
from trsp_core.schema.run_folder import RunFolder
from trsp_core.schema.schedules import Span, probe_due, shared_out
from trsp_core.surgery import discovery, hooks, lora, quantization, removal, training
from trsp_core.surgery.stack import Stack
from trsp_core.training.checkpointing import Rounds, Solutions, Waypoints
from trsp_core.training.progress import Past, fresh_events
from trsp_core.training.steering import Steering

Events = Generator[Event, None, None]


@dataclass
class Study:
    """What a run works with.

    Attributes:
        run: the files of the run folder; None where nothing is saved.
        past: what need not be done again, since a run that broke off has done it.
        undo: on exit it puts everything back that the run has changed.
        chosen: P, the layers chosen so far.
        pruned: opens a context in which the model is the pruned one.
    """

    config: RunConfig
    run: RunFolder | None
    past: Past
    undo: ExitStack
    model: nn.Module
    tokenizer: Any
    stack: Stack
    texts: blocks.Texts
    lab: Lab
    waypoints: Waypoints
    reference: perplexity.Reference
    chosen: list[int] = field(default_factory=list)
    pruned: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def method(self) -> methods.Method:
        return methods.get(self.config.method)

    @property
    def transfer(self) -> transfers.Transfer:
        return transfers.get(self.config.transfer)

    @property
    def trains(self) -> bool:
        return self.config.stage2_steps > 0

    @property
    def deletes_first(self) -> bool:
        """Whether the chosen layers go before stage 2: in every transfer but the penalty, and in the control."""
        return self.config.deletes_first

    @property
    def changes(self) -> bool:
        """Whether more happens to the model than deletion: training, or a repair."""
        return self.trains or self.transfer.repair is not None

    def measured(self, *states: str, sample: bool = True) -> Events:
        """Perplexity of the model as it stands and a sample of its text, for each of `states`; unless done before."""
        if states[0] not in self.past.done:
            yield from measurements.perplexities(self.stack, self.texts, self.reference, *states)
            if sample:
                yield from measurements.sample(self.config, self.stack, self.tokenizer, *states)

    def importance(self, state: str, phase: str) -> Events:
        """How much the loss rises without each layer; where stage 2 trains all layers, and unless done before."""
        if self.trains and not self.deletes_first and phase not in self.past.done:
            yield from measurements.importance(self.config, self.stack, self.texts, state, phase)


def execute(
    config: RunConfig,
    folder: Path | None = None,
    loaded: tuple[nn.Module, Any] | None = None,
    past: Past | None = None,
    facts: Facts | None = None,
    steering: Steering | None = None,
) -> Events:
    """Prune as `config` says, and yield each event of the run.

    Args:
        folder: the run folder, for the pruned model and for what to resume from; None keeps nothing.
        loaded: a model and its tokenizer to work on, instead of loading `config.model`. They end as they were.
        past: how far a run that broke off has come: its events are not told again, its work is repeated only if needed.
        facts: of the model, where `config` has been checked against them.
        steering: whoever reads the events may turn knobs with it in between.

    Raises:
        TrspError: the run cannot be done; the message says why and what to do.
    """
    with contextlib.ExitStack() as undo:
        study = yield from _prepared(config, folder, loaded, past or Past(), undo, facts)
        study.lab.steering = steering or study.lab.steering
        yield from study.measured("dense")
        _remember_dense(study)
        yield from study.importance("dense", "importance")
        yield from _choose_and_move(study)
        if study.trains and not study.deletes_first:
            yield from study.measured("trained", sample=False)
        yield from study.importance("trained", "importance after")
        yield from _delete(study)
        if config.speed_repeats and "speed" not in study.past.done:
            yield from measurements.speeds(config, study.stack, study.texts, study.pruned)
        yield from _save(study)
    yield ev.RunFinished(perplexity.peak_bytes())
    for point in study.run.points if study.run else ():
        point.unlink(missing_ok=True)


def _prepared(
    config: RunConfig,
    folder: Path | None,
    loaded: tuple[nn.Module, Any] | None,
    past: Past,
    undo: ExitStack,
    facts: Facts | None,
) -> Generator[Event, None, Study]:
    """Load the model, find its layers, cut the texts, and return the study of them."""
    run, fresh = RunFolder(folder) if folder else None, not past.next_event
    undo.callback(torch.set_num_threads, torch.get_num_threads())  # their number changes sums in the last bit
    waypoints = Waypoints(run, config)
    model, tokenizer, stack = yield from fresh_events(fresh, _model(config, loaded, facts))
    if loaded and (config.learn_weights or config.stage2_steps):
        undo.enter_context(training.restored(model))
    undo.enter_context(training.learning(model, []))
    texts = yield from fresh_events(fresh, _texts(config, tokenizer, stack))
    lab = Lab(stack, texts.calibration, config)
    lab.rounds, lab.solutions = Rounds(run, config, past), Solutions(run, config)
    lab.layer_weights = past.layer_weights
    if require := transfers.get(config.transfer).require:
        with transfers.opened(lab, transfers.get(config.transfer), []):
            require(lab)
    reference = perplexity.Reference(config.kl_blocks)
    return Study(config, run, past, undo, model, tokenizer, stack, texts, lab, waypoints, reference)


def _model(
    config: RunConfig, loaded: tuple[nn.Module, Any] | None, facts: Facts | None
) -> Generator[Event, None, tuple[nn.Module, Any, Stack]]:
    """Load the model, unless it was passed in; returns it with its tokenizer and its stack of layers.

    Raises:
        TrspError: it cannot be loaded, or `config` does not fit it.
    """
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    yield ev.PhaseStarted("load")
    if not config.threads:
        machine.write_rate(perplexity.matrix_rate())  # for the forecasts of later runs
    precision, note = loading.settle_precision(config.precision, config.device)
    model, tokenizer = loaded or loading.load(config.model, precision, config.device, config.compute_dtype, facts)
    if note and not loaded:
        yield ev.Noted(note)
    stack = discovery.find(model)
    if facts is None or (facts.n_layers, facts.max_length) != (len(stack.layers), stack.context):
        refuse(validate.check(config, len(stack.layers), stack.context))
    parameters, size = perplexity.parameter_bytes(model)
    yield ev.ModelLoaded(
        model=config.model,
        architecture=type(model).__name__,
        n_layers=len(stack.layers),
        width=stack.text_config.hidden_size,
        vocabulary=stack.text_config.vocab_size,
        parameters=parameters,
        layer_parameters=[perplexity.parameter_bytes(layer)[0] for layer in stack.layers],
        bytes=size,
        dtype=measurements.number_format(model),
        device=str(next(model.parameters()).device),
    )
    return model, tokenizer, stack


def _texts(config: RunConfig, tokenizer: Any, stack: Stack) -> Generator[Event, None, blocks.Texts]:
    yield ev.PhaseStarted("text")
    with tokenizer_check.panics_refused(config.model):
        texts = blocks.prepare(config, tokenizer)
        text_check.refuse_texts(texts, tokenizer, config, stack.text_config.vocab_size)
    for note in texts.notes:
        yield ev.Noted(note)
    lengths = len(special_tokens.begun(tokenizer, config.prompt)), config.sample_tokens
    if config.sample_tokens and not lengths[0]:
        raise TrspError("The sample prompt holds no token.", "Write another one, or set --sample-tokens to 0.")
    possible = generation.fitted(stack.context, *lengths)
    if config.sample_tokens and possible != lengths:
        yield ev.Noted(
            f"This model reads {stack.context} tokens at most: a sample is the last {possible[0]} of the prompt's "
            f"{lengths[0]} tokens and {possible[1]} of {lengths[1]} new ones."
        )
    yield from texts.events
    return texts


def _remember_dense(study: Study) -> None:
    """Keep what later needs the dense model: its predictions, which `measured` has kept unless an earlier process did
    the measuring, and a copy of the model where stage 2 distils it."""
    config, past, stack = study.config, study.past, study.stack
    if "dense" in past.done and "pruned" not in past.done:
        measurements.remember_dense(config, stack, study.texts, study.reference)
    if study.trains and config.distil:
        twin = copy.deepcopy(stack.model)
        path = next(name for name, module in stack.model.named_modules() if module is stack.parent)
        study.lab.teacher = dataclasses.replace(stack, model=twin, parent=twin.get_submodule(path))


def _choose_and_move(study: Study) -> Events:
    """Stage 1, then stage 2; in turns, a part of each, where `config.cycles` is more than one."""
    config, past, lab = study.config, study.past, study.lab
    count = count_to_remove(config, lab.n_layers)
    spans, parts = shared_out(config.stage2_steps, config.cycles), shared_out(count, config.cycles)
    for cycle, (part, span) in enumerate(zip(parts, spans, strict=True), 1):
        fresh = cycle > len(past.choices)
        if fresh:
            begun = past.round and cycle == len(past.choices) + 1
            yield from _choose(study, part.steps, begun=bool(begun))
        else:
            study.chosen = past.choices[cycle - 1]
        yield from fresh_events(fresh, _ways_to_prune(study, count))
        if study.changes and config.cycles == 1:  # with more cycles, training comes before the last choice
            with study.pruned():
                yield from study.measured("direct")
        yield from _repair(study)
        if not study.trains:
            return
        last = span.done + lab.steering.steps(config, span.steps)
        if past.step <= last:  # else the file to resume from has the weights of a later cycle
            yield from _move(study, cycle, span)
        lab.gone = study.chosen


def _choose(study: Study, count: int, begun: bool) -> Events:
    """Choose `count` more layers for P. The choice is `begun` where a run broke off in the middle of it."""
    method, lab, config = study.method, study.lab, study.config
    if not begun:
        units = methods.UNITS if method.pass_counts != methods.PassCounts() else 0
        steps = methods.most_steps(lab.steering.now(config), lab.steering.layers(config, count, lab.n_layers))
        yield ev.PhaseStarted("choose", steps if method.trains else units)
    with hooks.skipped(study.stack, lab.gone):
        study.chosen = [*lab.gone, *(yield from method.choose(lab, config, count))]
    yield ev.LayersChosen(method.name, study.chosen)


def _ways_to_prune(study: Study, count: int) -> Events:
    """Set `study.pruned`: the chosen layers go, or all layers become narrower. Some methods rewrite weights first."""
    method, lab, config = study.method, study.lab, study.config
    if method.rewrite:
        study.undo.enter_context(training.rewritten((yield from method.rewrite(lab, config, study.chosen))))
    study.pruned = partial(removal.removed, study.stack, study.chosen)
    if method.narrow:
        study.pruned = partial(removal.narrowed, study.stack, *(yield from method.narrow(lab, config, count)))


def _repair(study: Study) -> Events:
    """Give the layers that stay the weights that the repair finds; the old ones come back when the run ends. Not where
    the run resumes from a file with later weights; one with adapters alone has none."""
    config, past, repair = study.config, study.past, study.transfer.repair
    if not repair or (past.step and not config.adapter_rank):
        return
    study.undo.enter_context(transfers.opened(study.lab, study.transfer, study.chosen))
    lab, earlier = study.lab, past.refits if "repair" not in past.done else float("inf")
    probed = partial(measurements.along_repair, config, lab.stack, study.texts, study.chosen, lambda: lab.edits)
    edits = yield from probed(repair(lab, config, study.chosen), earlier)
    study.undo.enter_context(training.rewritten(edits))
    if study.trains:
        with study.pruned():
            yield from study.measured("repaired", sample=False)


def _move(study: Study, cycle: int, span: Span) -> Events:
    """Take this cycle's steps of stage 2, and probe now and then what deletion would cost."""
    config, past, stack, texts = study.config, study.past, study.stack, study.texts
    if config.adapter_rank and quantization.is_packed(study.model) and not lora.of(stack):
        study.undo.enter_context(lora.adapted(stack, config.adapter_rank, config.seed))  # never merged, but kept
    resumed = past.step > span.done
    if not resumed:
        yield ev.PhaseStarted("transfer", study.lab.steering.steps(config, span.steps))
    with study.pruned() if study.deletes_first else contextlib.nullcontext():
        penalised_layers = [] if study.deletes_first else study.chosen
        if cycle == 1 and not resumed:
            yield from measurements.probe(config, stack, texts, penalised_layers, 0)
        within = past if resumed else None
        for event in transfer(study.lab, config, study.chosen, span, study.deletes_first, within, study.waypoints):
            yield event
            if isinstance(event, ev.StageTwoStepped) and probe_due(study.lab.steering.now(config), event.step):
                yield from measurements.probe(config, stack, texts, penalised_layers, event.step)


def _delete(study: Study) -> Events:
    """Measure the model without the chosen layers; they are back afterwards."""
    before = _size(study.stack)
    with study.pruned():
        remaining = [i for i in range(study.lab.n_layers + len(study.chosen)) if i not in study.chosen]
        after = _size(study.stack)
        if not study.past.removed:
            yield ev.LayersRemoved(sorted(study.chosen), remaining, before[0], after[0], before[1], after[1])
        yield from study.measured(*(("pruned",) if study.changes else ("pruned", "direct")))  # it is both


def _save(study: Study) -> Events:
    config = study.config
    trained = config.save_trained and study.trains and not study.deletes_first
    if not study.run or not (config.save_model or trained):
        return
    yield ev.PhaseStarted("save", 2 * (config.save_model + trained))
    keep = partial(saving.keep, config, study.stack, study.tokenizer, study.run)
    size = (yield from keep("trained-model", 0)) if trained else 0
    if config.save_model:
        with study.pruned():
            size += yield from keep("model", 2 * trained)
    yield ev.ModelSaved(size)


def _size(stack: Stack) -> tuple[int, int]:
    """How many parameters the model has, and their bytes; adapters on packed weights are not counted."""
    with lora.set_aside(stack) if quantization.is_packed(stack.model) else contextlib.nullcontext():
        return perplexity.parameter_bytes(stack.model)
