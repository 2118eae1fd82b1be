"""The loss of an `XLAutoregressiveWrapper`: upstream's way through the segments of a row, and one sum over the row.

Dims: b batch, n positions, s positions of a segment, h of a layer's input, m of a memory, d width.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xtloss.arguments import OF_LOSS, having
from xtloss.tensors import map_tensors
from xtloss.weighting.targets import Targets, next_tokens, real_positions
from xtloss.weighting.weights import LossBreakdown, Weights, batch_weights, breakdown_of
from xtloss.wrappers.base import OF_LAYERS, counted_targets, loss_dtype_of, weighting_of
from xtloss.wrappers.head import LinearHead, fused_head
from xtloss.wrappers.masks import join_keys, mask_arguments, memory_length, memory_tokens
from xtloss.wrappers.rows import Outputs, legal_ids
from xtloss.wrappers.token_losses import check_outputs, loss_from_embeds, token_losses

# what is cut with the segments; each segment gets a mask of keys as it came
PER_TOKEN = tuple(name for name in having('travels') if name != 'self_attn_kv_mask')


class Segment(NamedTuple):
    """A piece of a batch, no longer than the network's `max_seq_len`."""

    ids: Tensor  # (b, s), what the network reads
    mask: Tensor | None  # (b, s)
    next_ids: Tensor  # (b, s), the targets; the last segment may have one less of these three
    counted: Tensor  # (b, s)
    weight: Tensor  # (b, s)
    arguments: dict[str, Any]  # of the network's forward


def seen_keys(mems: list[Tensor] | None, real: Tensor | None, mask: Tensor | None, h: int) -> Tensor | None:
    """Return (b, m + h) bool, what is real of memories, by (b, m), and of a segment, by (b, s); None: all of it."""
    m = memory_length(mems)
    keys = join_keys(F.pad(real, (0, h), value=True) if real is not None and m else None, mask)
    return None if keys is None else F.pad(keys, (m + h - keys.shape[1], 0), value=True)


def loss_and_breakdown(
    wrapper: Any, x: Tensor, given: dict[str, Any], *, has_rows: bool
) -> tuple[Tensor, LossBreakdown]:
    """Return the loss by the equation: count, weigh, run the network over the segments, cost, one sum.

    Test-time training, which x-transformers 2.20 does not have, trains some of the weights on each row.
    """
    targets, ttt = counted_targets(wrapper, x, given), getattr(wrapper, 'has_ttt', False)
    head = fused_head(wrapper, given, 'test-time training reads logits' if ttt else None)
    weighting, dtype = weighting_of(wrapper), loss_dtype_of(wrapper)
    weights = batch_weights(targets, weighting, dtype, given.get('loss_weight'), given.get('normalizer'))
    segments = cut_segments(wrapper, x, targets, weights, given)
    with torch.enable_grad() if ttt else nullcontext():
        total, token_loss = costs(wrapper, segments, given, head)  # (), (b, n-1)
        return breakdown_of(total, token_loss, weights)


def cut_segments(wrapper: Any, x: Tensor, targets: Targets, weights: Weights, given: dict[str, Any]) -> list[Segment]:
    """Cut inputs and targets alike; a row of one token is read, for a loss of 0 attached to the graph."""
    real = real_positions(x, lens=given.get('lens'), mask=given.get('mask'))
    ids = legal_ids(x, real, ignore_index=wrapper.ignore_index, pad_value=wrapper.pad_value)
    next_ids = next_tokens(x.masked_fill(~real, wrapper.ignore_index))
    made_anew = ('mask', *OF_LAYERS)
    arguments = {name: value for name, value in given.items() if name not in OF_LOSS and name not in made_anew}
    inputs, size = max(1, x.shape[1] - 1), wrapper.max_seq_len

    def cut(t: Tensor, start: int) -> Tensor:
        return t[:, start : min(start + size, inputs)]

    def of_segment(name: str, value: Any, start: int) -> Any:
        if name not in PER_TOKEN:
            return value
        ndim = 2 if name == 'embed_ids' else 3  # a (b, d) condition is of rows, also where d = n
        return map_tensors(lambda t: cut(t, start) if t.ndim == ndim and t.shape[:2] == x.shape else t, value)

    return [
        Segment(
            cut(ids, start),
            cut(given['mask'], start) if 'mask' in given else None,
            cut(next_ids, start),
            cut(targets.counted, start),
            cut(weights.weight, start),
            {name: of_segment(name, value, start) for name, value in arguments.items()},
        )
        for start in range(0, inputs, size)
    ]


def costs(
    wrapper: Any, segments: list[Segment], given: dict[str, Any], head: LinearHead | None
) -> tuple[Tensor, Tensor]:
    """Return Σ w · ℓ, 0-dim, and ℓ, (b, n-1), 0 where it is not counted: upstream's way through the segments.

    From one segment to the next go memories, and parameters that are trained at test time. Both are cut off from the
    graph after every `tbptt_steps` segments; in x-transformers 2.20 memories are after each.
    """
    ttt, steps = getattr(wrapper, 'has_ttt', False), given.get('ttt_recurrent_steps', 1)
    mems, real = given.get('mems'), (given.get('mem_masks') or [None])[0]  # which is of all layers alike
    if ttt:
        wrapper.init_ttt(len(segments[0].ids))

    parts = []
    for index, segment in enumerate(segments):
        cut_off = (index + 1) % getattr(wrapper, 'tbptt_steps', 1) == 0
        if given.get('dropout_mems', False):
            mems = real = None
        s = segment.ids.shape[1]
        call = {**segment.arguments, **({} if mems is None else {'mems': mems})}
        if hasattr(wrapper, 'tbptt_steps'):
            call['detach_mems'] = cut_off
        keys = seen_keys(mems, real, segment.mask, s + memory_tokens(wrapper.net))
        call = mask_arguments(wrapper.net, keys, call, mask=segment.mask, queries=s)
        if head is not None:
            call['return_embeddings'] = True

        for step in range(steps):
            out, intermediates = wrapper.net(segment.ids, return_mems=True, return_intermediates=True, **call)
            is_last_step = step == steps - 1
            if is_last_step:
                parts.append(segment_costs(wrapper, out, segment, head))
            if ttt and not (is_last_step and segment is segments[-1]):
                wrapper.update_ttt(out, segment.next_ids, create_graph=wrapper.training, intermediates=intermediates)

        # the network returns the ends of what its layers have attended to: their memories and their input, `hiddens`
        real = seen_keys(mems, real, segment.mask, intermediates.hiddens[0].shape[1])
        mems = intermediates.mems
        real = real[:, real.shape[1] - memory_length(mems) :] if real is not None and mems else None
        if ttt and cut_off:
            wrappers = wrapper.ttt_wrappers  # a list before x-transformers 2.23
            for trained in wrappers.values() if isinstance(wrappers, dict) else wrappers:
                params = trained.batch_params.items()
                trained.batch_params = {name: p.detach().requires_grad_(p.requires_grad) for name, p in params}
    totals, losses = zip(*parts, strict=True)
    return torch.stack(totals).sum(), torch.cat(losses, dim=1)


def segment_costs(wrapper: Any, out: Tensor, segment: Segment, head: LinearHead | None) -> tuple[Tensor, Tensor]:
    """Return Σ w · ℓ of a segment, 0-dim, and ℓ, (b, s), 0 where it is not counted."""
    b, s = segment.ids.shape
    check_outputs(out, segment.ids, or_more=False)
    place = torch.arange(b * s, device=out.device).view(b, s)[:, : segment.counted.shape[1]]
    ids, outputs = torch.where(segment.counted, segment.next_ids, 0), Outputs(place)
    if head is not None:
        return loss_from_embeds(head, out, ids, segment.counted, segment.weight, outputs)
    nll = token_losses(wrapper, out, ids, segment.counted, outputs)
    return (segment.weight * nll).sum(), nll
