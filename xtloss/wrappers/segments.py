"""Several sequences in one row: what the network is handed to keep them apart.

Dims: b batch, n positions, h heads, s runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers.attend import Attend
from x_transformers.x_transformers import AbsolutePositionalEmbedding

from xtloss.wrappers.runs import causal_mask, positions_in_run, run_numbers

# arguments of the network's forward that move no sequence: tests/test_segments.py proves each
APART_ARGUMENTS = frozenset(
    'mask self_attn_kv_mask attn_mask context context_mask condition in_attn_cond embed_ids sum_embeds recycle_steps '
    'looped_steps max_looped_steps layers_execute_order repeat_blocks attn_z_loss_weight'.split()
)
NEVER = frozenset({'prepend_embeds', 'mems', 'cache', 'pos', 'flash_pack_seq_kwargs'})  # these masks do not fit them


def segment_arguments(
    net: nn.Module,
    segment_ids: Tensor,  # (b, n) integer
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Return the arguments of the network's forward with which it computes each run of equal ids as if it were alone.

    `attn_mask` is joined with the causal mask of the runs, (b, 1, n, n) bool. `pos`, (b, n) int64, restarts with each
    run, but only where the embedding is absolute: relative encodings need none. A network built with
    `attn_flash_pack_seq` is handed `flash_pack_seq_kwargs` instead of a mask. Padding is a run like any other.
    Whether the network heeds them is for `check_segments` to say.
    """
    facts = row_facts(net)
    run = run_numbers(segment_ids)  # (b, n)
    if facts.takes_positions:
        arguments = {**arguments, 'pos': positions_in_run(run)}
    if facts.variable_length:
        return {**arguments, 'flash_pack_seq_kwargs': varlen_arguments(run)}

    # causal here already: the network looks for positions that see nothing before it makes its own mask causal, and
    # those that it overlooks it lets attend to everything
    attn_mask = causal_mask(run)  # (b, 1, n, n)
    if arguments.get('attn_mask') is not None:
        attn_mask = attn_mask & arguments['attn_mask']  # (n, n), (h, n, n) or (b, h, n, n), as the network reads them
    return {**arguments, 'attn_mask': attn_mask}


class RowFacts(NamedTuple):
    """How a network is told of the sequences in a row."""

    takes_positions: bool
    variable_length: bool


def row_facts(net: nn.Module) -> RowFacts:
    """Stub."""
    varlen = any(isinstance(m, Attend) and bool(m.flash and getattr(m, 'flash_pack_seq', False)) for m in net.modules())
    absolute = any(isinstance(m, AbsolutePositionalEmbedding) for m in net.modules())
    return RowFacts(absolute, varlen)


def varlen_arguments(run: Tensor) -> dict[str, Any]:
    """(1, n) run numbers -> the arguments of flash-attn's `flash_attn_varlen_func` for self-attention inside the runs.

    cu_seqlens, (s + 1,) int32, holds where each of the s runs starts, and n. Its size depends on the data: a host sync.
    Under torch.compile there is none, and it has n + 1 entries, the rest of them n: empty runs, each of which costs the
    backward of flash-attn 128 rows of a buffer.
    """
    n = run.shape[1]
    starts = F.pad(run[0].diff() > 0, (1, 0), value=True)  # (n,)
    position = torch.arange(n, device=run.device)
    cu_seqlens = F.pad(torch.where(starts, position, n).sort().values, (0, 1), value=n).int()
    if not torch.compiler.is_compiling():
        cu_seqlens = cu_seqlens[: int(starts.sum()) + 1]
    return {'cu_seqlens_q': cu_seqlens, 'cu_seqlens_k': cu_seqlens, 'max_seqlen_q': n, 'max_seqlen_k': n}
