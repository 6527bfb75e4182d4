"""Measures a run's model, and tells the figures as events: perplexity in both domains, how much each layer is worth,
what deletion would cost now, and speed."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor, nn

from trsp_core import malloc
from trsp_core.data.blocks import Texts
from trsp_core.evaluation import generation, layer_removal, perplexity
from trsp_core.schema import events as ev
from trsp_core.schema import schedules
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import Event
from trsp_core.surgery import hooks, quantization, training
from trsp_core.surgery.stack import Stack

T = TypeVar("T")
SPEED_PROMPT, SPEED_NEW = 128, 16  # tokens read and tokens written in one timing


def remember_dense(config: RunConfig, stack: Stack, texts: Texts, reference: perplexity.Reference) -> None:
    """Let `reference` see what the dense model predicts, without telling events: for a run that broke off after it had
    measured the dense model."""
    device = next(stack.model.parameters()).device
    for domain in ev.DOMAINS if config.kl_blocks else ():
        blocks = texts.measure[domain]
        watch, _ = reference.watch(domain)
        first = blocks[: perplexity.whole_batches(blocks, config.kl_blocks, device)]
        for _ in perplexity.block_losses(stack.model, first, watch):
            pass


def perplexities(stack: Stack, texts: Texts, reference: perplexity.Reference, *states: str) -> Iterator[Event]:
    """Measure, in both domains, the perplexity of the model as it stands, and its KL from the dense model.

    Args:
        reference: what the dense model predicts; the first measurement of a run is of that model, and fills it.
        states: names of the model as it stands, such as "pruned"; the figures are told for each of them.
    """
    yield ev.PhaseStarted(states[0], sum(len(blocks) for blocks in texts.measure.values()))
    done = 0
    for domain in ev.DOMAINS:
        blocks, losses = texts.measure[domain], []
        watch, divergences = reference.watch(domain)
        for few in perplexity.block_losses(stack.model, blocks, watch):
            losses += few
            done += len(few)
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
                dtype=number_format(stack.model),
            )
            if divergences:
                tokens = len(divergences) * (blocks.shape[1] - 1)
                kl = statistics.fmean(divergences)
                yield ev.DivergenceMeasured(state, domain, kl, list(divergences), len(divergences), tokens)
    malloc.give_back()  # training needs it; after a probe it would be asked for again at once


def sample(config: RunConfig, stack: Stack, tokenizer: Any, *states: str) -> Iterator[Event]:
    """Let the model as it stands continue the prompt, always with the likeliest token; `states` are names of it, as in
    `perplexities`."""
    if config.sample_tokens:
        prompt, text = generation.continuation(
            stack.model, tokenizer, config.prompt, config.sample_tokens, stack.context
        )
        for state in states:
            yield ev.TextGenerated(state, prompt, text)


def importance(config: RunConfig, stack: Stack, texts: Texts, state: str, phase: str) -> Iterator[Event]:
    """Measure how much the loss rises without each layer alone, on the first measured blocks of the calibration domain.
    Layers are taken from the top down, so that what lies below them is computed only once.

    Args:
        state: a name of the model as it stands, for the event.
        phase: the name of this phase of the run.
    """
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


def probe(config: RunConfig, stack: Stack, texts: Texts, chosen: list[int], step: int) -> Iterator[Event]:
    """Measure the perplexity that the model would have if the layers `chosen` were deleted now, after `step` of stage
    2, on the first measured blocks of each domain."""
    for domain in ev.DOMAINS if config.probe_blocks else ():
        losses, tokens = _losses_without(config, stack, texts, chosen, domain)
        yield ev.DeletionProbed(step, perplexity.perplexity(losses), len(losses), tokens, domain, losses)


def along_repair(
    config: RunConfig,
    stack: Stack,
    texts: Texts,
    chosen: list[int],
    edits: Callable[[], Mapping[nn.Parameter, Tensor]],
    story: Generator[Event, None, T],
    earlier: float = 0,
) -> Generator[Event, None, T]:
    """Pass on the events of a repair and what it returns; behind some of its layers, measure the perplexity that the
    model would have if the repair stopped there, on the first measured blocks of each domain.

    Args:
        edits: called for the new weights so far, by parameter.
        story: the repair.
        earlier: the events up to that of so many repaired layers are left out, since an earlier process has told
            them; infinite where it has told all.
    """
    done, due = 0, []
    with contextlib.closing(story):
        while True:
            try:
                event = next(story)
            except StopIteration as end:
                return end.value
            if done >= earlier:
                yield event
            if isinstance(event, ev.RepairPlanned):
                due = schedules.repair_probes(config, len(event.layers))
            if isinstance(event, ev.LayerRefitted):
                done += 1
                if done in due and done >= earlier:
                    with training.rewritten(edits()):
                        samples = {d: _losses_without(config, stack, texts, chosen, d) for d in ev.DOMAINS}
                    for domain, (losses, tokens) in samples.items():
                        figure = perplexity.perplexity(losses)
                        yield ev.RepairProbed(done, figure, len(losses), tokens, domain, losses)


def _losses_without(
    config: RunConfig, stack: Stack, texts: Texts, chosen: list[int], domain: str
) -> tuple[list[float], int]:
    """The loss of each of the first measured blocks of a domain without the layers `chosen`, in nats a token, and the
    number of tokens of all of them."""
    blocks = texts.measure[domain][: config.probe_blocks]
    with hooks.skipped(stack, chosen):
        losses = [loss for few in perplexity.block_losses(stack.model, blocks) for loss in few]
    return losses, blocks.shape[0] * (blocks.shape[1] - 1)


def speeds(
    config: RunConfig, stack: Stack, texts: Texts, pruned: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Event]:
    """Measure the speed of the dense and the pruned model, reading a prompt and writing tokens.

    They are timed in turn, so that other work on the machine slows down both; the first turn is a warm-up, and does not
    count. The model with all its layers stands for the dense one, since training does not change shapes. Where the
    context is short, fewer tokens are read and written.

    Args:
        pruned: opens a context in which the model is the pruned one.
    """
    yield ev.PhaseStarted("speed", config.speed_repeats)
    read, new_tokens = generation.fitted(stack.context, SPEED_PROMPT, SPEED_NEW)
    prompt = texts.measure["calibration"].flatten()[:read].view(1, -1)
    prompt = prompt.to(next(stack.model.parameters()).device)
    timings: dict[str, list[tuple[float, float]]] = {"dense": [], "pruned": []}
    for repeat in range(config.speed_repeats + 1):
        timings["dense"].append(perplexity.time_once(stack.model, prompt, new_tokens))
        with pruned():
            timings["pruned"].append(perplexity.time_once(stack.model, prompt, new_tokens))
        yield ev.Progressed(repeat)
    for state, (_, *timed) in timings.items():
        prefills, decodes = zip(*timed, strict=True)
        yield ev.SpeedMeasured(
            state,
            prompt.shape[1],
            new_tokens,
            config.speed_repeats,
            *perplexity.spread(prefills),
            *perplexity.spread(decodes),
        )


def number_format(model: nn.Module) -> str:
    """The number format of the weights, in words: "float32", or "nf4, products in bfloat16" where they are packed."""
    plain = str(next(model.parameters()).dtype).removeprefix("torch.")
    packed = quantization.name_of(model)
    return f"{packed}, products in {plain}" if packed else plain
