"""ContinuousAutoregressiveWrapper of x-transformers, with every weighting of its loss, over targets, not inputs.

Dims: b batch, n positions, d features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from x_transformers.continuous import ContinuousAutoregressiveWrapper as Upstream

from xtloss.checks import check_batch, refuse_arguments
from xtloss.losses.cross_entropy import loss_dtype
from xtloss.weighting.targets import Targets, count_targets, next_tokens
from xtloss.weighting.weights import WEIGHTINGS, batch_normalizer, batch_weights, weighted_loss
from xtloss.wrappers.inputs import mask_arguments, real_positions
from xtloss.wrappers.options import WeightingOptions
from xtloss.wrappers.rollout import count_rollout, refuse_rollout, roll_out

NOTES = {
    'mask': ': it says which frames are real, and the last frame of x, a target, is one of them; a mask of the inputs '
    'x[:, :-1], which x-transformers takes too, cannot say so'
}
REFUSED = {
    'prepend_embeds': 'the outputs would no longer be aligned with the targets',
    'segment_ids': 'only AutoregressiveWrapper keeps sequences that share a row apart',
}


class ContinuousAutoregressiveWrapper(WeightingOptions, Upstream):  # type: ignore[misc]
    """Upstream's wrapper with a choice of what each target weighs in the loss.

    ::

        loss = Σ w[b,i] · ℓ[b,i] / Z                        over the targets i = 1 … n-1 of x, (b, n, d)
        w[b,i] = loss_weight[b,i] · counted[b,i] · L^(-p)   L: how many targets count in row b

    ℓ is the mean over features of the elementwise loss of frame ``x[b,i]``. `AutoregressiveWrapper` has the table of
    weightings.

    Where rows are of equal length and nothing is masked it equals upstream's. It differs where that is wrong:

    - targets are masked, not inputs: upstream trains the last real frame to predict the first frame of padding;
    - ``equal_loss_weight_batch`` averages over features: upstream sums them, so that its loss is d times too large.

    Args:
        net: the network, as upstream.
        loss_fn: called with the network's output and the frames to predict, (b, n-1, d); returns the loss of each
            element, (b, n-1, d), or of each frame, (b, n-1). What is not counted is 1 in both of its arguments, be it
            NaN in the batch. One that reduces further works only where nothing is masked or weighted. None: mean
            squared error, or Gaussian negative log-likelihood (nats) for a network built with ``probabilistic``.
        use_l1_loss: None as ``loss_fn`` is the absolute error.
        equal_loss_weight_batch: each sequence weighs the same, whatever its length: ``loss_weighting='sequence'``.
        loss_weighting: 'token', 'sequence', 'square', 'padded', 'sequence_sum', or a number in [0, 1].

    Raises:
        TypeError, ValueError: options of the wrong type or value, or the flag beside another weighting.

    """

    net: Any
    loss_fn: Any

    def __init__(
        self,
        net: nn.Module,
        loss_fn: nn.Module | None = None,
        use_l1_loss: bool = False,
        equal_loss_weight_batch: bool = False,
        loss_weighting: str | float | None = None,
    ) -> None:
        super().__init__(net, loss_fn, use_l1_loss, equal_loss_weight_batch)
        self.loss_weighting = loss_weighting
        self.check_loss_options()

    def forward(
        self,
        x: Tensor,
        rollout_steps: int = 1,
        *,
        lens: Tensor | None = None,
        mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        loss_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        return_breakdown: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the loss of a batch of sequences of frames; float32, or wider where the outputs are wider.

        Args:
            x: (b, n, d), floating point; padding may be NaN.
            rollout_steps: k > 1: in each row of more than k real frames, padded right, the network reads
                1 + floor(u · (length - k)) of them, u = ``torch.rand(b)``, and predicts the next k, each from those
                that it predicted; a probabilistic one draws them. These k are the row's targets, L = k, and
                ``loss_weight`` (b, n) is read at them; shorter rows have none. k passes of the network, with no cache.
            lens: (b,), integer: frames from ``lens`` on are padding.
            mask: (b, n), bool, True = real frame: attention mask, and neither a masked frame nor the frame right after
                one is a target.
            loss_mask: (b, n), bool: frames that are no targets where False, though the network reads them.
            loss_weight: (b,) or (b, n), floating point, any sign: how much a sequence, or a target, weighs. Never in Z.
            normalizer: a number > 0, or 0-dim tensor >= 0, in place of Z.
            return_breakdown: return a `LossBreakdown` last.
            **kwargs: the network's, as upstream. With ``seq_start_pos`` (b,), frames before it are padding.

        Returns:
            ``loss`` or ``(loss, breakdown)``. Where nothing counts the loss is 0 and its gradients are zeros.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: of the wrong shape, device or range; a rollout with ``loss_mask``, ``seq_start_pos``, or what
                the network reads frame by frame; a ``loss_fn`` that reduces where there are masks or weights.

        """
        padding = {'lens': lens, 'mask': mask, 'seq_start_pos': kwargs.get('seq_start_pos')}
        given = {**padding, 'loss_mask': loss_mask, 'loss_weight': loss_weight, 'normalizer': normalizer}
        targets = self._count(x, rollout_steps, kwargs, **given)
        is_plain = (
            all(argument is None for argument in given.values())
            and not return_breakdown
            and self.weighting == WEIGHTINGS['token']
        )
        counted = targets.counted[..., None]  # (b, n-1, 1), or (b, k, 1) in a rollout, where all below has k for n-1
        if rollout_steps > 1:
            out, x, loss_weight = roll_out(self.net, x, targets, loss_weight, lens=lens, mask=mask, arguments=kwargs)
        else:
            inputs, kwargs = self._network_arguments(x, padding, kwargs)
            out = self.net(inputs, **kwargs)[..., : counted.shape[1], :]  # (b, n-1, d), or a mean and a variance of it
        dtype = loss_dtype(out.dtype)

        # replaced before the loss, not after: the gradient of what is not finite is NaN, though it be multiplied by 0
        frames = torch.where(counted, next_tokens(x), 1)  # (b, n-1, d)
        losses = self.loss_fn(torch.where(counted, out, 1).to(dtype), frames.to(dtype))

        if losses.ndim not in (2, 3) or losses.shape[:2] != counted.shape[:2]:
            if not is_plain:
                raise ValueError(
                    f'loss_fn must return {tuple(frames.shape)} or {tuple(frames.shape[:2])} where there are masks or '
                    f'weights, got {tuple(losses.shape)}'
                )
            return torch.where(counted.any(), losses.mean(), 0) if counted.numel() else out.sum()

        losses = losses.to(loss_dtype(losses.dtype))
        losses = losses.mean(dim=-1) if losses.ndim == 3 else losses
        token_loss = torch.where(targets.counted, losses, 0)  # (b, n-1)
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
        seq_start_pos: Tensor | None = None,
        **network_kwargs: Any,
    ) -> Tensor:
        """Return Z of this batch, 0-dim, float32 or wider, without running the network.

        Takes what `forward` takes, and raises what it raises. Sum it over the micro-batches of a step, hand the sum to
        `global_normalizer`, and that to `forward` as ``normalizer``, and the gradients add up to those of one batch.
        """
        rollout_steps = network_kwargs.get('rollout_steps', 1)
        targets = self._count(
            x, rollout_steps, network_kwargs, lens=lens, mask=mask, loss_mask=loss_mask, seq_start_pos=seq_start_pos
        )
        return batch_normalizer(targets, self.weighting, self.loss_dtype)

    def _count(self, x: Tensor, rollout_steps: int, network_arguments: dict[str, Any], **arguments: Any) -> Targets:
        check_batch(x, kind='floating point', counts={'rollout_steps': rollout_steps}, notes=NOTES, **arguments)
        refuse_arguments(network_arguments, REFUSED)
        if rollout_steps > 1:
            refuse_rollout({**network_arguments, **arguments})
            return count_rollout(x, rollout_steps, lens=arguments['lens'], mask=arguments['mask'])
        counting = {name: arguments[name] for name in ('lens', 'mask', 'loss_mask', 'seq_start_pos')}
        return count_targets(x, **counting)

    def _network_arguments(
        self, x: Tensor, padding: dict[str, Tensor | None], arguments: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """All frames but the last, 0 where they are padding, and the other arguments of the network's forward."""
        inputs = x[:, : max(1, x.shape[1] - 1)]  # a row of one frame is read, for a loss of 0 attached to the graph
        if all(argument is None for argument in padding.values()):
            return inputs, arguments
        real = real_positions(x, **padding)[:, : inputs.shape[1]]
        arguments = mask_arguments(
            self.net, mask=real, random_mask=None, n=real.shape[1], prepended=0, arguments=arguments
        )
        return inputs.masked_fill(~real[..., None], 0), arguments
