"""ContinuousAutoregressiveWrapper of x-transformers, with every weighting of its loss, over targets, not inputs.

Dims: b batch, n positions, d features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from x_transformers.continuous import ContinuousAutoregressiveWrapper as Upstream
from x_transformers.continuous import GaussianNLL

from xtloss.arguments import COUNTING, OF_LOSS, having, keywords, loss_dtype, refuse_given
from xtloss.weighting.targets import next_tokens, real_positions
from xtloss.weighting.weights import WEIGHTINGS, LossBreakdown, batch_weights, breakdown_of
from xtloss.wrappers import base
from xtloss.wrappers.masks import has_known_attention, join_keys, mask_arguments
from xtloss.wrappers.rollout import roll_out

REFUSED = {
    'prepend_embeds': 'the outputs would no longer be aligned with the targets',
    'segment_ids': 'only AutoregressiveWrapper keeps sequences that share a row apart',
}
REFUSED_IN_ROLLOUT = {
    'loss_mask': 'which frames a rollout predicts is drawn',
    'seq_start_pos': 'the rows of a rollout start at their first frame; pad them right',
    **dict.fromkeys(having('framewise'), 'it is for given frames, and a rollout reads frames that it predicts'),
}


class ContinuousAutoregressiveWrapper(base.LossWrapper, Upstream):  # type: ignore[misc]
    """Upstream's wrapper for sequences of frames, with the equation and weightings of `AutoregressiveWrapper`.

    ℓ is the mean over features of the elementwise loss of frame ``x[b,i]``, i = 1 … n-1 of x, (b, n, d). Where rows are
    of equal length and nothing is masked the loss equals upstream's. It differs where that is wrong:

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
        equal_loss_weight_batch, loss_weighting: as in `AutoregressiveWrapper`.

    """

    loss_fn: Any

    @base.shows_upstream(Upstream.__init__)
    def __init__(
        self,
        net: nn.Module,
        loss_fn: nn.Module | None = None,
        use_l1_loss: bool = False,
        equal_loss_weight_batch: bool = False,
        loss_weighting: str | float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(net, loss_fn, use_l1_loss, equal_loss_weight_batch, **kwargs)
        base.set_options(self, equal_loss_weight_batch=equal_loss_weight_batch, loss_weighting=loss_weighting)

    @base.shows_upstream(Upstream.forward)
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
            lens, loss_mask, loss_weight, normalizer, return_breakdown: as in `AutoregressiveWrapper.forward`.
            mask: (b, n), bool, of all frames: the last is a target too.
            **kwargs: the network's, as upstream. With ``seq_start_pos`` (b,), frames before it are padding.

        Returns:
            ``loss`` or ``(loss, breakdown)``. Where nothing counts the loss is 0 and its gradients are zeros.

        Raises:
            TypeError, ValueError: as there; a rollout with ``loss_mask``, ``seq_start_pos``, or what the network reads
                frame by frame; a ``loss_fn`` that reduces where there are masks or weights.

        """
        x, given = check_frames(self, x, {
            'rollout_steps': rollout_steps, 'lens': lens, 'mask': mask, 'loss_mask': loss_mask,
            'loss_weight': loss_weight, 'normalizer': normalizer, 'return_breakdown': return_breakdown, **kwargs,
        })  # fmt: skip
        loss, breakdown = base.on_rows(loss_and_breakdown, self, x, given)
        return (loss, breakdown) if return_breakdown else loss


NAMES = keywords(ContinuousAutoregressiveWrapper.forward)


@base.checked.register
def check_frames(
    wrapper: ContinuousAutoregressiveWrapper, x: Tensor, given: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Check all that a wrapper was given, by name; return it as `check_call` does."""
    x, given = base.check_call(wrapper, x, given, NAMES, x_rule='floating point: b n d', unread=1, refused=REFUSED)
    if given.get('rollout_steps', 1) > 1:
        refuse_given(given, REFUSED_IN_ROLLOUT)
        if 'condition' in given and given['condition'].ndim == 3:
            raise ValueError(f'condition must have shape (b, d) in a rollout, got {tuple(given["condition"].shape)}')
    return x, given


def loss_and_breakdown(
    wrapper: Any, x: Tensor, given: dict[str, Any], *, has_rows: bool
) -> tuple[Tensor, LossBreakdown]:
    """Return the loss by the equation: count, run the network, cost, weigh, one sum; and what it is made of."""
    targets = base.counted_targets(wrapper, x, given)
    counted = targets.counted[..., None]  # (b, n-1, 1), or (b, k, 1) in a rollout, where all below has k for n-1
    net, weighting, loss_weight = wrapper.net, base.weighting_of(wrapper), given.get('loss_weight')
    if given['rollout_steps'] > 1:
        out, x, loss_weight = roll_out(net, x, targets, given)
    else:
        inputs, arguments = inputs_and_arguments(net, x, given)
        out = net(inputs, **arguments)[..., : counted.shape[1], :]  # (b, n-1, d), or a mean and a variance of it

    # what is not counted is replaced before the loss: the gradient of a NaN is NaN, though it be multiplied by 0
    frames, dtype = torch.where(counted, next_tokens(x), 1), loss_dtype(out.dtype)  # (b, n-1, d)
    is_gaussian = type(wrapper.loss_fn) is GaussianNLL and wrapper._xtloss_finding('loss_fn is upstream')
    loss_fn = gaussian_nll if is_gaussian else wrapper.loss_fn
    losses = loss_fn(torch.where(counted, out, 1).to(dtype), frames.to(dtype))
    losses = losses.to(loss_dtype(losses.dtype))

    if losses.ndim not in (2, 3) or losses.shape[:2] != counted.shape[:2]:
        weighs = weighting != WEIGHTINGS['token'] or any(
            name in given for name in (*COUNTING, 'loss_weight', 'normalizer')
        )
        if has_rows and (weighs or given.get('return_breakdown')):  # it has to be a mean over all elements
            raise ValueError(
                f'loss_fn must return {tuple(frames.shape)} or {tuple(frames.shape[:2])} where there are masks or '
                f'weights, got {tuple(losses.shape)}'
            )
        losses = losses.mean().expand(counted.shape[:2]) if counted.numel() else out[..., 0]

    losses = losses.mean(dim=-1) if losses.ndim == 3 else losses
    token_loss = torch.where(targets.counted, losses, 0)  # (b, n-1)
    weights = batch_weights(targets, weighting, token_loss.dtype, loss_weight, given.get('normalizer'))
    return breakdown_of((weights.weight * token_loss).sum(), token_loss, weights)


def inputs_and_arguments(net: Any, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return all frames but the last, 0 where they are padding, and the other arguments of the network's forward."""
    n = max(1, x.shape[1] - 1)  # a row of one frame is read, for a loss of 0 attached to the graph
    inputs = x[:, :n]
    padding = {name: given[name] for name in ('lens', 'mask', 'seq_start_pos') if name in given}
    if padding:
        inputs = inputs.masked_fill(~real_positions(x, **padding)[:, :n, None], 0)
    if has_known_attention(net):  # right padding needs no mask: a causal network does not look there
        padding.pop('lens', None)
    mask = real_positions(x, **padding)[:, :n] if padding else None
    arguments = {k: v for k, v in given.items() if k not in OF_LOSS and k not in ('mask', 'self_attn_kv_mask')}
    keys = join_keys(mask, given.get('self_attn_kv_mask'))
    return inputs, mask_arguments(net, keys, arguments, mask=mask, queries=n)


def gaussian_nll(predicted: Tensor, target: Tensor) -> Tensor:
    """`F.gaussian_nll_loss` of each element, (...), in nats: ½ · (log variance + (mean - target)² / variance).

    The variance is taken as 1e-6 at least; where it is negative, NaN comes out. torch would look at its values.
    """
    mean, variance = predicted
    least = variance.detach().clamp(min=1e-6).masked_fill(variance < 0, torch.nan)
    variance = least + (variance - variance.detach())  # its gradient goes on, as in torch
    return 0.5 * (variance.log() + (mean - target) ** 2 / variance)
