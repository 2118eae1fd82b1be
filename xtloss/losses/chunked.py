"""The loss of a linear head and its gradients, in one pass over chunks of tokens: three matrix products.

Of the logits z of a token let m be the largest but the target's, E = exp(z - m) with 0 at the target, and s its sum.
Then nll = softplus(D) with D = m + log(s) - z[target], and the gradient of token_weight · nll by z is
c · (E - s · onehot(target)) with c = token_weight · sigmoid(D) / s.

There are two loops. A CPU spends its time on the products, and works in place, in one float32 buffer. An accelerator
spends it on bytes: logits stay as narrow as the products, and two compiled functions read each twice and write it once.

Dims: N tokens, d width, v vocabulary, r tokens of a chunk.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from xtloss.arguments import has_values, loss_dtype
from xtloss.losses.cross_entropy import chunks, exp_others_, softplus


class Problem(NamedTuple):
    """Σ token_weight · nll is asked for, and some of its gradients."""

    embed: Tensor  # (N, d)
    weight: Tensor  # (v, d)
    bias: Tensor | None  # (v,)
    target: Tensor  # (N,) int64
    token_weight: Tensor  # (N,), float32 or wider
    chunk_size: int  # tokens; 0: `linear_cross_entropy` chooses
    dtype: torch.dtype  # of the products
    needs_grad: list[bool]  # of embed, weight, bias


# the loss, (), and token losses, (N,), in float32 or wider; gradients of embed, weight and bias, None if not asked for
LossAndGrads: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gradient products: float16 keeps none below 6e-8, and no scaler's scale is known here."""
    return torch.float32 if dtype == torch.float16 else dtype


def new_results(p: Problem) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Make tensors for the token losses and the gradients that are asked for; zeros where chunks are summed."""
    wide = loss_dtype(p.dtype)
    makers: tuple[Callable[..., Tensor], ...] = torch.empty, torch.zeros, torch.zeros
    embed, weight, bias = (
        make(t.shape, dtype=wide, device=t.device) if needed and t is not None else None
        for t, needed, make in zip(p[:3], p.needs_grad, makers, strict=True)
    )
    return torch.empty(len(p.embed), dtype=wide, device=p.embed.device), embed, weight, bias


# on a CPU


def loop_of_cpu(p: Problem) -> LossAndGrads:
    """Solve it in place. In float32 c scales what the gradient products take and give: that is less than (r, v)."""
    n, v = len(p.embed), len(p.weight)
    wide, grad_dtype = loss_dtype(p.dtype), gradient_dtype(p.dtype)
    head = p.weight.to(p.dtype)
    head_for_grad = p.weight.to(grad_dtype) if p.needs_grad[0] else head
    token_loss, grad_embed, grad_weight, grad_bias = new_results(p)

    buffer = logits_buffer(min(p.chunk_size, n), v, wide, p.embed.device, blas=p.dtype == wide)
    for chunk in chunks(n, p.chunk_size):
        x, ids = p.embed[chunk], p.target[chunk]  # (r, d), (r,)
        z = buffer[: len(ids)]  # (r, v)
        if p.dtype == wide:
            torch.mm(x.to(p.dtype), head.t(), out=z)
        else:
            z.copy_(x.to(p.dtype) @ head.t())
        if p.bias is not None:
            z += p.bias

        margin, _, s = exp_others_(z, ids)
        token_loss[chunk] = softplus(margin).squeeze(1)
        if not any(p.needs_grad):
            continue

        c = p.token_weight[chunk, None] * margin.sigmoid() / s.clamp(min=1)  # (r, 1)
        z.scatter_(1, ids[:, None], -s)

        if grad_bias is not None:
            grad_bias.addmv_(z.t(), c.squeeze(1))
        if grad_dtype == wide:
            if grad_embed is not None:
                torch.mm(z, head_for_grad, out=grad_embed[chunk]).mul_(c)
            if grad_weight is not None:
                grad_weight.addmm_(z.t(), x.to(wide) * c)
        else:
            g = z.mul_(c).to(grad_dtype)
            if grad_embed is not None:
                grad_embed[chunk] = g @ head_for_grad
            if grad_weight is not None:
                grad_weight += g.t() @ x.to(grad_dtype)

    return (p.token_weight * token_loss).sum(), token_loss, grad_embed, grad_weight, grad_bias


def logits_buffer(r: int, v: int, dtype: torch.dtype, device: torch.device, *, blas: bool) -> Tensor:
    """Make room for the logits of a chunk, (r, v): by columns of whole cache lines for MKL, slow at a few wide rows."""
    if device.type != 'cpu' or not blas:
        return torch.empty(r, v, dtype=dtype, device=device)
    line = 64 // dtype.itemsize
    return torch.empty(v, -(-r // line) * line, dtype=dtype, device=device).t()[:r]


# on an accelerator


def is_accelerated(embed: Tensor) -> bool:
    """Tell whether the accelerator's loop is the one to run: where there are values, and a compiler."""
    return embed.device.type not in ('cpu', 'meta') and has_values(embed) and has_compiler(embed.device.type)


@cache
def has_compiler(device_type: str) -> bool:
    """Tell whether torch.compile works there, by trying it once on a trivial function; warn where it does not."""
    try:
        compiled(softplus)(torch.zeros(2, device=device_type))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any class: torch has none for it
        message = f'no compiler for {device_type}: head and loss run uncompiled, right and slower ({error!r:.200})'
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for all sizes; beyond the limit of its compilations dynamo runs it as it is written."""
    return torch.compile(function, dynamic=True)


def loop_of_accelerator(p: Problem) -> LossAndGrads:
    """Solve it with logits, and their gradients, in the dtype of the products."""
    grad_dtype = gradient_dtype(p.dtype)
    head = p.weight.detach().to(p.dtype)
    head_for_grad = p.weight.detach().to(grad_dtype) if p.needs_grad[0] else head
    bias, token_weight = p.bias if p.bias is None else p.bias.detach(), p.token_weight.detach()
    token_loss, grad_embed, grad_weight, grad_bias = new_results(p)

    for chunk in chunks(len(p.embed), p.chunk_size):
        x = p.embed.detach()[chunk]  # (r, d)
        ids, w = p.target[chunk].clone(), token_weight[chunk].clone()  # (r,), as torch compiles a view's offset in
        z = x.to(p.dtype) @ head.t()  # (r, v)
        token_loss[chunk], m, c, slope = compiled(row_terms)(z, bias, ids, w)
        if any(p.needs_grad):
            g = z if grad_dtype == p.dtype else torch.empty_like(z, dtype=grad_dtype)  # (r, v)
            compiled(write_gradient)(z, bias, ids, m, c, slope, g)
            if grad_bias is not None:
                grad_bias += g.sum(dim=0, dtype=grad_bias.dtype)
            if grad_embed is not None:
                grad_embed[chunk] = g @ head_for_grad
            if grad_weight is not None:
                add_product_(grad_weight, g.t(), x.to(grad_dtype))
            del g
        del z  # before the next chunk's is made, or there are two

    return (token_weight * token_loss).sum(), token_loss, grad_embed, grad_weight, grad_bias


def row_terms(z: Tensor, bias: Tensor | None, target: Tensor, token_weight: Tensor) -> tuple[Tensor, ...]:
    """Return nll (r,), and m, c and slope = c · s, each (r, 1). One read of z (r, v) where a cache holds its rows."""
    at_target = z.gather(1, target[:, None]).to(token_weight.dtype)
    if bias is not None:
        at_target = at_target + bias[target][:, None]
    others, _ = _other_logits(z, bias, target, token_weight.dtype)
    m = others.amax(dim=1, keepdim=True)
    s = (others - m).exp().sum(dim=1, keepdim=True)
    s = torch.where(m == -torch.inf, 0, s)

    margin = torch.where(at_target == torch.inf, torch.nan, (m - at_target) + s.log())
    slope = token_weight[:, None] * margin.sigmoid()
    return softplus(margin).squeeze(1), m.clamp(min=torch.finfo(m.dtype).min), slope / s.clamp(min=1), slope


def write_gradient(
    z: Tensor, bias: Tensor | None, target: Tensor, m: Tensor, c: Tensor, slope: Tensor, out: Tensor
) -> None:
    """Out, which may be z, becomes c · exp(z - m), and -slope at the target. One read, one write."""
    others, is_target = _other_logits(z, bias, target, m.dtype)
    out.copy_(torch.where(is_target, -slope, (others - m).exp() * c))


def _other_logits(z: Tensor, bias: Tensor | None, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    is_target = torch.arange(z.shape[1], device=z.device) == target[:, None]  # a scatter would move bytes
    logits = z.to(dtype) if bias is None else z.to(dtype) + bias.to(dtype)
    return torch.where(is_target, -torch.inf, logits), is_target


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Total += a @ b, summed in total's dtype, without a temporary as large as it where torch can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _adds_wide_products(a.device, a.dtype, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@cache
def _adds_wide_products(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Tell whether torch adds a product of narrow matrices to a wide one there, and rightly: tried once."""
    one, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, dtype=wide, device=device)
    with suppress(NotImplementedError, RuntimeError, TypeError):
        torch.addmm(total, one, one, out_dtype=wide, out=total)
    return bool((total == 17).all())
