"""What each target costs, from what the network returned.

Dims: b batch, n positions, p prepended embeddings, t tokens, d width, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtloss.losses.cross_entropy import cross_entropy, loss_dtype
from xtloss.losses.linear_cross_entropy import linear_cross_entropy
from xtloss.losses.linear_head import LinearHead
from xtloss.losses.transforms import has_values
from xtloss.weighting.targets import at_predictors, predictors


def token_losses(
    logits: Tensor,  # (b, p+n, v)
    ids: Tensor,  # (b, n-1)
    counted: Tensor,  # (b, n-1)
    *,
    is_log_prob: bool = False,
) -> Tensor:
    """Nll of each target in nats, (b, n-1), 0 where it is not counted; float32, or wider where the logits are wider.

    All positions of the logits are read where they lie, in one flat (tokens, vocab) view: slicing off the last would
    copy them, and their gradient.
    """
    check_outputs(logits, ids)
    b, positions, _ = logits.shape
    targets = at_predictors(torch.where(counted, ids, 0), positions).flatten()
    at_counted = at_predictors(counted, positions).flatten()

    nll = flat_losses(logits.flatten(0, 1), targets, at_counted, is_log_prob=is_log_prob)
    return predictors(nll.view(b, positions), ids.shape[1])


def flat_losses(
    logits: Tensor,  # (t, v)
    targets: Tensor,  # (t,), in [0, v)
    counted: Tensor,  # (t,)
    *,
    is_log_prob: bool = False,
) -> Tensor:
    """Nll of each target in nats, (t,), 0 where it is not counted; float32, or wider where the logits are wider."""
    if not is_log_prob:
        return cross_entropy(logits, targets, counted)
    log_prob = logits.gather(1, targets[:, None]).squeeze(1)
    return torch.where(counted, -log_prob.to(loss_dtype(logits.dtype)), 0)


def loss_from_embeds(
    head: LinearHead,
    embeds: Tensor,  # (b, p+n, d)
    ids: Tensor,  # (b, n-1)
    counted: Tensor,  # (b, n-1)
    weight: Tensor,  # (b, n-1)
) -> tuple[Tensor, Tensor]:
    """Σ weight · nll over the counted targets, 0-dim, and their nll, (b, n-1), detached, 0 where not counted.

    In eager mode only the rows that count reach the head, at the price of one host sync. A compiled graph has static
    shapes, and what has no values cannot be counted: there the others go along, as zeros that weigh nothing.
    """
    check_outputs(embeds, ids)
    b, positions, _ = embeds.shape
    at_counted = at_predictors(counted, positions).flatten()  # (b·(p+n),)
    targets = at_predictors(torch.where(counted, ids, 0), positions).flatten()
    weight = at_predictors(weight, positions).flatten()
    embeds = embeds.flatten(0, 1)  # (b·(p+n), d)

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
    return total, predictors(nll.view(b, positions), ids.shape[1])


def next_embed_loss(
    pred: Tensor,  # (b, p+n, d)
    embeds: Tensor,  # (b, p+n, d), of the tokens that the network read
    counted: Tensor,  # (b, n-1)
) -> Tensor:
    """Mean absolute error of the predicted embedding of each target, (b, n-1), 0 where it is not counted."""
    targets = counted.shape[1]
    difference = predictors(pred, targets) - embeds[:, embeds.shape[1] - targets :].detach()
    return torch.where(counted[..., None], difference, 0).abs().to(loss_dtype(pred.dtype)).mean(dim=-1)


def check_outputs(outputs: Tensor, ids: Tensor) -> None:
    """Raise ValueError unless there is an output for each token that is read."""
    b, positions = ids.shape[0], ids.shape[1] + 1
    if outputs.ndim != 3 or outputs.shape[0] != b or outputs.shape[1] < positions:
        raise ValueError(f'the network must return ({b}, {positions} or more, vocab), got {tuple(outputs.shape)}')
