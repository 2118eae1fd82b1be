"""How the network is told which keys are real, so that no hidden key moves anything and no query sees the future.

x-transformers takes three masks, each with a fault. `mask` makes the activations of a bfloat16 network float32, and is
dropped beside `self_attn_kv_mask` and `seq_start_pos`. Under these two a query that sees no key, such as padding on the
left, attends to every key alike, or is NaN in float64. So the keys are told by `attn_mask`, in which a query that would
see none sees itself.

Dims: b batch, h heads, i queries, k keys: those of the queries are the last.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers.x_transformers import (
    AbsolutePositionalEmbedding,
    Attention,
    AttentionLayers,
    DynamicPositionBias,
    RelativePositionBias,
    ScaledSinusoidalEmbedding,
    ShiftTokens,
)

from xtloss.wrappers.memories import memory_length


def is_known(net: Any) -> bool:
    """Whether it has the attention layers of x-transformers."""
    return isinstance(getattr(net, 'attn_layers', None), AttentionLayers)


def mask_arguments(
    net: Any,
    keys: Tensor | None,  # (b, k) bool, False where no query may look
    arguments: dict[str, Any],
    *,
    mask: Tensor | None,  # (b, n), as the caller gave it
    queries: int,
) -> dict[str, Any]:
    """Return the arguments of the network's forward under which only `keys` are attended to.

    A network that is not of x-transformers gets `mask` as it came, and `self_attn_kv_mask` where more is hidden.
    """
    if keys is None:
        return arguments
    if not is_known(net):
        arguments = arguments if mask is None else {**arguments, 'mask': mask}
        return arguments if keys is mask else {**arguments, 'self_attn_kv_mask': keys}

    attentions = [module for module in net.modules() if isinstance(module, Attention)]
    windows = [attention.max_attend_past for attention in attentions if attention.max_attend_past is not None]
    always_visible = memory_tokens(net) > 0 or any(attention.num_mem_kv > 0 for attention in attentions)
    interspersed = getattr(net, 'memory_tokens_interspersed_every', None) is not None
    m = memory_length(arguments.get('mems'))
    k = max(keys.shape[1], m + queries + (0 if interspersed else memory_tokens(net)))
    keys = F.pad(keys, (k - keys.shape[1], 0), value=True)
    extra = dict(arguments)
    of_memory = (extra.pop('mem_masks', None) or [None])[0]  # of all layers alike
    if of_memory is not None and m:
        keys = keys & F.pad(of_memory, (0, k - m), value=True)
    if mask is not None and any(isinstance(module, ShiftTokens) for module in net.modules()):  # which read it too
        extra['mask'] = mask
    if always_visible or arguments.get('self_attn_additional_kv') is not None:
        return {**extra, 'self_attn_kv_mask': keys}

    if 'mask' in extra:
        extra['self_attn_kv_mask'] = torch.ones_like(keys)  # for attention, in place of `mask`
    causal = bool(net.attn_layers.causal) and arguments.get('causal') is None
    window = min(windows) if windows else None
    seen = visible_keys(keys, queries, causal=causal, window=window, attn_mask=arguments.get('attn_mask'))
    return {**extra, 'attn_mask': seen}


def memory_tokens(net: Any) -> int:
    """How many of its own tokens the network puts before every row."""
    tokens = getattr(net, 'memory_tokens', None)
    return 0 if tokens is None else len(tokens)


def prepended_length(arguments: dict[str, Any]) -> int:
    """How many embeddings the caller puts before every row."""
    return arguments['prepend_embeds'].shape[1] if 'prepend_embeds' in arguments else 0


def visible_keys(
    keys: Tensor,  # (b, k) bool
    queries: int,
    *,
    causal: bool,
    window: int | None,
    attn_mask: Tensor | None,  # (i, k), (h, i, k) or (b, h, i, k) bool
) -> Tensor:
    """(b, 1 or h, i, k) bool: the keys each query may look at. One that could look at none may look at itself."""
    k = keys.shape[1]
    past = torch.ones(queries, k, dtype=torch.bool, device=keys.device).tril(k - queries)
    itself = past.triu(k - queries)  # the diagonal
    seen = keys[:, None, None, :]  # (b, 1, 1, k)
    if attn_mask is not None:
        seen = seen & attn_mask
    in_reach = seen & (past if window is None else past.triu(k - queries - window))
    lost = ~in_reach.any(dim=-1, keepdim=True)  # (b, 1 or h, i, 1)
    return (seen & past if causal else seen) | (itself & lost)


def precision_of(net: nn.Module, arguments: dict[str, Any]) -> AbstractContextManager[Any]:
    """Where a narrow network is handed `mask`, and so makes float32 of its activations: autocast them back."""
    if 'mask' in arguments and is_known(net):
        for p in net.parameters():
            if p.dtype in (torch.bfloat16, torch.float16):
                return torch.autocast(arguments['mask'].device.type, p.dtype)
    return nullcontext()


def position_arguments(net: Any, start: Tensor | None, n: int, prepended: int, pos: Any) -> dict[str, Any]:
    """Return what tells the network where rows start, (b,), and no more: `seq_start_pos` masks keys besides."""
    if start is None:
        return {}
    if not is_known(net):
        return {'seq_start_pos': start}
    layers = net.attn_layers
    if not isinstance(net.pos_emb, (AbsolutePositionalEmbedding, ScaledSinusoidalEmbedding)):
        return {}
    relative = layers.rotary_pos_emb is not None or layers.rel_pos is not None or layers.polar_pos_emb is not None
    fixed = layers.polar_pos_emb is not None or isinstance(layers.rel_pos, (RelativePositionBias, DynamicPositionBias))
    if pos is not None or fixed or (prepended and relative):
        return {'seq_start_pos': start}
    return {'pos': (torch.arange(n, device=start.device) - start[:, None]).clamp(min=0)}
