"""The rows that the network reads, and where in them the targets of the batch are predicted.

Dims: b batch, n positions, p prepended embeddings; r rows and m positions of what the network returns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xtloss.packing.segments import segment_arguments
from xtloss.packing.verdict import trusted
from xtloss.weighting.targets import Outputs, real_positions
from xtloss.wrappers.attention_masks import is_known, mask_arguments, position_arguments, prepended_length
from xtloss.wrappers.inputs import join_keys, legal_ids, random_key_mask
from xtloss.wrappers.unpad import plan_rows

# arguments of a wrapper's forward that the network does not get
OF_THE_LOSS = frozenset(
    'lens loss_mask loss_weight segment_ids normalizer return_outputs return_breakdown '
    'rollout_steps dropout_mems ttt_recurrent_steps'.split()
)
# and those that it gets as other masks and positions
OF_MASKS = frozenset('mask self_attn_kv_mask prepend_mask seq_start_pos'.split())


class Rows(NamedTuple):
    """What the network reads, and where its outputs lie that predict the targets."""

    ids: Tensor  # (b, n)
    arguments: dict[str, Any]
    outputs: Outputs


def network_rows(
    net: Any,
    x: Tensor,  # (b, n)
    given: dict[str, Any],
    *,
    ignore_index: int,
    pad_value: int,
    mask_prob: float,
    unpad: bool,
) -> Rows:
    """Make the rows of a batch from all that a wrapper's forward was given, and has checked."""
    prepended = prepended_length(given)
    telling = {name: given.get(name) for name in ('lens', 'mask', 'seq_start_pos', 'segment_ids')}
    real = real_positions(x, **telling, prepended=prepended)
    ids = legal_ids(x, ignore_index=ignore_index, pad_value=pad_value, real=real)
    random_mask = random_key_mask(real, mask_prob) if mask_prob > 0 else None

    outputs = Outputs()
    if unpad and (plan := plan_rows(x, given, one_row=trusted(net).varlen)) is not None:
        ids, given, outputs = plan.take(ids, pad_value), plan.arguments(given), plan.outputs()
        random_mask = None if random_mask is None else plan.take(random_mask, True)

    n, mask = ids.shape[1], given.get('mask')
    arguments = {name: value for name, value in given.items() if name not in OF_THE_LOSS}
    if 'segment_ids' in given:
        arguments = segment_arguments(net, given['segment_ids'], arguments)
    arguments = {name: value for name, value in arguments.items() if name not in OF_MASKS}
    arguments.update(position_arguments(net, given.get('seq_start_pos'), n, prepended, arguments.get('pos')))
    start = given.get('seq_start_pos') if is_known(net) else None  # a network of somebody else's hides what is before
    keys = visible_positions(ids, given, start, prepended, random_mask)
    return Rows(ids, mask_arguments(net, keys, arguments, mask=mask, queries=prepended + n), outputs)


def visible_positions(
    x: Tensor, given: dict[str, Any], start: Tensor | None, prepended: int, random_mask: Tensor | None
) -> Tensor | None:
    """(b, up to p+n) bool: the keys that no argument hides; None where there is no such argument."""
    n, before = x.shape[1], given.get('prepend_mask')
    position = torch.arange(prepended + n, device=x.device)
    return join_keys(
        [
            given.get('mask'),
            random_mask,
            given.get('self_attn_kv_mask'),
            None if before is None else F.pad(before, (0, n), value=True),
            None if start is None else position >= start[:, None],
        ]
    )
