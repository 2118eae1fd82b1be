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


def token_losses(
    logits: Tensor,  # (r, m, v)
    ids: Tensor,  # (b, n-1)
    counted: Tensor,  # (b, n-1)
    outputs: Outputs,
    *,
    is_log_prob: bool = False,
    composite: bool = False,
) -> Tensor:
    """Return the nll of each target in nats, (b, n-1), 0 where it is not counted; float32, or wider as the logits are.

    All positions of the logits are read where they lie, in one flat (tokens, vocab) view: slicing off the last would
    copy them, and their gradient. `composite` is of `cross_entropy`.
    """
    shape, flat = logits.shape[:2], rearrange(logits, 'r m v -> (r m) v')
    targets = outputs.at_outputs(torch.where(counted, ids, 0), shape)  # (r·m,)
    at_counted = outputs.at_outputs(counted, shape)
    if is_log_prob:
        log_prob = flat.gather(1, targets[:, None]).squeeze(1)
        nll = torch.where(at_counted, -log_prob.to(loss_dtype(logits.dtype)), 0)
    else:
        nll = cross_entropy(flat, targets, at_counted, composite=composite)
    return outputs.to_targets(nll.view(shape), ids.shape)


def loss_from_embeds(
    head: LinearHead,
    embeds: Tensor,  # (r, m, d)
    ids: Tensor,  # (b, n-1)
    counted: Tensor,  # (b, n-1)
    weight: Tensor,  # (b, n-1)
    outputs: Outputs,
) -> tuple[Tensor, Tensor]:
    """Return Σ weight · nll over the counted targets, 0-dim, and their nll, (b, n-1), detached, 0 where not counted.

    In eager mode only the rows that count reach the head, at the price of one host sync. A compiled graph has static
    shapes, and what has no values cannot be counted: there the others go along, as zeros that weigh nothing.
    """
    shape = embeds.shape[:2]
    at_counted = outputs.at_outputs(counted, shape)  # (r·m,)
    targets = outputs.at_outputs(torch.where(counted, ids, 0), shape)
    weight = outputs.at_outputs(weight, shape)
    embeds = rearrange(embeds, 'r m d -> (r m) d')

    if torch.compiler.is_compiling() or not has_values(at_counted):
        rows = torch.where(at_counted[:, None], embeds, 0)
        total, nll = linear_cross_entropy(head.scaled(rows), head.weight, targets, weight, bias=head.bias)
        nll = torch.where(at_counted, nll, 0)
    else:
        index = at_counted.nonzero().squeeze(1)
        rows = embeds.index_select(0, index)  # its backward needs no sort
        total, row_nll = linear_cross_entropy(
            head.scaled(rows), head.weight, targets[index], weight[index], bias=head.bias
        )
        nll = torch.zeros_like(weight, dtype=row_nll.dtype).index_copy(0, index, row_nll)
    return total, outputs.to_targets(nll.view(shape), ids.shape)


def next_embed_loss(
    pred: Tensor,  # (r, m, d)
    embeds: Tensor,  # (r, m, d), of the tokens that the network read
    counted: Tensor,  # (b, n-1)
    outputs: Outputs,
) -> Tensor:
    """Return the mean absolute error of the predicted embedding of each target, (b, n-1), 0 where it is not counted."""
    read = F.pad(embeds[:, 1:], (0, 0, 0, 1)).detach()  # of the token after each, and so of the target
    difference = outputs.to_targets(pred - read, counted.shape)
    return torch.where(counted[..., None], difference, 0).abs().to(loss_dtype(pred.dtype)).mean(dim=-1)


def check_outputs(out: Any, ids: Tensor, outputs: Outputs) -> None:
    """Raise ValueError unless the network returned one tensor with an output for each token that is read."""
    b, n = ids.shape
    right = isinstance(out, Tensor) and out.ndim == 3
    if not right or (outputs.place is None and (out.shape[0] != b or out.shape[1] <= n)):
        found = tuple(out.shape) if isinstance(out, Tensor) else f'a {type(out).__name__}'
        raise ValueError(f'the network must return ({b}, {n + 1} or more, vocab), from one head, got {found}')
