"""How far sequences that share a row move each other in a network: an experiment on the whole of it.

Dims: b batch, n positions, m another length, d features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xtloss.checks import check_known, check_module, forward_keywords, widened
from xtloss.packing.experiment import ALONE, NoPlaceError, leak, neutral, outputs, stand_ins
from xtloss.packing.segments import check_segments, segment_arguments
from xtloss.packing.verdict import trusted


def segment_leak(net: nn.Module, **network_kwargs: Any) -> float:
    """Measure whether sequences that `pack` puts into one row keep apart in this network, as `segment_ids` has them.

    The largest difference, over the standard deviation of the outputs, between each sequence in a shared row and the
    same sequence alone in a row of its own length, and between outputs before and after other sequences, or a later
    token, become others. It runs in float32, in evaluation, without randomness, on weights shaken by 1/√fan-in, so that
    what is initialised to zero cannot hide. The network and all random streams are left as they were; meanwhile no
    other thread may run it.

        >>> segment_leak(net) < 1e-4
        True

    Args:
        net: a `TransformerWrapper`, or what is around one. The rows are as wide as it takes, 256 tokens at most.
        **network_kwargs: what its `forward` cannot do without, for b rows: `context` (b, m, d), `condition` (b, d) or
            (b, n, d), `embed_ids` {name: (b, n)}. Rows are then as many, and as wide, as these.

    Returns:
        Rounding, below 1e-4, where it keeps them apart; inf where it cannot take the masks or these arguments, or has
        several heads or pooled tokens.

    Raises:
        TypeError: `net` is no module, or its `forward` does not know an argument.

    """
    check_module('net', net)
    known = forward_keywords(net, getattr(net, 'attn_layers', None))
    if known is not None:
        check_known('segment_leak()', network_kwargs, known)
    arguments = {name: each(without_graph, value) for name, value in network_kwargs.items() if value is not None}
    limit, v = getattr(net, 'max_seq_len', 0) or 256, getattr(net, 'num_tokens', 2)
    varlen = trusted(net).varlen
    b, n = size_of(arguments, 1 if varlen else 2, min(limit, 256))
    device = next((p.device for p in net.parameters()), torch.device('cpu'))
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, v, (b, n), generator=draw)
    other = (x + torch.randint(1, max(v, 2), (b, n), generator=draw)) % v

    def run(x: Tensor, ids: Tensor, place: tuple[slice, slice]) -> Tensor:
        given = {name: each(partial(cut, name, *place), value) for name, value in arguments.items()}
        if varlen or x.shape == (b, n):  # else alone, without masks
            check_segments(net, len(ids), given, trust=True, asks='segment_leak()')
            given = segment_arguments(net, ids, given)
        logits, hiddens = net(x, return_intermediates=True, looped_pred_all_logits=True, **given)
        pooled = getattr(hiddens, 'attn_pooled_tokens', None)
        if not isinstance(logits, Tensor) or pooled is not None:
            raise NoPlaceError('several heads, or tokens that are none of a sequence')
        more = [getattr(hiddens, name, None) or [] for name in ('all_pred_logits', 'exit_logits')]
        return outputs([logits, *more], *x.shape)

    with ALONE, neutral(), stand_ins(net, net):
        for module in net.modules():
            module.training = False
        try:
            return leak(run, x.to(device), other.to(device)).max().item()
        except Exception:  # whatever the network raises
            return float('inf')


def each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change a tensor, or all in a dict; anything else stays."""
    if isinstance(value, dict):
        return {name: each(change, part) for name, part in value.items()}
    return change(value) if isinstance(value, Tensor) else value


def without_graph(t: Tensor) -> Tensor:
    """Return a tensor without its graph, float32 where it is floating point, int64 where it is integer."""
    return t.detach().float() if t.is_floating_point() else widened(t.detach())


def of_rows(name: str, t: Tensor) -> bool:
    """Whether an argument belongs to rows (b, …), and not to tokens (b, n, …)."""
    return name in ('context', 'context_mask') or t.ndim == 1 or (name in ('condition', 'in_attn_cond') and t.ndim == 2)


def size_of(arguments: dict[str, Any], b: int, n: int) -> tuple[int, int]:
    """Return how many rows of how many tokens the arguments belong to, or else (b, n)."""
    for name, value in arguments.items():
        for t in value.values() if isinstance(value, dict) else [value]:
            if isinstance(t, Tensor) and name == 'attn_mask':
                b, n = len(t) if t.ndim == 4 and len(t) > 1 else b, t.shape[-1]
            elif isinstance(t, Tensor) and t.ndim:
                b, n = len(t), n if of_rows(name, t) else t.shape[1]
    return b, n


def cut(name: str, rows: slice, here: slice, t: Tensor) -> Tensor:
    """Return the part of an argument that belongs to some tokens of some rows."""
    if name == 'attn_mask':
        return (t[rows] if t.ndim == 4 and len(t) > 1 else t)[..., here, here]
    if t.ndim == 0:
        return t
    return t[rows] if of_rows(name, t) else t[rows, here]
