"""How long a run will take and how much memory it will hold, from counts of operations; no torch, no model.

A forward pass costs two operations a matrix parameter and token; training steps are multiples of it. Seconds follow
from the rate of matrix products that runs on this machine have measured, and until there is one from a guess (`rough`).
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
from trsp_core.schema.config import PACKED, RunConfig

EFFICIENCY = 0.78  # of the matrix rate, that a whole model reaches
BANDWIDTH = 10e9  # bytes/s of memory, for what is bound by it: the optimiser, the loss, decoding
NOMINAL_CORE, NOMINAL_GPU = 80.0, 20_000.0  # GFLOP/s where nothing was measured
UNPACKING = {"nf4": 30.0, "int8": 3.0}  # bytes of memory traffic that spelling a packed number out takes as long as
MEASURED_AT_ONCE = 512  # tokens of a measuring pass, see `perplexity`


@dataclass(frozen=True)
class Forecast:
    """What is expected of a run.

    Attributes:
        phases: in order, each `{"name", "seconds"}`; only those that will occur.
        seconds: their sum; `peak_bytes` the most memory of the child process.
        rough: nothing was measured on this machine yet, or not for this device and precision.
    """

    phases: list[dict[str, Any]]
    seconds: float
    peak_bytes: int
    rough: bool


def forecast(config: RunConfig, facts: Facts, rate: float | None = None) -> Forecast:
    """The forecast for `config` on a model with `facts`.

    Args:
        rate: GFLOP/s of float32 matrix products; None takes the one measured on all cores of this machine, or its share
            for fewer threads.
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
    """Seconds of one step of stage 2. For ratios: the same whatever the machine is doing at the moment.

    Args:
        rate: GFLOP/s.
    """
    return _Cost(config, facts, rate * EFFICIENCY * 1e9, BANDWIDTH).training_step()


@dataclass(frozen=True)
class _Cost:
    """Seconds of a run's parts; `speed` is operations/s reached, `bandwidth` bytes/s."""

    config: RunConfig
    facts: Facts
    speed: float
    bandwidth: float

    @property
    def removed(self) -> int:
        return min(configs.count_to_remove(self.config, self.facts.n_layers), self.facts.n_layers - 1)

    def forward(self, tokens: float, length: int, skipped: float = 0) -> float:
        """One pass over `tokens` in blocks of `length`, `skipped` layers left out."""
        f = self.facts
        share = 1 - skipped / f.n_layers
        matrices = share * sum(f.layer_parameters) + f.vocabulary * f.width  # a tied embedding is the head, once
        attention = share * f.n_layers * 2 * length * f.width
        products = 2 * tokens * (matrices + attention) / self.speed + 8 * tokens * f.vocabulary / self.bandwidth
        return products + self.unpacked(share * -(-tokens // MEASURED_AT_ONCE))

    def unpacked(self, passes: float) -> float:
        """Packed weights are spelled out for every pass over them."""
        return passes * sum(self.facts.layer_parameters) * UNPACKING.get(self.config.precision, 0.0) / self.bandwidth

    def step(self, passes: float, skipped: float = 0, learning: bool = False) -> float:
        """One training step: `passes` forward passes' worth, and the optimiser's traffic where W learns."""
        tokens = self.config.batch_blocks * self.config.block_length
        traffic = 7 * 4 * self.facts.parameters / self.bandwidth if learning else 0.0
        if self.config.recompute:  # the layers once more, the head not
            layers, head = sum(self.facts.layer_parameters), self.facts.vocabulary * self.facts.width
            passes += layers / (layers + head)
        return passes * self.forward(tokens, self.config.block_length, skipped) + traffic + 0.05

    def measured(self, skipped: int = 0, sample: bool = True) -> float:
        """Perplexity in both domains, and a sample of text."""
        c = self.config
        tokens = 2 * c.measure_blocks * c.measure_length
        return self.forward(tokens, c.measure_length, skipped) + (
            self.decoding(c.sample_tokens, skipped) if sample else 0
        )

    def weighed(self) -> float:
        """Each layer left out alone; what lies below it is not computed again."""
        c = self.config
        blocks = min(c.importance_blocks, c.measure_blocks)
        tokens, n_layers = blocks * c.measure_length, self.facts.n_layers
        return n_layers * self.forward(tokens, c.measure_length, n_layers / 2)

    def decoding(self, tokens: int, skipped: int = 0) -> float:
        """Decoding: every token reads all weights, and each layer has its overhead."""
        share = 1 - skipped / self.facts.n_layers
        read = 4 * self.facts.parameters / (2 * self.bandwidth)  # one stream alone is twice as fast
        return tokens * (share * (read + 0.0003 * self.facts.n_layers) + 0.002)

    def chosen(self) -> float:
        """Stage 1, or another method's choice."""
        c, method = self.config, methods.get(self.config.method)
        sample = c.score_blocks * c.block_length * method.pass_counts.over_sample(self.facts.n_layers, self.removed)
        read = self.forward(sample + c.calibration_blocks * c.block_length * method.pass_counts.pool, c.block_length)
        if not method.trains:
            return 0.05 + read
        rounds = [0] if c.one_shot else list(range(self.removed))
        passes = 3.0 if c.learn_weights else 2.0
        return sum(c.stage1_steps * self.step(passes, r, c.learn_weights) for r in rounds)

    def training_step(self) -> float:
        """One step of stage 2, the mean of those with and without the chosen layers: forward and back, the local
        penalty's own way back, the teacher's way forward."""
        c = self.config
        local = 2 * self.removed / self.facts.n_layers if c.penalty_reach == "local" and c.lambda_2 else 0.0
        own = 2.2 if c.adapter_rank else 3  # adapters need the way back through the layers, not the weights' gradients
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
        """The closed form: passes, and for each layer the product of what its MLP reads with itself, and a solve in
        double precision."""
        c, f, cost = self.config, self.facts, transfers.get(self.config.transfer).cost
        tokens, layers = c.calibration_blocks * c.block_length, f.n_layers - self.removed
        seconds = cost.passes * 2 * tokens * sum(f.layer_parameters) / self.speed  # no pass reaches the head
        hidden = mlp_width(f)
        squares = 2 * tokens * hidden * (hidden + 2 * f.width) + 2 * (hidden**3 / 3 + 2 * hidden**2 * f.width)
        return seconds + (layers * squares / self.speed if cost.squares else 0.0)

    def phases(self) -> dict[str, float]:
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
        """The phases as they occur: choosing and moving once a cycle."""
        seconds_of, cycles = self.phases(), self.config.cycles
        if cycles == 1:
            return list(seconds_of.items())
        turns = [(name, seconds_of[name] / cycles) for name in ("choose", "transfer")] * cycles
        before = list(seconds_of).index("choose")
        rest = [(name, seconds) for name, seconds in seconds_of.items() if name not in ("choose", "transfer")]
        return [*rest[:before], *turns, *rest[before:]]


def peak_bytes(config: RunConfig, facts: Facts) -> int:
    """The most memory of the child: weights, where they learn also gradients and AdamW's two moments, a teacher's
    weights where one is distilled, narrowed layers beside the whole ones, and the activations and logits of one step
    or one measuring pass; and of the fresh process that proves what is kept, which maps its weights from the file."""
    packed = config.precision in PACKED
    size = BYTES[config.compute_dtype if packed else config.precision]
    weights = weight_bytes(facts, config.precision, config.compute_dtype)
    learns = config.stage2_steps > 0 or (config.learn_weights and methods.get(config.method).trains)
    tokens = config.batch_blocks * config.block_length
    a_layer = 12 * facts.width + 1.5 * max(facts.layer_parameters) / facts.width  # numbers kept for the way back
    steps = learns or methods.get(config.method).trains
    held_layers = 1 if config.recompute else facts.n_layers
    activations = tokens * (held_layers * a_layer + facts.n_layers * facts.width) * size if steps else 0
    if config.adapter_rank and config.stage2_steps:
        adapted = 1.5 * activations  # what adapters keep beside the maps that they sit on
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
        # In and out of a layer's maps.
        optimizer_bytes = 4 * 4 * config.adapter_rank * 20 * facts.width * facts.n_layers
    twins = weights if methods.get(config.method).narrow else 0  # the narrowed layers, and before them the gradients
    states = 0.0
    if methods.get(config.method).pass_counts.keeps:
        scored = config.score_blocks * config.block_length * facts.width * size
        states = min(budget.SEARCH_ROOM, scored * facts.n_layers**2 / 2)
    cost = transfers.get(config.transfer).cost
    pool = config.calibration_blocks * config.block_length
    hidden = mlp_width(facts)
    repair_bytes = 4.0 * pool * (cost.states * facts.width + cost.squares * hidden) + cost.squares * 20.0 * hidden**2
    proof_bytes = PROCESS_BYTES if config.save_model or config.save_trained else 0
    if packed and proof_bytes:  # spelled out in bfloat16 beside the packed ones, or packed a second time
        proof_bytes += facts.parameters * 2 if config.save_as == "merged" else weights
    peak = max(optimizer_bytes + activations + logits, states + logits, repair_bytes, proof_bytes)
    return int(PROCESS_BYTES + weights + teacher + twins + peak)


def mlp_width(facts: Facts) -> float:
    """F, the numbers that an MLP's output projection reads, as far as a layer's size tells: three maps of D times F
    beside attention's."""
    return max((max(facts.layer_parameters) - 3 * facts.width**2) / (3 * facts.width), facts.width)


def check_memory(expected: Forecast) -> None:
    """Raise TrspError if `expected` does not fit into the memory that is free now."""
    require_memory(expected.peak_bytes, "This run")


def on_gpu(config: RunConfig) -> bool:
    """Whether the run will use a GPU, as far as that can be seen without torch."""
    return config.device == "cuda" or (config.device == "auto" and Path("/dev/nvidia0").exists())
