"""AutoregressiveWrapper of x-transformers, with every weighting of its loss and no logits where none are needed.

Dims: b batch, n positions, p prepended embeddings, d width, v vocabulary, l loops.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper as Upstream

from xtloss.checks import check_batch
from xtloss.losses.cross_entropy import loss_dtype
from xtloss.losses.linear_cross_entropy import refuse_transforms
from xtloss.losses.linear_head import linear_head, why_not_linear
from xtloss.losses.looped import looped_losses
from xtloss.losses.token_losses import loss_from_embeds, next_embed_loss, token_losses
from xtloss.packing.segments import segment_arguments
from xtloss.weighting.targets import Targets, count_targets, next_tokens, predictors
from xtloss.weighting.weights import LossBreakdown, batch_normalizer, batch_weights, normalize
from xtloss.wrappers.inputs import legal_ids, mask_arguments, random_key_mask, real_positions
from xtloss.wrappers.options import WeightingOptions


class AutoregressiveWrapper(WeightingOptions, Upstream):  # type: ignore[misc]
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

    Args:
        net: the network, as upstream.
        *args: upstream's arguments, as are other keywords.
        equal_loss_weight_batch: each sequence weighs the same, whatever its length: ``loss_weighting='sequence'``.
        loss_weighting: a name of the table, or a number in [0, 1].
        fused: 'auto' makes head and loss in one pass without the (b, n, vocab) logits where the head is a plain linear
            map and nobody asks for logits; True raises ValueError, saying why, where that cannot be; False never does
            it, which torch.func transforms and double backward need.
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
        self.equal_loss_weight_batch = equal_loss_weight_batch
        self.loss_weighting = loss_weighting
        self.fused = fused
        self.check_loss_options()

    def check_loss_options(self) -> None:
        """Raise TypeError or ValueError unless the options are legal."""
        _ = self.weighting
        if not isinstance(self.fused, bool | str):
            raise TypeError(f"fused must be bool or 'auto', got {type(self.fused).__name__}")
        if self.fused not in (True, False, 'auto'):
            raise ValueError(f"fused must be True, False or 'auto', got {self.fused!r}")

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
        x, targets = self._count(
            x, prepend_embeds, normalizer, lens=lens, mask=mask, loss_mask=loss_mask, loss_weight=loss_weight,
            seq_start_pos=kwargs.get('seq_start_pos'), segment_ids=segment_ids,
        )  # fmt: skip
        arguments = self._network_arguments(x, prepend_embeds, mask, segment_ids, kwargs)
        fuse = self._fuses(return_outputs, arguments)

        out, cache = self.net(
            legal_ids(
                x,
                ignore_index=self.ignore_index,
                pad_value=self.pad_value,
                lens=lens,
                mask=mask,
                segment_ids=segment_ids,
            ),
            return_intermediates=True,
            return_attn_z_loss=self.add_attn_z_loss,
            return_next_embed_pred=self.add_continuous_pred_head,
            prepend_embeds=prepend_embeds,
            looped_pred_all_logits=True,
            **{**arguments, **({'return_embeddings': True} if fuse else {})},
        )
        if self.add_continuous_pred_head:
            out, (next_embed_pred, embeds) = out

        counted, ids = targets.counted, next_tokens(x)  # (b, n-1)
        weights = batch_weights(targets, self.weighting, loss_dtype(out.dtype), loss_weight, normalizer)

        extra = torch.zeros_like(weights.by_length)  # (b, n-1)
        if fuse:
            total, token_loss = loss_from_embeds(linear_head(self.net), out, ids, counted, weights.weight)
        else:
            token_loss, exit_loss = self._token_losses(out, cache, ids, counted)
            total = (weights.weight * token_loss).sum()
            extra = extra + self.looped_exit_loss_weight * exit_loss
        if self.add_continuous_pred_head:
            extra = extra + self.next_embed_loss_weight * next_embed_loss(next_embed_pred, embeds, counted)

        auxiliary = normalize((weights.by_length * extra).sum(), weights.normalizer)
        if self.add_attn_z_loss:
            auxiliary = auxiliary + cache.attn_z_loss
        loss = normalize(total, weights.normalizer) + auxiliary

        returned: list[Any] = [loss]
        if return_outputs:
            returned.append((predictors(out, counted.shape[1]), cache))
        if return_breakdown:
            breakdown = LossBreakdown(token_loss, weights.weight, weights.normalizer, auxiliary)
            returned.append(LossBreakdown(*(t.detach() for t in breakdown)))
        return tuple(returned) if len(returned) > 1 else loss

    def loss_normalizer(
        self,
        x: Tensor,
        *,
        lens: Tensor | None = None,
        mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        seq_start_pos: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **network_kwargs: Any,
    ) -> Tensor:
        """Return Z of this batch, 0-dim, float32 or wider, without running the network.

        Takes what `forward` takes, and raises what it raises. Sum it over the micro-batches of a step, hand the sum to
        `global_normalizer`, and that to `forward` as ``normalizer``, and the gradients add up to those of one batch.
        """
        _, targets = self._count(
            x, network_kwargs.get('prepend_embeds'), None, lens=lens, mask=mask, loss_mask=loss_mask,
            seq_start_pos=seq_start_pos, segment_ids=segment_ids,
        )  # fmt: skip
        return batch_normalizer(targets, self.weighting, self.loss_dtype)

    def _count(
        self, x: Tensor, prepend_embeds: Tensor | None, normalizer: Tensor | float | None, **arguments: Any
    ) -> tuple[Tensor, Targets]:
        check_batch(x, normalizer=normalizer, **arguments)
        x = x.long()  # unsigned ids would wrap a negative ignore_index
        arguments.pop('loss_weight', None)
        prepended = 0 if prepend_embeds is None else prepend_embeds.shape[1]
        return x, count_targets(x, ignore_index=self.ignore_index, prepended=prepended, **arguments)

    def _network_arguments(
        self,
        x: Tensor,
        prepend_embeds: Tensor | None,
        mask: Tensor | None,
        segment_ids: Tensor | None,
        arguments: dict[str, Any],
    ) -> dict[str, Any]:
        prepended = 0 if prepend_embeds is None else prepend_embeds.shape[1]
        start = arguments.get('seq_start_pos')
        real = real_positions(x, mask=mask, seq_start_pos=None if start is None else start - prepended)
        random_mask = random_key_mask(real, self.mask_prob) if self.mask_prob > 0 else None
        arguments = mask_arguments(
            self.net, mask=mask, random_mask=random_mask, n=x.shape[1], prepended=prepended, arguments=arguments
        )
        if segment_ids is None:
            return arguments
        return segment_arguments(self.net, segment_ids, arguments, prepend_embeds=prepend_embeds)

    def _fuses(self, return_outputs: bool, arguments: dict[str, Any]) -> bool:
        if self.fused is False:
            return False
        names = [name for name, value in arguments.items() if value is not None]
        why_not = 'return_outputs asks for logits' if return_outputs else why_not_linear(self.net, names)
        if why_not is None:
            refuse_transforms()
        elif self.fused is True:
            raise ValueError(f'fused=True, but head and loss cannot be one: {why_not}')
        return why_not is None

    def _token_losses(self, logits: Tensor, cache: Any, ids: Tensor, counted: Tensor) -> tuple[Tensor, Tensor | float]:
        """The loss and the exit loss of each target, (b, n-1)."""
        of_loops = cache.all_pred_logits if self.net.looped else [logits]
        nll = [token_losses(t, ids, counted, is_log_prob=self.net.output_is_log_prob) for t in of_loops]
        if not self.net.looped:
            return nll[0], 0.0
        exit_logits = [predictors(logits, counted.shape[1]).squeeze(-1) for logits in cache.exit_logits]
        return looped_losses(
            torch.stack(nll),  # (l, b, n-1)
            torch.where(counted, torch.stack(exit_logits), 0).to(nll[0].dtype),  # (l, b, n-1)
            slope=self.looped_loss_slope,
            threshold=self.looped_loss_threshold_exit,
        )
