"""A run, from a config to a pruned model, as one flat generator of events. Read it from top to bottom: that is the
method.

    for event in execute(config): ...

Close the generator at any event: a model that was passed in is then what it was, to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import shutil
import statistics
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from trsp_core import files as files_module
from trsp_core import formatting, machine, malloc
from trsp_core.data import blocks as data
from trsp_core.data import special_tokens, text_check
from trsp_core.errors import TrspError, refuse
from trsp_core.evaluation import generation, layer_removal, perplexity, verification
from trsp_core.files import sync, sync_all
from trsp_core.models import catalog, loading, tokenizer_check
from trsp_core.pruning import forecast, methods, preflight, validate
from trsp_core.pruning.checkpointing import Rounds, Waypoints
from trsp_core.pruning.lab import Lab
from trsp_core.pruning.progress import Past
from trsp_core.pruning.stage2 import transfer
from trsp_core.schema import config as configs
from trsp_core.schema import events as ev
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import Event
from trsp_core.schema.run_folder import RunFolder
from trsp_core.schema.schedules import shared_out
from trsp_core.surgery import discovery, hooks, lora, quantization, removal, training
from trsp_core.surgery.stack import Stack

T = TypeVar("T")
Events = Generator[Event, None, None]
SPEED_PROMPT, SPEED_NEW = 128, 16  # tokens read and tokens written in one timing


def execute(
    config: RunConfig,
    folder: Path | None = None,
    loaded: tuple[nn.Module, Any] | None = None,
    past: Past | None = None,
) -> Events:
    """Prune as `config` says and tell each event.

    Args:
        folder: the run folder, where the pruned model goes; None keeps nothing.
        loaded: a model and its tokenizer to work on, instead of loading `config.model`. It is left as it was.
        past: of a run that broke off: what is settled is not told again, and done again only where it has to be.

    Raises:
        TrspError: what was asked cannot be done; the message says why and what to do.
    """
    past = past or Past()
    run = RunFolder(folder) if folder else None
    fresh, waypoints = not past.place, Waypoints(run, config)
    model, tokenizer, stack = yield from _told(fresh, _opened(config, loaded))

    with contextlib.ExitStack() as undo:
        if loaded and (config.learn_weights or config.stage2_steps):
            undo.enter_context(training.restored(model))
        undo.enter_context(training.learning(model, []))

        texts = yield from _told(fresh, _texts(config, tokenizer, stack))
        lab = Lab(stack, texts.calibration, config)
        lab.rounds = Rounds(run, config, past)
        first = config.control == "delete_first"  # then there is nothing to see before deletion

        reference = perplexity.Reference(config.kl_blocks)
        if "dense" not in past.done:
            yield from _measured(config, lab, texts, tokenizer, reference, ("dense",))
        elif "pruned" not in past.done:
            _look_again(config, lab, texts, reference)
        if config.stage2_steps and config.distil:
            twin = copy.deepcopy(model)
            lab.teacher = dataclasses.replace(stack, model=twin, parent=_twin_of(stack.parent, model, twin))
        if config.stage2_steps and not first and "importance" not in past.done:
            yield from _weighed(config, stack, texts, "dense", "importance")

        method = methods.get(config.method)
        count, chosen = configs.layers_to_remove(config.ratio, lab.n_layers), []
        cut: Callable[[], Any] = contextlib.nullcontext  # makes the pruned model, for a while
        spans, parts = shared_out(config.stage2_steps, config.cycles), shared_out(count, config.cycles)
        for cycle, (part, span) in enumerate(zip(parts, spans, strict=True), 1):
            new = cycle > len(past.choices)
            if new:
                if not past.round or cycle > len(past.choices) + 1:
                    yield ev.PhaseStarted("choose", _choosing_steps(config, method, part.steps))
                with hooks.skipped(stack, lab.gone):
                    chosen = [*lab.gone, *(yield from method.choose(lab, config, part.steps))]
                yield ev.LayersChosen(method.name, chosen)
            else:
                chosen = past.choices[cycle - 1]
            if method.rewrite:
                undo.enter_context(training.rewritten((yield from _told(new, method.rewrite(lab, config, chosen)))))
            cut = partial(removal.removed, stack, chosen)
            if method.narrow:
                cut = partial(removal.narrowed, stack, *(yield from _told(new, method.narrow(lab, config, count))))
            if not config.stage2_steps:
                break
            if past.step > span.done + span.steps:  # the weights of a later cycle are in the file
                lab.gone = chosen
                continue
            if config.cycles == 1 and "direct" not in past.done:  # with more, no model is dense and without all of them
                with cut():
                    yield from _measured(config, lab, texts, tokenizer, reference, ("direct",))
            if config.adapter_rank and quantization.is_packed(model) and not lora.of(stack):
                undo.enter_context(lora.adapted(stack, config.adapter_rank, config.seed))  # never merged, but kept
            inside = past.step > span.done
            if not inside:
                yield ev.PhaseStarted("transfer", span.steps)
            with cut() if first else contextlib.nullcontext():
                doomed = [] if first else chosen
                if cycle == 1 and not inside:
                    yield from _probe(config, stack, texts, doomed, 0)
                for event in transfer(lab, config, chosen, span, first, past if inside else None, waypoints):
                    yield event
                    if isinstance(event, ev.StageTwoStepped) and _probe_due(config, event.step):
                        yield from _probe(config, stack, texts, doomed, event.step)
            lab.gone = chosen
        if config.stage2_steps and not first and "trained" not in past.done:
            yield from _measured(config, lab, texts, tokenizer, reference, ("trained",), sample=False)
        if config.stage2_steps and not first and "importance after" not in past.done:
            yield from _weighed(config, stack, texts, "trained", "importance after")

        before = _size(stack)
        with cut():
            kept = [i for i in range(lab.n_layers + len(chosen)) if i not in chosen]
            after = _size(stack)
            if not past.removed:
                yield ev.LayersRemoved(sorted(chosen), kept, before[0], after[0], before[1], after[1])
            states = ("pruned",) if config.stage2_steps else ("pruned", "direct")  # no training: one model is both
            if "pruned" not in past.done:
                yield from _measured(config, lab, texts, tokenizer, reference, states)
        if config.speed_repeats and "speed" not in past.done:
            yield from _speeds(config, stack, texts, cut)
        trained = config.save_trained and config.stage2_steps and not first
        if folder and (config.save_model or trained):
            keep = partial(_keep, config, stack, tokenizer, RunFolder(folder))
            yield ev.PhaseStarted("save", 2 * (config.save_model + trained))
            size = (yield from keep("trained-model", 0)) if trained else 0
            if config.save_model:
                with cut():
                    size += yield from keep("model", 2 * trained)
            yield ev.ModelSaved(size)
    yield ev.RunFinished(perplexity.peak_bytes())
    if run:
        run.checkpoint_file.unlink(missing_ok=True)
        run.rounds_file.unlink(missing_ok=True)


def _told(fresh: bool, story: Generator[Event, None, T]) -> Generator[Event, None, T]:
    """`story`; where it is not `fresh`, only what comes of it."""
    with contextlib.closing(story):
        while True:
            try:
                event = next(story)
            except StopIteration as end:
                return end.value
            if fresh:
                yield event


def _opened(
    config: RunConfig, loaded: tuple[nn.Module, Any] | None
) -> Generator[Event, None, tuple[nn.Module, Any, Stack]]:
    """The plan, then the model with its tokenizer and its stack of layers.

    Raises:
        TrspError: it cannot be had, or not with this config.
    """
    plan = preflight.preflight(config) if loaded is None else None
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    if plan:
        yield _planned(plan)

    yield ev.PhaseStarted("load")
    rate = 0.0
    if not (plan and config.threads):  # else nobody asks for it
        rate = perplexity.matrix_rate()
    if not config.threads:
        machine.write_rate(rate)
    precision, note = loading.settle_precision(config.precision, config.device)
    model, tokenizer = loaded or loading.load(config.model, precision, config.device, config.compute_dtype)
    if note and not loaded:
        yield ev.Noted(note)
    stack = discovery.find(model)
    refuse(validate.check(config, len(stack.layers), stack.context))
    if not plan:
        yield _planned(forecast.forecast(config, _facts(config, stack), rate))
    yield _model_loaded(config, stack)
    return model, tokenizer, stack


def _texts(config: RunConfig, tokenizer: Any, stack: Stack) -> Generator[Event, None, data.Texts]:
    yield ev.PhaseStarted("text")
    with tokenizer_check.panics_refused(config.model):
        texts = data.prepare(config, tokenizer)
        text_check.refuse_texts(texts, tokenizer, config, stack.text_config.vocab_size)
    for note in texts.notes:
        yield ev.Noted(note)
    wanted = len(special_tokens.begun(tokenizer, config.prompt)), config.sample_tokens
    if config.sample_tokens and not wanted[0]:
        raise TrspError("The sample prompt holds no token.", "Write another one, or set --sample-tokens to 0.")
    fits = generation.fitted(stack.context, *wanted)
    if config.sample_tokens and fits != wanted:
        yield ev.Noted(
            f"This model reads {stack.context} tokens at most: a sample is the last {fits[0]} of the prompt's "
            f"{wanted[0]} tokens and {fits[1]} of {wanted[1]} new ones."
        )
    yield from texts.events
    return texts


def _look_again(config: RunConfig, lab: Lab, texts: data.Texts, reference: perplexity.Reference) -> None:
    """What the dense model predicts, for a run that has measured it before and keeps but the figures."""
    for domain in ev.DOMAINS:
        blocks = texts.measure[domain]
        watch, _ = reference.watch(domain)
        first = blocks[: perplexity.whole_batches(blocks, config.kl_blocks, lab.device)]
        for _ in perplexity.block_losses(lab.model, first, watch):
            pass


def _measured(
    config: RunConfig,
    lab: Lab,
    texts: data.Texts,
    tokenizer: Any,
    reference: perplexity.Reference,
    states: tuple[str, ...],
    sample: bool = True,
) -> Iterator[Event]:
    """Perplexity of the model as it stands and its distance from the dense one, in both domains, and a sample of its
    text; `states` are what it is."""
    yield ev.PhaseStarted(states[0], sum(len(blocks) for blocks in texts.measure.values()))
    done = 0
    for domain in ev.DOMAINS:
        blocks, losses = texts.measure[domain], []
        watch, divergences = reference.watch(domain)
        for part in perplexity.block_losses(lab.model, blocks, watch):
            losses += part
            done += len(part)
            yield ev.Progressed(done)
        for state in states:
            yield ev.PerplexityMeasured(
                state=state,
                domain=domain,
                perplexity=perplexity.perplexity(losses),
                losses=losses,
                text=texts.names[domain],
                blocks=blocks.shape[0],
                block_length=blocks.shape[1],
                tokens=blocks.shape[0] * (blocks.shape[1] - 1),
                dtype=_dtype(lab.model),
            )
            if divergences:
                tokens = len(divergences) * (blocks.shape[1] - 1)
                kl = statistics.fmean(divergences)
                yield ev.DivergenceMeasured(state, domain, kl, list(divergences), len(divergences), tokens)
    malloc.give_back()  # training needs it; after a probe it would be asked for again at once
    if sample and config.sample_tokens:
        prompt, text = generation.continuation(
            lab.model, tokenizer, config.prompt, config.sample_tokens, lab.stack.context
        )
        for state in states:
            yield ev.TextGenerated(state, prompt, text)


def _weighed(config: RunConfig, stack: Stack, texts: data.Texts, state: str, phase: str) -> Iterator[Event]:
    """How much the loss rises without each layer alone, on the first measured blocks of the calibration domain; from
    the top down, so that what lies below a layer is computed once."""
    blocks = texts.measure["calibration"][: config.importance_blocks]
    if not len(blocks):
        return
    n_layers = len(stack.layers)
    yield ev.PhaseStarted(phase, n_layers)
    path = layer_removal.Path(stack, blocks.to(next(stack.model.parameters()).device))
    dense = path.figures(frozenset()).loss
    rises = [0.0] * n_layers
    for done, layer in enumerate(reversed(range(n_layers)), 1):
        rises[layer] = path.figures(frozenset([layer])).loss - dense
        yield ev.Progressed(done)
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    yield ev.ImportanceMeasured(state, rises, dense, texts.names["calibration"], len(blocks), tokens)


def _probe_due(config: RunConfig, step: int) -> bool:
    return step % config.probe_every == 0 or step == config.stage2_steps


def _probe(config: RunConfig, stack: Stack, texts: data.Texts, chosen: list[int], step: int) -> Iterator[Event]:
    """Perplexity if the chosen layers were deleted now, on the first measured blocks of each domain."""
    for domain in ev.DOMAINS:
        blocks = texts.measure[domain][: config.probe_blocks]
        if not len(blocks):
            return
        with hooks.skipped(stack, chosen):
            losses = [loss for part in perplexity.block_losses(stack.model, blocks) for loss in part]
        tokens = blocks.shape[0] * (blocks.shape[1] - 1)
        yield ev.DeletionProbed(step, perplexity.perplexity(losses), len(blocks), tokens, domain, losses)


def _speeds(config: RunConfig, stack: Stack, texts: data.Texts, cut: Callable[[], Any]) -> Iterator[Event]:
    """Prefill and decode of both models, in turn, so that a change of the machine's pace meets both; the first is a
    warm-up. Training has not changed the shapes, so the dense ones are timed on the model at hand. Where the context is
    short, less is read and less is written.

    Args:
        cut: context in which the model is the pruned one.
    """
    yield ev.PhaseStarted("speed", config.speed_repeats)
    read, written = generation.fitted(stack.context, SPEED_PROMPT, SPEED_NEW)
    prompt = texts.measure["calibration"].flatten()[:read].view(1, -1)
    prompt = prompt.to(next(stack.model.parameters()).device)
    dense, pruned = [], []
    for repeat in range(config.speed_repeats + 1):
        dense.append(perplexity.time_once(stack.model, prompt, written))
        with cut():
            pruned.append(perplexity.time_once(stack.model, prompt, written))
        yield ev.Progressed(repeat)
    for state, timings in (("dense", dense[1:]), ("pruned", pruned[1:])):
        prefill, decode = ([t[i] for t in timings] for i in (0, 1))
        yield ev.SpeedMeasured(
            state,
            prompt.shape[1],
            written,
            config.speed_repeats,
            *perplexity.spread(prefill),
            *perplexity.spread(decode),
        )


def _keep(
    config: RunConfig, stack: Stack, tokenizer: Any, run: RunFolder, name: str, done: int
) -> Generator[Event, None, int]:
    """Write the model at hand into the run's folder `name`, where it lies only once a fresh process with stock
    transformers has computed the same from it; returns its bytes.

    Args:
        done: units of the phase that are done.

    Raises:
        TrspError: it cannot be loaded, or computes something else. It is left in `unproved-NAME`.
    """
    unproved, computed = run.folder / f"unproved-{name}", run.folder / f".{name}-proof.partial"
    try:
        size = save(config, stack, tokenizer, unproved, computed)
        yield ev.Progressed(done + 1)
        malloc.give_back()
        torch.cuda.empty_cache()
        yield from _proved(run, unproved, computed, ev.Progressed(done + 1))
        if name == run.model_folder.name:
            computed.replace(run.proof_file)  # exports are compared with it
        shutil.rmtree(run.folder / name, ignore_errors=True)
        unproved.replace(run.folder / name)
        sync(run.folder)
    except (GeneratorExit, KeyboardInterrupt):
        shutil.rmtree(unproved, ignore_errors=True)
        raise
    finally:
        computed.unlink(missing_ok=True)
    yield ev.Progressed(done + 2)
    return size


def _proved(run: RunFolder, unproved: Path, computed: Path, now: ev.Progressed) -> Iterator[Event]:
    """Let a fresh process load the checkpoint in `unproved` and compare it with what `proof.keep` wrote to `computed`.
    Tells `now` again where the run is to stop meanwhile."""
    files = f"The files are in {unproved.name}, unproved."
    again = "All that was measured stays, and resuming the run tries this again; without --save-model nothing is kept."
    if (free := machine.available_memory()) < forecast.BASE:
        raise TrspError(
            f"The model is not proved: a fresh process to load it takes {formatting.size(forecast.BASE)} of memory, "
            f"{formatting.size(free)} are free. {files}",
            f"Free some memory. {again}",
        )
    with contextlib.closing(verification.checking(unproved, computed)) as waiting:
        while True:
            try:
                next(waiting)
            except StopIteration as end:
                problems = end.value.problems
                break
            except TrspError as error:
                raise TrspError(f"{error.message} {files}", f"{error.remedy} {again}") from error
            if run.cancelled():
                yield now
    if problems:
        raise TrspError(
            f"The model that stock transformers loads is not the one of this run: {'; '.join(problems)}. {files}",
            f"Please report this. {again}",
        )


def save(config: RunConfig, stack: Stack, tokenizer: Any, target: Path, reference: Path | None = None) -> int:
    """Write an ordinary checkpoint (safetensors) to `target`, whole or not at all; returns its bytes. A packed model is
    spelled out in bfloat16 with its adapters merged, or, as `config.save_as` says, written as it is, with its adapters
    in the folder `adapter`.

    Args:
        reference: where to keep what the model in memory says, for the proof of an export.
    """
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    packed = quantization.is_packed(stack.model)
    beside = packed and config.save_as == "adapters"
    model: Any = quantization.spelled_out(stack, torch.bfloat16) if packed and not beside else stack.model
    dtype = model.config.dtype
    try:
        with lora.set_aside(stack) if beside else contextlib.nullcontext():
            model.save_pretrained(temporary)
    finally:
        model.config.dtype = dtype  # save_pretrained leaves a string there
    if beside and lora.of(stack):
        lora.save(stack, temporary / "adapter", config.model)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    sync_all(temporary)
    temporary.replace(target)
    if reference:
        verification.keep(model, tokenizer, reference)
        sync(reference)
    sync(target.parent)
    return files_module.folder_size(target)


def _twin_of(module: nn.Module, model: nn.Module, twin: nn.Module) -> nn.Module:
    """The module of `twin`, a copy of `model`, that stands where `module` stands."""
    return twin.get_submodule(next(name for name, m in model.named_modules() if m is module))


def _choosing_steps(config: RunConfig, method: methods.Method, count: int) -> int:
    if not method.trains:
        return methods.UNITS if method.passes != methods.Passes() else 0
    return config.stage1_steps * (1 if config.one_shot else count)


def _planned(plan: forecast.Forecast) -> ev.RunPlanned:
    return ev.RunPlanned(list(plan.phases), plan.peak_bytes)


def _facts(config: RunConfig, stack: Stack) -> catalog.Facts:
    """What `models.facts` reads from a checkpoint, taken from a model in memory."""
    parameters, size = perplexity.parameter_bytes(stack.model)
    text = stack.text_config
    return catalog.Facts(
        name=config.model,
        folder=Path(),
        architecture=type(stack.model).__name__,
        n_layers=len(stack.layers),
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        max_length=stack.context,
        parameters=parameters,
        layer_parameters=[perplexity.parameter_bytes(layer)[0] for layer in stack.layers],
        bytes=size,
    )


def _model_loaded(config: RunConfig, stack: Stack) -> ev.ModelLoaded:
    facts = _facts(config, stack)
    return ev.ModelLoaded(
        model=config.model,
        architecture=facts.architecture,
        n_layers=facts.n_layers,
        width=facts.width,
        vocabulary=facts.vocabulary,
        parameters=facts.parameters,
        layer_parameters=list(facts.layer_parameters),
        bytes=facts.bytes,
        dtype=_dtype(stack.model),
        device=str(next(stack.model.parameters()).device),
    )


def _size(stack: Stack) -> tuple[int, int]:
    """Parameters of the model and their bytes; adapters on packed weights are not counted."""
    with lora.set_aside(stack) if quantization.is_packed(stack.model) else contextlib.nullcontext():
        return perplexity.parameter_bytes(stack.model)


def _dtype(model: nn.Module) -> str:
    """The number format of the weights, and of the products where that is another."""
    plain = str(next(model.parameters()).dtype).removeprefix("torch.")
    packed = quantization.name_of(model)
    return f"{packed}, products in {plain}" if packed else plain
