"""XLAutoregressiveWrapper of x-transformers, with every weighting of its loss, over rows, not over their segments.

Dims: b batch, n positions, s positions of a segment, m positions of a memory, v vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from x_transformers.xl_autoregressive_wrapper import XLAutoregressiveWrapper as Upstream

from xtloss.checks import check_batch, refuse_arguments
from xtloss.losses.token_losses import flat_losses
from xtloss.weighting.targets import Targets, count_targets, next_tokens
from xtloss.weighting.weights import batch_normalizer, batch_weights, weighted_loss
from xtloss.wrappers.inputs import legal_ids, real_positions
from xtloss.wrappers.memories import Memories, memory_arguments, remember
from xtloss.wrappers.options import WeightingOptions

REFUSED = {
    'seq_start_pos': 'the network would count it from the start of every segment; mask is cut with the segments',
    'segment_ids': 'only AutoregressiveWrapper keeps sequences that share a row apart',
}
REFUSED_BESIDE_MASK = {'self_attn_kv_mask': 'the network drops mask when it has this one'}


class Segment(NamedTuple):
    """A piece of a batch, no longer than the network's `max_seq_len`."""

    ids: Tensor  # (b, s), what the network reads
    mask: Tensor | None  # (b, s)
    next_ids: Tensor  # (b, s), the targets
    counted: Tensor  # (b, s)


class XLAutoregressiveWrapper(WeightingOptions, Upstream):  # type: ignore[misc]
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

    Args:
        net: the network, as upstream.
        *args: upstream's arguments, as are other keywords.
        equal_loss_weight_batch: each sequence weighs the same, whatever its length: ``loss_weighting='sequence'``.
        loss_weighting: 'token', 'sequence', 'square', 'padded', 'sequence_sum', or a number in [0, 1].
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
    ttt_wrappers: dict[str, Any]

    def __init__(
        self,
        net: nn.Module,
        *args: Any,
        equal_loss_weight_batch: bool = False,
        loss_weighting: str | float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(net, *args, **kwargs)
        self.equal_loss_weight_batch = equal_loss_weight_batch
        self.loss_weighting = loss_weighting
        self.check_loss_options()

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

        Args:
            x: (b, n), token ids of any integer dtype; ``ignore_index`` where there is no target.
            mems: memories of what came before the rows, (b, m, d) a layer, with ``mem_masks`` where some is padding.
            dropout_mems: let every segment forget those before.
            ttt_recurrent_steps: passes over a segment, each after an update by test-time training.
            lens: (b,), integer: tokens from ``lens`` on are padding.
            mask: (b, n), bool, True = real token: attention mask, of segments and memories, and neither a masked token
                nor the token right after one is a target. Masked ids may be anything.
            loss_mask: (b, n), bool: tokens that are no targets where False, though the network reads them.
            loss_weight: (b,) or (b, n), floating point, any sign: how much a sequence, or a target, weighs. Never in Z.
            normalizer: a number > 0, or 0-dim tensor >= 0, in place of Z.
            return_breakdown: return a `LossBreakdown` last.
            **kwargs: the network's, as upstream: each segment gets the same.

        Returns:
            ``loss`` or ``(loss, breakdown)``. Where nothing counts the loss is 0 and its gradients are zeros.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: of the wrong shape, device or range; ``seq_start_pos``; ``self_attn_kv_mask`` beside ``mask``.

        """
        x, targets = self._count(
            x, ttt_recurrent_steps, kwargs,
            lens=lens, mask=mask, loss_mask=loss_mask, loss_weight=loss_weight, normalizer=normalizer,
        )  # fmt: skip
        memories = Memories(mems, kwargs.pop('mem_masks', None))
        segments = self._segments(x, targets.counted, lens=lens, mask=mask)
        with torch.enable_grad() if self._trains_at_test_time else nullcontext():
            token_loss = self._token_losses(segments, memories, dropout_mems, ttt_recurrent_steps, kwargs)  # (b, n-1)
            weights = batch_weights(targets, self.weighting, token_loss.dtype, loss_weight, normalizer)
            loss, breakdown = weighted_loss(token_loss, weights)
        return (loss, breakdown) if return_breakdown else loss

    def loss_normalizer(
        self,
        x: Tensor,
        *,
        lens: Tensor | None = None,
        mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **network_kwargs: Any,
    ) -> Tensor:
        """Return Z of this batch, 0-dim, float32 or wider, without running the network.

        Takes what `forward` takes, and raises what it raises. Sum it over the micro-batches of a step, hand the sum to
        `global_normalizer`, and that to `forward` as ``normalizer``, and the gradients add up to those of one batch.
        """
        recurrent_steps = network_kwargs.get('ttt_recurrent_steps', 1)
        _, targets = self._count(x, recurrent_steps, network_kwargs, lens=lens, mask=mask, loss_mask=loss_mask)
        return batch_normalizer(targets, self.weighting, self.loss_dtype)

    @property
    def _trains_at_test_time(self) -> bool:
        return getattr(self, 'has_ttt', False)  # x-transformers 2.20 has no test-time training

    def _count(
        self, x: Tensor, recurrent_steps: int, network_arguments: dict[str, Any], **arguments: Any
    ) -> tuple[Tensor, Targets]:
        check_batch(x, counts={'ttt_recurrent_steps': recurrent_steps}, **arguments)
        if recurrent_steps > 1 and not self._trains_at_test_time:
            raise ValueError(f'ttt_recurrent_steps must be 1 without test-time training, got {recurrent_steps}')
        refuse_arguments(network_arguments, REFUSED)
        if arguments['mask'] is not None:
            refuse_arguments(network_arguments, REFUSED_BESIDE_MASK)
        x = x.long()  # unsigned ids would wrap a negative ignore_index
        counting = {name: arguments[name] for name in ('lens', 'mask', 'loss_mask')}
        return x, count_targets(x, ignore_index=self.ignore_index, **counting)

    def _segments(self, x: Tensor, counted: Tensor, *, lens: Tensor | None, mask: Tensor | None) -> list[Segment]:
        """Cut inputs and targets alike; a row of one token is read, for a loss of 0 attached to the graph."""
        ids = legal_ids(x, ignore_index=self.ignore_index, pad_value=self.pad_value, lens=lens, mask=mask)
        next_ids = x.masked_fill(~real_positions(x, lens=lens, mask=mask), self.ignore_index)

        def cut(t: Tensor) -> tuple[Tensor, ...]:
            return t.split(self.max_seq_len, dim=1)

        inputs = max(1, x.shape[1] - 1)
        ids_ = cut(ids[:, :inputs])
        masks = [None] * len(ids_) if mask is None else cut(mask[:, :inputs])
        return [Segment(*pieces) for pieces in zip(ids_, masks, cut(next_tokens(next_ids)), cut(counted), strict=True)]

    def _token_losses(
        self,
        segments: list[Segment],
        memories: Memories,
        dropout_mems: bool,
        recurrent_steps: int,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Nll of each target, (b, n-1), 0 where it is not counted: upstream's way through the segments.

        From one segment to the next go memories, and parameters that are trained at test time. Both are cut off from
        the graph after every `tbptt_steps` segments; in x-transformers 2.20 memories are after each.
        """
        if self._trains_at_test_time:
            self.init_ttt(len(segments[0].ids))

        losses = []
        for index, segment in enumerate(segments):
            cut_off = (index + 1) % getattr(self, 'tbptt_steps', 1) == 0
            if dropout_mems or not len(segment.ids):  # x-transformers cannot attend to the memories of no rows
                memories = Memories()
            call = {**arguments, **memory_arguments(memories, segment.mask)}
            if hasattr(self, 'tbptt_steps'):
                call['detach_mems'] = cut_off

            for step in range(recurrent_steps):
                logits, intermediates = self.net(segment.ids, return_mems=True, return_intermediates=True, **call)
                is_last_step = step == recurrent_steps - 1
                if is_last_step:
                    losses.append(self._segment_losses(logits, segment))
                if self._trains_at_test_time and not (is_last_step and segment is segments[-1]):
                    self.update_ttt(logits, segment.next_ids, create_graph=self.training, intermediates=intermediates)

            memories = remember(memories, segment.mask, intermediates)
            if self._trains_at_test_time and cut_off:
                for wrapper in self.ttt_wrappers.values():
                    wrapper.batch_params = {
                        name: p.detach().requires_grad_(p.requires_grad) for name, p in wrapper.batch_params.items()
                    }
        return torch.cat(losses, dim=1)

    def _segment_losses(self, logits: Tensor, segment: Segment) -> Tensor:
        """Nll of each target of a segment, (b, s), 0 where it is not counted."""
        b, s = segment.ids.shape
        if logits.ndim != 3 or logits.shape[:2] != (b, s):
            raise ValueError(f'the network must return ({b}, {s}, vocab), got {tuple(logits.shape)}')
        logits = logits[:, : segment.counted.shape[1]]
        ids = torch.where(segment.counted, segment.next_ids, 0)
        net: Any = self if hasattr(self, 'output_is_log_prob') else self.net  # upstream may have wrapped self.net
        losses = flat_losses(
            logits.flatten(0, 1), ids.flatten(), segment.counted.flatten(), is_log_prob=net.output_is_log_prob
        )
        return losses.view_as(ids)
