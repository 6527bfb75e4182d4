"""Finding a model's decoder layers, and changing what they do: gate, skip, remove. Every change is a context manager.

Nothing here copies a model's forward pass: gates are hooks, a skipped layer hands its input on, a removed one is
gone from the list. On leaving the context the model is what it was, to the bit.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trsp_core import families
from trsp_core.errors import TrspError, is_ours, is_short_memory

MEMORIES = (CacheLayerMixin, LinearAttentionCacheLayerMixin)
DEPTHS = (12, 24)  # of configs made to see what grows with the layers; patterns of 2, 3, 4 and 6 layers fit in


@dataclass(frozen=True)
class Stack:
    """A causal language model and the list of decoder layers inside it.

    Attributes:
        model: the whole model; `model(input_ids=..., use_cache=False).logits` is (B, T, V).
        parent, name: `getattr(parent, name)` is the ModuleList of the L layers.
        extras: how many values a layer returns after the hidden states; None where it returns a bare tensor.
        family: what is particular to this architecture.
        proved: sets of layers without which the config is known to describe the model.
    """

    model: nn.Module
    parent: nn.Module
    name: str
    extras: int | None
    family: families.Family
    proved: set[frozenset[int]] = field(default_factory=set, compare=False)

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.parent, self.name)

    @property
    def text_config(self) -> Any:
        return _text_config(self.model)

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads; None where its config names no limit."""
        return families.context(self.text_config)

    def writers(self, layer: int) -> list[nn.Module]:
        """Layer `layer`'s modules that write into the residual stream: attention's first, the MLP's last."""
        named = self.layers[layer].named_modules()
        return [module for name, module in named if name.rpartition(".")[2] in self.family.outputs]

    def outputs(self, layer: int) -> list[nn.Parameter]:
        """Parameters of `writers`."""
        return [p for module in self.writers(layer) for p in module.parameters(recurse=True)]


def find(model: nn.Module) -> Stack:
    """The decoder layers of `model`: the one ModuleList whose members each map (B, T, D) to (B, T, D), one after the
    other, confirmed by a forward pass of three tokens. A second pass confirms that no token is seen before its turn.

    Raises:
        TrspError: no such list, or a family that cannot be pruned by whole layers; the message names the reason.
    """
    config = _text_config(model)
    family = families.of(getattr(config, "model_type", ""))
    _refuse_unfit(model, config, family)
    calls: dict[nn.Module, tuple[Tensor, Any]] = {}
    order: list[nn.Module] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        order.append(module)
        calls[module] = (_entering(args, kwargs), output)

    lists = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > 0
    ]
    hooks = [m.register_forward_hook(note, with_kwargs=True) for _, _, child in lists for m in child]
    try:
        seen = _three_tokens(model, last=0)
    finally:
        for hook in hooks:
            hook.remove()
    near = 0.01 * seen.nan_to_num().abs().max().item()  # int8 rounds by what it sees of all tokens
    if not torch.allclose(seen[:, :2], _three_tokens(model, last=1)[:, :2], rtol=1e-2, atol=near, equal_nan=True):
        raise TrspError(
            f"{type(model).__name__} reads the tokens that follow: it is an encoder.", "Choose a decoder-only model."
        )
    found = [(p, n, c) for p, n, c in lists if _is_chain(list(c), calls, order)]
    found.sort(key=lambda entry: -sum(p.numel() for p in entry[2].parameters()))
    if not found:
        raise TrspError(
            f"No list of decoder layers was found in {type(model).__name__}.",
            "Choose a model whose layers run one after the other from hidden states to hidden states.",
        )
    parent, name, layers = found[0]
    says = getattr(config, "num_hidden_layers", "an untold number of")
    if says != len(layers) * family.caches:
        raise TrspError(
            f"{type(model).__name__} says it has {says} layers, but {len(layers)} were found.",
            "Choose a model with one plain stack of decoder layers.",
        )
    owners = collections.Counter(id(p) for layer in layers for p in layer.parameters())
    if max(owners.values()) > 1:
        raise TrspError(f"Layers of {type(model).__name__} share weights.", "Choose a model whose layers are its own.")
    output = calls[layers[0]][1]
    extras = len(output) - 1 if isinstance(output, (tuple, list)) else None
    stack = Stack(model, parent, name, extras, family)
    if len(layers) > 1:
        _try(stack)
    return stack


def _try(stack: Stack) -> None:
    """Raise TrspError unless a layer in the middle can be removed, or, where that is the last of its kind, the next."""
    middle = len(stack.layers) // 2
    try:
        with removed(stack, [middle]):
            return
    except TrspError:
        with removed(stack, [middle - 1]):
            return


def _three_tokens(model: nn.Module, last: int) -> Tensor:
    """Logits (1, 3, V) of two tokens 0 and then `last`."""
    try:
        with torch.no_grad():
            ids = torch.tensor([[0, 0, last]], device=next(model.parameters()).device)
            return model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        if is_ours(error) or is_short_memory(error):
            raise
        raise TrspError(
            f"{type(model).__name__} does not run on three plain tokens: {type(error).__name__}: {str(error)[:200]}",
            "Choose a causal language model that takes text alone.",
        ) from error


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config(decoder=True)


def _refuse_unfit(model: nn.Module, config: Any, family: families.Family) -> None:
    if family.refused:
        raise TrspError(f"{family.name} cannot be pruned by whole layers: {family.refused}.", "Choose another model.")
    if getattr(config, "num_kv_shared_layers", 0):
        raise TrspError(
            f"{type(model).__name__} cannot be pruned by whole layers: {config.num_kv_shared_layers} of its layers "
            "reuse the key-value cache of others.",
            "Choose a model in which every layer has a cache of its own.",
        )
    if "shared" in (getattr(config, "indexer_types", None) or ()):
        raise TrspError(
            f"{type(model).__name__} cannot be pruned by whole layers: some of them attend to the tokens that an "
            "earlier one has picked.",
            "Choose a model in which every layer picks its own.",
        )
    saved_as = getattr(model.config, "model_type", "")
    if saved_as not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise TrspError(
            f"{type(model).__name__} would be saved as {saved_as}, which loads as no causal model.",
            "Choose a causal language model.",
        )
    if config.is_encoder_decoder or type(config).is_encoder_decoder:
        raise TrspError(f"{type(model).__name__} belongs to an encoder-decoder.", "Choose a decoder-only model.")


def _is_chain(layers: list[nn.Module], calls: dict, order: list[nn.Module]) -> bool:
    """Whether `layers` ran once each, in order, from (B, T, ..., D) to the same shape, each fed what the one before
    put out."""
    if any(layer not in calls for layer in layers) or [m for m in order if m in set(layers)] != layers:
        return False
    before = None
    for layer in layers:
        entering, leaving = calls[layer][0], _hidden(calls[layer][1])
        if not (torch.is_tensor(entering) and torch.is_tensor(leaving)):
            return False
        if entering.dim() < 3 or leaving.shape != entering.shape:
            return False
        if before is not None and not torch.allclose(before, entering, rtol=0, atol=0, equal_nan=True):
            return False
        before = leaving
    return True


def _entering(args: tuple, kwargs: dict) -> Any:
    """X_in (B, T, D) of a layer call."""
    return args[0] if args else kwargs.get("hidden_states")


def _hidden(output: Any) -> Any:
    """X_out (B, T, D) of what a layer returned."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextlib.contextmanager
def gated(stack: Stack, weights: Tensor, kind: str, layers: Collection[int]) -> Iterator[None]:
    """Put weight s_i on layer i's output, for i in `layers` (design section 2; paper figure 2).

    `branch`: the next layer sees X_in + s_i (X_out - X_in), which is exactly X_out at s_i = 1 and X_in at 0.
    `output`: it sees s_i X_out.

    Args:
        weights: (L,), float32; gradients flow into it.
        kind: "branch" or "output".
    """

    def make(i: int) -> Any:
        def gate(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            x_out = _hidden(output)
            x_in = _entering(args, kwargs).to(x_out.device)  # a layer may be the first on its GPU
            # In bfloat16 the numbers below 1 are 0.004 apart, and the steps of s would be lost: so not in its format.
            wide = torch.promote_types(x_out.dtype, weights.dtype)
            s = weights[i].to(x_out.device, wide)
            gated = torch.lerp(x_in.to(wide), x_out.to(wide), s) if kind == "branch" else s * x_out.to(wide)
            return _with_hidden(output, gated.to(x_out.dtype))

        return gate

    hooks = [stack.layers[i].register_forward_hook(make(i), with_kwargs=True) for i in sorted(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def skipped(
    stack: Stack, layers: Collection[int], instead: Mapping[int, Tensor] = MappingProxyType({})
) -> Iterator[None]:
    """Layers in `layers` hand their input on, and compute nothing. Call the model with `use_cache=False`.

    Args:
        instead: for some of `layers`: hidden states (B, T, D) to hand on in place of the input.
    """

    def make(i: int) -> Any:
        def hand_on(*args: Any, **kwargs: Any) -> Any:
            hidden = instead[i] if i in instead else _entering(args, kwargs)
            return hidden if stack.extras is None else (hidden, *[None] * stack.extras)

        return hand_on

    with forwarding({stack.layers[i]: make(i) for i in sorted(layers)}):
        yield


@contextlib.contextmanager
def forwarding(forwards: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Modules compute by other functions inside, by module."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextlib.contextmanager
def tapped(stack: Stack, layers: Sequence[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """A dict that each forward pass fills: layer to its (X_in, X_out), each (B, T, D), in the autograd graph."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def make(i: int) -> Any:
        def tap(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            x_out = _hidden(output)
            seen[i] = (_entering(args, kwargs).to(x_out.device), x_out)

        return tap

    hooks = [stack.layers[i].register_forward_hook(make(i), with_kwargs=True) for i in layers]
    try:
        yield seen
    finally:
        seen.clear()
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def recomputed(stack: Stack) -> Iterator[None]:
    """On the way back each layer is computed once more from its input, so that nothing inside it has to be kept
    (gradient checkpointing, arXiv:1604.06174). Gates and taps see what they always see."""

    def make(forward: Any) -> Any:
        def again(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return again

    with forwarding({layer: make(layer.forward) for layer in stack.layers}):
        yield


@contextlib.contextmanager
def fused(stack: Stack, backend: str = "inductor") -> Iterator[None]:
    """Each layer is compiled for passes with gradients: on a GPU its small kernels become few. Gates and taps see what
    they always see; other passes, whose shapes vary, are as before.

    Args:
        backend: of torch.compile.

    Raises:
        TrspError: at the first pass, where torch cannot compile them.
    """
    from torch._functorch import config as compiling

    def make(forward: Any) -> Any:
        fast = compiled(forward, backend)
        return lambda *args, **kwargs: (fast if torch.is_grad_enabled() else forward)(*args, **kwargs)

    keeps = compiling.patch(donated_buffer=False)  # some pass back goes over its tables twice
    with keeps, forwarding({layer: make(layer.forward) for layer in stack.layers}):
        try:
            yield
        finally:
            torch.compiler.reset()  # torch compiles a function for few cases; those of the next stage are others


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """`function` by torch.compile, for one shape after the other.

    Raises:
        TrspError: when it is called, where torch cannot compile it.
    """
    from torch._dynamo.exc import TorchDynamoException

    fast = torch.compile(function, dynamic=False, backend=backend)

    def through(*args: Any, **kwargs: Any) -> Any:
        try:
            return fast(*args, **kwargs)
        except TorchDynamoException as error:
            raise TrspError(
                f"The layers could not be fused: {str(error)[:300]}",
                "Set --fuse false, or see that there is a C compiler.",
            ) from error

    return through


@contextlib.contextmanager
def removed(stack: Stack, layers: Collection[int]) -> Iterator[nn.Module]:
    """The model without `layers`: gone from the list, and with the config and every layer's number as if it had never
    had them, so that it caches, saves and reloads like any other. On exit all of it is put back.

    Raises:
        TrspError: the config cannot describe a model without these layers.
    """
    old, config = stack.layers, stack.text_config
    gone = frozenset(layers)
    keep = [i for i in range(len(old)) if i not in gone]
    memories = _memories(config)
    before = dict(vars(config))
    named = (*families.NUMBERS, "num_hidden_layers")
    numbers = [(m, n, vars(m)[n]) for layer in old for m in layer.modules() for n in named if n in vars(m)]
    setattr(stack.parent, stack.name, nn.ModuleList([old[i] for i in keep]))
    try:
        _say_of_layers(config, len(old), keep, stack.family.caches)
        for new, i in enumerate(keep):
            for module in old[i].modules():
                _renumber(module, i, new, stack.family.caches)
                if vars(module).get("num_hidden_layers") == len(old):
                    module.num_hidden_layers = len(keep)  # type: ignore[assignment]
        if gone not in stack.proved:
            _prove(stack, gone, memories)
            stack.proved.add(gone)
        yield stack.model
    finally:
        setattr(stack.parent, stack.name, old)
        vars(config).clear()
        vars(config).update(before)
        for module, name, number in numbers:
            setattr(module, name, number)


def _renumber(module: nn.Module, old: int, new: int, caches: int) -> None:
    """Layer `old` is layer `new` now: in what `module` calls its number, or its place in the cache."""
    places = {old: new} | {caches * old + k: caches * new + k for k in range(caches)}
    for name in families.NUMBERS:
        if vars(module).get(name) in places:
            setattr(module, name, places[vars(module)[name]])


def _say_of_layers(config: Any, n_layers: int, keep: Sequence[int], caches: int) -> None:
    """Let `config` speak of the layers in `keep` alone: per-layer lists, the fields that `families` names, and what a
    heterogeneous config overrides for single layers."""
    told: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in families.LEADING and isinstance(value, int):
            told[name] = sum(i < value for i in keep)
        elif name in families.INDICES and isinstance(value, (list, tuple)):
            told[name] = type(value)(new for new, i in enumerate(keep) if i in value)
        elif name in families.ORDINALS and isinstance(value, (list, tuple)):
            told[name] = type(value)(new + 1 for new, i in enumerate(keep) if i + 1 in value)
        elif name in families.PATTERNS and value:
            told[name] = [value[i % len(value)] for i in keep]
        elif name in families.COUNTS and value == n_layers:
            told[name] = len(keep)
        elif name in families.DIVIDED:
            told[name] = value * (len(keep) / n_layers) ** families.DIVIDED[name]
        elif isinstance(value, (list, tuple)) and len(value) == n_layers and _is_per_layer(type(config), name):
            told[name] = type(value)(value[i] for i in keep)
    different = vars(config).pop("_heterogeneity_spec", None)
    config.num_hidden_layers = len(keep) * caches  # under whatever name this config keeps it
    for name, value in told.items():
        setattr(config, name, value)
    if different:
        by_layer = different.per_layer_overrides
        config.per_layer_config = {new: by_layer[i] for new, i in enumerate(keep) if i in by_layer}


def _is_per_layer(config_class: type, name: str) -> bool:
    """Whether the config's list `name` has one entry a layer. Its length says nothing: token ids, multipliers and
    limits may happen to be as many."""
    return name in families.LISTS or name in _growing(config_class)


@functools.cache
def _growing(config_class: type) -> frozenset[str]:
    """Names of the lists that a config made of defaults gives one entry a layer, whatever its depth; none, where its
    defaults belong to one depth."""
    found = []
    for depth in DEPTHS:
        try:
            values = vars(config_class(num_hidden_layers=depth))
        except (StrictDataclassError, ValueError, NotImplementedError):
            return frozenset()
        found.append({n for n, v in values.items() if isinstance(v, (list, tuple)) and len(v) == depth})
    return frozenset.intersection(*map(frozenset, found))


def _prove(stack: Stack, gone: frozenset[int], memories: set[type]) -> None:
    """Raise TrspError unless a model built from the config, without memory for its weights, is the one at hand: the
    same parameters, and in each layer the same plain values, such as its number or a scale that depends on it.

    Args:
        memories: the kinds of cache that the layers had before any went; each has to be left, since a hybrid model asks
            one of each for how far it has read.
    """
    model, name = stack.model, type(stack.model).__name__
    path = next(n for n, m in model.named_modules() if m is stack.parent)
    without = f"without layer{'s' if len(gone) > 1 else ''} {', '.join(map(str, sorted(gone)))}"
    remedy = "Protect these layers from removal, or choose another model."
    if gone & set(stack.family.stays):
        raise TrspError(f"{name} cannot be used {without}: {stack.family.note}.", remedy)
    if memories - _memories(stack.text_config):
        raise TrspError(f"{name} {without} has attention layers alone, or none.", remedy)
    try:
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(model.config))
    except Exception as error:
        raise TrspError(f"{name} cannot be built {without}: {error}.", remedy) from error
    here = _described(model, stack.layers)
    there = _described(built, getattr(built.get_submodule(path), stack.name))
    for key in [*here, *there]:
        found, told = (side.get(key, "missing") for side in (here, there))
        if not (found == told or (isinstance(found, float) and math.isclose(found, told))):
            raise TrspError(f"The config of {name} cannot say what it is {without}: {key}, {found} or {told}.", remedy)


def _memories(config: Any) -> set[type]:
    """Which kinds of cache the layers have: of keys and values, of a state."""
    layers = DynamicCache(config=config).layers
    return {kind for kind in MEMORIES if any(isinstance(layer, kind) for layer in layers)}


def _described(model: nn.Module, layers: nn.ModuleList) -> dict[str, Any]:
    """Shapes of all parameters, and the plain values in each layer's modules. Packed weights have the shape of
    what they stand for; adapters, and what linear maps are made of, are no part of the description."""
    shapes: dict[str, Any] = {
        name.replace(".base_layer", ""): tuple(getattr(p, "quant_state", p).shape)
        for name, p in model.named_parameters()
        if "lora_" not in name
    }
    return shapes | {
        f"layers.{path}.{name}": value
        for path, module in layers.named_modules()
        if not isinstance(module, nn.Linear) and not hasattr(module, "get_base_layer")
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str)) and name != "training" and not name.startswith("_")
    }


@contextlib.contextmanager
def narrowed(stack: Stack, layers: Sequence[nn.Module], entries: Mapping[str, int]) -> Iterator[nn.Module]:
    """The model with `layers` in place of its own, and `entries` in its config. On exit all of it is put back."""
    old, values = stack.layers, vars(stack.text_config)
    before = {name: values[name] for name in entries if name in values}
    setattr(stack.parent, stack.name, nn.ModuleList(layers))
    try:
        for name, value in entries.items():
            setattr(stack.text_config, name, value)
        yield stack.model
    finally:
        setattr(stack.parent, stack.name, old)
        for name in entries:
            if name in before:
                setattr(stack.text_config, name, before[name])
            else:
                delattr(stack.text_config, name)


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, every parameter has its old values and `requires_grad` on exit. Costs one copy."""
    copies = [(p, p.detach().clone(), p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, copy, wanted in copies:
                parameter.copy_(copy)
                parameter.requires_grad_(wanted)


@contextlib.contextmanager
def rewritten(edits: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Parameters hold the values in `edits` inside, and on exit their old ones, to the bit."""
    old = {p: p.detach().clone() for p in edits}
    try:
        _write(edits)
        yield
    finally:
        _write(old)


def _write(values: Mapping[nn.Parameter, Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(value)


@contextlib.contextmanager
def heard(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets what `module` puts out, (B, T, D), at each of its calls."""
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _args, output: outputs.append(_hidden(output)))
    try:
        yield outputs
    finally:
        hook.remove()


@contextlib.contextmanager
def learning(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Only `parameters` require gradients; on exit flags are as before and all gradients are gone."""
    wanted = {id(p) for p in parameters}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
