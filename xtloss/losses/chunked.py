"""The pass over chunks of tokens that makes the loss of a linear head and its gradients: three matrix products.

Dims: N tokens, d width, v vocabulary, r rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xtloss.losses.cross_entropy import exp_others_, loss_dtype, row_chunks, softplus


class LossAndGrads(NamedTuple):
    loss: Tensor  # ()
    token_loss: Tensor  # (N,)
    embed: Tensor | None  # (N, d), ∂ loss / ∂ embed
    weight: Tensor | None  # (v, d)
    bias: Tensor | None  # (v,)


class Problem(NamedTuple):
    """What is asked for: Σ token_weight · nll, by products in `dtype`, `chunk_size` tokens at a time."""

    embed: Tensor  # (N, d)
    weight: Tensor  # (v, d)
    bias: Tensor | None  # (v,)
    target: Tensor  # (N,) int64
    token_weight: Tensor  # (N,), float32 or wider
    chunk_size: int
    dtype: torch.dtype
    needs_grad: list[bool]  # of embed, weight, bias


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that gradient products run in.

    float16 keeps no gradient below 6e-8 and none above 65504, and the scale that a gradient scaler will apply is not
    known here: its gradient products run in float32.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def new_gradients(p: Problem) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Room for token losses and the gradients that are asked for, float32 or wider; zeros where they are summed."""
    wide = loss_dtype(p.dtype)
    makers: tuple[Callable[..., Tensor], ...] = torch.empty, torch.zeros, torch.zeros
    embed, weight, bias = (
        make(t.shape, dtype=wide, device=t.device) if needed and t is not None else None
        for t, needed, make in zip(p[:3], p.needs_grad, makers, strict=True)
    )
    return torch.empty(len(p.embed), dtype=wide, device=p.embed.device), embed, weight, bias


def chunked_loss_and_grads(p: Problem) -> LossAndGrads:
    """Compute the loss and the gradients that are asked for, in float32 or wider; the products run in `dtype`.

    With E = exp(z - m), 0 at the target, and s its row sum, a row's gradient is c · (E - s · onehot(target)) where
    c = token_weight · sigmoid(D) / s. In full precision c scales what the products take and give, not the logits.
    """
    n, v = len(p.embed), len(p.weight)
    wide, grad_dtype = loss_dtype(p.dtype), gradient_dtype(p.dtype)
    head = p.weight.to(p.dtype)
    head_for_grad = p.weight.to(grad_dtype) if p.needs_grad[0] else head
    token_loss, grad_embed, grad_weight, grad_bias = new_gradients(p)

    buffer = chunk_buffer(min(p.chunk_size, n), v, wide, p.embed.device, blas=p.dtype == wide)
    for rows in row_chunks(n, p.chunk_size):
        x, ids = p.embed[rows], p.target[rows]  # (r, d), (r,)
        z = buffer[: len(ids)]  # (r, v)
        if p.dtype == wide:
            torch.mm(x.to(p.dtype), head.t(), out=z)
        else:
            z.copy_(x.to(p.dtype) @ head.t())
        if p.bias is not None:
            z += p.bias

        margin, _, s = exp_others_(z, ids)
        token_loss[rows] = softplus(margin).squeeze(1)
        if not any(p.needs_grad):
            continue

        c = p.token_weight[rows, None] * margin.sigmoid() / s.clamp(min=1)  # (r, 1)
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

    return LossAndGrads((p.token_weight * token_loss).sum(), token_loss, grad_embed, grad_weight, grad_bias)


def chunk_buffer(rows: int, v: int, dtype: torch.dtype, device: torch.device, *, blas: bool) -> Tensor:
    """Return room for the logits of a chunk, (rows, v).

    Where a CPU's BLAS fills it, it is stored column by column, each padded to whole cache lines: MKL is slower at
    writing a product as a few wide rows.
    """
    if device.type != 'cpu' or not blas:
        return torch.empty(rows, v, dtype=dtype, device=device)
    line = 64 // dtype.itemsize
    return torch.empty(v, -(-rows // line) * line, dtype=dtype, device=device).t()[:rows]
