"""The loss of an `AutoregressiveWrapper`, in the order the data flows: count, run the network, weigh, cost, one sum.

Dims: b batch, n positions, v vocabulary, l loops.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xtloss.tensors import loss_dtype
from xtloss.weighting.targets import Targets, next_tokens, real_positions
from xtloss.weighting.weights import (
    LossBreakdown,
    Weights,
    batch_normalizer,
    batch_weights,
    breakdown_of,
    normalize,
    share_of_step,
)
from xtloss.wrappers.base import counted_targets, weighting_of
from xtloss.wrappers.head import fused_head
from xtloss.wrappers.rows import Outputs, network_rows
from xtloss.wrappers.token_losses import check_outputs, loss_from_embeds, next_embed_loss, token_losses
from xtloss.wrappers.unpad import TELLING, unpads


def loss_outputs_breakdown(
    wrapper: Any, x: Tensor, given: dict[str, Any], *, has_rows: bool
) -> tuple[Tensor, tuple[Tensor, Any], LossBreakdown]:
    """Return the loss of a batch that has been checked, logits and cache, and what the loss is made of."""
    targets, unpad = counted_targets(wrapper, x, given), unpads(wrapper, given)
    head = fused_head(wrapper, given)
    ids, arguments, outputs = network_rows(wrapper, x, given, unpad=unpad)
    out, cache = wrapper.net(
        ids,
        return_intermediates=True,
        return_attn_z_loss=wrapper.add_attn_z_loss,
        return_next_embed_pred=wrapper.add_continuous_pred_head,
        looped_pred_all_logits=True,
        **arguments,
        **({} if head is None else {'return_embeddings': True}),
    )
    out, next_embed = out if wrapper.add_continuous_pred_head else (out, (out, out))
    check_outputs(out, ids, or_more=outputs.place is None)

    dtype, weighting = loss_dtype(out.dtype), weighting_of(wrapper)
    weights = batch_weights(targets, weighting, dtype, given.get('loss_weight'), given.get('normalizer'))
    total, token_loss, extra = costs(wrapper, out, cache, next_tokens(x), targets, weights, outputs, head)
    if wrapper.add_continuous_pred_head:
        extra = extra + wrapper.next_embed_loss_weight * next_embed_loss(next_embed, targets.counted, outputs)

    auxiliary = normalize((weights.by_length * extra).sum(), weights.normalizer)
    if wrapper.add_attn_z_loss and has_rows:
        own = batch_normalizer(targets, weighting, dtype)
        auxiliary = auxiliary + cache.attn_z_loss * share_of_step(own, weights.normalizer)
    loss, breakdown = breakdown_of(total, token_loss, weights, auxiliary)

    if not given.get('return_outputs'):
        return loss, (out, cache), breakdown
    logits = outputs.to_targets(out, targets.counted.shape)
    if not unpad:
        return loss, (logits, cache), breakdown
    telling: dict[str, Any] = {name: given.get(name) for name in TELLING}
    real = real_positions(x, **telling)[:, :-1]  # outputs are of the caller's batch, whichever rows the network read
    return loss, (torch.where(real[..., None], logits, 0), None), breakdown


def costs(
    wrapper: Any, out: Tensor, cache: Any, ids: Tensor, targets: Targets, weights: Weights, outputs: Outputs, head: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ w · ℓ, 0-dim; ℓ, (b, n-1); and the exit loss of each target, times its coefficient, (b, n-1)."""
    net, counted, none = wrapper.net, targets.counted, torch.zeros_like(weights.by_length)
    if head is not None:
        return *loss_from_embeds(head, out, ids, counted, weights.weight, outputs), none

    of_loops = cache.all_pred_logits if net.looped else [out]
    nll = [token_losses(wrapper, logits, ids, counted, outputs) for logits in of_loops]
    if not net.looped:
        return (weights.weight * nll[0]).sum(), nll[0], none

    exit_logits = torch.stack([outputs.to_targets(t, counted.shape).squeeze(-1) for t in cache.exit_logits])
    exit_logits = torch.where(counted, exit_logits, 0).to(nll[0].dtype)  # (l, b, n-1)
    gate = {'slope': wrapper.looped_loss_slope, 'threshold': wrapper.looped_loss_threshold_exit}
    token_loss, exit_loss = looped_losses(torch.stack(nll), exit_logits, **gate)
    return (weights.weight * token_loss).sum(), token_loss, wrapper.looped_exit_loss_weight * exit_loss


def looped_losses(nll: Tensor, exit_logits: Tensor, *, slope: float, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the loss and the exit loss of each target, both (b, n-1), in nats, means over the loops, of (l, b, n-1).

    loss = nll · exit probability. The exit loss is the binary cross-entropy of each loop's gate, but the last's, to
    sigmoid(slope · (nll[loop + 1] - nll[loop] + threshold)): whether to stop because the next loop gains too little.
    A single loop has none. Zhu et al., Scaling Latent Reasoning via Looped Language Models, 2025,
    https://arxiv.org/abs/2510.25741, as x-transformers trains them.
    """
    exit_target = torch.sigmoid(slope * (nll[1:] - nll[:-1] + threshold)).detach()
    exit_loss = F.binary_cross_entropy_with_logits(exit_logits[:-1], exit_target, reduction='none')  # (l-1, b, n-1)

    certain, gates = torch.zeros_like(exit_logits[:1]), exit_logits[:-1].detach()  # certain: log 1
    stay = torch.cat([certain, F.logsigmoid(-gates).cumsum(dim=0)])  # up to each loop
    leave = torch.cat([F.logsigmoid(gates), certain])  # right after it; the last loop takes what is left
    return (nll * (stay + leave).exp()).mean(dim=0), exit_loss.sum(dim=0) / max(1, len(exit_loss))
