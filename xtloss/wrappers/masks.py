"""How a network is told which keys are real, and where the sequences of a row begin and end.

x-transformers takes three masks, each with a fault. `mask` makes a bfloat16 network float32, and is dropped beside
`self_attn_kv_mask` and `seq_start_pos`, under which a query that sees no key, such as padding on the left, attends to
all alike, or is NaN in float64. So the keys are told by `attn_mask`, in which a query that would see none sees itself.

Dims: b batch, n positions, p prepended embeddings, m positions of a memory, h heads; i queries, the last of k keys.
"""

from collections.abc import Sequence
from functools import reduce
from operator import and_
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from x_transformers import x_transformers as upstream
from x_transformers.attend import Attend


def has_known_attention(net: Any) -> bool:
    """Tell whether it has the attention layers of x-transformers."""
    return isinstance(getattr(net, 'attn_layers', None), upstream.AttentionLayers)


def memory_length(mems: Sequence[Tensor | None] | None) -> int:
    """Return how many positions of a memory, the same in all layers, are attended to before the row."""
    return 0 if not mems or mems[0] is None else mems[0].shape[1]


def memory_tokens(net: Any) -> int:
    """Return how many of its own tokens the network puts before every row."""
    return len(getattr(net, 'memory_tokens', ()))


def prepended_length(arguments: dict[str, Any]) -> int:
    """Return how many embeddings the caller puts before every row."""
    return arguments['prepend_embeds'].shape[1] if 'prepend_embeds' in arguments else 0


def join_keys(*masks: Tensor | None) -> Tensor | None:
    """Return (b, k) bool, the keys that all these masks show; each ends where the row ends. One is returned as is."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    k = max([mask.shape[1] for mask in given])
    padded = [mask if mask.shape[1] == k else F.pad(mask, (k - mask.shape[1], 0), value=True) for mask in given]
    return reduce(and_, padded)


def mask_arguments(
    net: Any,
    keys: Tensor | None,  # (b, up to k) bool, False where no query may look
    arguments: dict[str, Any],
    *,
    mask: Tensor | None,  # (b, n), as the caller gave it
    queries: int,
) -> dict[str, Any]:
    """Return the arguments of the network's forward under which only `keys` are attended to.

    A network that is not of x-transformers gets `mask` as it came, and `self_attn_kv_mask` where more is hidden.
    """
    if not has_known_attention(net):
        arguments = arguments if mask is None else {**arguments, 'mask': mask}
        return arguments if keys is mask else {**arguments, 'self_attn_kv_mask': keys}
    if keys is not None:
        keys = of_all_keys(net, keys, arguments, queries)
        arguments = {name: value for name, value in arguments.items() if name != 'mem_masks'}
    elif arguments.get('attn_mask') is None:
        return arguments

    attentions = [module for module in net.modules() if isinstance(module, upstream.Attention)]
    sees_more = memory_tokens(net) > 0 or any(attention.num_mem_kv > 0 for attention in attentions)
    shifts = mask is not None and any(isinstance(module, upstream.ShiftTokens) for module in net.modules())
    if shifts and keys is not None:  # tokens are shifted by `mask`, which attention must not read
        arguments = {**arguments, 'mask': mask, 'self_attn_kv_mask': torch.ones_like(keys)}
    if sees_more or arguments.get('self_attn_additional_kv') is not None:
        return arguments if keys is None else {**arguments, 'self_attn_kv_mask': keys}

    windows = [attention.max_attend_past for attention in attentions if attention.max_attend_past is not None]
    causal = bool(net.attn_layers.causal) and arguments.get('causal') is None
    seen = visible_keys(queries, keys, attn_mask=arguments.get('attn_mask'), causal=causal, windows=windows)
    return {**arguments, 'attn_mask': seen}


def of_all_keys(net: Any, keys: Tensor, arguments: dict[str, Any], queries: int) -> Tensor:
    """Return (b, k) bool, which of all keys are real: of memories, memory tokens and the row, of which `keys` tells."""
    m = memory_length(arguments.get('mems'))
    interspersed = getattr(net, 'memory_tokens_interspersed_every', None) is not None
    k = max(keys.shape[1], m + queries + (0 if interspersed else memory_tokens(net)))
    of_memories = (arguments.get('mem_masks') or [None])[0]  # of all layers alike
    keys = F.pad(keys, (k - keys.shape[1], 0), value=True)
    return keys & F.pad(of_memories, (0, k - m), value=True) if of_memories is not None and m else keys


def visible_keys(
    queries: int,
    keys: Tensor | None = None,  # (b, k) bool; None: all are real
    *,
    run: Tensor | None = None,  # (b, k) integers: a key is seen from its own run alone
    attn_mask: Tensor | None = None,  # (i, k), (h, i, k) or (b, h, i, k) bool
    causal: bool = True,
    windows: Sequence[int] = (),  # how far back the layers look
) -> Tensor:
    """Return (b, 1 or h, i, k) bool, the keys each query may look at. One that could look at none may see itself."""
    like = next(t for t in (keys, run, attn_mask) if t is not None)
    k = like.shape[-1]
    past = torch.ones(queries, k, dtype=torch.bool, device=like.device).tril(k - queries)
    masks = [
        None if keys is None else rearrange(keys, 'b k -> b 1 1 k'),
        None if run is None else rearrange(run, 'b i -> b 1 i 1') == rearrange(run, 'b k -> b 1 1 k'),
        attn_mask,
    ]
    seen = reduce(and_, [mask for mask in masks if mask is not None])
    if keys is None and attn_mask is None:  # every query sees itself
        return seen & past
    in_reach = seen & past.triu(k - queries - min(windows, default=k))
    lost = ~in_reach.any(dim=-1, keepdim=True)  # (b, 1 or h, i, 1)
    itself = past.triu(k - queries)  # the diagonal
    return (seen & past if causal else seen) | (itself & lost)


def position_arguments(net: Any, start: Tensor | None, n: int, prepended: int, pos: Any) -> dict[str, Any]:
    """Return what tells the network where rows start, (b,), and no more: `seq_start_pos` masks keys besides."""
    if start is None:
        return {}
    if not has_known_attention(net):
        return {'seq_start_pos': start}
    layers = net.attn_layers
    if not isinstance(net.pos_emb, (upstream.AbsolutePositionalEmbedding, upstream.ScaledSinusoidalEmbedding)):
        return {}
    relative = [layers.rotary_pos_emb, layers.rel_pos, layers.polar_pos_emb] != [None] * 3
    biases = (upstream.RelativePositionBias, upstream.DynamicPositionBias)
    fixed = layers.polar_pos_emb is not None or isinstance(layers.rel_pos, biases)
    if pos is not None or fixed or (prepended and relative):
        return {'seq_start_pos': start}
    return {'pos': (torch.arange(n, device=start.device) - rearrange(start, 'b -> b 1')).clamp(min=0)}


def takes_positions(net: nn.Module) -> bool:
    """Tell whether its embedding is absolute, so that each sequence needs positions that begin at 0."""
    return any(isinstance(module, upstream.AbsolutePositionalEmbedding) for module in net.modules())


def takes_lengths(net: nn.Module) -> bool:
    """Tell whether it was built with `attn_flash_pack_seq`: flash-attn takes lengths of sequences, and no mask."""
    return any(isinstance(m, Attend) and bool(m.flash and m.flash_pack_seq) for m in net.modules())


def segment_arguments(net: nn.Module, segment_ids: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the network's arguments with which it computes each run of equal ids, (b, n), as if it were alone.

    `attn_mask` is joined with the causal mask of the runs, (b, 1, n, n) bool. `pos`, (b, n) int64, restarts with each
    run, but only where the embedding is absolute: relative encodings need none. Padding is a run like any other.
    """
    starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))  # (b, n), of each run of a row but the first
    run = starts.cumsum(dim=1)  # (b, n), from 0 in each row
    if takes_positions(net):
        position = torch.arange(run.shape[1], device=run.device).expand_as(run)
        arguments = {**arguments, 'pos': position - torch.where(starts, position, 0).cummax(dim=1).values}
    if takes_lengths(net):
        if len(run) > 1:
            raise ValueError(f'a network built with attn_flash_pack_seq takes segment_ids of one row, got {len(run)}')
        return {**arguments, 'flash_pack_seq_kwargs': variable_lengths(run)}

    # causal here already: the network looks for positions that see nothing before it makes its own mask causal, and
    # those that it overlooks it lets attend to everything
    attn_mask = visible_keys(run.shape[1], run=run, attn_mask=arguments.get('attn_mask'))
    return {**arguments, 'attn_mask': attn_mask}


def variable_lengths(run: Tensor) -> dict[str, Any]:
    """(1, n) run numbers -> the arguments of flash-attn's `flash_attn_varlen_func` for self-attention inside the runs.

    cu_seqlens, (s + 1,) int32, holds where each of the s runs starts, and n: a host sync. Under torch.compile there is
    none, and it has n + 1 entries, the rest of them n: empty runs, which cost the backward of flash-attn some memory.
    """
    n = run.shape[1]
    starts = F.pad(run[0].diff() > 0, (1, 0), value=True)  # (n,)
    position = torch.arange(n, device=run.device)
    cu_seqlens = F.pad(torch.where(starts, position, n).sort().values, (0, 1), value=n).int()
    if not torch.compiler.is_compiling():
        cu_seqlens = cu_seqlens[: int(starts.sum()) + 1]
    return {'cu_seqlens_q': cu_seqlens, 'cu_seqlens_k': cu_seqlens, 'max_seqlen_q': n, 'max_seqlen_k': n}
