"""Several sequences in one row: what the network is handed to keep them apart.

Dims: b batch, n positions, s runs of equal ids.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers.attend import Attend
from x_transformers.x_transformers import AbsolutePositionalEmbedding

from xtloss.wrappers.masks import visible_keys


def takes_positions(net: nn.Module) -> bool:
    """Tell whether its embedding is absolute, so that each sequence needs positions that begin at 0."""
    return any(isinstance(module, AbsolutePositionalEmbedding) for module in net.modules())


def takes_lengths(net: nn.Module) -> bool:
    """Tell whether it was built with `attn_flash_pack_seq`: flash-attn takes lengths of sequences, and no mask."""
    return any(isinstance(m, Attend) and bool(m.flash and m.flash_pack_seq) for m in net.modules())


def segment_arguments(
    net: nn.Module,
    segment_ids: Tensor,  # (b, n) integer
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Return the arguments of the network's forward with which it computes each run of equal ids as if it were alone.

    `attn_mask` is joined with the causal mask of the runs, (b, 1, n, n) bool. `pos`, (b, n) int64, restarts with each
    run, but only where the embedding is absolute: relative encodings need none. A network built with
    `attn_flash_pack_seq` is handed `flash_pack_seq_kwargs` instead of a mask. Padding is a run like any other.
    Whether the network heeds them is for `segment_leak` to say.

    Raises:
        ValueError: several rows for `attn_flash_pack_seq`, which would read the lengths of the first.

    """
    run = F.pad((segment_ids[:, 1:] != segment_ids[:, :-1]).cumsum(dim=-1), (1, 0))  # (b, n), from 0 in each row
    if takes_positions(net):
        position = torch.arange(run.shape[1], device=run.device).expand_as(run)
        starts = F.pad(run.diff(dim=-1) > 0, (1, 0))
        arguments = {**arguments, 'pos': position - torch.where(starts, position, 0).cummax(dim=-1).values}
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
