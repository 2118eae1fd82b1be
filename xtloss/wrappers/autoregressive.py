"""AutoregressiveWrapper of x-transformers, with every weighting of its loss and no logits where none are needed.

Dims: b batch, n positions, p prepended embeddings, d width, v vocabulary, l loops.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper as Upstream

from xtloss.checks import check_flag
from xtloss.losses.cross_entropy import loss_dtype
from xtloss.losses.linear_head import linear_head
from xtloss.losses.looped import looped_losses
from xtloss.losses.token_losses import loss_from_embeds, next_embed_loss, token_losses
from xtloss.packing.segments import check_segments
from xtloss.weighting.targets import Outputs, Targets, next_tokens
from xtloss.weighting.weights import LossBreakdown, Weights, batch_weights, breakdown_of, normalize
from xtloss.wrappers.attention_masks import precision_of
from xtloss.wrappers.base import LossWrapper
from xtloss.wrappers.returns import ReturnsOutputs
from xtloss.wrappers.rows import OF_THE_LOSS, Rows, network_rows
from xtloss.wrappers.stand_in import on_a_stand_in
from xtloss.wrappers.unpad import TELLING, refuse_unpad


class AutoregressiveWrapper(LossWrapper, Upstream):  # type: ignore[misc]
    """Upstream's wrapper with a choice of what each target weighs in the loss.

    ::

        loss = Σ w[b,i] · ℓ[b,i] / Z  +  auxiliary          over the targets i = 1 … n-1 of x, (b, n)
        w[b,i] = loss_weight[b,i] · counted[b,i] · L^(-p)   L: how many targets count in the sequence of (b,i)

    ℓ is the cross-entropy of token ``x[b,i]`` in nats.

    ================  ===  ==========================================
    loss_weighting    p    Z
    ================  ===  ==========================================
    'token'           0    Σ counted (the default, and upstream's)
    'sequence'        1    number of sequences with L > 0
    'square'          0.5  Σ counted · L^-0.5
    'padded'          0    b · (n-1)
    'sequence_sum'    0    number of sequences with L > 0
    a float p         p    Σ counted · L^-p
    ================  ===  ==========================================

        >>> model = AutoregressiveWrapper(net, loss_weighting='sequence')
        >>> x, lens = torch.tensor([[7, 1, 4, 9], [3, 5, 0, 0]]), torch.tensor([4, 2])
        >>> loss, breakdown = model(x, lens=lens, return_breakdown=True)
        >>> breakdown.weight / breakdown.normalizer  # the share of each target
        tensor([[0.1667, 0.1667, 0.1667],
                [0.5000, 0.0000, 0.0000]])

    Args:
        net: the network, as upstream.
        *args: upstream's arguments, as are other keywords.
        equal_loss_weight_batch: each sequence weighs the same, whatever its length: ``loss_weighting='sequence'``.
        loss_weighting: a name of the table, or a number in [0, 1].
        fused: 'auto' makes head and loss in one pass without the (b, n, vocab) logits where the head is a plain linear
            map and nobody asks for logits; True raises ValueError, saying why, where that cannot be; False never does
            it, which torch.func transforms and double backward need.
        unpad: no compute goes into the padding that ``lens``, ``mask`` and ``seq_start_pos`` tell of.
        trust_segments: take it that the network keeps the sequences of ``segment_ids`` apart, without a proof.
        **kwargs: upstream's.

    Raises:
        TypeError, ValueError: options of the wrong type or value, or the flag beside another weighting.

    Source: https://github.com/lucidrains/x-transformers/issues/291

    """

    net: Any
    ignore_index: int
    pad_value: int
    mask_prob: float
    add_attn_z_loss: bool
    add_continuous_pred_head: bool
    next_embed_loss_weight: float
    looped_loss_threshold_exit: float
    looped_loss_slope: float
    looped_exit_loss_weight: float
    unpad: bool
    trust_segments: bool
    __call__: ReturnsOutputs

    def __init__(
        self,
        net: nn.Module,
        *args: Any,
        equal_loss_weight_batch: bool = False,
        loss_weighting: str | float | None = None,
        fused: bool | Literal['auto'] = 'auto',
        unpad: bool = False,
        trust_segments: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(net, *args, **kwargs)
        self.set_loss_options(
            equal_loss_weight_batch=equal_loss_weight_batch,
            loss_weighting=loss_weighting,
            fused=fused,
            unpad=unpad,
            trust_segments=trust_segments,
        )

    def forward(
        self,
        x: Tensor,
        return_outputs: bool = False,
        prepend_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        loss_weight: Tensor | None = None,
        segment_ids: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        return_breakdown: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the loss of a batch of token ids, in nats; float32, or wider where the logits are wider.

        Args:
            x: (b, n), token ids of any integer dtype; ``ignore_index`` where there is no target.
            return_outputs: return ``(loss, (logits, cache))`` as upstream; logits (b, n-1, vocab).
            prepend_embeds: (b, p, d), embeddings before the first token, as upstream.
            lens: (b,), integer: tokens from ``lens`` on are padding.
            mask: (b, n), bool, True = real token: attention mask, and neither a masked token nor the token right after
                one is a target. Masked ids may be anything.
            loss_mask: (b, n), bool: tokens that are no targets where False, though the network reads them.
            loss_weight: (b,) or (b, n), floating point, any sign: how much a sequence, or a target, weighs. Never in Z.
            segment_ids: (b, n), integer, of `pack`: sequences packed in a row, 0 = padding; they are kept apart.
            normalizer: a number > 0, or 0-dim tensor >= 0, in place of Z.
            return_breakdown: return a `LossBreakdown` last.
            **kwargs: the network's, as upstream. With ``seq_start_pos`` (b,), targets up to it do not count.

        Returns:
            ``loss``, ``(loss, (logits, cache))``, ``(loss, breakdown)`` or ``(loss, (logits, cache), breakdown)``.
            Where nothing counts the loss is 0 and its gradients are zeros.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: of the wrong shape, device or range; ``fused=True`` where it cannot be; network options with
                which segments cannot be kept apart.

        """
        x, given = self._checked(x, {
            'return_outputs': return_outputs, 'return_breakdown': return_breakdown, 'prepend_embeds': prepend_embeds,
            'lens': lens, 'mask': mask, 'loss_mask': loss_mask, 'loss_weight': loss_weight,
            'segment_ids': segment_ids, 'normalizer': normalizer, **kwargs,
        })  # fmt: skip
        made: tuple[Any, ...] = self._loss(x, given) if len(x) else on_a_stand_in(self, self._loss, x, given)
        wanted = (True, return_outputs, return_breakdown)
        returned = tuple(value for value, asked in zip(made, wanted, strict=True) if asked)
        return returned if len(returned) > 1 else returned[0]

    def _loss(
        self, x: Tensor, given: dict[str, Any], stand_in: Any = None
    ) -> tuple[Tensor, tuple[Tensor, Any], LossBreakdown]:
        """The equation: count, run the network, weigh in the dtype of what it returned, cost, one sum."""
        targets = self._count(x, given)
        rows, fuse = self._rows(x, given, unpad=self._unpads(given)), self._fuses(given)
        out, cache, next_embed = self._run(stand_in or self.net, rows, fuse)
        weights = batch_weights(
            targets, self.weighting, loss_dtype(out.dtype), given.get('loss_weight'), given.get('normalizer')
        )
        total, token_loss, extra = self._costs(out, cache, next_tokens(x), targets, weights, rows.outputs, fuse)
        if self.add_continuous_pred_head:
            extra = extra + self.next_embed_loss_weight * next_embed_loss(
                next_embed[0], next_embed[1], targets.counted, rows.outputs
            )

        auxiliary = normalize((weights.by_length * extra).sum(), weights.normalizer)
        if self.add_attn_z_loss and stand_in is None:
            auxiliary = auxiliary + cache.attn_z_loss
        loss, breakdown = breakdown_of(total, token_loss, weights, auxiliary)

        logits = rows.outputs.to_targets(out, targets.counted.shape) if given.get('return_outputs') else out
        cache = cache if rows.outputs.place is None else None  # of other rows than the caller's
        return loss, (logits, cache), breakdown

    # below the fold: what the lines above call

    def _check_option_types(self) -> None:
        super()._check_option_types()
        check_flag('unpad', self.unpad)
        check_flag('trust_segments', self.trust_segments)

    def _checked(self, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        x, given = self._check_batch(x, given)
        if 'segment_ids' in given:
            network = {name: value for name, value in given.items() if name not in OF_THE_LOSS}
            check_segments(self.net, len(x), network, trust=self.trust_segments, asks='segment_ids')
        if self._unpads(given):
            refuse_unpad(self.net, x, given)
            network = {name: value for name, value in given.items() if name not in (*OF_THE_LOSS, 'seq_start_pos')}
            check_segments(self.net, 1, network, trust=self.trust_segments, asks='unpad=True')
        self._may_fuse(given)
        return x, given

    def _unpads(self, given: dict[str, Any]) -> bool:
        """Whether a call tells of padding that no compute need go into."""
        return self.unpad and 'segment_ids' not in given and any(name in given for name in TELLING)

    def _rows(self, x: Tensor, given: dict[str, Any], *, unpad: bool) -> Rows:
        return network_rows(
            self.net,
            x,
            given,
            ignore_index=self.ignore_index,
            pad_value=self.pad_value,
            mask_prob=self.mask_prob,
            unpad=unpad,
        )

    def _run(self, net: Any, rows: Rows, fuse: bool) -> tuple[Tensor, Any, Any]:
        """Logits, or embeddings for a fused head; intermediates; predicted and read embeddings, where there are any."""
        with precision_of(self.net, rows.arguments):
            out, cache = net(
                rows.ids,
                return_intermediates=True,
                return_attn_z_loss=self.add_attn_z_loss,
                return_next_embed_pred=self.add_continuous_pred_head,
                looped_pred_all_logits=True,
                **rows.arguments,
                **({'return_embeddings': True} if fuse else {}),
            )
        out, next_embed = out if self.add_continuous_pred_head else (out, None)
        return out, cache, next_embed

    def _costs(
        self,
        out: Tensor,
        cache: Any,
        ids: Tensor,  # (b, n-1)
        targets: Targets,
        weights: Weights,
        outputs: Outputs,
        fuse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Σ w · ℓ, 0-dim; ℓ, (b, n-1); and the exit loss of each target, times its coefficient, (b, n-1)."""
        counted, none = targets.counted, torch.zeros_like(weights.by_length)
        if fuse:
            return *loss_from_embeds(linear_head(self.net), out, ids, counted, weights.weight, outputs), none

        of_loops = cache.all_pred_logits if self.net.looped else [out]
        is_log_prob = self.net.output_is_log_prob
        nll = [token_losses(logits, ids, counted, outputs, is_log_prob=is_log_prob) for logits in of_loops]
        if not self.net.looped:
            return (weights.weight * nll[0]).sum(), nll[0], none

        exit_logits = torch.stack([outputs.to_targets(t, counted.shape).squeeze(-1) for t in cache.exit_logits])
        token_loss, exit_loss = looped_losses(
            torch.stack(nll),  # (l, b, n-1)
            torch.where(counted, exit_logits, 0).to(nll[0].dtype),  # (l, b, n-1)
            slope=self.looped_loss_slope,
            threshold=self.looped_loss_threshold_exit,
        )
        return (weights.weight * token_loss).sum(), token_loss, self.looped_exit_loss_weight * exit_loss
