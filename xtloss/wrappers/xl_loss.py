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
from xtloss.wrappers.token_losses import loss_from_embeds, token_losses

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


class Memories(NamedTuple):
    """A memory for each attention layer, all of the same positions, and which of these are real."""

    mems: list[Tensor] | None = None  # (b, m, d) each
    mask: Tensor | None = None  # (b, m) bool; None: nothing in them is padding


def seen_keys(memories: Memories, mask: Tensor | None, h: int) -> Tensor | None:
    """Return (b, m + h) bool, what is real of the memories and of a segment with this mask, (b, s); None: all of it."""
    m = memory_length(memories.mems)
    keys = join_keys(F.pad(memories.mask, (0, h), value=True) if memories.mask is not None and m else None, mask)
    return None if keys is None else F.pad(keys, (m + h - keys.shape[1], 0), value=True)


def remember(memories: Memories, mask: Tensor | None, intermediates: Any) -> Memories:
    """Return the memories that a segment with this mask, (b, s), left, given those it had.

    The network returns the ends of what its layers have attended to: their memories and their input, `hiddens`.
    """
    mems = intermediates.mems
    keys = seen_keys(memories, mask, intermediates.hiddens[0].shape[1]) if mems else None
    return Memories(mems, None if keys is None else keys[:, keys.shape[1] - mems[0].shape[1] :])


def trains_at_test_time(wrapper: Any) -> bool:
    """Tell whether some of its weights are trained on each row; x-transformers 2.20 has no such wrapper."""
    return getattr(wrapper, 'has_ttt', False)


def loss_and_breakdown(
    wrapper: Any, x: Tensor, given: dict[str, Any], *, has_rows: bool
) -> tuple[Tensor, LossBreakdown]:
    """Return the loss by the equation: count, weigh, run the network over the segments, cost, one sum."""
    targets, ttt = counted_targets(wrapper, x, given), trains_at_test_time(wrapper)
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
    ttt, steps = trains_at_test_time(wrapper), given.get('ttt_recurrent_steps', 1)
    memories = Memories(given.get('mems'), (given.get('mem_masks') or [None])[0])  # one mask is of all layers
    if ttt:
        wrapper.init_ttt(len(segments[0].ids))

    parts = []
    for index, segment in enumerate(segments):
        cut_off = (index + 1) % getattr(wrapper, 'tbptt_steps', 1) == 0
        if given.get('dropout_mems', False):
            memories = Memories()
        call = network_arguments(wrapper, segment, memories, cut_off)
        if head is not None:
            call['return_embeddings'] = True

        for step in range(steps):
            out, intermediates = wrapper.net(segment.ids, return_mems=True, return_intermediates=True, **call)
            is_last_step = step == steps - 1
            if is_last_step:
                parts.append(segment_costs(wrapper, out, segment, head))
            if ttt and not (is_last_step and segment is segments[-1]):
                wrapper.update_ttt(out, segment.next_ids, create_graph=wrapper.training, intermediates=intermediates)

        memories = remember(memories, segment.mask, intermediates)
        if ttt and cut_off:
            cut_off_test_time_parameters(wrapper)
    totals, losses = zip(*parts, strict=True)
    return torch.stack(totals).sum(), torch.cat(losses, dim=1)


def network_arguments(wrapper: Any, segment: Segment, memories: Memories, cut_off: bool) -> dict[str, Any]:
    """Return the arguments of the network's forward for a segment that remembers those before."""
    s = segment.ids.shape[1]
    keys = seen_keys(memories, segment.mask, s + memory_tokens(wrapper.net))
    arguments = dict(segment.arguments)
    if memories.mems is not None:
        arguments['mems'] = memories.mems
    if hasattr(wrapper, 'tbptt_steps'):
        arguments['detach_mems'] = cut_off
    return mask_arguments(wrapper.net, keys, arguments, mask=segment.mask, queries=s)


def cut_off_test_time_parameters(wrapper: Any) -> None:
    """Detach what test-time training made of the weights in the segments before."""
    wrappers = wrapper.ttt_wrappers  # a list before x-transformers 2.23
    for trained in wrappers.values() if isinstance(wrappers, dict) else wrappers:
        trained.batch_params = {
            name: p.detach().requires_grad_(p.requires_grad) for name, p in trained.batch_params.items()
        }


def segment_costs(wrapper: Any, out: Tensor, segment: Segment, head: LinearHead | None) -> tuple[Tensor, Tensor]:
    """Return Σ w · ℓ of a segment, 0-dim, and ℓ, (b, s), 0 where it is not counted."""
    b, s = segment.ids.shape
    if not isinstance(out, Tensor) or out.ndim != 3 or out.shape[:2] != (b, s):
        found = tuple(out.shape) if isinstance(out, Tensor) else f'a {type(out).__name__}'
        raise ValueError(f'the network must return ({b}, {s}, vocab), from one head, got {found}')
    place = torch.arange(b * s, device=out.device).view(b, s)[:, : segment.counted.shape[1]]
    ids, outputs = torch.where(segment.counted, segment.next_ids, 0), Outputs(place)
    if head is not None:
        return loss_from_embeds(head, out, ids, segment.counted, segment.weight, outputs)
    net: Any = wrapper if hasattr(wrapper, 'output_is_log_prob') else wrapper.net  # upstream may have wrapped the net
    options: dict[str, Any] = {'is_log_prob': net.output_is_log_prob, 'composite': wrapper.fused is False}
    nll = token_losses(out, ids, segment.counted, outputs, **options)
    return (segment.weight * nll).sum(), nll
