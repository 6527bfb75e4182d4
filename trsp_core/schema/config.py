"""What a run is asked to do: `RunConfig`, every field a knob; and presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trsp_core import paths
from trsp_core.errors import Problem, TrspError, refuse
from trsp_core.schema import codec, knobs
from trsp_core.schema.knobs import Knob, knob

SCHEMA = 1  # number of the format of config.json; a higher one is refused


GROUPS = {
    "first": "What matters first",
    "choice": "Choosing layers",
    "stage 1": "Stage 1: learn the layer weights",
    "stage 2": "Stage 2: move the knowledge",
    "text": "Texts",
    "measure": "Measuring",
    "machine": "Machine",
}

# One file each in the folder of methods, which needs more than this package may load.
METHODS = (
    "trsp",
    *sorted({file.stem for file in (paths.PACKAGE / "pruning" / "methods").glob("[a-z]*.py")} - {"trsp"}),
)

TRANSFERS = (
    "penalty",
    *sorted({file.stem for file in (paths.PACKAGE / "pruning" / "transfers").glob("[a-z]*.py")} - {"penalty"}),
)

PACKED = ("nf4", "int8")  # precisions of bitsandbytes

TEXTS = {
    "wikipedia": "Wikipedia articles (107, shipped with gensim)",
    "news": "News stories (300, shipped with gensim)",
    "wikitext2": "WikiText-2 (from the hub)",
    "c4": "C4, English (from the hub)",
}


@dataclass(frozen=True)
class RunConfig:
    """All that a run needs to be repeated. Immutable; `dataclasses.replace` makes a changed one."""

    model: str = knob(
        "smollm2-135m",
        label="Model",
        group="first",
        help="A name from the catalogue, a Hugging Face id (owner/name), or a folder with config.json and safetensors.",
    )
    text: str = knob(
        "wikipedia",
        label="Calibration text",
        group="first",
        help="What the model reads while it is pruned: wikipedia, news, wikitext2, c4, or a path to your own .txt or "
        ".jsonl file. A pruned model keeps best what it was calibrated on.",
        paper="section 4.1",
    )
    ratio: float = knob(
        0.25,
        label="Share of layers to remove",
        group="first",
        low=0.0,
        high=1.0,
        help="K = floor(ratio × L + 1/2) of the L layers are removed. Higher: a smaller, faster and worse model.",
        paper="section 4.1",
    )
    lambda_1: float = knob(
        5e-2,
        label="λ₁, pull of the layer weights to zero",
        group="first",
        low=0.0,
        high=100.0,
        log=True,
        help="Strength of the l1 penalty in stage 1. Higher: weights sink faster, and less by what the text needs. "
        "At 0 the language-modelling loss alone moves them.",
        paper="equation 3",
    )
    lambda_2: float = knob(
        10.0,
        label="λ₂, pull of the chosen layers to doing nothing",
        group="first",
        low=0.0,
        high=10000.0,
        log=True,
        help="Strength of the stage 2 penalty on output minus input of the chosen layers. Higher: the gap closes "
        "sooner, at a higher price in language-modelling loss. At 0 stage 2 is plain training.",
        paper="equation 6",
    )
    method: str = knob(
        "trsp",
        label="Method",
        group="choice",
        choices=METHODS,
        help="How the layers are chosen. Stage 2 can follow any of them; set its steps to 0 for direct deletion.",
    )
    layers: str = knob(
        "",
        label="Layers to remove (method manual)",
        group="choice",
        help="Comma-separated layer numbers from 0, for the method manual; ranges such as 13-18 are fine. "
        "It overrides the ratio.",
    )
    protect_first: int = knob(
        0,
        label="Protected first layers",
        group="choice",
        low=0,
        high=1000,
        unit="layers",
        help="So many layers at the input end are never chosen. Higher: safer ends, fewer candidates.",
    )
    protect_last: int = knob(
        0,
        label="Protected last layers",
        group="choice",
        low=0,
        high=1000,
        unit="layers",
        help="So many layers at the output end are never chosen. Higher: safer ends, fewer candidates. The gate of the "
        "paper needs at least one.",
    )
    no_neighbours: bool = knob(
        False,
        label="No two neighbours",
        group="choice",
        help="When on, a layer next to a chosen one is no candidate any more: removals spread over the depth.",
    )
    score_blocks: int = knob(
        8,
        label="Blocks that layers are scored on",
        group="choice",
        low=1,
        high=100000,
        unit="blocks",
        help="How many calibration blocks the methods that score layers read (all but masks, random, last, magnitude "
        "and manual; TRSP where it has a shortlist). Higher: scores depend less on the sample, and take more time.",
    )
    gate: str = knob(
        "branch",
        label="Gate",
        group="stage 1",
        choices=("branch", "output"),
        help="branch: the next layer sees X_in + s (X_out - X_in), so s = 0 is exactly removal. output: it sees "
        "s X_out, as drawn in the paper, which rescales the whole residual stream.",
        paper="figure 2",
    )
    stage1_steps: int = knob(
        10,
        label="Steps a round",
        group="stage 1",
        low=1,
        high=10000,
        unit="steps",
        help="Gradient steps before each choice. Higher: a better-founded choice, and more time.",
        paper="algorithm 1",
    )
    stage1_average: int = knob(
        1,
        label="Steps that a choice is averaged over",
        group="stage 1",
        low=1,
        high=10000,
        unit="steps",
        help="What is compared is the mean of each layer weight over the last so many steps of its round. Higher: the "
        "choice hangs less on the last blocks, and more on weights from before. 1: the weights as they are.",
    )
    stage1_stretch: int = knob(
        1,
        label="Longest round",
        group="stage 1",
        low=1,
        high=100,
        unit="times",
        help="A round takes its steps again, at most so many times, while the margin between the smallest weight and "
        "the next one is within its noise. Higher: near ties get more steps, clear choices do not. 1: each round has "
        "the same steps.",
    )
    shortlist: int = knob(
        1,
        label="Shortlist of a round",
        group="stage 1",
        low=1,
        high=1000,
        unit="layers",
        help="Of so many layers with the smallest weights, each round takes the one without which the scored blocks' "
        "loss is lowest. Higher: less is left to chance, and more time. 1: the smallest weight decides, as in the "
        "paper.",
    )
    stage1_lr: float = knob(
        0.02,
        label="Learning rate of the layer weights",
        group="stage 1",
        low=1e-6,
        high=1.0,
        log=True,
        help="Adam's rate for the layer weights s. Higher: they move further in the same steps.",
    )
    l1: str = knob(
        "subgradient",
        label="How the l1 term acts",
        group="stage 1",
        choices=("subgradient", "proximal"),
        help="subgradient: its sign joins the gradient. proximal: after each step every candidate's weight is "
        "soft-thresholded by rate × λ₁, which reaches exact zeros; it wants a λ₁ about twenty times higher.",
        paper="section 3.2",
    )
    learn_weights: bool = knob(
        False,
        label="Let the model's weights learn in stage 1",
        group="stage 1",
        help="When off, only the layer weights learn. When on, all of W learns with them, as the paper's equation "
        "has it: slower, and twice the memory and more.",
        paper="equation 3",
    )
    stage1_weight_lr: float = knob(
        1e-5,
        label="Learning rate of W in stage 1",
        group="stage 1",
        low=1e-8,
        high=0.1,
        log=True,
        help="Used where the model's weights learn in stage 1. Higher: they adapt faster to sinking layers.",
    )
    one_shot: bool = knob(
        False,
        label="Choose all at once",
        group="stage 1",
        help="When on, one round decides all K layers (the paper's ablation without the iteration).",
        paper="table 5, w/o W",
    )
    transfer: str = knob(
        "penalty",
        label="Transfer",
        group="stage 2",
        choices=TRANSFERS,
        help="How the work of the chosen layers moves into the others. penalty: train with all layers there, then "
        "delete (TRSP). Any other deletes first, and stage 2 trains what is left; before that refit solves each kept "
        "layer for the dense model's state, linear_map the layers below the cuts alone, magnitude scales what lies "
        "below a cut, rotation turns it as well, kept_weights folds in what stage 1 has learned, rebuild trains the "
        "layers beside the cuts, and none leaves all as it is.",
    )
    ridge: float = knob(
        1.0,
        label="Ridge of a closed form",
        group="stage 2",
        low=1e-6,
        high=1e4,
        log=True,
        help="For transfers that solve for weights: how strongly the old ones are held on to, over the mean energy of "
        "what they read. Higher: the weights change less, and less of one text is learnt by heart.",
    )
    refit: str = knob(
        "all",
        label="What refit solves for",
        group="stage 2",
        choices=("all", "mlp"),
        help="all: the output projections of attention and of the MLP in each kept layer, one after the other. mlp: "
        "the MLP's alone, in three quarters of the time.",
    )
    control: str = knob(
        "none",
        label="Control",
        group="stage 2",
        choices=("none", "delete_first"),
        help="none: train with all layers there, then delete (TRSP). delete_first: delete, then train what is left for "
        "the same steps on the same blocks, with no penalty: what stage 2 has to beat.",
    )
    stage2_steps: int = knob(
        60,
        label="Steps of stage 2",
        group="stage 2",
        low=0,
        high=100000,
        unit="steps",
        help="Training steps: before deletion with the transfer penalty, after it with any other. Higher: more "
        "knowledge moves, more time. 0: nothing is trained (w/o R).",
        paper="algorithm 1",
    )
    stage2_lr: float = knob(
        1e-4,
        label="Learning rate of stage 2",
        group="stage 2",
        low=1e-8,
        high=0.1,
        log=True,
        help="AdamW's rate for all of W. Higher: buys the calibration domain and can lose the others.",
    )
    output_rate: float = knob(
        10.0,
        label="Rate of the chosen layers' output projections",
        group="stage 2",
        low=0.0,
        high=1000.0,
        log=True,
        unit="times",
        help="The projections that write into the residual stream learn so many times faster in the chosen layers. "
        "Higher: the gap closes sooner.",
    )
    penalty: str = knob(
        "relative",
        label="Penalty R",
        group="stage 2",
        choices=("relative", "l2", "l1", "sum"),
        help="l2, l1: norm of output minus input over the width, averaged over tokens. relative: the l2 norm divided "
        "by the input's, so that one λ₂ serves many models. sum: the l2 norm summed over all tokens, as in the paper.",
        paper="equation 6",
    )
    penalty_reach: str = knob(
        "local",
        label="Reach of the penalty's gradient",
        group="stage 2",
        choices=("local", "model"),
        help="local: it teaches the chosen layers alone to do nothing. model: it flows through every layer before them "
        "too, as in the paper.",
        paper="equation 6",
    )
    anneal: float = knob(
        0.0,
        label="Share of stage 2 over which the chosen layers fade out",
        group="stage 2",
        low=0.0,
        high=1.0,
        help="A gate on the chosen layers' branches closes in a straight line over so much of stage 2, and stays shut. "
        "Higher: a gentler removal, more steps in which λ₂ acts, and fewer for the model as it will be. 0: no gate, "
        "as in the paper.",
    )
    cycles: int = knob(
        1,
        label="Cycles of choosing and moving",
        group="stage 2",
        low=1,
        high=1000,
        unit="cycles",
        help="The K layers and the steps of stage 2 are shared out over so many cycles of both stages: choose some, "
        "move their knowledge, choose again. Higher: later choices see what earlier ones did. 1: as in the paper.",
    )
    distil: float = knob(
        0.0,
        label="Share of the loss distilled from the dense model",
        group="stage 2",
        low=0.0,
        high=1.0,
        help="So much of the language-modelling loss gives way to a distance from the dense model. Higher: other "
        "domains are kept better, the calibration domain is learnt less; any value above 0 takes a second forward "
        "pass, and the memory of a second model.",
    )
    distil_from: str = knob(
        "logits",
        label="What is distilled",
        group="stage 2",
        choices=("logits", "states"),
        help="logits: KL from the dense model's predictions, nats a token. states: relative distance of the hidden "
        "states behind each run of chosen layers from the dense model's there.",
    )
    adapter_rank: int = knob(
        0,
        label="LoRA rank",
        group="stage 2",
        low=0,
        high=1024,
        help="Above 0, stage 2 trains LoRA adapters of this rank on the layers' linear maps instead of all of W, and "
        "merges them before deletion. Higher: more freedom, more memory. 0: all of W.",
    )
    adapter_lr: float = knob(
        1e-3,
        label="Learning rate of the adapters",
        group="stage 2",
        low=1e-8,
        high=0.1,
        log=True,
        help="AdamW's rate for LoRA adapters, instead of the rate of stage 2. Higher: they learn faster; about ten "
        "times the rate of W suits them.",
    )
    lambda_2_schedule: str = knob(
        "ramp",
        label="Schedule of λ₂",
        group="stage 2",
        choices=("ramp", "constant"),
        help="ramp: from 0 to λ₂ in a straight line over the steps. constant: λ₂ from the first step on. Where a gate "
        "fades the chosen layers out, either ends when it is shut.",
    )
    lr_schedule: str = knob(
        "constant",
        label="Schedule of the learning rate",
        group="stage 2",
        choices=("constant", "cosine"),
        help="constant: the same rate throughout. cosine: a warm-up over a tenth of the steps, then down to a tenth.",
    )
    heldout: str = knob(
        "news",
        label="Held-out domain",
        group="text",
        help="A second text that the run never trains on: what a gain is worth outside the calibration domain. "
        "Same choices as the calibration text.",
    )
    block_length: int = knob(
        128,
        label="Calibration block length",
        group="text",
        low=8,
        high=8192,
        unit="tokens",
        help="T of a training block. Higher: longer context, more memory and time a step.",
        paper="section 4.1",
    )
    batch_blocks: int = knob(
        2,
        label="Blocks a step",
        group="text",
        low=1,
        high=256,
        unit="blocks",
        help="B of a training step. Higher: steadier gradients, more time a step.",
    )
    calibration_blocks: int = knob(
        256,
        label="Calibration blocks",
        group="text",
        low=1,
        high=100000,
        unit="blocks",
        help="Size of the pool that steps draw from, in the same order for the same seed. Higher: less repetition.",
        paper="section 4.1",
    )
    measure_blocks: int = knob(
        24,
        label="Blocks measured in each domain",
        group="measure",
        low=1,
        high=10000,
        unit="blocks",
        help="Perplexity is taken over so many blocks, which are never trained on. Higher: smaller uncertainty.",
    )
    measure_length: int = knob(
        256,
        label="Measurement block length",
        group="measure",
        low=8,
        high=8192,
        unit="tokens",
        help="T of a measured block. Higher: lower perplexity, since more context is seen.",
    )
    probe_every: int = knob(
        10,
        label="Steps between probes",
        group="measure",
        low=1,
        high=100000,
        unit="steps",
        help="Every so many steps of stage 2: perplexity if the chosen layers were deleted now. Higher: less time.",
    )
    probe_blocks: int = knob(
        4,
        label="Blocks a probe",
        group="measure",
        low=0,
        high=1000,
        unit="blocks",
        help="Size of the fixed sample of a probe, from the measured blocks of each domain. Higher: steadier and "
        "slower; 0: no probes.",
    )
    importance_blocks: int = knob(
        1,
        label="Blocks to weigh each layer on",
        group="measure",
        low=0,
        high=1000,
        unit="blocks",
        help="The rise of the loss when each layer alone is left out, in the dense model and after stage 2, on so many "
        "measured blocks of the calibration domain. Higher: steadier and slower; 0: not measured.",
    )
    kl_blocks: int = knob(
        4,
        label="Blocks compared with the dense model",
        group="measure",
        low=0,
        high=1000,
        unit="blocks",
        help="KL from the dense model's predictions is taken on so many of the measured blocks of each domain. Higher: "
        "steadier, and more room for temporary files; 0: not measured.",
    )
    speed_repeats: int = knob(
        3,
        label="Repeats of the speed measurement",
        group="measure",
        low=0,
        high=100,
        unit="times",
        help="Prefill and decode are timed so often, after a warm-up; the median counts. Higher: steadier; "
        "0: no speed measurement.",
    )
    prompt: str = knob(
        "The history of the city begins",
        label="Sample prompt",
        group="measure",
        help="Continued by the dense and by the pruned model, so that the run shows text and not figures alone.",
    )
    sample_tokens: int = knob(
        40,
        label="Sample length",
        group="measure",
        low=0,
        high=1000,
        unit="tokens",
        help="New tokens of the sample, chosen greedily. Higher: more text to compare; 0: no sample.",
    )
    seed: int = knob(
        0,
        label="Seed",
        group="machine",
        low=0,
        high=2**31 - 1,
        help="Of the split of the text, the order of blocks and random choices. Same seed, same machine: same run.",
    )
    precision: str = knob(
        "float32",
        label="Precision",
        group="machine",
        choices=("float32", "bfloat16", *PACKED),
        help="Number format of the weights. float32 is exact. bfloat16 halves the memory, and rounding decides between "
        "layers that are nearly tied: look at the margins. nf4 packs the layers' linear maps into four bits, int8 into "
        "eight (bitsandbytes): least memory, slower passes on a CPU, and a dense model that is a little worse; stage 2 "
        "then trains LoRA adapters alone.",
    )
    compute_dtype: str = knob(
        "float32",
        label="Number format of products on packed weights",
        group="machine",
        choices=("float32", "bfloat16"),
        help="For the precisions nf4 and int8: what packed weights are unpacked to, and the format of embeddings, head "
        "and norms. float32 is exact; bfloat16 halves those too.",
    )
    recompute: bool = knob(
        False,
        label="Recompute activations on the way back",
        group="machine",
        help="When on, a step of either stage keeps each layer's input alone and computes the rest again on the way "
        "back (gradient checkpointing): less memory, and a step takes 1.3 to 1.4 times as long.",
    )
    fuse: bool = knob(
        False,
        label="Fuse kernels on a GPU",
        group="machine",
        help="When on, each layer is compiled (torch.compile) for the steps of both stages: the first step of each "
        "takes some ten seconds, the others less time than without. For a GPU, which needs a C compiler beside it; a "
        "CPU takes no notice.",
    )
    save_as: str = knob(
        "merged",
        label="How a packed model is kept",
        group="machine",
        choices=("merged", "adapters"),
        help="For the precisions nf4 and int8. merged: unpacked and with its adapters added, an ordinary model in "
        "bfloat16. adapters: as it ran, packed weights and the adapters beside them.",
    )
    device: str = knob(
        "auto",
        label="Device",
        group="machine",
        choices=("auto", "cpu", "cuda"),
        help="auto takes a GPU where there is one; cpu and cuda (a GPU) insist.",
    )
    threads: int = knob(
        0,
        label="CPU threads",
        group="machine",
        low=0,
        high=1024,
        help="Threads of the matrix products. Higher: faster, up to one a core. 0: one for each core.",
    )
    resume_minutes: float = knob(
        2.0,
        label="Time between points to resume from",
        group="machine",
        low=0.0,
        high=1440.0,
        unit="minutes",
        help="So often stage 2 writes its weights and the optimiser's state to the run folder, and an interrupted run "
        "loses no more than that; they take up to three times the model's size until the run finishes. Higher: less "
        "is written, more is lost. 0: nothing is written, and an interrupted stage 2, or repair, starts over.",
    )
    save_model: bool = knob(
        True,
        label="Keep the pruned model",
        group="machine",
        help="When on, the pruned model is stored with the run as safetensors, for Compare and for download, once a "
        "fresh process with stock transformers has computed the same from it.",
    )
    save_trained: bool = knob(
        False,
        label="Keep the model before deletion",
        group="machine",
        help="When on, the model after stage 2 with all its layers is stored too, so that Compare can show it. Takes "
        "as much room as the dense model; without a stage 2 there is nothing to keep.",
    )

    @property
    def deletes_first(self) -> bool:
        """The chosen layers go before stage 2."""
        return self.control == "delete_first" or self.transfer != "penalty"

    @property
    def repairs(self) -> bool:
        """The transfer finds new weights for layers that stay, before any training."""
        return self.transfer not in ("penalty", "none")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def as_command(self) -> str:
        """The shell command that repeats this run; only what differs from the defaults is named."""
        words = ["python -m trsp_core run"]
        for name, value in self.as_dict().items():
            if value != KNOBS[name].default:
                words.append(f"{KNOBS[name].flag} {_quote(value)}")
        return " ".join(words)


KNOBS: dict[str, Knob] = knobs.of(RunConfig)

_TWO_STAGE: dict[str, Any] = {  # TRSP's own two stages, in a few steps each
    "stage1_steps": 5,
    "score_blocks": 4,
    "stage2_steps": 30,
    "anneal": 0.25,
    "measure_blocks": 8,
    "kl_blocks": 2,
    "probe_every": 10,
    "probe_blocks": 2,
    "importance_blocks": 0,
    "sample_tokens": 24,
}

_REFIT: dict[str, Any] = {  # what was measured to lose least for its time: docs/results.md
    "shortlist": 4,
    "score_blocks": 8,
    "transfer": "refit",
    "adapter_rank": 16,
    "lr_schedule": "cosine",
}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {**_TWO_STAGE, **_REFIT, "anneal": 0.0, "stage2_steps": 40, "calibration_blocks": 128, "score_blocks": 4},
    "standard": {**_REFIT, "stage1_steps": 5, "stage2_steps": 160},
    "two-stage": _TWO_STAGE,
    "4-bit": {**_TWO_STAGE, "precision": "nf4", "adapter_rank": 8},
    "paper": {
        "gate": "output",
        "protect_first": 3,
        "protect_last": 4,
        "learn_weights": True,
        "lambda_1": 5e-3,
        "lambda_2": 1e-3,
        "penalty": "l2",
        "penalty_reach": "model",
        "lambda_2_schedule": "constant",
        "output_rate": 1.0,
        "calibration_blocks": 128,
        "block_length": 2048,
        "stage2_steps": 128,
        "batch_blocks": 1,
    },
}


def layers_to_remove(ratio: float, n_layers: int) -> int:
    """K = floor(ratio * L + 1/2)."""
    return math.floor(ratio * n_layers + 0.5)


def count_to_remove(config: RunConfig, n_layers: int) -> int:
    """K of a run on a model with L = `n_layers`, by its ratio or by the layers that it names.

    Raises:
        TrspError: the layers that it names are no numbers.
    """
    return len(parse_layers(config.layers)) if config.method == "manual" else layers_to_remove(config.ratio, n_layers)


def parse_layers(text: str) -> list[int]:
    """Sorted layer numbers from `"3, 13-15"`.

    Raises:
        TrspError: a part that is no number and no range.
    """
    numbers: set[int] = set()
    for part in text.replace(" ", "").split(","):
        low, _, high = part.partition("-")
        if not low.isdecimal() or (high and not high.isdecimal()) or len(part) > 12:
            raise TrspError(
                f"Layers: {text[:60]!r} was given, expected numbers and ranges.", 'Write for example "3, 13-15".'
            )
        last = int(high or low)
        if last > 100_000:
            raise TrspError(f"Layers: {last} is beyond any model.", "Name layers of this model, counted from 0.")
        numbers.update(range(int(low), last + 1))
    return sorted(numbers)


def parse(values: Mapping[str, Any], preset: str | None = None) -> RunConfig:
    """A config from loose values (JSON, flags, a form, a URL), each of its type and within its bounds; all problems
    are raised at once.

    Args:
        values: knob name to value; a missing knob takes the preset's value or its default.
        preset: a key of `PRESETS`, or None.

    Raises:
        TrspError: unknown names, values of a wrong type or out of bounds.
    """
    problems: list[Problem] = []
    if preset is not None and preset not in PRESETS:
        problems.append(Problem("preset", f"There is no preset {preset!r}.", f"Take one of {', '.join(PRESETS)}."))
    typed: dict[str, Any] = dict(PRESETS.get(preset or "", {}))
    for name, value in values.items():
        if name not in KNOBS:
            problems.append(Problem(str(name)[:60], f"There is no setting {str(name)[:60]!r}.", "Leave it out."))
            continue
        typed[name], problem = KNOBS[name].parse(value)
        if problem:
            problems.append(problem)
    refuse(problems)
    return RunConfig(**{k: v for k, v in typed.items() if k in KNOBS})


@dataclass(frozen=True)
class Settings:
    """What `config.json` holds, as it was written: no setting is checked yet. An exported `run.json` tells the
    environment of the run too."""

    settings: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)


def settings_in(text: str) -> dict[str, Any]:
    """The settings in a run's `config.json`, as they were written.

    Raises:
        TrspError: no JSON, or a newer schema.
    """
    try:
        return codec.decode_document(text, SCHEMA, Settings).settings
    except ValueError as error:
        raise TrspError("config.json cannot be read: it is damaged or cut short.", "Start the run again.") from error


def to_json(config: RunConfig) -> str:
    """What `config.json` holds."""
    return codec.encode({"schema": SCHEMA, "settings": config}, indent=1)


def _quote(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    safe = text and all(c.isalnum() or c in "-_./,:" for c in text)
    return text if safe else "'" + text.replace("'", "'\\''") + "'"
