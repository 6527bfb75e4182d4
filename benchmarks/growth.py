"""How the cost of a step grows: with layers, width, tokens and the ratio, on Llama-shaped models built from configs;
the law that fits, and from it a forecast for larger models on named GPUs. Writes assets/growth.svg.

The law is that of a roofline with a fixed cost a layer:
    seconds = operations / (share * matrix rate) + layers * overhead
fitted by least squares of relative errors, with the matrix rate measured beside each model.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import Row, row
from benchmarks._web import ROOT
from benchmarks.steps import PASSES, operations
from trsp_core.evaluation import perplexity
from trsp_core.pruning import validate
from trsp_core.pruning.lab import Lab
from trsp_core.pruning.methods import trsp
from trsp_core.pruning.stage2 import transfer
from trsp_core.schema import config as configs
from trsp_core.surgery import discovery

BASE = {"layers": 8, "width": 512, "tokens": 512}
AXES = {"layers": (4, 8, 16, 32), "width": (256, 512, 1024, 1536), "tokens": (128, 256, 512, 1024)}
LARGEST = {"layers": 16, "width": 2048, "tokens": 512}  # about a billion parameters: stage 1 alone, for the memory
VOCABULARY, LENGTH, STEPS = 16_384, 128, 4
RATIOS = (0.125, 0.25, 0.5)
GPUS = {"L4 24 GB": (121e12, 24), "A100 80 GB": (312e12, 80), "H100 80 GB": (989e12, 80)}  # data sheets, bf16 dense
SHARE = 0.4  # of a GPU's data-sheet rate that is assumed
MODELS = {"7B": (6.7e9, 32, 7), "70B": (69e9, 80, 20)}  # parameters, layers, layers to remove


@dataclass(frozen=True)
class Point:
    """A step of `kind` on one model: GFLOP that it needs, GFLOP/s beside it, and its seconds."""

    kind: str
    axis: str
    layers: int
    width: int
    tokens: int
    parameters: int
    needed: float
    rate: float
    seconds: float


def run() -> Iterator[Row]:
    """The exponent of each axis, the law and how well it fits, stage 1 over the ratio, and the forecasts."""
    points = [*measured()]
    for kind in ("stage 1", "stage 2"):
        share, overhead, errors = law([p for p in points if p.kind == kind])
        facts = {"share_of_the_matrix_rate": round(share, 3), "ms_a_layer": round(1000 * overhead, 2)}
        yield row(f"growth, {kind}: measured over the law", errors, None, "lower", **facts, models=len(errors))
    yield from ratios()
    yield from forecasts()
    draw(points)


def measured() -> Iterator[Point]:
    shapes = [(axis, {**BASE, axis: value}) for axis, values in AXES.items() for value in values]
    for axis, shape in [*shapes, ("largest", LARGEST)]:
        lab, config = built(**shape)
        kinds: dict[str, Any] = {"stage 1": lambda lab=lab, config=config: trsp.choose(lab, config, 1)}
        if axis != "largest":
            chosen = list(range(shape["layers"] // 2, shape["layers"] // 2 + max(shape["layers"] // 4, 1)))
            kinds["stage 2"] = lambda lab=lab, config=config, chosen=chosen: transfer(lab, config, chosen)
        for kind, make in kinds.items():
            needed = operations(lab.stack, shape["tokens"], LENGTH) * PASSES[kind] / 1e9
            parameters = perplexity.parameter_bytes(lab.model)[0]
            rate, seconds = timed(make())
            yield Point(kind, axis, **shape, parameters=parameters, needed=needed, rate=rate, seconds=seconds)


def built(layers: int, width: int, tokens: int) -> tuple[Lab, configs.RunConfig]:
    """A model with random weights on random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(width // 192, 1)}
    if heads["num_attention_heads"] % heads["num_key_value_heads"]:
        heads["num_key_value_heads"] = heads["num_attention_heads"]
    shape = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **shape, **heads)).eval()
    model.requires_grad_(False)
    config = validate.from_values(
        {
            "block_length": LENGTH,
            "batch_blocks": tokens // LENGTH,
            "calibration_blocks": 32,
            "stage1_steps": STEPS,
            "stage2_steps": STEPS,
        }
    )
    blocks = torch.randint(0, VOCABULARY, (32, LENGTH))
    return Lab(discovery.find(model), blocks, config), config


def timed(steps: Any) -> tuple[float, float]:
    """The matrix rate around a step, GFLOP/s, and its seconds; medians, the first step left out."""
    rates, seconds = [], []
    for number in range(STEPS):
        before, began = perplexity.matrix_rate(0.1), time.perf_counter()
        next(steps)
        if number:
            seconds.append(time.perf_counter() - began)
            rates.append((before + perplexity.matrix_rate(0.1)) / 2)
    steps.close()
    return statistics.median(rates), statistics.median(seconds)


def law(points: list[Point]) -> tuple[float, float, list[float]]:
    """Share of the rate, seconds of overhead a layer, and measured over fitted of each point."""
    ideal = torch.tensor([[p.needed / p.rate, p.layers] for p in points], dtype=torch.float64)
    seconds = torch.tensor([p.seconds for p in points], dtype=torch.float64)
    weights = ideal / seconds[:, None]
    slope, overhead = torch.linalg.lstsq(weights, torch.ones(len(points), 1, dtype=torch.float64)).solution.flatten()
    fitted = ideal @ torch.stack([slope, overhead])
    return 1 / slope.item(), overhead.item(), (seconds / fitted).tolist()


def ratios() -> Iterator[Row]:
    """Stage 1 as a whole over rounds times its first round: later rounds run fewer layers."""
    lab, config = built(**{**BASE, "layers": 16, "width": 256})
    for ratio in RATIOS:
        count, times = round(ratio * 16), [time.perf_counter()]
        for event in trsp.choose(lab, config, count):
            if type(event).__name__ == "LayerChosen":
                times.append(time.perf_counter())
        rounds = [b - a for a, b in itertools.pairwise(times)]
        expected = statistics.fmean((16 - r) / 16 for r in range(count))
        found = statistics.fmean(rounds) / rounds[0]
        name = f"growth, stage 1 at ratio {ratio}: mean round over the first"
        yield row(name, [found], None, "lower", by_the_layers_left=round(expected, 3), rounds=count)


def forecasts() -> Iterator[Row]:
    """Seconds of 512-token steps and gigabytes in bfloat16, from the operations and an assumed share: not measured."""
    for name, (parameters, layers, count) in MODELS.items():
        for gpu, (rate, memory) in GPUS.items():
            step = {kind: passes * 2 * parameters * 512 / (SHARE * rate) for kind, passes in PASSES.items()}
            rounds = statistics.fmean((layers - r) / layers for r in range(count)) * count * 10
            need = {"stage 1": 2 * parameters / 1e9 * 1.15, "stage 2": 6 * parameters / 1e9 * 1.15}
            facts = {
                "forecast_not_measured": True,
                "seconds_stage_1_of_10_steps_a_round": round(rounds * step["stage 1"], 1),
                "seconds_stage_2_of_128_steps": round(128 * step["stage 2"], 1),
                "gb_stage_1": round(need["stage 1"]),
                "gb_stage_2": round(need["stage 2"]),
                "gpus_for_stage_2": -(-round(need["stage 2"]) // memory),
            }
            yield row(f"forecast, {name} on {gpu}: s a step of stage 2", [step["stage 2"]], None, "lower", **facts)


def draw(points: list[Point]) -> None:
    """Seconds of a step over the operations it needs, both stages, with the line of the machine's matrix rate."""
    import altair as alt

    rate = statistics.median(p.rate for p in points)
    table = [{"stage": p.kind, "GFLOP": p.needed, "seconds": p.seconds, "varied": p.axis} for p in points]
    ends = [min(p.needed for p in points), max(p.needed for p in points)]
    line = alt.Chart(alt.Data(values=[{"GFLOP": x, "seconds": x / rate} for x in ends]))
    x = alt.X("GFLOP:Q", scale=alt.Scale(type="log"), title="Operations that a step needs, GFLOP")
    y = alt.Y("seconds:Q", scale=alt.Scale(type="log"), title="Seconds a step")
    limit = line.mark_line(color="#888", strokeDash=[6, 4]).encode(x, y)
    dots = alt.Chart(alt.Data(values=table)).mark_point(filled=True, size=90)
    colours = alt.Scale(domain=["stage 1", "stage 2"], range=["#2f6fb0", "#c8641b"])
    shown = dots.encode(x, y, alt.Color("stage:N", scale=colours, title=None), alt.Shape("varied:N", title="Varied"))
    picture = (limit + shown).properties(width=560, height=300, background="white")
    picture.save(str(ROOT / "assets" / "growth.svg"))
