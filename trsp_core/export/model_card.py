"""Texts about an exported model: its card, how to repeat its run, and a recipe for mergekit.

A card is for others, so of the path of a local model or text it names the last part alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trsp_core import escaping, formatting
from trsp_core.evaluation import intervals
from trsp_core.evaluation.verification import Proof
from trsp_core.export import gguf_layer_kinds
from trsp_core.models import catalog
from trsp_core.pruning import methods, transfers
from trsp_core.schema import turns
from trsp_core.schema.config import KNOBS, PACKED, TEXTS, RunConfig
from trsp_core.schema.events import DOMAINS, DivergenceMeasured, KnobTurned, PerplexityMeasured
from trsp_core.schema.run_state import RunState

TITLES = {
    "dense": "Dense, as it came",
    "direct": "The same layers deleted at once, nothing trained",
    "repaired": "Repaired, nothing trained",
    "trained": "Trained, all layers still there",
    "pruned": "This model",
}
# Kinds of models (config.model_type) of which mergekit 0.1.5 was seen to make the export: the same config, and tensors
# equal to the bit. True or False: only with the head tied to the embedding, or only apart, as the kind has it unsaid.
MERGED: dict[str, bool | None] = {
    **dict.fromkeys(("gpt2", "granite", "llama", "mamba", "mistral", "olmo2", "starcoder2")),
    "gemma": True,
    **dict.fromkeys(("phi", "phi3", "stablelm"), False),
}
DOMAIN_TITLES = {"calibration": "calibration domain", "heldout": "held-out domain"}


def public_config(config: RunConfig) -> RunConfig:
    """The config without the folders of this machine."""
    return dataclasses.replace(
        config, model=_last(config.model), text=_last(config.text), heldout=_last(config.heldout)
    )


def script(config: RunConfig, history: Sequence[KnobTurned] = ()) -> str:
    """A Python script that repeats the run, with the knobs that were turned in it; only settings that differ from the
    defaults are named."""
    changes = {name: value for name, value in config.as_dict().items() if value != KNOBS[name].default}
    arguments = "".join(f"\n    {name}={value!r}," for name, value in changes.items()) + ("\n" if changes else "")
    words = "".join(f"\n    {turns.word(turn)!r}," for turn in history)
    more = "from trsp_core.runs import steering\nfrom trsp_core.schema import turns\n" if words else ""
    schedule = f"steering.schedule(run, map(turns.from_word, [{words}\n]))  # it was steered while it ran\n"
    story = "execute(config, run.folder)"
    if words:
        story = "steering.steered(run, config, lambda wheel: execute(config, run.folder, steering=wheel))"
    return (
        f"from trsp_core import RunConfig, Store, execute, record\n{more}"
        "\n"
        f"config = RunConfig({arguments})\n"
        "run = Store().create(config)  # a new folder under runs/\n"
        f"{schedule if words else ''}"
        f"state = record(run, {story})\n"
        "print(run.folder, state.ended, state.perplexity)\n"
    )


def name(config: RunConfig, state: RunState, dtype: str) -> str:
    """A name for the exported model: `smollm2-135m-trsp-22-of-30-float32`."""
    base = re.sub(r"[^\w.-]+", "-", _last(config.model)).strip(".-") or "model"
    rest = "narrow"
    if state.removed and not state.narrowed:
        n_kept = len(state.removed.kept)
        rest = f"{n_kept}-of-{n_kept + len(state.removed.removed)}"
    return f"{base}-{config.method}-{rest}-{dtype}"


def is_direct(config: RunConfig, state: RunState) -> bool:
    """Whether this model is its base without some layers, and nothing else was changed."""
    method = methods.all_methods().get(config.method)
    learned = config.learn_weights and config.method == "trsp"
    plain = method and not method.rewrite and not state.narrowed and not state.refits
    repair = getattr(transfers.all_transfers().get(config.transfer), "repair", None)
    return bool(plain and not repair and not config.stage2_steps and not learned)


def no_recipe(config: RunConfig, state: RunState, exported: dict[str, Any], dtype: str) -> str:
    """Why there is no recipe for mergekit, in a sentence; "" where mergekit makes the same tensors.

    Args:
        exported: the config.json of the export.
        dtype: the number format of its weights.
    """
    kind, reason = str(exported.get("model_type", "")), ""
    lists = _per_layer(exported, len(state.removed.kept)) if state.removed else []
    if not is_direct(config, state):
        reason = "more than whole layers of the base was changed"
    elif config.precision in PACKED or "quantization_config" in exported:
        away = "up to 14 % of the largest weight away"
        reason = f"its weights were packed as {config.precision}, and mergekit takes the base's own, {away}"
    elif config.precision == "bfloat16" and dtype != "bfloat16":
        reason = f"the run's weights were rounded to bfloat16 before they were written as {dtype}"
    elif lists:
        reason = f"mergekit does not cut what config.json says of each layer ({', '.join(lists)}), and ends in an error"
    elif kind not in MERGED:
        reason = f"mergekit 0.1.5 was not seen to give the same tensors for models of the kind {kind}"
    elif MERGED[kind] not in (None, exported.get("tie_word_embeddings", MERGED[kind])):
        reason = f"mergekit expects a head {'that is the embedding' if MERGED[kind] else 'apart from the embedding'}"
    return f"There is no mergekit.yml: {reason}." if reason else ""


def _per_layer(exported: dict[str, Any], n_layers: int) -> list[str]:
    """Fields of a config.json with an entry for each of the kept layers."""
    return [
        name
        for name, value in exported.items()
        if isinstance(value, list) and len(value) == n_layers and not name.endswith(("_token_id", "architectures"))
    ]


def mergekit(config: RunConfig, state: RunState, dtype: str) -> str:
    """A recipe for mergekit that deletes the same layers; of use where `no_recipe` has nothing to say."""
    assert state.removed
    base, slices = escaping.yaml(_base(config)), []
    for _, group in itertools.groupby(enumerate(sorted(state.removed.kept)), key=lambda pair: pair[1] - pair[0]):
        layers = [layer for _, layer in group]
        slices.append(f"  - sources:\n      - model: {base}\n        layer_range: [{layers[0]}, {layers[-1] + 1}]\n")
    comment = (
        f"# The base of this run is a 4-bit GGUF file of {catalog.CATALOGUE[config.model].hub_id}, spelled out as\n"
        "# safetensors. mergekit wants a safetensors folder: put the converted one here (python -m trsp_core doctor\n"
        "# says where models are kept), or the hub's model, whose weights are not rounded to 4 bits.\n"
        if config.model in catalog.CATALOGUE
        else ""
    )
    return (
        "# Reproduces the deletion alone: the choice of layers, all measurements and the proof are the run's.\n"
        f"#   mergekit-yaml mergekit.yml ./pruned --copy-tokenizer\n{comment}"
        f"merge_method: passthrough\ndtype: {dtype}\nslices:\n{''.join(slices)}"
    )


def rows(state: RunState) -> list[list[str]]:
    """Perplexity before and after, with 95 % intervals where there are losses, and KL: a head, then a row a state."""
    states = [s for s in TITLES if s in state.perplexity]
    if state.perplexity.get("direct") == state.perplexity.get("pruned"):
        states = [s for s in states if s != "direct"]
    head = ["", *(f"perplexity, {DOMAIN_TITLES[d]}" for d in DOMAINS), "KL to dense, nats a token"]
    kl = {s: [state.divergence.get(s, {}).get(d) for d in DOMAINS] for s in states}
    return [
        head,
        *(
            [
                TITLES[s] if s != "direct" or not state.narrowed else "Narrowed, nothing trained",
                *(_perplexity(measurement(state, s, d)) for d in DOMAINS),
                " / ".join("–" if v is None else formatting.nats(v) for v in kl[s]) if any(kl[s]) else "",
            ]
            for s in states
        ),
    ]


def measurement(state: RunState, model_state: str, domain: str) -> PerplexityMeasured | None:
    """What was measured of the model in one state, in one domain."""
    return next((m for m in state.measured if m.state == model_state and m.domain == domain), None)


def removal(state: RunState) -> str:
    """What was removed, in a sentence."""
    if not state.removed:
        return "Nothing was removed."
    removed, before, after = state.removed, state.removed.parameters_before, state.removed.parameters
    what = f"Layers {', '.join(map(str, removed.removed))} of {len(removed.removed) + len(removed.kept)} (from 0)"
    what = f"No layer is gone, {state.narrowed.sentence}" if state.narrowed else f"{what} are gone"
    return (
        f"{what}: {formatting.count(after)} parameters instead of {formatting.count(before)} "
        f"({formatting.signed_percent(after / max(before, 1) - 1)})."
    )


def against_dense(state: RunState) -> str:
    """How much worse the model is than the dense one, in a sentence; "" where the two were not measured alike."""
    parts = []
    for domain in DOMAINS:
        one, other = measurement(state, "pruned", domain), measurement(state, "dense", domain)
        if (
            one
            and other
            and len(one.losses) == len(other.losses)
            and all(map(math.isfinite, (*one.losses, *other.losses)))
        ):
            factor = intervals.factor(one.losses, other.losses)
            parts.append(
                f"{formatting.interval(factor.value, factor.low, factor.high, formatting.ratio)} times in the "
                f"{DOMAIN_TITLES[domain]}"
            )
    return f"Against the dense model on the same blocks its perplexity is {' and '.join(parts)}." if parts else ""


def protocol(config: RunConfig, state: RunState) -> str:
    """How it was measured, so that another can repeat it."""
    parts = []
    for domain in DOMAINS:
        perplexity = measurement(state, "pruned", domain) or measurement(state, "dense", domain)
        if perplexity:
            parts.append(
                f"the {DOMAIN_TITLES[domain]}: {_text(perplexity.text)}, {perplexity.blocks} blocks of "
                f"{perplexity.block_length} tokens ({formatting.count(perplexity.tokens)} predicted), "
                f"{perplexity.dtype}"
            )
    kl_blocks = next((e.blocks for _, _, e in state.lines if isinstance(e, DivergenceMeasured)), 0)
    kl = f" KL is of the first {kl_blocks} of the blocks." if kl_blocks else ""
    packing = ""
    if config.precision in PACKED and config.save_as == "merged":
        packing = (
            f" Measured on weights packed as {config.precision}; what is kept is what they stand for, in bfloat16."
        )
    return (
        f"Lower is better. Measured in {'; '.join(parts)}. Each block is its own context, and none was trained on.{kl} "
        f"Brackets are 95 % t intervals over blocks. One seed ({config.seed}).{packing}"
    )


def procedure(config: RunConfig) -> str:
    """What was done, in a sentence or two."""
    method = methods.all_methods().get(config.method)
    choice = f"Method {config.method}" + (f", {method.title}: {method.summary}" if method else ".")
    transfer = transfers.all_transfers().get(config.transfer)
    if transfer and transfer.repair:
        choice += f" Transfer {config.transfer}, {transfer.title}: {transfer.summary}"
    if not config.stage2_steps:
        return f"{choice} Nothing was trained."
    when = "after the deletion" if config.deletes_first else "before the deletion"
    return f"{choice} Then {config.stage2_steps} training steps {when}, on blocks of {config.block_length} tokens."


def write(config: RunConfig, state: RunState, proof: Proof, title: str, exported: dict[str, Any], dtype: str) -> str:
    """The model card, README.md with the hub's front matter.

    Args:
        exported: the config.json beside it.
        dtype: the number format of the weights.
    """
    public, cells = public_config(config), rows(state)
    now = turns.applied(config, turns.values(state.turns))
    table = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    parts = [
        f"---\n{_metadata(config)}\n---",
        f"# {escaping.markdown(title)}",
        f"{_base_in_words(config)} {escaping.markdown(removal(state))}",
        f"## What was done\n\n{escaping.markdown(procedure(now))} Made with TRSP Explorer, after *Two-Stage "
        "Regularization-Based Structured Pruning for LLMs* (arXiv:2505.18232).",
        "## Before and after\n\n" + "\n".join("| " + " | ".join(map(escaping.markdown, row)) + " |" for row in table),
        escaping.markdown(turns.account(state.turns)),
        escaping.markdown(" ".join([against_dense(state), protocol(config, state)]).strip()),
        _speed(state),
        f"## Proof\n\n{escaping.markdown(proof.sentence)} The figures are in `proof.json`.",
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or the name of this repository\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n```",
        f"## Repeat\n\n{escaping.fenced(turns.command(public, state.turns), 'sh')}\n\n"
        f"The same from Python:\n\n{escaping.fenced(script(public, state.turns), 'python')}\n\n"
        "`run.json` holds every setting and the versions. Local models and texts are named by their last part.",
    ]
    parts.append(
        escaping.markdown(no_recipe(config, state, exported, dtype))
        or "`mergekit.yml` reproduces the deletion alone, nothing of the choice or the figures."
    )
    if warning := gguf_layer_kinds.warning(exported):
        parts.append(f"## To GGUF\n\n{escaping.markdown(warning)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(config: RunConfig) -> str:
    """What the hub reads of a card, as YAML."""
    from huggingface_hub import ModelCardData  # lazily: 60 ms, and a report has no need of it

    base = None
    if config.model in catalog.CATALOGUE or catalog.is_hub_id(config.model):
        base = _base(config) if catalog.is_hub_id(config.model) else _upstream(config)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        license=licence(config.model) or None,
        tags=["pruning", "width-pruning" if config.method == "width" else "depth-pruning", "trsp"],
    ).to_yaml()


def licence(model: str) -> str:
    """The hub's word for the licence of a base model; "" where nothing says it."""
    if model in catalog.CATALOGUE:
        return "gemma" if catalog.CATALOGUE[model].terms else catalog.CATALOGUE[model].licence.lower()
    try:
        text = (catalog.locate(model) / "README.md").read_text("utf-8")
    except (catalog.TrspError, OSError, UnicodeDecodeError):
        return ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    entry = re.search(r"^license:\s*([\w.-]{1,40})\s*$", front[1], re.MULTILINE) if front else None
    return entry[1] if entry else ""


def _base_in_words(config: RunConfig) -> str:
    source = catalog.CATALOGUE.get(config.model)
    if source:
        return f"{source.title} (its 4-bit GGUF file, spelled out), pruned. Licence of the base: {source.licence}."
    licence_name = licence(config.model)
    terms = (
        f"Licence of the base: {escaping.markdown(licence_name)}."
        if licence_name
        else "The licence of the base holds; it was not known here."
    )
    return f"`{_model(config.model)}`, pruned. {terms}"


def _base(config: RunConfig) -> str:
    """How others name the base model: its hub id, or a folder of theirs."""
    return config.model if catalog.is_hub_id(config.model) else f"./{_model(config.model)}"


def _upstream(config: RunConfig) -> str:
    return catalog.CATALOGUE[config.model].hub_id


def _perplexity(event: PerplexityMeasured | None) -> str:
    if event is None:
        return "–"
    if not event.losses or not all(map(math.isfinite, event.losses)):
        return formatting.perplexity(event.perplexity)
    interval = intervals.perplexity(event.losses)
    return formatting.interval(interval.value, interval.low, interval.high, formatting.perplexity)


def _speed(state: RunState) -> str:
    dense, pruned = state.speed.get("dense"), state.speed.get("pruned")
    if not dense or not pruned:
        return ""
    parts = [
        f"{what} {formatting.rate(getattr(dense, what))} to {formatting.rate(getattr(pruned, what))} tokens/s"
        for what in ("prefill", "decode")
    ]
    ceiling = f" (ceiling {formatting.ratio(state.ceiling)} times)" if state.ceiling else ""
    tokens = f"{pruned.prompt_tokens} tokens read, {pruned.new_tokens} written"
    return f"Speed on the machine of the run, {tokens}: {', '.join(parts)}{ceiling}."


def _model(name: str) -> str:
    """A model's name: of the catalogue and of the hub as it is, of a local folder its last part."""
    return name if name in catalog.CATALOGUE or catalog.is_hub_id(name) else _last(name)


def _text(name: str) -> str:
    """A text's name: of a built-in one as it is, of a file its last part."""
    return name if name in TEXTS else _last(name)


def _last(path: str) -> str:
    """The last part of a local path, of plain letters alone."""
    return re.sub(r"[^\w. -]", "_", Path(path).name) or "local"
