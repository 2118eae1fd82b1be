"""The rows that the network reads, where in them the targets of the batch are predicted, and what each target costs.

Dims: b batch, n positions, p prepended embeddings, d width, v vocabulary; r rows, m positions that the network returns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from xtloss.arguments import OF_LOSS, has_values, loss_dtype
from xtloss.losses.cross_entropy import cross_entropy
from xtloss.losses.linear_cross_entropy import linear_cross_entropy
from xtloss.weighting.targets import real_positions
from xtloss.wrappers.head import LinearHead
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
    """Return the rows that the network reads of a batch, (r, m), its other arguments, and where its outputs lie."""
    net, prepended = wrapper.net, prepended_length(given)
    told = {name: given.get(name) for name in ('lens', 'mask', 'seq_start_pos', 'segment_ids')}
    real = real_positions(x, **told, prepended=prepended)
    ids = x.masked_fill((x == wrapper.ignore_index) | ~real, wrapper.pad_value)  # which are legal, whatever x holds
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
    if 'segment_ids' not in given:  # where positions begin anew anyway
        arguments.update(position_arguments(net, start, n, prepended, arguments.get('pos')))

    started = None
    if start is not None and has_known_attention(net):  # another network hides by itself what is before the start
        started = torch.arange(prepended + n, device=ids.device) >= rearrange(start, 'b -> b 1')
    before = None if before is None else F.pad(before, (0, n), value=True)
    keys = join_keys(mask, random_mask, given.get('self_attn_kv_mask'), before, started)
    if keys is None and 'segment_ids' in given and 'attn_mask' not in given:  # every query sees itself
        return ids, arguments, outputs
    return ids, mask_arguments(net, keys, arguments, mask=mask, queries=prepended + n), outputs


def random_key_mask(real: Tensor, mask_prob: float) -> Tensor:
    """Return (b, n) bool, False at a random `mask_prob` of the keys of a row, never at its first, or first real, one.

    Liu et al., FCM: Forgetful Causal Masking, 2022, https://arxiv.org/abs/2210.13432, with upstream's random numbers.
    """
    n = real.shape[1]
    noise = torch.randn(real.shape, device=real.device)
    noise[:, 0] = -torch.finfo(noise.dtype).max
    hidden = noise.topk(min(int(n * mask_prob), n - 1), dim=-1).indices
    is_first = real & (real.cumsum(dim=1) == 1)
    return torch.ones_like(real).scatter(1, hidden, False) | is_first


def token_losses(wrapper: Any, logits: Tensor, ids: Tensor, counted: Tensor, outputs: Outputs) -> Tensor:
    """Return the nll of each target, of ids (b, n-1), in nats, (b, n-1), 0 where not counted; float32 or wider.

    All logits, (r, m, v), are read where they lie: slicing off the last would copy them, and their gradient.
    """
    shape, flat = logits.shape[:2], rearrange(logits, 'r m v -> (r m) v')
    targets = outputs.at_outputs(torch.where(counted, ids, 0), shape)  # (r·m,)
    at_counted = outputs.at_outputs(counted, shape)
    net = wrapper if hasattr(wrapper, 'output_is_log_prob') else wrapper.net  # XL's may have wrapped the network
    if net.output_is_log_prob:
        log_prob = flat.gather(1, targets[:, None]).squeeze(1)
        nll = torch.where(at_counted, -log_prob.to(loss_dtype(logits.dtype)), 0)
    else:
        nll = cross_entropy(flat, targets, at_counted, composite=wrapper.fused is False)
    return outputs.to_targets(nll.view(shape), ids.shape)


def loss_from_embeds(
    head: LinearHead, embeds: Tensor, ids: Tensor, counted: Tensor, weight: Tensor, outputs: Outputs
) -> tuple[Tensor, Tensor]:
    """Return Σ weight · nll over the counted targets, 0-dim, and their nll, (b, n-1), detached, 0 where not counted.

    Embeds are (r, m, d), the other tensors (b, n-1). In eager mode only the rows that count reach the head, at the
    price of one host sync. Where shapes are static, or nothing has values, the others go along, as zeros.
    """
    shape, flat = embeds.shape[:2], rearrange(embeds, 'r m d -> (r m) d')
    at_counted = outputs.at_outputs(counted, shape)  # (r·m,)
    targets = outputs.at_outputs(torch.where(counted, ids, 0), shape)
    weight = outputs.at_outputs(weight, shape)

    if torch.compiler.is_compiling() or not has_values(at_counted):
        rows = head.scaled(torch.where(at_counted[:, None], flat, 0))
        total, nll = linear_cross_entropy(rows, head.weight, targets, weight, bias=head.bias)
        nll = torch.where(at_counted, nll, 0)
    else:
        index = at_counted.nonzero().squeeze(1)
        rows = head.scaled(flat.index_select(0, index))  # whose backward needs no sort
        total, row_nll = linear_cross_entropy(rows, head.weight, targets[index], weight[index], bias=head.bias)
        nll = row_nll.new_zeros(len(weight)).index_copy(0, index, row_nll)
    return total, outputs.to_targets(nll.view(shape), ids.shape)


def next_embed_loss(next_embed: tuple[Tensor, Tensor], counted: Tensor, outputs: Outputs) -> Tensor:
    """Return the mean absolute error of the predicted embedding of each target, (b, n-1), 0 where it is not counted."""
    pred, embeds = next_embed  # (r, m, d) each, the latter of the tokens that the network read
    read = F.pad(embeds[:, 1:], (0, 0, 0, 1)).detach()  # of the token after each, and so of the target
    difference = torch.where(counted[..., None], outputs.to_targets(pred - read, counted.shape), 0)
    return difference.abs().to(loss_dtype(pred.dtype)).mean(dim=-1)


def check_outputs(out: Any, ids: Tensor, *, or_more: bool) -> None:
    """Raise ValueError unless the network returned one tensor with an output for each token of ids, (r, m), or more."""
    r, m = ids.shape
    right = isinstance(out, Tensor) and out.ndim == 3 and out.shape[0] == r
    if not right or out.shape[1] < m or (out.shape[1] > m and not or_more):
        found = tuple(out.shape) if isinstance(out, Tensor) else f'a {type(out).__name__}'
        raise ValueError(f'the network must return ({r}, {m}{" or more" * or_more}, vocab), of one head, got {found}')
