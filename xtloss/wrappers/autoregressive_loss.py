"""The loss of an `AutoregressiveWrapper`, in the order the data flows: count, run the network, weigh, cost, one sum.

Dims: b batch, n positions, v vocabulary, l loops.
"""

from typing import Any

import torch
from torch import Tensor

from xtloss.losses.looped import looped_losses
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
from xtloss.wrappers.head import LinearHead, fused_head
from xtloss.wrappers.rows import Outputs, Rows, network_rows
from xtloss.wrappers.token_losses import check_outputs, loss_from_embeds, next_embed_loss, token_losses
from xtloss.wrappers.unpad import TELLING, unpads


def loss_outputs_breakdown(
    wrapper: Any, x: Tensor, given: dict[str, Any], *, has_rows: bool
) -> tuple[Tensor, tuple[Tensor, Any], LossBreakdown]:
    """Return the loss of a batch that has been checked, logits and cache, and what the loss is made of."""
    targets, unpad = counted_targets(wrapper, x, given), unpads(wrapper, given)
    head = fused_head(wrapper, given)
    rows = network_rows(wrapper, x, given, unpad=unpad)
    out, cache, next_embed = run_network(wrapper, rows, embeddings=head is not None)
    check_outputs(out, targets.counted, rows.outputs)

    dtype, weighting, normalizer = loss_dtype(out.dtype), weighting_of(wrapper), given.get('normalizer')
    weights = batch_weights(targets, weighting, dtype, given.get('loss_weight'), normalizer)
    total, token_loss, extra = costs(wrapper, out, cache, next_tokens(x), targets, weights, rows.outputs, head)
    if wrapper.add_continuous_pred_head:
        distance = next_embed_loss(next_embed[0], next_embed[1], targets.counted, rows.outputs)
        extra = extra + wrapper.next_embed_loss_weight * distance

    auxiliary = normalize((weights.by_length * extra).sum(), weights.normalizer)
    if wrapper.add_attn_z_loss and has_rows:
        own = batch_normalizer(targets, weighting, dtype)
        share = 1 if normalizer is None else share_of_step(own, weights.normalizer)
        auxiliary = auxiliary + cache.attn_z_loss * share
    loss, breakdown = breakdown_of(total, token_loss, weights, auxiliary)

    if given.get('return_outputs'):
        out = rows.outputs.to_targets(out, targets.counted.shape)
    if unpad:  # the outputs are those of the caller's batch, whichever rows the network read
        telling: dict[str, Any] = {name: given.get(name) for name in TELLING}
        real = real_positions(x, **telling)[:, :-1]
        out, cache = torch.where(real[..., None], out, 0) if given.get('return_outputs') else out, None
    return loss, (out, cache), breakdown


def run_network(wrapper: Any, rows: Rows, *, embeddings: bool) -> tuple[Tensor, Any, Any]:
    """Return logits, or embeddings for a fused head; intermediates; and embeddings predicted and read, if there are."""
    asks = {'return_embeddings': True} if embeddings else {}
    out, cache = wrapper.net(
        rows.ids,
        return_intermediates=True,
        return_attn_z_loss=wrapper.add_attn_z_loss,
        return_next_embed_pred=wrapper.add_continuous_pred_head,
        looped_pred_all_logits=True,
        **rows.arguments,
        **asks,
    )
    out, next_embed = out if wrapper.add_continuous_pred_head else (out, None)
    return out, cache, next_embed


def costs(
    wrapper: Any,
    out: Tensor,
    cache: Any,
    ids: Tensor,  # (b, n-1)
    targets: Targets,
    weights: Weights,
    outputs: Outputs,
    head: LinearHead | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ w · ℓ, 0-dim; ℓ, (b, n-1); and the exit loss of each target, times its coefficient, (b, n-1)."""
    net, counted, none = wrapper.net, targets.counted, torch.zeros_like(weights.by_length)
    if head is not None:
        return *loss_from_embeds(head, out, ids, counted, weights.weight, outputs), none

    options: dict[str, Any] = {'is_log_prob': net.output_is_log_prob, 'composite': wrapper.fused is False}
    of_loops = cache.all_pred_logits if net.looped else [out]
    nll = [token_losses(logits, ids, counted, outputs, **options) for logits in of_loops]
    if not net.looped:
        return (weights.weight * nll[0]).sum(), nll[0], none

    exit_logits = torch.stack([outputs.to_targets(t, counted.shape).squeeze(-1) for t in cache.exit_logits])
    token_loss, exit_loss = looped_losses(
        torch.stack(nll),  # (l, b, n-1)
        torch.where(counted, exit_logits, 0).to(nll[0].dtype),  # (l, b, n-1)
        slope=wrapper.looped_loss_slope,
        threshold=wrapper.looped_loss_threshold_exit,
    )
    return (weights.weight * token_loss).sum(), token_loss, wrapper.looped_exit_loss_weight * exit_loss
