"""The rows that the network reads, and where in them the targets of the batch are predicted.

Dims: b batch, n positions, p prepended embeddings; r rows and m positions of what the network returns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from xtloss.arguments import OF_LOSS
from xtloss.weighting.targets import real_positions
from xtloss.wrappers.masks import (
    has_known_attention,
    join_keys,
    mask_arguments,
    position_arguments,
    prepended_length,
    segment_arguments,
    takes_lengths,
)
from xtloss.wrappers.unpad import plan_rows

REAL = ('lens', 'mask', 'seq_start_pos', 'segment_ids')  # the arguments that say which positions are real
OF_MASKS = frozenset(('mask', 'self_attn_kv_mask', 'prepend_mask', 'seq_start_pos'))  # the network gets others instead


class Outputs(NamedTuple):
    """Where among the network's outputs, (r, m), those lie that predict the targets, (b, n-1).

    In the rows of the batch, after what was prepended; the last output of a row predicts no target. Or at `place`.
    """

    place: Tensor | None = None  # (b, n-1) int64, in the r · m outputs end to end; r · m where there is none

    def at_outputs(self, t: Tensor, shape: Sequence[int]) -> Tensor:
        """(b, n-1), aligned with the targets -> (r · m,): each at the output that predicts it, else 0."""
        r, m = shape
        if self.place is None:
            return rearrange(F.pad(t, (m - t.shape[1] - 1, 1)), 'b n -> (b n)')
        return t.new_zeros(r * m + 1).scatter(0, self.place.flatten(), t.flatten())[:-1]

    def to_targets(self, outputs: Tensor, shape: Sequence[int]) -> Tensor:
        """(r, m, ...), the network's outputs -> (b, n-1, ...): those that predict the targets, else 0."""
        if self.place is None:
            return outputs[:, -1 - shape[1] : -1]
        flat = rearrange(outputs, 'r m ... -> (r m) ...')
        return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[self.place]


def network_rows(
    wrapper: Any, x: Tensor, given: dict[str, Any], *, unpad: bool
) -> tuple[Tensor, dict[str, Any], Outputs]:
    """Return the rows that the network reads of a batch, (r, m), its other arguments, and where its outputs lie.

    `given` is all that a wrapper's forward was given, and has checked.
    """
    net, prepended = wrapper.net, prepended_length(given)
    real = real_positions(x, **{name: given.get(name) for name in REAL}, prepended=prepended)
    ids = legal_ids(x, real, ignore_index=wrapper.ignore_index, pad_value=wrapper.pad_value)
    random_mask = random_key_mask(real, wrapper.mask_prob) if wrapper.mask_prob > 0 else None

    outputs = Outputs()
    if unpad and (plan := plan_rows(x, given, one_row=takes_lengths(net))) is not None:
        ids, given, outputs = plan.take(ids, wrapper.pad_value), plan.arguments(given), Outputs(plan.places())
        random_mask = None if random_mask is None else plan.take(random_mask, True)

    n, mask, start, before = ids.shape[1], given.get('mask'), given.get('seq_start_pos'), given.get('prepend_mask')
    arguments = {name: value for name, value in given.items() if name not in OF_LOSS}
    if 'segment_ids' in given:
        arguments = segment_arguments(net, given['segment_ids'], arguments)
    arguments = {name: value for name, value in arguments.items() if name not in OF_MASKS}
    arguments.update(position_arguments(net, start, n, prepended, arguments.get('pos')))

    started = None  # another network than x-transformers' hides by itself what is before the start
    if start is not None and has_known_attention(net):
        started = torch.arange(prepended + n, device=ids.device) >= rearrange(start, 'b -> b 1')
    before = None if before is None else F.pad(before, (0, n), value=True)
    keys = join_keys(mask, random_mask, given.get('self_attn_kv_mask'), before, started)
    return ids, mask_arguments(net, keys, arguments, mask=mask, queries=prepended + n), outputs


def legal_ids(x: Tensor, real: Tensor, *, ignore_index: int, pad_value: int) -> Tensor:
    """Return x, (b, n), with `pad_value` for ignored tokens and padding, whose ids may be anything."""
    return x.masked_fill((x == ignore_index) | ~real, pad_value)


def random_key_mask(real: Tensor, mask_prob: float) -> Tensor:
    """Return (b, n) bool, False at a random `mask_prob` of the keys of a row, never at its first, or first real, one.

    Liu et al., FCM: Forgetful Causal Masking, 2022, https://arxiv.org/abs/2210.13432. It draws the random numbers that
    upstream draws.
    """
    n = real.shape[1]
    noise = torch.randn(real.shape, device=real.device)
    noise[:, 0] = -torch.finfo(noise.dtype).max
    hidden = noise.topk(min(int(n * mask_prob), n - 1), dim=-1).indices
    is_first = real & (real.cumsum(dim=1) == 1)
    return torch.ones_like(real).scatter(1, hidden, False) | is_first
