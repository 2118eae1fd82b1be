"""What each target costs, from what the network returned.

Dims: b batch, n positions, d width, v vocabulary; r rows and m positions of what the network returned.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from xtloss.losses.cross_entropy import cross_entropy
from xtloss.losses.linear_cross_entropy import linear_cross_entropy
from xtloss.tensors import has_values, loss_dtype
from xtloss.wrappers.head import LinearHead
from xtloss.wrappers.rows import Outputs


def token_losses(wrapper: Any, logits: Tensor, ids: Tensor, counted: Tensor, outputs: Outputs) -> Tensor:
    """Return the nll of each target, of ids (b, n-1), in nats, (b, n-1), 0 where not counted; float32 or wider.

    All positions of the logits, (r, m, v), are read where they lie, in one flat (tokens, vocab) view: slicing off the
    last would copy them, and their gradient.
    """
    shape, flat = logits.shape[:2], rearrange(logits, 'r m v -> (r m) v')
    targets = outputs.at_outputs(torch.where(counted, ids, 0), shape)  # (r·m,)
    at_counted = outputs.at_outputs(counted, shape)
    net = wrapper if hasattr(wrapper, 'output_is_log_prob') else wrapper.net  # XL's may have wrapped the network
    if net.output_is_log_prob:
        log_prob = flat.gather(1, targets[:, None]).squeeze(1)
        nll = torch.where(at_counted, -log_prob.to(loss_dtype(logits.dtype)), 0)
    else:
        nll = cross_entropy(flat, targets, at_counted, composite=wrapper.fused is False)
    return outputs.to_targets(nll.view(shape), ids.shape)


def loss_from_embeds(
    head: LinearHead, embeds: Tensor, ids: Tensor, counted: Tensor, weight: Tensor, outputs: Outputs
) -> tuple[Tensor, Tensor]:
    """Return Σ weight · nll over the counted targets, 0-dim, and their nll, (b, n-1), detached, 0 where not counted.

    Embeds are (r, m, d), what tells of the targets (b, n-1). In eager mode only the rows that count reach the head, at
    the price of one host sync. A compiled graph has static shapes, and what has no values cannot be counted: there the
    others go along, as zeros that weigh nothing.
    """
    shape, flat = embeds.shape[:2], rearrange(embeds, 'r m d -> (r m) d')
    at_counted = outputs.at_outputs(counted, shape)  # (r·m,)
    targets = outputs.at_outputs(torch.where(counted, ids, 0), shape)
    weight = outputs.at_outputs(weight, shape)

    if torch.compiler.is_compiling() or not has_values(at_counted):
        rows = head.scaled(torch.where(at_counted[:, None], flat, 0))
        total, nll = linear_cross_entropy(rows, head.weight, targets, weight, bias=head.bias)
        nll = torch.where(at_counted, nll, 0)
    else:
        index = at_counted.nonzero().squeeze(1)
        rows = head.scaled(flat.index_select(0, index))  # whose backward needs no sort
        total, row_nll = linear_cross_entropy(rows, head.weight, targets[index], weight[index], bias=head.bias)
        nll = torch.zeros_like(weight, dtype=row_nll.dtype).index_copy(0, index, row_nll)
    return total, outputs.to_targets(nll.view(shape), ids.shape)


def next_embed_loss(next_embed: tuple[Tensor, Tensor], counted: Tensor, outputs: Outputs) -> Tensor:
    """Return the mean absolute error of the predicted embedding of each target, (b, n-1), 0 where it is not counted.

    The embeddings, (r, m, d) each, are those predicted and those of the tokens that the network read.
    """
    pred, embeds = next_embed
    read = F.pad(embeds[:, 1:], (0, 0, 0, 1)).detach()  # of the token after each, and so of the target
    difference = torch.where(counted[..., None], outputs.to_targets(pred - read, counted.shape), 0)
    return difference.abs().to(loss_dtype(pred.dtype)).mean(dim=-1)


def check_outputs(out: Any, ids: Tensor, *, or_more: bool) -> None:
    """Raise ValueError unless the network returned one tensor with an output for each token of ids, (r, m), or more."""
    r, m = ids.shape
    right = isinstance(out, Tensor) and out.ndim == 3 and out.shape[0] == r
    if not right or out.shape[1] < m or (out.shape[1] > m and not or_more):
        found = tuple(out.shape) if isinstance(out, Tensor) else f'a {type(out).__name__}'
        raise ValueError(f'the network must return ({r}, {m}{" or more" * or_more}, vocab), of one head, got {found}')
