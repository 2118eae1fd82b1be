"""ContinuousAutoregressiveWrapper of x-transformers, with every weighting of its loss, over targets, not inputs.

Dims: b batch, n positions, d features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from x_transformers.continuous import ContinuousAutoregressiveWrapper as Upstream

from xtloss.checks import check_flag, refuse_arguments
from xtloss.losses.cross_entropy import loss_dtype
from xtloss.losses.gaussian import gaussian_nll, is_gaussian
from xtloss.weighting.targets import Targets, next_tokens, real_positions
from xtloss.weighting.weights import WEIGHTINGS, LossBreakdown, batch_weights, breakdown_of
from xtloss.wrappers.attention_masks import is_known, mask_arguments, precision_of
from xtloss.wrappers.base import LossWrapper
from xtloss.wrappers.inputs import join_keys
from xtloss.wrappers.returns import ReturnsLoss
from xtloss.wrappers.rollout import count_rollout, refuse_rollout, roll_out
from xtloss.wrappers.rows import OF_THE_LOSS
from xtloss.wrappers.stand_in import on_a_stand_in

NOTES = {
    'mask': ': it says which frames are real, and the last frame of x, a target, is one of them; a mask of the inputs '
    'x[:, :-1], which x-transformers takes too, cannot say so'
}
REFUSED = {
    'prepend_embeds': 'the outputs would no longer be aligned with the targets',
    'segment_ids': 'only AutoregressiveWrapper keeps sequences that share a row apart',
}
RETURNS = dict.fromkeys(
    ('return_intermediates', 'return_mems', 'return_attn', 'return_embeddings'), 'forward returns a loss'
)


class ContinuousAutoregressiveWrapper(LossWrapper, Upstream):  # type: ignore[misc]
    """Upstream's wrapper with a choice of what each target weighs in the loss.

    ::

        loss = Σ w[b,i] · ℓ[b,i] / Z                        over the targets i = 1 … n-1 of x, (b, n, d)
        w[b,i] = loss_weight[b,i] · counted[b,i] · L^(-p)   L: how many targets count in row b

    ℓ is the mean over features of the elementwise loss of frame ``x[b,i]``. `AutoregressiveWrapper` has the table of
    weightings.

    Where rows are of equal length and nothing is masked it equals upstream's. It differs where that is wrong:

    - targets are masked, not inputs: upstream trains the last real frame to predict the first frame of padding;
    - ``equal_loss_weight_batch`` averages over features: upstream sums them, so that its loss is d times too large.

        >>> model = ContinuousAutoregressiveWrapper(net, loss_weighting='sequence')
        >>> frames, lens = torch.randn(2, 8, 3), torch.tensor([8, 5])  # after its 5th frame the second may hold NaN
        >>> one_step = model(frames, lens=lens)
        >>> its_own_predictions = model(frames, rollout_steps=3, lens=lens)

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
    __call__: ReturnsLoss

    def __init__(
        self,
        net: nn.Module,
        loss_fn: nn.Module | None = None,
        use_l1_loss: bool = False,
        equal_loss_weight_batch: bool = False,
        loss_weighting: str | float | None = None,
    ) -> None:
        check_flag('use_l1_loss', use_l1_loss)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f'loss_fn must be callable, got {type(loss_fn).__name__}')
        super().__init__(net, loss_fn, use_l1_loss, equal_loss_weight_batch)
        self.set_loss_options(equal_loss_weight_batch=equal_loss_weight_batch, loss_weighting=loss_weighting)

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

        Takes what `AutoregressiveWrapper.forward` takes, but for outputs, embeddings and segments, of frames:

        Args:
            x: (b, n, d), floating point; padding may be NaN.
            rollout_steps: k > 1: in each row of more than k real frames, padded right, the network reads
                1 + floor(u · (length - k)) of them, u = ``torch.rand(b)``, and predicts the next k, each from those
                that it predicted; a probabilistic one draws them. These k are the row's targets, L = k, and
                ``loss_weight`` (b, n) is read at them; shorter rows have none. k passes of the network, with no cache.
            lens: (b,), integer.
            mask: (b, n), bool, of all frames: the last is a target too.
            loss_mask: (b, n), bool.
            loss_weight: (b,) or (b, n), floating point.
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
        x, given = self._checked(x, {
            'rollout_steps': rollout_steps, 'lens': lens, 'mask': mask, 'loss_mask': loss_mask,
            'loss_weight': loss_weight, 'normalizer': normalizer, 'return_breakdown': return_breakdown, **kwargs,
        })  # fmt: skip
        loss, breakdown = self._loss(x, given) if len(x) else on_a_stand_in(self, self._loss, x, given)
        return (loss, breakdown) if return_breakdown else loss

    def _loss(self, x: Tensor, given: dict[str, Any], stand_in: Any = None) -> tuple[Tensor, LossBreakdown]:
        """The equation: count, run the network, cost, weigh, one sum."""
        targets = self._count(x, given)
        counted = targets.counted[..., None]  # (b, n-1, 1), or (b, k, 1) in a rollout, where all below has k for n-1
        net, loss_weight = stand_in or self.net, given.get('loss_weight')
        if given.get('rollout_steps', 1) > 1:
            out, x, loss_weight = roll_out(net, x, targets, given)
        else:
            inputs, arguments = self._rows(x, given)
            with precision_of(self.net, arguments):
                out = net(inputs, **arguments)
            out = out[..., : counted.shape[1], :]  # (b, n-1, d), or a mean and a variance of it

        # replaced before the loss, not after: the gradient of what is not finite is NaN, though it be multiplied by 0
        frames, dtype = torch.where(counted, next_tokens(x), 1), loss_dtype(out.dtype)  # (b, n-1, d)
        loss_fn = gaussian_nll if is_gaussian(self.loss_fn) else self.loss_fn
        losses = loss_fn(torch.where(counted, out, 1).to(dtype), frames.to(dtype))
        losses = losses.to(loss_dtype(losses.dtype))

        if losses.ndim not in (2, 3) or losses.shape[:2] != counted.shape[:2]:
            if stand_in is None and not self._is_plain(given):
                raise ValueError(
                    f'loss_fn must return {tuple(frames.shape)} or {tuple(frames.shape[:2])} where there are masks or '
                    f'weights, got {tuple(losses.shape)}'
                )
            losses = losses.mean().expand(counted.shape[:2]) if counted.numel() else out[..., 0]

        losses = losses.mean(dim=-1) if losses.ndim == 3 else losses
        token_loss = torch.where(targets.counted, losses, 0)  # (b, n-1)
        weights = batch_weights(targets, self.weighting, token_loss.dtype, loss_weight, given.get('normalizer'))
        return breakdown_of((weights.weight * token_loss).sum(), token_loss, weights)

    # below the fold: what the lines above call

    def _checked(self, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        steps = given.get('rollout_steps', 1)
        x, given = self._check_batch(x, given, kind='floating point', counts={'rollout_steps': steps}, notes=NOTES)
        refuse_arguments(given, REFUSED)
        refuse_arguments({name: given.get(name) or None for name in RETURNS}, RETURNS)
        if steps > 1:
            refuse_rollout(given)
        return x, given

    def key_range(self, n: int, before: int) -> tuple[int, int | None]:
        """Of all frames but the last."""
        return super().key_range(max(1, n - 1), before)

    def _count(self, x: Tensor, given: dict[str, Any]) -> Targets:
        if given.get('rollout_steps', 1) == 1:
            return super()._count(x, given)
        told: dict[str, Any] = {name: given.get(name) for name in ('lens', 'mask', 'loss_mask')}
        return count_rollout(x, given['rollout_steps'], **told)

    def _is_plain(self, given: dict[str, Any]) -> bool:
        """Whether a mean over all elements is the loss."""
        masks = ('lens', 'mask', 'loss_mask', 'loss_weight', 'seq_start_pos', 'normalizer')
        asks = given.get('return_breakdown', False) or any(name in given for name in masks)
        return not asks and self.weighting == WEIGHTINGS['token']

    def _rows(self, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """All frames but the last, 0 where they are padding, and the other arguments of the network's forward."""
        inputs = x[:, : max(1, x.shape[1] - 1)]  # a row of one frame is read, for a loss of 0 attached to the graph
        n = inputs.shape[1]
        padding = {name: given[name] for name in ('lens', 'mask', 'seq_start_pos') if name in given}
        if padding:
            inputs = inputs.masked_fill(~real_positions(x, **padding)[:, :n, None], 0)
        if is_known(self.net):  # right padding needs no mask: a causal network does not look there
            padding.pop('lens', None)
        mask = real_positions(x, **padding)[:, :n] if padding else None
        hidden = ('mask', 'self_attn_kv_mask', *OF_THE_LOSS)
        arguments = {name: value for name, value in given.items() if name not in hidden}
        keys = join_keys([mask, given.get('self_attn_kv_mask')])
        return inputs, mask_arguments(self.net, keys, arguments, mask=mask, queries=n)
