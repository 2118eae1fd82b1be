"""Which targets count, and how many each sequence has. The one place where inputs and targets are aligned.

Dims: b batch, n positions, s sequences a row can hold (1, or n with segment ids).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """The counted targets of a batch, and L, the number of them in each sequence."""

    counted: Tensor  # (b, n-1) bool
    length: Tensor  # (b, n-1) int64, L of the sequence that the target lies in
    lengths: Tensor  # (b, s) int64, L of every sequence, 0 where there is none


def next_tokens(t: Tensor) -> Tensor:
    """(b, n, ...) aligned with the inputs -> (b, n-1, ...) aligned with the targets: target i is token i + 1."""
    return t[:, 1:]


def real_positions(
    x: Tensor,  # (b, n) or (b, n, d)
    *,
    lens: Tensor | None = None,
    mask: Tensor | None = None,
    seq_start_pos: Tensor | None = None,
    segment_ids: Tensor | None = None,
    prepended: int = 0,
) -> Tensor:
    """(b, n) bool, False where x is padding. `seq_start_pos` counts from the first prepended embedding on."""
    i = torch.arange(x.shape[1], device=x.device)  # (n,)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if lens is not None:
        real = real & (i < lens[:, None])
    if mask is not None:
        real = real & mask
    if seq_start_pos is not None:
        real = real & (i + prepended >= seq_start_pos[:, None])
    if segment_ids is not None:
        real = real & (segment_ids != 0)
    return real


def count_targets(
    x: Tensor,  # (b, n) or (b, n, d)
    *,
    ignore_index: int | None = None,
    loss_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    **real: Any,
) -> Targets:
    """Count the targets of x by every rule that is given, by `real_positions` too.

    Target (b, i), i = 1 … n-1, counts when all hold:

    - ``x[b, i] != ignore_index``
    - ``i < lens[b]``
    - ``mask[b, i] and mask[b, i-1]``
    - ``loss_mask[b, i]``
    - ``prepended + i > seq_start_pos[b]``, as the network counts positions from the first prepended embedding on
    - ``segment_ids[b, i] == segment_ids[b, i-1] != 0``

    A sequence is a row, or with ``segment_ids`` one contiguous run of equal non-zero ids inside a row.
    """
    b, n = x.shape[:2]
    is_real = real_positions(x, segment_ids=segment_ids, **real)
    counted = next_tokens(is_real) & is_real[:, :-1]
    if ignore_index is not None:
        counted = counted & (next_tokens(x) != ignore_index)
    if loss_mask is not None:
        counted = counted & next_tokens(loss_mask)

    if segment_ids is None:
        lengths = counted.sum(dim=-1, keepdim=True)  # (b, 1)
        return Targets(counted, lengths.expand(b, n - 1), lengths)

    same = next_tokens(segment_ids) == segment_ids[:, :-1]
    counted = counted & same
    run = (~same).cumsum(dim=-1)  # (b, n-1), the how-manieth run of its row
    lengths = run.new_zeros(b, n).scatter_add(1, run, counted.long())
    return Targets(counted, lengths.gather(1, run), lengths)
