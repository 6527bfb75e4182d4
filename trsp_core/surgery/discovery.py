"""Finds the stack of decoder layers in a model of any family."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trsp_core.errors import TrspError, is_ours, is_short_memory
from trsp_core.surgery import families
from trsp_core.surgery.hooks import entering, hidden_of
from trsp_core.surgery.removal import removed
from trsp_core.surgery.stack import Stack, text_config


def find(model: nn.Module) -> Stack:
    """The stack of decoder layers in `model`: the largest ModuleList whose members run one after the other, each from
    (B, T, D) to (B, T, D). A pass over three tokens shows that; a second one, that no token sees those after it.

    Raises:
        TrspError: no such list, or a model that cannot be pruned by whole layers; the message names the reason.
    """
    config = text_config(model)
    family = families.of(getattr(config, "model_type", ""))
    _refuse_unfit(model, config, family)
    calls: dict[nn.Module, tuple[Tensor, Any]] = {}
    order: list[nn.Module] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        order.append(module)
        calls[module] = (entering(args, kwargs), output)

    lists = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > 0
    ]
    hooks = [m.register_forward_hook(note, with_kwargs=True) for _, _, child in lists for m in child]
    try:
        logits = three_tokens(model, last=0)
    finally:
        for hook in hooks:
            hook.remove()
    near = 0.01 * logits.nan_to_num().abs().max().item()  # int8 rounds each token by the range of all tokens
    if not torch.allclose(logits[:, :2], three_tokens(model, last=1)[:, :2], rtol=1e-2, atol=near, equal_nan=True):
        raise TrspError(
            f"{type(model).__name__} reads the tokens that follow: it is an encoder.", "Choose a decoder-only model."
        )
    chains = [(p, n, c) for p, n, c in lists if _is_chain(list(c), calls, order)]
    chains.sort(key=lambda entry: -sum(p.numel() for p in entry[2].parameters()))
    if not chains:
        raise TrspError(
            f"No list of decoder layers was found in {type(model).__name__}.",
            "Choose a model whose layers run one after the other from hidden states to hidden states.",
        )
    parent, name, layers = chains[0]
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
    """Raise TrspError unless the middle layer can be removed, or the one below it: one may be alone of its kind."""
    middle = len(stack.layers) // 2
    try:
        with removed(stack, [middle]):
            return
    except TrspError:
        with removed(stack, [middle - 1]):
            return


def three_tokens(model: nn.Module, last: int) -> Tensor:
    """Logits (1, 3, V) of the token ids 0, 0, `last`. Raises TrspError where the model does not run on them."""
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
    """Whether each of `layers` ran once, in order, on exactly what the one before had put out, and kept its shape
    (B, T, ..., D). `calls` holds what entered and left each module, `order` the modules as they ran."""
    if any(layer not in calls for layer in layers) or [m for m in order if m in set(layers)] != layers:
        return False
    before = None
    for layer in layers:
        entering, leaving = calls[layer][0], hidden_of(calls[layer][1])
        if not (torch.is_tensor(entering) and torch.is_tensor(leaving)):
            return False
        if entering.dim() < 3 or leaving.shape != entering.shape:
            return False
        if before is not None and not torch.allclose(before, entering, rtol=0, atol=0, equal_nan=True):
            return False
        before = leaving
    return True
