"""Width: every layer loses attention heads and MLP channels, and no layer goes (LLM-Pruner, arXiv:2305.11627).

    score of a unit = sum over the weights that go with it of  |w * dL_LM/dw|

A unit is a channel of the MLP, or a key-value head with the query heads that read it. Which weights go with a channel,
the library `torch-pruning` finds by tracing the MLP; it also cuts the matrices. Attention it cannot trace: on rotary
embeddings its search never ends (issue 527 of VainF/Torch-Pruning). So which weights go with a head follows from the
config.

Each layer loses the same number of units, lowest scores first, so that an ordinary config still describes the model.
The number is such that the model gets as small as by deleting K average layers; heads and channels go in equal shares,
as nearly as whole key-value heads allow. Unlike in the paper no layer is spared at the ends, and no LoRA training
follows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.pruning.methods import Method, PassCounts, progressed
from trsp_core.schema.events import LayersNarrowed
from trsp_core.surgery import families

if TYPE_CHECKING:
    from torch import Tensor, nn

INTO = ("q_proj", "k_proj", "v_proj")
COUNTS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class Part:
    """A matrix of which each unit has a part.

    Attributes:
        side: "out" if a unit has rows of the weight (out, in), "in" if it has columns.
        span: how many; unit u has those from u * span on.
    """

    module: nn.Linear
    side: str
    span: int

    def salience(self) -> Tensor:
        """The sum of |w * dL_LM/dw| over each unit's part, (units,); the weight has to hold its gradient."""
        weight, gradient = self.module.weight, self.module.weight.grad
        assert gradient is not None
        each = (weight * gradient).detach().double().abs().sum(1 if self.side == "out" else 0)
        return each.view(-1, self.span).sum(1)

    def size(self) -> int:
        """How many parameters one unit has in this matrix and its bias."""
        bias = 1 if self.side == "out" and self.module.bias is not None else 0
        others = self.module.in_features if self.side == "out" else self.module.out_features
        return self.span * (others + bias)

    def cut(self, units: Sequence[int]) -> None:
        """Take `units` out of the matrix and its bias, in place."""
        import torch_pruning

        indices = [u * self.span + i for u in units for i in range(self.span)]
        prune = (
            torch_pruning.prune_linear_out_channels if self.side == "out" else torch_pruning.prune_linear_in_channels
        )
        prune(self.module, indices)


def choose(lab, config, count):
    """[]: no layer goes, see `narrow`."""
    yield from ()
    return []


def narrow(lab, config, count):
    """A narrower copy of each layer, and the entries of the config that describe them; one `LayersNarrowed` tells it.

    Raises:
        TrspError: heads or channels of this model cannot be cut, or it cannot get so small; the message says why.
    """
    layers, batches = list(lab.stack.layers), lab.sample(config)
    halves = [(heads(lab, layer), channels(lab, layer)) for layer in layers]
    tokens = sum(ids.numel() for ids in batches)
    with lab.learning([part.module.weight for both in halves for half in both for part in half]):
        for n, ids in enumerate(batches, 1):
            lab.add_gradient(ids, ids.numel() / tokens)
            yield progressed(n, len(batches))
        scores = [[score(half) for half in both] for both in halves]
    units = {tuple(len(score) for score in both) for both in scores}
    if len(units) > 1:
        refuse(lab, "its layers are not equally wide")
    total = sum(p.numel() for p in lab.model.parameters())
    layer = sum(p.numel() for layer in layers for p in layer.parameters()) / len(layers)  # parameters, in the mean
    sizes = tuple(sum(part.size() for part in half) for half in halves[0])
    gone, entries, shapes = cuts(lab, layer, count / len(layers), units.pop(), sizes)
    narrowed = [slimmed(lab, *pair, gone) for pair in zip(layers, scores, strict=True)]
    before: list = [getattr(lab.stack.text_config, name, None) for name in COUNTS]
    with lab.narrowed(narrowed, entries):
        if {name: value.shape for name, value in lab.model.state_dict().items()} != shapes:
            refuse(lab, "its config cannot describe fewer heads of the same size")
        remaining_parameters = sum(p.numel() for p in lab.model.parameters())
    yield LayersNarrowed(
        layers=len(layers),
        heads=[before[0], entries[COUNTS[0]]],
        key_value_heads=[before[1] or before[0], entries[COUNTS[1]]],
        channels=[before[2], entries[COUNTS[2]]],
        aim=total - round(count * layer),
        parameters=remaining_parameters,
    )
    return narrowed, entries


def score(parts: Sequence[Part]) -> list[float]:
    """The score of each unit: the sum of its salience over `parts`, the matrices that it is a part of."""
    import torch

    return torch.stack([part.salience() for part in parts]).sum(0).tolist()


def heads(lab, layer):
    """The matrices of the layer's attention, for units that are a key-value head with the query heads that read it.

    Raises:
        TrspError: attention is not built of four ordinary matrices.
    """
    from torch import nn

    text = lab.stack.text_config
    block = next((m for m in layer.modules() if all(isinstance(getattr(m, n, None), nn.Linear) for n in INTO)), None)
    if block is None:
        refuse(lab, "its queries, keys and values are not three ordinary matrices")
    q, k, v = (getattr(block, name) for name in INTO)
    count = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    back = [m for name, m in block.named_children() if name in families.OUTPUTS and isinstance(m, nn.Linear)]
    size, per = k.out_features // count, text.num_attention_heads // count
    widths = [q.out_features, *(m.in_features for m in back)]
    if k.out_features != v.out_features or k.out_features % count or widths != [count * per * size] * 2:
        refuse(lab, "its attention has another form than queries, keys, values and one matrix back")
    return [Part(q, "out", per * size), Part(k, "out", size), Part(v, "out", size), Part(back[0], "in", per * size)]


def channels(lab, layer):
    """The matrices of the layer's MLP, for units that are a channel, as the library finds them by tracing the MLP.

    Raises:
        TrspError: the MLP is no module of its own, or its channels cannot be cut one by one.
    """
    import torch
    import torch_pruning
    from torch import nn

    named = [(name, m) for name, m in layer.named_modules() if name.rpartition(".")[2] in families.OUTPUTS]
    (name, down) = named[-1]
    path = name.rpartition(".")[0]
    attends = path and any(hasattr(layer.get_submodule(path), name) for name in INTO)
    if not path or attends or not isinstance(down, nn.Linear):
        refuse(lab, "its MLP is not a module of its own that ends in an ordinary matrix")
    mlp, weight, every = layer.get_submodule(path), down.weight, list(range(down.in_features))
    probe = torch.zeros(1, 2, down.out_features, device=weight.device, dtype=weight.dtype, requires_grad=True)
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(
            mlp, probe, forward_fn=lambda module, x: module(x), verbose=False
        )
    group = graph.get_pruning_group(down, torch_pruning.prune_linear_in_channels, every)
    coupled = [(dep, indices) for dep, indices in group if any(True for _ in parameters_of(dep.target.module))]
    if any(not isinstance(dep.target.module, nn.Linear) or sorted(indices) != every for dep, indices in coupled):
        refuse(lab, "its MLP couples channels in a way that cannot be cut")
    out = graph.is_out_channel_pruning_fn
    return [Part(dep.target.module, "out" if out(dep.handler) else "in", 1) for dep, _ in coupled]


def parameters_of(module):
    """The parameters of a module that the trace names; the trace may also name a parameter itself."""
    return module.parameters() if hasattr(module, "parameters") else [module]


def cuts(lab, layer, share, units, sizes):
    """How much to take from each layer: as many key-value heads as come nearest to `share` of them, and then as many
    channels as the rest takes.

    Args:
        layer: parameters of a layer, in the mean.
        share: of them that has to go, 0 to 1.
        units: how many key-value heads, and how many channels, a layer has.
        sizes: parameters of one key-value head with its query heads, and of one channel.

    Returns:
        `(heads, channels)` to take, the config's entries for what is left, and the shapes of a model with these.

    Raises:
        TrspError: no such numbers, or none that the config accepts.
    """
    text, wanted = lab.stack.text_config, layer * share
    per = text.num_attention_heads // units[0]
    for gone in sorted(range(units[0]), key=lambda n: abs(n / units[0] - share)):
        cut = math.ceil((wanted - gone * sizes[0]) / sizes[1])
        if not 0 <= cut < units[1]:
            continue
        heads_left = units[0] - gone
        entries = dict(zip(COUNTS, (heads_left * per, heads_left, units[1] - cut), strict=True)) | {
            "head_dim": head_size(lab)
        }
        shapes = described(lab.model, entries)
        if shapes:
            return (gone, cut), entries, shapes
    raise TrspError(
        f"No layer of this model can lose {formatting.percent(share)} of its parameters in width.", "Lower the ratio."
    )


def head_size(lab):
    """Numbers of one attention head, by the config."""
    text = lab.stack.text_config
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def described(model, entries):
    """Shapes, by name, of all tensors that `model` has when its config has these `entries`; None where the config does
    not accept them."""
    import torch
    from huggingface_hub.errors import StrictDataclassError

    values = copy.deepcopy(model.config)
    for name, value in entries.items():
        setattr(values.get_text_config(decoder=True), name, value)
    try:
        values = type(values).from_dict(values.to_dict())
    except (ValueError, StrictDataclassError):
        return None
    with torch.device("meta"):
        return {name: value.shape for name, value in type(model)(values).state_dict().items()}


def slimmed(lab, layer, scores, gone):
    """A copy of `layer` without its lowest key-value heads and channels.

    Args:
        scores: of its key-value heads, and of its channels.
        gone: how many of each to take.
    """
    text = lab.stack.text_config
    twin = copy.deepcopy(layer, {id(text): text})  # the config is the model's, and stays one
    for half, score, count in zip((heads(lab, twin), channels(lab, twin)), scores, gone, strict=True):
        lowest = sorted(range(len(score)), key=lambda unit: (score[unit], unit))[:count]
        for part in half if count else ():
            part.cut(lowest)
    return twin.requires_grad_(False)


def refuse(lab, why) -> NoReturn:
    """Raise the TrspError that says why this model cannot be narrowed."""
    raise TrspError(
        f"{lab.stack.family.name} cannot be narrowed here: {why}.", "Choose another method, or another model."
    )


METHOD = Method(
    name="width",
    title="Width, grouped Taylor",
    paper="LLM-Pruner: On the Structural Pruning of Large Language Models, arXiv:2305.11627",
    summary="No layer goes: each loses the heads and channels whose weights times their gradients add up to least.",
    differences="Its authors' code leaves the first three layers and the last one of 32 whole, and adds a second-order "
    "term to the scores; here each layer loses the same, by first order alone.",
    choose=choose,
    pass_counts=PassCounts(once=3, slopes=True),
    narrow=narrow,
    reads_weights=True,
)
