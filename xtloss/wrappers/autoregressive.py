"""AutoregressiveWrapper of x-transformers, with every weighting of its loss and no logits where none are needed.

Dims: b batch, n positions, p prepended embeddings, d width, l loops.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper as Upstream

from xtloss.arguments import OF_LOSS, has_values, having, keywords, loss_dtype, refuse_given
from xtloss.weighting.targets import Targets, next_tokens, real_positions
from xtloss.weighting.weights import LossBreakdown, Weights, batch_weights, breakdown_of
from xtloss.wrappers import base
from xtloss.wrappers.head import fused_head
from xtloss.wrappers.rows import Outputs, check_outputs, loss_from_embeds, network_rows, next_embed_loss, token_losses
from xtloss.wrappers.segment_leak import why_not_apart
from xtloss.wrappers.unpad import TELLING, refuse_unpad, unpads

APART = dict.fromkeys(having('apart'), 'the masks and positions of shared rows have no place for it')


class AutoregressiveWrapper(base.LossWrapper, Upstream):  # type: ignore[misc]
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
        trust_segments: take it that the network keeps the sequences of ``segment_ids`` apart, without measuring it.
        **kwargs: upstream's.

    Raises:
        TypeError, ValueError: options of the wrong type or value, or the flag beside another weighting.

    Source: https://github.com/lucidrains/x-transformers/issues/291

    """

    fused: bool | str = 'auto'
    unpad: bool = False
    trust_segments: bool = False

    @base.shows_upstream(Upstream.__init__)
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
        weighting = {'equal_loss_weight_batch': equal_loss_weight_batch, 'loss_weighting': loss_weighting}
        base.set_options(self, **weighting, fused=fused, unpad=unpad, trust_segments=trust_segments)

    @base.shows_upstream(Upstream.forward)
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
            ValueError: of the wrong shape, device or range; ``fused=True`` where it cannot be; a network that does not
                keep segments apart, as `segment_leak` measures.

        """
        x, given = check_tokens(self, x, {
            'return_outputs': return_outputs, 'return_breakdown': return_breakdown, 'prepend_embeds': prepend_embeds,
            'lens': lens, 'mask': mask, 'loss_mask': loss_mask, 'loss_weight': loss_weight,
            'segment_ids': segment_ids, 'normalizer': normalizer, **kwargs,
        })  # fmt: skip
        require_apart(self, x, given)  # here alone: elsewhere the weights of a sharded network are not whole
        loss, outputs, breakdown = base.on_rows(loss_outputs_breakdown, self, x, given)
        returned = (loss, *([outputs] if return_outputs else []), *([breakdown] if return_breakdown else []))
        return returned if len(returned) > 1 else loss


NAMES = keywords(AutoregressiveWrapper.forward)


@base.checked.register
def check_tokens(wrapper: AutoregressiveWrapper, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Check all that a wrapper was given, by name; return it as `check_call` does."""
    x, given = base.check_call(wrapper, x, given, NAMES)
    if 'segment_ids' in given:
        refuse_given(given, APART)
    if unpads(wrapper, given):
        refuse_unpad(wrapper.net, x, given)
    return x, given


def require_apart(wrapper: AutoregressiveWrapper, x: Tensor, given: dict[str, Any]) -> None:
    """Raise ValueError where sequences are to share rows, and the network, as it measures, does not keep them apart."""
    unpad = unpads(wrapper, given) and (torch.compiler.is_compiling() or has_values(x))  # else it goes as it came
    if wrapper.trust_segments or not (unpad or 'segment_ids' in given):
        return
    if torch.compiler.is_compiling():
        reason = wrapper._xtloss_finding('why_not_unpadded' if unpad else 'why_not_apart')
    else:
        arguments = {name: value for name, value in given.items() if name not in OF_LOSS and name not in TELLING}
        reason = why_not_apart(wrapper.net, arguments, short_rows=unpad)
    if reason is not None:
        raise ValueError(f'{"unpad=True" if unpad else "segment_ids"}: {reason}')


def loss_outputs_breakdown(
    wrapper: Any, x: Tensor, given: dict[str, Any], *, has_rows: bool
) -> tuple[Tensor, tuple[Tensor, Any], LossBreakdown]:
    """Return the loss of a batch that has been checked, logits and cache, and what the loss is made of."""
    targets, unpad = base.counted_targets(wrapper, x, given), unpads(wrapper, given)
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

    weights = batch_weights(
        targets, base.weighting_of(wrapper), loss_dtype(out.dtype), given.get('loss_weight'), given.get('normalizer')
    )
    total, token_loss, extra = costs(wrapper, out, cache, next_tokens(x), targets, weights, outputs, head)
    if wrapper.add_continuous_pred_head:
        extra = extra + wrapper.next_embed_loss_weight * next_embed_loss(next_embed, targets.counted, outputs)

    z_loss = cache.attn_z_loss if wrapper.add_attn_z_loss and has_rows else None
    loss, breakdown = breakdown_of(total, token_loss, weights, extra, z_loss)
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
    Zhu et al., Scaling Latent Reasoning via Looped Language Models, 2025, https://arxiv.org/abs/2510.25741.
    """
    exit_target = torch.sigmoid(slope * (nll[1:] - nll[:-1] + threshold)).detach()
    exit_loss = F.binary_cross_entropy_with_logits(exit_logits[:-1], exit_target, reduction='none')  # (l-1, b, n-1)

    certain, gates = torch.zeros_like(exit_logits[:1]), exit_logits[:-1].detach()  # certain: log 1
    stay = torch.cat([certain, F.logsigmoid(-gates).cumsum(dim=0)])  # up to each loop
    leave = torch.cat([F.logsigmoid(gates), certain])  # right after it; the last loop takes what is left
    return (nll * (stay + leave).exp()).mean(dim=0), exit_loss.sum(dim=0) / max(1, len(exit_loss))
