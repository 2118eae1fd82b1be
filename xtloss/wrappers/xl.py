"""XLAutoregressiveWrapper of x-transformers, with every weighting of its loss, over rows, not over their segments.

Dims: b batch, n positions, s positions of a segment, m positions of a memory, d width.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from x_transformers.xl_autoregressive_wrapper import XLAutoregressiveWrapper as Upstream

from xtloss.checks import refuse_arguments
from xtloss.losses.linear_head import linear_head
from xtloss.losses.token_losses import loss_from_embeds, token_losses
from xtloss.weighting.targets import Outputs, next_tokens, real_positions
from xtloss.weighting.weights import LossBreakdown, batch_weights, breakdown_of
from xtloss.wrappers.attention_masks import mask_arguments, memory_tokens, precision_of
from xtloss.wrappers.base import LossWrapper
from xtloss.wrappers.inputs import legal_ids
from xtloss.wrappers.memories import OF_LAYERS, Memories, remember, seen_keys
from xtloss.wrappers.returns import ReturnsLoss
from xtloss.wrappers.rows import OF_THE_LOSS
from xtloss.wrappers.stand_in import on_a_stand_in

REFUSED = {
    'seq_start_pos': 'the network would count it from the start of every segment; mask is cut with the segments',
    'prepend_embeds': 'every segment would get them',
    'segment_ids': 'only AutoregressiveWrapper keeps sequences that share a row apart',
}
REFUSED_BESIDE_MASK = {'self_attn_kv_mask': 'mask says which keys are real'}
# of the network's arguments those that are cut with the segments, and how many dims they have where they are per token
PER_TOKEN = {'embed_ids': 2, 'sum_embeds': 3, 'condition': 3}


class Segment(NamedTuple):
    """A piece of a batch, no longer than the network's `max_seq_len`."""

    ids: Tensor  # (b, s), what the network reads
    mask: Tensor | None  # (b, s)
    next_ids: Tensor  # (b, s), the targets; the last segment may have one less of these three
    counted: Tensor  # (b, s)
    weight: Tensor  # (b, s)
    arguments: dict[str, Any]  # of the network's forward


class XLAutoregressiveWrapper(LossWrapper, Upstream):  # type: ignore[misc]
    """Upstream's wrapper, for rows longer than the network, with a choice of what each target weighs in the loss.

    ::

        loss = Σ w[b,i] · ℓ[b,i] / Z                        over the targets i = 1 … n-1 of x, (b, n)
        w[b,i] = loss_weight[b,i] · counted[b,i] · L^(-p)   L: how many targets count in row b

    ℓ is the cross-entropy of token ``x[b,i]`` in nats, predicted by the network from its segment of the row and the
    memories of those before. `AutoregressiveWrapper` has the table of weightings. L and Z are of whole rows: segments
    decide what the network sees, and nothing about the weights.

    Where every target counts it equals upstream's. It differs where some do not: upstream averages each segment by
    itself, and counts a row that is empty there as a loss of 0.

    Memories, truncated backpropagation and test-time training are upstream's. The inner loss of the latter counts as
    upstream's, by ``ignore_index``, which padding under ``lens`` and ``mask`` is for it.

        >>> model = XLAutoregressiveWrapper(net, loss_weighting='sequence')
        >>> x, lens = torch.randint(0, 16, (2, 21)), torch.tensor([21, 9])  # longer than net.max_seq_len
        >>> loss, breakdown = model(x, lens=lens, return_breakdown=True)
        >>> breakdown.token_loss.shape  # of whole rows
        torch.Size([2, 20])

    Args:
        net: the network, as upstream.
        *args: upstream's arguments, as are other keywords.
        equal_loss_weight_batch: each sequence weighs the same, whatever its length: ``loss_weighting='sequence'``.
        loss_weighting: 'token', 'sequence', 'square', 'padded', 'sequence_sum', or a number in [0, 1].
        fused: head and loss of each segment in one pass, as in `AutoregressiveWrapper`; not with test-time training.
        **kwargs: upstream's.

    Raises:
        TypeError, ValueError: options of the wrong type or value, or the flag beside another weighting.

    """

    net: Any
    ignore_index: int
    pad_value: int
    max_seq_len: int
    init_ttt: Any
    update_ttt: Any
    ttt_wrappers: dict[str, Any] | list[Any]
    __call__: ReturnsLoss

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
        self.set_loss_options(
            equal_loss_weight_batch=equal_loss_weight_batch, loss_weighting=loss_weighting, fused=fused
        )

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
        """Return the loss of a batch of token ids, in nats; float32, or wider where the logits are wider.

        Takes what `AutoregressiveWrapper.forward` takes, but for outputs, embeddings and segment ids, and besides:

        Args:
            x: (b, n), token ids of any integer dtype; ``ignore_index`` where there is no target.
            mems: memories of what came before the rows, (b, m, d) a layer. Where some of that is padding, ``mem_masks``
                has (b, m) bool for each layer, all alike.
            dropout_mems: let every segment forget those before.
            ttt_recurrent_steps: passes over a segment, each after an update by test-time training.
            lens: (b,), integer.
            mask: (b, n), bool, of segments and memories.
            loss_mask: (b, n), bool.
            loss_weight: (b,) or (b, n), floating point.
            normalizer: a number > 0, or 0-dim tensor >= 0, in place of Z.
            return_breakdown: return a `LossBreakdown` last.
            **kwargs: the network's, as upstream. ``embed_ids``, ``sum_embeds`` and ``condition`` of each token are cut
                with the segments; each segment gets all of the others. A ``condition`` of each token needs
                ``dropout_mems``: x-transformers takes it to be of the memories too.

        Returns:
            ``loss`` or ``(loss, breakdown)``. Where nothing counts the loss is 0 and its gradients are zeros.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: of the wrong shape, device or range; ``seq_start_pos``; ``self_attn_kv_mask`` beside ``mask``;
                ``fused=True`` where it cannot be.

        """
        x, given = self._checked(x, {
            'mems': mems, 'dropout_mems': dropout_mems, 'ttt_recurrent_steps': ttt_recurrent_steps,
            'lens': lens, 'mask': mask, 'loss_mask': loss_mask, 'loss_weight': loss_weight,
            'normalizer': normalizer, 'return_breakdown': return_breakdown, **kwargs,
        })  # fmt: skip
        loss, breakdown = self._loss(x, given) if len(x) else on_a_stand_in(self, self._loss, x, given)
        return (loss, breakdown) if return_breakdown else loss

    def _loss(self, x: Tensor, given: dict[str, Any], stand_in: Any = None) -> tuple[Tensor, LossBreakdown]:
        """The equation: count, weigh, run the network over the segments, cost, one sum."""
        targets = self._count(x, given)
        weights = batch_weights(
            targets, self.weighting, self.loss_dtype, given.get('loss_weight'), given.get('normalizer')
        )
        segments = self._segments(x, targets.counted, weights.weight, given)
        with torch.enable_grad() if self._trains_at_test_time else nullcontext():
            total, token_loss = self._costs(stand_in or self.net, segments, given)  # (), (b, n-1)
            return breakdown_of(total, token_loss, weights)

    # below the fold: what the lines above call

    @property
    def _trains_at_test_time(self) -> bool:
        return getattr(self, 'has_ttt', False)  # x-transformers 2.20 has no test-time training

    def _checked(self, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        steps = given.get('ttt_recurrent_steps', 1)
        x, given = self._check_batch(x, given, counts={'ttt_recurrent_steps': steps})
        if steps > 1 and not self._trains_at_test_time:
            raise ValueError(f'ttt_recurrent_steps must be 1 without test-time training, got {steps}')
        refuse_arguments(given, REFUSED)
        if 'mask' in given:
            refuse_arguments(given, REFUSED_BESIDE_MASK)
        self._may_fuse(given)
        return x, given

    def key_range(self, n: int, before: int) -> tuple[int, int | None]:
        """Each segment gets it as it is."""
        return min(n, 1), None

    def _why_not_fused(self, given: dict[str, Any]) -> str | None:
        return 'test-time training reads logits' if self._trains_at_test_time else super()._why_not_fused(given)

    def _segments(self, x: Tensor, counted: Tensor, weight: Tensor, given: dict[str, Any]) -> list[Segment]:
        """Cut inputs and targets alike; a row of one token is read, for a loss of 0 attached to the graph."""
        real = real_positions(x, lens=given.get('lens'), mask=given.get('mask'))
        ids = legal_ids(x, ignore_index=self.ignore_index, pad_value=self.pad_value, real=real)
        next_ids = next_tokens(x.masked_fill(~real, self.ignore_index))
        made_anew = (*OF_THE_LOSS, 'mask', *OF_LAYERS)
        arguments = {name: value for name, value in given.items() if name not in made_anew}
        inputs = max(1, x.shape[1] - 1)

        def cut(t: Tensor, start: int) -> Tensor:
            return t[:, start : start + self.max_seq_len]

        def piece(t: Any, ndim: int, start: int) -> Any:
            if isinstance(t, dict):
                return {name: piece(value, ndim, start) for name, value in t.items()}
            is_per_token = isinstance(t, Tensor) and t.ndim == ndim and t.shape[:2] == x.shape
            return cut(t[:, :inputs], start) if is_per_token else t

        return [
            Segment(
                cut(ids[:, :inputs], start),
                cut(given['mask'][:, :inputs], start) if 'mask' in given else None,
                cut(next_ids, start),
                cut(counted, start),
                cut(weight, start),
                {name: piece(t, PER_TOKEN[name], start) if name in PER_TOKEN else t for name, t in arguments.items()},
            )
            for start in range(0, inputs, self.max_seq_len)
        ]

    def _costs(self, net: Any, segments: list[Segment], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Σ w · ℓ, 0-dim, and ℓ, (b, n-1), 0 where it is not counted: upstream's way through the segments.

        From one segment to the next go memories, and parameters that are trained at test time. Both are cut off from
        the graph after every `tbptt_steps` segments; in x-transformers 2.20 memories are after each.
        """
        fuse, steps = self._fuses(given), given.get('ttt_recurrent_steps', 1)
        masks = given.get('mem_masks') or [None]  # of all layers alike
        memories = Memories(given.get('mems'), masks[0])
        if self._trains_at_test_time:
            self.init_ttt(len(segments[0].ids))

        costs = []
        for index, segment in enumerate(segments):
            cut_off = (index + 1) % getattr(self, 'tbptt_steps', 1) == 0
            if given.get('dropout_mems', False):
                memories = Memories()
            call = self._network_arguments(segment, memories, cut_off)
            if fuse:
                call['return_embeddings'] = True

            for step in range(steps):
                with precision_of(self.net, call):
                    out, intermediates = net(segment.ids, return_mems=True, return_intermediates=True, **call)
                is_last_step = step == steps - 1
                if is_last_step:
                    costs.append(self._segment_costs(out, segment, fuse))
                if self._trains_at_test_time and not (is_last_step and segment is segments[-1]):
                    self.update_ttt(out, segment.next_ids, create_graph=self.training, intermediates=intermediates)

            memories = remember(memories, segment.mask, intermediates)
            if self._trains_at_test_time and cut_off:
                self._cut_off_test_time_parameters()
        totals, losses = zip(*costs, strict=True)
        return torch.stack(totals).sum(), torch.cat(losses, dim=1)

    def _network_arguments(self, segment: Segment, memories: Memories, cut_off: bool) -> dict[str, Any]:
        s = segment.ids.shape[1]
        keys = seen_keys(memories, segment.mask, s + memory_tokens(self.net))
        arguments = dict(segment.arguments)
        if memories.mems is not None:
            arguments['mems'] = memories.mems
        if hasattr(self, 'tbptt_steps'):
            arguments['detach_mems'] = cut_off
        return mask_arguments(self.net, keys, arguments, mask=segment.mask, queries=s)

    def _cut_off_test_time_parameters(self) -> None:
        wrappers = self.ttt_wrappers  # a list before x-transformers 2.23
        for wrapper in wrappers.values() if isinstance(wrappers, dict) else wrappers:
            wrapper.batch_params = {
                name: p.detach().requires_grad_(p.requires_grad) for name, p in wrapper.batch_params.items()
            }

    def _segment_costs(self, out: Tensor, segment: Segment, fuse: bool) -> tuple[Tensor, Tensor]:
        """Σ w · ℓ of a segment, 0-dim, and ℓ, (b, s), 0 where it is not counted."""
        b, s = segment.ids.shape
        if out.ndim != 3 or out.shape[:2] != (b, s):
            raise ValueError(f'the network must return ({b}, {s}, vocab), got {tuple(out.shape)}')
        place = torch.arange(b * s, device=out.device).view(b, s)[:, : segment.counted.shape[1]]
        ids, outputs = torch.where(segment.counted, segment.next_ids, 0), Outputs(place)
        if fuse:
            return loss_from_embeds(linear_head(self.net), out, ids, segment.counted, segment.weight, outputs)
        net: Any = self if hasattr(self, 'output_is_log_prob') else self.net  # upstream may have wrapped self.net
        nll = token_losses(out, ids, segment.counted, outputs, is_log_prob=net.output_is_log_prob)
        return (segment.weight * nll).sum(), nll
