"""What the network reads: ids that are legal everywhere, and masks that it does not drop.

Dims: b batch, n positions, p prepended embeddings.
"""

from __future__ import annotations

from functools import reduce
from operator import and_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def legal_ids(
    x: Tensor,  # (b, n)
    *,
    ignore_index: int,
    pad_value: int,
    lens: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """x with `pad_value` for ignored tokens and padding, whose ids may be anything."""
    is_ignored = x == ignore_index
    return x.masked_fill(is_ignored | ~real_positions(x, lens=lens, mask=mask, segment_ids=segment_ids), pad_value)


def real_positions(
    x: Tensor,  # (b, n) or (b, n, d)
    *,
    lens: Tensor | None = None,
    mask: Tensor | None = None,
    seq_start_pos: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """(b, n) bool, False where x is padding."""
    i = torch.arange(x.shape[1], device=x.device)  # (n,)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if lens is not None:
        real = real & (i < lens[:, None])
    if mask is not None:
        real = real & mask
    if seq_start_pos is not None:
        real = real & (i >= seq_start_pos[:, None])
    if segment_ids is not None:
        real = real & (segment_ids != 0)
    return real


def random_key_mask(real: Tensor, mask_prob: float) -> Tensor:
    """(b, n) bool, False at a random `mask_prob` of the keys of each row, never at the first, or the first real one.

    A query that sees no key at all would see every key: the network masks the future last.

    Liu et al., FCM: Forgetful Causal Masking, 2022, https://arxiv.org/abs/2210.13432. Draws the random numbers upstream
    draws.
    """
    n = real.shape[1]
    noise = torch.randn(real.shape, device=real.device)
    noise[:, 0] = -torch.finfo(noise.dtype).max
    hidden = noise.topk(min(int(n * mask_prob), n - 1), dim=-1).indices
    is_first = real & (real.cumsum(dim=1) == 1)
    return torch.ones_like(real).scatter(1, hidden, False) | is_first


def mask_arguments(
    net: nn.Module,
    *,
    mask: Tensor | None,  # (b, n)
    random_mask: Tensor | None,  # (b, n)
    n: int,
    prepended: int,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Return the arguments of the network's forward, with masks under which no padding is attended to.

    `mask` reaches the network as `mask`. It drops that one when it is given `self_attn_kv_mask` or `seq_start_pos`, so
    there `mask` is joined into `self_attn_kv_mask`, which covers memory tokens and prepended embeddings too.
    """
    arguments = dict(arguments)
    key_mask, drops_mask = arguments.get('self_attn_kv_mask'), False
    if mask is not None:
        arguments['mask'] = mask
        drops_mask = key_mask is not None or arguments.get('seq_start_pos') is not None
        if arguments.get('prepend_mask') is not None:
            mask = torch.cat((arguments['prepend_mask'], mask), dim=1)

    if random_mask is None and not drops_mask:
        return arguments

    interspersed = getattr(net, 'memory_tokens_interspersed_every', None) is not None
    memory_tokens = getattr(net, 'memory_tokens', None)
    keys = n + prepended + (0 if interspersed or memory_tokens is None else len(memory_tokens))
    masks = [m for m in (random_mask, key_mask, mask) if m is not None]
    arguments['self_attn_kv_mask'] = reduce(and_, (F.pad(m, (keys - m.shape[1], 0), value=True) for m in masks))
    return arguments
