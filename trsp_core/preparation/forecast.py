"""Forecasts how long a run will take and how much memory it will hold, by counting operations. Loads no torch and no
model.

A forward pass costs two operations for each matrix parameter and token; a training step costs a multiple of it. Seconds
follow from the rate of matrix products that earlier runs on this machine have measured; before any from a guess, and
then the forecast is `rough`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsp_core.machine import read_rate, require_memory
from trsp_core.models.inspection import BYTES, Facts, weight_bytes
from trsp_core.perf import budget
from trsp_core.perf.budget import PROCESS_BYTES, at_once
from trsp_core.pruning import methods, transfers
from trsp_core.schema import config as configs
from trsp_core.schema import schedules
from trsp_core.schema.config import PACKED, RunConfig

EFFICIENCY = 0.78  # the share of the matrix rate that a whole model reaches
BANDWIDTH = 10e9  # bytes/s of memory traffic, for what it bounds: the optimiser, the loss, decoding
NOMINAL_CORE, NOMINAL_GPU = 80.0, 20_000.0  # GFLOP/s where nothing was measured
UNPACKING = {"nf4": 30.0, "int8": 3.0}  # the time to unpack a number, as bytes of memory traffic
MEASURED_AT_ONCE = 512  # tokens that are measured at once: two lanes of `perplexity.TOKENS_AT_ONCE`


@dataclass(frozen=True)
class Forecast:
    """What is expected of a run.

    Attributes:
        phases: the phases that will occur, in order, each `{"name", "seconds"}`.
        seconds: their sum.
        peak_bytes: the most memory that the run's process will hold.
        rough: whether no rate was measured on this machine yet, or none for this device and precision.
    """

    phases: list[dict[str, Any]]
    seconds: float
    peak_bytes: int
    rough: bool


def forecast(config: RunConfig, facts: Facts, rate: float | None = None) -> Forecast:
    """The forecast for `config` on a model with `facts`.

    Args:
        rate: GFLOP/s of float32 matrix products with the threads of this run. None takes the rate that was measured on
            all cores of this machine, and of it the share of `config.threads`.
    """
    gpu = on_gpu(config)
    measured_rate = rate if rate is not None else read_rate()
    cores = os.cpu_count() or 1
    threads = min(config.threads or cores, cores)
    whole = measured_rate or NOMINAL_CORE * cores
    gflops = NOMINAL_GPU if gpu else whole if rate is not None else whole * threads / cores
    cost = _Cost(config, facts, gflops * EFFICIENCY * 1e9, BANDWIDTH * (50 if gpu else 1))
    phases = [{"name": name, "seconds": round(seconds, 2)} for name, seconds in cost.in_order()]
    return Forecast(
        phases=phases,
        seconds=sum(p["seconds"] for p in phases),
        peak_bytes=peak_bytes(config, facts),
        rough=gpu or not measured_rate or config.precision == "bfloat16",
    )


def training_step(config: RunConfig, facts: Facts, rate: float = NOMINAL_CORE) -> float:
    """Seconds of one step of stage 2. For comparing configs: with the default `rate` the figure is the same on every
    machine and at any time.

    Args:
        rate: GFLOP/s of float32 matrix products.
    """
    return _Cost(config, facts, rate * EFFICIENCY * 1e9, BANDWIDTH).training_step()


@dataclass(frozen=True)
class _Cost:
    """The seconds that the parts of a run take.

    Attributes:
        speed: operations/s that a whole model reaches.
        bandwidth: bytes/s of memory traffic.
    """

    config: RunConfig
    facts: Facts
    speed: float
    bandwidth: float

    @property
    def removed(self) -> int:
        return min(configs.count_to_remove(self.config, self.facts.n_layers), self.facts.n_layers - 1)

    def forward(self, tokens: float, length: int, skipped: float = 0) -> float:
        """A forward pass over `tokens` in blocks of `length`, with `skipped` layers left out."""
        f = self.facts
        share = 1 - skipped / f.n_layers
        matrices = share * sum(f.layer_parameters) + f.vocabulary * f.width  # a tied embedding is the head, once
        attention = share * f.n_layers * 2 * length * f.width
        products = 2 * tokens * (matrices + attention) / self.speed + 8 * tokens * f.vocabulary / self.bandwidth
        return products + self.unpacked(share * -(-tokens // MEASURED_AT_ONCE))

    def unpacked(self, passes: float) -> float:
        """Unpacking packed weights, which each of `passes` does anew; 0 where they are not packed."""
        return passes * sum(self.facts.layer_parameters) * UNPACKING.get(self.config.precision, 0.0) / self.bandwidth

    def step(self, passes: float, skipped: float = 0, learning: bool = False) -> float:
        """A training step that computes as much as `passes` forward passes; and the optimiser's traffic where W is
        `learning`."""
        tokens = self.config.batch_blocks * self.config.block_length
        traffic = 7 * 4 * self.facts.parameters / self.bandwidth if learning else 0.0
        if self.config.recompute:  # the layers once more, the head not
            layers, head = sum(self.facts.layer_parameters), self.facts.vocabulary * self.facts.width
            passes += layers / (layers + head)
        return passes * self.forward(tokens, self.config.block_length, skipped) + traffic + 0.05

    def measured(self, skipped: int = 0, sample: bool = True) -> float:
        """Measuring perplexity in both domains, and writing a sample of text."""
        c = self.config
        tokens = 2 * c.measure_blocks * c.measure_length
        return self.forward(tokens, c.measure_length, skipped) + (
            self.decoding(c.sample_tokens, skipped) if sample else 0
        )

    def weighed(self) -> float:
        """Measuring the loss without each layer alone; what lies below a layer is not computed again."""
        c = self.config
        blocks = min(c.importance_blocks, c.measure_blocks)
        tokens, n_layers = blocks * c.measure_length, self.facts.n_layers
        return n_layers * self.forward(tokens, c.measure_length, n_layers / 2)

    def decoding(self, tokens: int, skipped: int = 0) -> float:
        """Writing `tokens`, one after the other: each reads all weights, and each layer adds an overhead."""
        share = 1 - skipped / self.facts.n_layers
        read = 4 * self.facts.parameters / (2 * self.bandwidth)  # one stream alone is twice as fast
        return tokens * (share * (read + 0.0003 * self.facts.n_layers) + 0.002)

    def chosen(self) -> float:
        """Choosing the layers, by stage 1 or another method."""
        c, method = self.config, methods.get(self.config.method)
        sample = c.score_blocks * c.block_length * method.pass_counts.over_sample(self.facts.n_layers, self.removed)
        read = self.forward(sample + c.calibration_blocks * c.block_length * method.pass_counts.pool, c.block_length)
        if not method.trains:
            return 0.05 + read
        rounds = [0] if c.one_shot else list(range(self.removed))
        passes, steps = 3.0 if c.learn_weights else 2.0, methods.most_steps(c, 1)
        shortlist = c.shortlist if c.shortlist > 1 and method.name == "trsp" else 0
        tokens = c.score_blocks * c.block_length * shortlist * (self.removed if c.one_shot else 1)
        return sum(
            steps * self.step(passes, r, c.learn_weights) + self.forward(tokens, c.block_length, r + 1) for r in rounds
        )

    def training_step(self) -> float:
        """A step of stage 2, the mean of those that run the chosen layers and those that skip them: forward and
        backward pass, the backward passes of local penalties, and the teacher's forward pass."""
        c = self.config
        local = 2 * self.removed / self.facts.n_layers if c.penalty_reach == "local" and c.lambda_2 else 0.0
        own = 2.2 if c.adapter_rank else 3  # adapters need the gradients of hidden states, not those of the weights
        deep = self.step(own + local, 0, not c.adapter_rank)
        short = self.step(own, self.removed, not c.adapter_rank)
        at_depth = 0.0 if c.deletes_first else c.anneal or 1.0
        teacher = self.forward(c.batch_blocks * c.block_length, c.block_length) if c.distil else 0.0
        return at_depth * deep + (1 - at_depth) * short + teacher

    def transferred(self) -> float:
        """Stage 2 with its probes."""
        c = self.config
        probes = 1 + -(-c.stage2_steps // c.probe_every) if c.probe_blocks else 0
        probe = self.forward(2 * c.probe_blocks * c.measure_length, c.measure_length, self.removed)
        return c.stage2_steps * self.training_step() + probes * probe

    def repaired(self) -> float:
        """A repair: its passes, and where it solves with (F, F) matrices, for each layer summing one up and solving in
        double precision; with its probes where it goes up layer by layer."""
        c, f, cost = self.config, self.facts, transfers.get(self.config.transfer).cost
        lowest, tokens = below_the_cuts(c), c.calibration_blocks * c.block_length
        layers = f.n_layers - lowest - self.removed
        share = 1 - lowest / f.n_layers if cost.climbs else 1.0
        seconds = cost.passes * share * 2 * tokens * sum(f.layer_parameters) / self.speed  # no pass reaches the head
        hidden = mlp_width(f)
        squares = 2 * tokens * hidden * (hidden + 2 * f.width) + 2 * (hidden**3 / 3 + 2 * hidden**2 * f.width)
        probes = len(schedules.repair_probes(c, layers)) if transfers.get(c.transfer).in_order else 0
        seconds += probes * self.forward(2 * c.probe_blocks * c.measure_length, c.measure_length, self.removed)
        return seconds + (layers * squares / self.speed if cost.squares else 0.0)

    def phases(self) -> dict[str, float]:
        """The phases that will occur, by name; with several cycles, `choose` and `transfer` stand for all of them."""
        c = self.config
        trained, before = c.stage2_steps > 0, not c.deletes_first
        repaired = transfers.get(c.transfer).repair is not None
        stored = self.facts.parameters * (2 if c.precision in PACKED else BYTES[c.precision])
        both = self.forward(256, 128, self.removed / 2) + self.decoding(32, self.removed // 2)
        seconds = {"load": 4 + self.facts.bytes / 0.5e9, "text": 1.5, "dense": self.measured()}
        if trained and before and c.importance_blocks:
            seconds["importance"] = self.weighed()
        seconds["choose"] = self.chosen()
        if (trained or repaired) and c.cycles == 1:
            seconds["direct"] = self.measured(self.removed)
        if repaired:
            seconds["repair"] = self.repaired()
        if repaired and trained:
            seconds["repaired"] = self.measured(self.removed, sample=False)
        if trained:
            seconds["transfer"] = self.transferred()
        if trained and before:
            seconds |= {"trained": self.measured(sample=False)}
            if c.importance_blocks:
                seconds["importance after"] = self.weighed()
        seconds["pruned"] = self.measured(self.removed)
        if c.speed_repeats:
            seconds["speed"] = (c.speed_repeats + 1) * both
        if models := c.save_model + (c.save_trained and trained and before):
            proved = 5 + self.forward(32, 32) + self.decoding(48)  # by a fresh process that loads it
            seconds["save"] = models * (0.5 + stored / 0.4e9 + proved)
        return seconds

    def in_order(self) -> list[tuple[str, float]]:
        """The phases with their seconds, in order; `choose` and `transfer` come once in each cycle."""
        seconds_of, cycles = self.phases(), self.config.cycles
        if cycles == 1:
            return list(seconds_of.items())
        turns = [(name, seconds_of[name] / cycles) for name in ("choose", "transfer")] * cycles
        before = list(seconds_of).index("choose")
        rest = [(name, seconds) for name, seconds in seconds_of.items() if name not in ("choose", "transfer")]
        return [*rest[:before], *turns, *rest[before:]]


def peak_bytes(config: RunConfig, facts: Facts) -> int:
    """The most memory, in bytes, that the run's process and the fresh one that proves its model will hold.

    All along, the process itself, the weights, a teacher's weights where one is distilled, and narrowed layers beside
    the whole ones. On top of that the largest of: activations and logits of a step or a measuring pass, with gradients
    and AdamW's two moments of what learns; the states that a search keeps; the matrices of a repair; the proof.
    """
    packed = config.precision in PACKED
    size = BYTES[config.compute_dtype if packed else config.precision]
    weights = weight_bytes(facts, config.precision, config.compute_dtype)
    learns = config.stage2_steps > 0 or (config.learn_weights and methods.get(config.method).trains)
    tokens = config.batch_blocks * config.block_length
    a_layer = 12 * facts.width + 1.5 * max(facts.layer_parameters) / facts.width  # kept for the backward pass, a token
    passes = methods.get(config.method).pass_counts
    steps = learns or methods.get(config.method).trains or passes.slopes
    held_layers = 1 if config.recompute else facts.n_layers
    activations = tokens * (held_layers * a_layer + facts.n_layers * facts.width) * size if steps else 0
    if config.adapter_rank and config.stage2_steps:
        adapted = 1.5 * activations  # adapters keep more than the linear maps that they sit on
        if not (on_gpu(config) or packed or config.penalty == "sum"):  # its parts go side by side, one after the other
            wide = min(config.threads or os.cpu_count() or 1, config.batch_blocks)
            adapted *= min(1.0, wide * at_once(config) / config.batch_blocks)
        activations = max(adapted, activations if methods.get(config.method).trains else 0)
    widest = max(3 * tokens if steps else 0, 3 * max(MEASURED_AT_ONCE, config.measure_length))
    logits = widest * facts.vocabulary * 4
    teacher = weights if config.distil and config.stage2_steps else 0
    optimizer_bytes = 0.0  # gradients and both moments
    if learns and (config.learn_weights or not config.adapter_rank):
        optimizer_bytes = 3 * weights
    elif learns:
        # Values, gradients and two moments, 4 bytes each; a layer's linear maps, in and out, are some 20 D wide.
        optimizer_bytes = 4 * 4 * config.adapter_rank * 20 * facts.width * facts.n_layers
    twins = weights if methods.get(config.method).narrow else 0  # the narrowed layers, and before them the gradients
    scored = config.score_blocks * config.block_length
    states = min(budget.SEARCH_ROOM, scored * facts.width * size * facts.n_layers**2 / 2) if passes.keeps else 0.0
    if passes.predicts:
        states += 4.0 * scored * facts.vocabulary
    cost = transfers.get(config.transfer).cost
    pool = config.calibration_blocks * config.block_length
    hidden = mlp_width(facts)
    repair_bytes = 4.0 * pool * (cost.states * facts.width + cost.squares * hidden) + cost.squares * 20.0 * hidden**2
    repair_bytes += cost.copies * weights
    if cost.squares:  # the old output projections and the new ones
        fitted_layers = facts.n_layers - below_the_cuts(config)
        repair_bytes += 8.0 * fitted_layers * hidden * facts.width
    if packed and transfers.get(config.transfer).opens:
        opened_layers = facts.n_layers - below_the_cuts(config)
        weights += int(size * opened_layers * (hidden + facts.width) * facts.width)
    proof_bytes = PROCESS_BYTES if config.save_model or config.save_trained else 0
    if packed and proof_bytes:  # spelled out in bfloat16 beside the packed ones, or packed a second time
        proof_bytes += facts.parameters * 2 if config.save_as == "merged" else weights
    peak = max(optimizer_bytes + activations + logits, states + logits, repair_bytes, proof_bytes)
    return int(PROCESS_BYTES + weights + teacher + twins + peak)


def below_the_cuts(config: RunConfig) -> int:
    """The layer right below the first deleted one, where the config names them; else 0, the lowest that it can be."""
    named = configs.parse_layers(config.layers) if config.method == "manual" else []
    return max(min(named, default=1) - 1, 0)


def mlp_width(facts: Facts) -> float:
    """An estimate of F, how many numbers the MLP's output projection reads, from the size of the largest layer: as if
    it had three (D, F) maps beside 3 D^2 parameters of attention; at least D."""
    return max((max(facts.layer_parameters) - 3 * facts.width**2) / (3 * facts.width), facts.width)


def check_memory(expected: Forecast) -> None:
    """Raise TrspError if a run with the forecast `expected` does not fit into the memory that is free now."""
    require_memory(expected.peak_bytes, "This run")


def on_gpu(config: RunConfig) -> bool:
    """Whether the run will use a GPU, as far as that can be seen without torch."""
    return config.device == "cuda" or (config.device == "auto" and Path("/dev/nvidia0").exists())
