"""XLAutoregressiveWrapper of x-transformers, with every weighting of its loss, over rows, not over their segments.

Dims: b batch, n positions, s positions of a segment, h of a layer's input, m of a memory, d width.
"""

import sys
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers.xl_autoregressive_wrapper import XLAutoregressiveWrapper as Upstream

from xtloss.arguments import OF_LOSS, having, keywords, map_tensors, refuse_given
from xtloss.weighting.targets import Targets, next_tokens, real_positions
from xtloss.weighting.weights import LossBreakdown, Weights, batch_weights, breakdown_of
from xtloss.wrappers import base
from xtloss.wrappers.head import fused_head
from xtloss.wrappers.masks import join_keys, mask_arguments, memory_length, memory_tokens
from xtloss.wrappers.rows import Outputs, check_outputs, loss_from_embeds, token_losses

# what is cut with the segments; each segment gets a mask of keys as it came
PER_TOKEN = tuple(name for name in having('travels') if name != 'self_attn_kv_mask')
REFUSED = {
    'seq_start_pos': 'the network would count it from the start of every segment; mask is cut with the segments',
    'prepend_embeds': 'every segment would get them',
    'segment_ids': 'only AutoregressiveWrapper keeps sequences that share a row apart',
}


class XLAutoregressiveWrapper(base.LossWrapper, Upstream):  # type: ignore[misc]
    """Upstream's wrapper, for rows longer than the network, with the equation and options of `AutoregressiveWrapper`.

    ℓ is the cross-entropy of token ``x[b,i]`` in nats, predicted by the network from its segment of the row and the
    memories of those before. L and Z are of whole rows: segments decide what the network sees, and nothing about the
    weights. Where every target counts the loss equals upstream's. It differs where some do not: upstream averages each
    segment by itself, and counts a row that is empty there as a loss of 0.

    Memories, truncated backpropagation and test-time training are upstream's. The inner loss of the latter counts as
    upstream's, by ``ignore_index``, which padding under ``lens`` and ``mask`` is for it; it reads logits, so that head
    and loss are not one.

        >>> model = XLAutoregressiveWrapper(net, loss_weighting='sequence')
        >>> x, lens = torch.randint(0, 16, (2, 21)), torch.tensor([21, 9])  # longer than net.max_seq_len
        >>> loss, breakdown = model(x, lens=lens, return_breakdown=True)
        >>> breakdown.token_loss.shape  # of whole rows
        torch.Size([2, 20])

    """

    fused: bool | str = 'auto'

    @base.shows_upstream(Upstream.__init__)
    def __init__(
        self,
        net: nn.Module,
        *args: Any,
        equal_loss_weight_batch: bool = False,
        loss_weighting: str | float | None = None,
        fused: bool | Literal['auto'] = 'auto',
        **kwargs: Any,
    ) -> None:
        super().__init__(net, *args, **kwargs)
        base.set_options(
            self, equal_loss_weight_batch=equal_loss_weight_batch, loss_weighting=loss_weighting, fused=fused
        )

    @base.shows_upstream(Upstream.forward)
    def forward(
        self,
        x: Tensor,
        mems: list[Tensor] | None = None,
        dropout_mems: bool = False,
        ttt_recurrent_steps: int = 1,
        *,
        lens: Tensor | None = None,
        mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        loss_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        return_breakdown: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the loss of a batch of token ids, as `AutoregressiveWrapper.forward` does.

        Args:
            x, lens, mask, loss_mask, loss_weight, normalizer, return_breakdown: as there; ``mask`` is of memories too.
            mems: memories of what came before the rows, (b, m, d) a layer. Where some of that is padding, ``mem_masks``
                has (b, m) bool for each layer, all alike.
            dropout_mems: let every segment forget those before.
            ttt_recurrent_steps: passes over a segment, each after an update by test-time training.
            **kwargs: the network's, as upstream. ``embed_ids``, ``sum_embeds`` and ``condition`` of each token are cut
                with the segments; each segment gets all of the others. A ``condition`` of each token needs
                ``dropout_mems``: x-transformers takes it to be of the memories too.

        Returns:
            ``loss`` or ``(loss, breakdown)``.

        Raises:
            TypeError, ValueError: as there; ``seq_start_pos``, ``prepend_embeds`` and ``segment_ids``;
                ``self_attn_kv_mask`` beside ``mask``.

        """
        x, given = check_rows(self, x, {
            'mems': mems, 'dropout_mems': dropout_mems, 'ttt_recurrent_steps': ttt_recurrent_steps,
            'lens': lens, 'mask': mask, 'loss_mask': loss_mask, 'loss_weight': loss_weight,
            'normalizer': normalizer, 'return_breakdown': return_breakdown, **kwargs,
        })  # fmt: skip
        loss, breakdown = base.on_rows(loss_and_breakdown, self, x, given)
        return (loss, breakdown) if return_breakdown else loss


NAMES = keywords(XLAutoregressiveWrapper.forward)


@base.checked.register
def check_rows(wrapper: XLAutoregressiveWrapper, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Check all that a wrapper was given, by name; return it as `check_call` does."""
    # a mask of the keys is for those of each segment, and may be as short
    x, given = base.check_call(wrapper, x, given, NAMES, unread=sys.maxsize, refused=REFUSED)
    steps = given.get('ttt_recurrent_steps', 1)
    if steps > 1 and not getattr(wrapper, 'has_ttt', False):
        raise ValueError(f'ttt_recurrent_steps must be 1 without test-time training, got {steps}')
    if 'mask' in given:
        refuse_given(given, {'self_attn_kv_mask': 'mask says which keys are real'})
    return x, given


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
    """Return the loss by the equation: count, weigh, run the network over the segments, cost, one sum."""
    targets, ttt = base.counted_targets(wrapper, x, given), getattr(wrapper, 'has_ttt', False)
    head = fused_head(wrapper, given, 'test-time training reads logits' if ttt else None)
    weighting, dtype = base.weighting_of(wrapper), base.loss_dtype_of(wrapper)
    weights = batch_weights(targets, weighting, dtype, given.get('loss_weight'), given.get('normalizer'))
    segments = cut_segments(wrapper, x, targets, weights, given)
    with torch.enable_grad() if ttt else nullcontext():
        total, token_loss = costs(wrapper, segments, given, head)  # (), (b, n-1)
        return breakdown_of(total, token_loss, weights)


def cut_segments(wrapper: Any, x: Tensor, targets: Targets, weights: Weights, given: dict[str, Any]) -> list[Segment]:
    """Cut inputs and targets alike; a row of one token is read, for a loss of 0 attached to the graph."""
    real = real_positions(x, lens=given.get('lens'), mask=given.get('mask'))
    ids = x.masked_fill((x == wrapper.ignore_index) | ~real, wrapper.pad_value)
    next_ids = next_tokens(x.masked_fill(~real, wrapper.ignore_index))
    made_anew = ('mask', *base.OF_LAYERS)
    arguments = {name: value for name, value in given.items() if name not in OF_LOSS and name not in made_anew}
    inputs, size = max(1, x.shape[1] - 1), wrapper.max_seq_len

    def cut(t: Tensor, start: int) -> Tensor:
        return t[:, start : min(start + size, inputs)]

    def of_segment(name: str, value: Any, start: int) -> Any:
        if name not in PER_TOKEN:
            return value
        ndim = 2 if name == 'embed_ids' else 3  # a (b, d) condition is of rows, also where d = n
        return map_tensors(lambda t: cut(t, start) if t.ndim == ndim and t.shape[:2] == x.shape else t, value)

    tensors: list[Any] = [ids, given.get('mask'), next_ids, targets.counted, weights.weight]
    segments = []
    for start in range(0, inputs, size):
        call = {name: of_segment(name, value, start) for name, value in arguments.items()}
        pieces: list[Any] = [None if t is None else cut(t, start) for t in tensors]
        segments.append(Segment._make([*pieces, call]))
    return segments


def costs(wrapper: Any, segments: list[Segment], given: dict[str, Any], head: Any) -> tuple[Tensor, Tensor]:
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


def segment_costs(wrapper: Any, out: Tensor, segment: Segment, head: Any) -> tuple[Tensor, Tensor]:
    """Return Σ w · ℓ of a segment, 0-dim, and ℓ, (b, s), 0 where it is not counted."""
    b, s = segment.ids.shape
    check_outputs(out, segment.ids, or_more=False)
    place = torch.arange(b * s, device=out.device).view(b, s)[:, : segment.counted.shape[1]]
    ids, outputs = torch.where(segment.counted, segment.next_ids, 0), Outputs(place)
    if head is not None:
        return loss_from_embeds(head, out, ids, segment.counted, segment.weight, outputs)
    nll = token_losses(wrapper, out, ids, segment.counted, outputs)
    return (segment.weight * nll).sum(), nll
