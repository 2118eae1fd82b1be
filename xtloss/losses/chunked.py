"""The pass over chunks of tokens that makes the loss of a linear head and its gradients: three matrix products.

Dims: N tokens, d width, v vocabulary, r rows of a chunk.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtloss.losses.cross_entropy import exp_others_, loss_dtype, row_chunks, softplus


class LossAndGrads(NamedTuple):
    loss: Tensor  # ()
    token_loss: Tensor  # (N,)
    embed: Tensor | None  # (N, d), ∂ loss / ∂ embed
    weight: Tensor | None  # (v, d)
    bias: Tensor | None  # (v,)


def loss_and_grads(*args: Any) -> LossAndGrads:
    """`chunked_loss_and_grads`, in the dtypes it names, whatever autocast is on."""
    device = args[0].device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        return chunked_loss_and_grads(*args)


def chunked_loss_and_grads(
    embed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor,
    chunk_size: int,
    dtype: torch.dtype,
    needs_grad: list[bool],
) -> LossAndGrads:
    """Compute the loss and the gradients that are asked for, in float32 or wider; the products run in `dtype`.

    With E = exp(z - m), 0 at the target, and s its row sum, a row's gradient is c · (E - s · onehot(target)) where
    c = token_weight · sigmoid(D) / s. In full precision c scales what the products take and give, not the logits.

    float16 keeps no gradient below 6e-8 and none above 65504, and the scale that a gradient scaler will apply is not
    known here: its gradient products run in float32.
    """
    (n, d), v = embed.shape, weight.shape[0]
    wide = loss_dtype(dtype)
    grad_dtype = wide if dtype == torch.float16 else dtype
    needs_embed, needs_weight, needs_bias = needs_grad

    head = weight.to(dtype)
    head_for_grad = weight.to(grad_dtype) if needs_embed else head
    token_loss = torch.empty(n, dtype=wide, device=embed.device)
    grad_embed = torch.empty(n, d, dtype=wide, device=embed.device) if needs_embed else None
    grad_weight = torch.zeros(v, d, dtype=wide, device=embed.device) if needs_weight else None
    grad_bias = torch.zeros(v, dtype=wide, device=embed.device) if needs_bias else None

    buffer = chunk_buffer(min(chunk_size, n), v, wide, embed.device, blas=dtype == wide)
    for rows in row_chunks(n, chunk_size):
        x, ids = embed[rows], target[rows]  # (r, d), (r,)
        z = buffer[: len(ids)]  # (r, v)
        if dtype == wide:
            torch.mm(x.to(dtype), head.t(), out=z)
        else:
            z.copy_(x.to(dtype) @ head.t())
        if bias is not None:
            z += bias

        margin, _, s = exp_others_(z, ids)
        token_loss[rows] = softplus(margin).squeeze(1)
        if not any(needs_grad):
            continue

        c = token_weight[rows, None] * margin.sigmoid() / s.clamp(min=1)  # (r, 1)
        z.scatter_(1, ids[:, None], -s)

        if grad_bias is not None:
            grad_bias.addmv_(z.t(), c.squeeze(1))
        if grad_dtype == wide:
            if grad_embed is not None:
                torch.mm(z, head_for_grad, out=grad_embed[rows]).mul_(c)
            if grad_weight is not None:
                torch.addmm(grad_weight, z.t(), x.to(wide) * c, out=grad_weight)  # a FLOP counter overlooks addmm_
        else:
            g = z.mul_(c).to(grad_dtype)
            if grad_embed is not None:
                grad_embed[rows] = g @ head_for_grad
            if grad_weight is not None:
                grad_weight += g.t() @ x.to(grad_dtype)

    return LossAndGrads((token_weight * token_loss).sum(), token_loss, grad_embed, grad_weight, grad_bias)


def chunk_buffer(rows: int, v: int, dtype: torch.dtype, device: torch.device, *, blas: bool) -> Tensor:
    """Return room for the logits of a chunk, (rows, v).

    Where a CPU's BLAS fills it, it is stored column by column, each padded to whole cache lines: MKL is slower at
    writing a product as a few wide rows.
    """
    if device.type != 'cpu' or not blas:
        return torch.empty(rows, v, dtype=dtype, device=device)
    line = 64 // dtype.itemsize
    return torch.empty(v, -(-rows // line) * line, dtype=dtype, device=device).t()[:rows]
