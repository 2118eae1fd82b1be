"""The pass over chunks on an accelerator, where time is bytes: two reads and one write of each logit, beside products.

Dims: N tokens, d width, v vocabulary, r rows of a chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xtloss.losses.chunked import LossAndGrads, Problem, gradient_dtype, new_gradients
from xtloss.losses.cross_entropy import row_chunks, softplus
from xtloss.losses.transforms import has_values

without_compiler: set[str] = set()  # types of devices


class NoCompilerError(Exception):
    """The kernels cannot be compiled for this device."""


def is_accelerated(device: torch.device) -> bool:
    """Whether elementwise work is to be compiled there: a CPU's is cheap beside its products."""
    return device.type not in ('cpu', 'meta', *without_compiler)


def loss_and_grads_or_none(p: Problem) -> LossAndGrads | None:
    """Solve it with compiled kernels; None where there is no compiler, which is said once."""
    if not is_accelerated(p.embed.device) or not has_values(p.embed):
        return None
    try:
        return accelerated_loss_and_grads(p)
    except NoCompilerError as error:
        device = p.embed.device.type
        without_compiler.add(device)
        warnings.warn(
            f'no compiler for {device}: the elementwise work of head and loss runs as a chain of operations, which '
            f'is right, and slower ({error.__cause__!r:.200})',
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def accelerated_loss_and_grads(p: Problem) -> LossAndGrads:
    """Compute what `chunked_loss_and_grads` does; logits and their gradients stay in the dtype of the products."""
    grad_dtype, token_weight = gradient_dtype(p.dtype), p.token_weight.detach()
    heads = p.weight.detach().to(p.dtype), p.weight.detach().to(grad_dtype)
    bias = None if p.bias is None else p.bias.detach()
    room = new_gradients(p)

    for rows in row_chunks(len(p.embed), p.chunk_size):
        # compiled functions are given no views: their offsets and bases would be compiled in
        target, weight = p.target[rows].clone(), token_weight[rows].clone()  # (r,)
        _solve_chunk(rows, p.embed.detach()[rows], heads, bias, target, weight, room)

    token_loss, *grads = room
    return LossAndGrads((token_weight * token_loss).sum(), token_loss, *grads)


def _solve_chunk(
    rows: slice,
    x: Tensor,  # (r, d)
    heads: tuple[Tensor, Tensor],  # (v, d), in the dtype of the logits, and of their gradient
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor,
    room: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
) -> None:
    token_loss, grad_embed, grad_weight, grad_bias = room
    head, head_for_grad = heads
    z = x.to(head.dtype) @ head.t()  # (r, v)
    token_loss[rows], m, scale, slope = compiled(row_terms, z, bias, target, token_weight)
    if grad_embed is grad_weight is grad_bias is None:
        return

    g = z if head_for_grad.dtype == z.dtype else torch.empty_like(z, dtype=head_for_grad.dtype)  # (r, v)
    compiled(write_gradient, z, bias, target, m, scale, slope, g)
    if grad_bias is not None:
        grad_bias += g.sum(dim=0, dtype=grad_bias.dtype)
    if grad_embed is not None:
        grad_embed[rows] = g @ head_for_grad
    if grad_weight is not None:
        accumulate_(grad_weight, g.t(), x.to(g.dtype))


def row_terms(
    z: Tensor,  # (r, v)
    bias: Tensor | None,  # (v,)
    target: Tensor,  # (r,)
    token_weight: Tensor,  # (r,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return nll (r,), and m, scale and slope (r, 1) of the gradient: see `write_gradient`. One read of z."""
    at_target = z.gather(1, target[:, None]).to(token_weight.dtype)
    if bias is not None:
        at_target = at_target + bias[target][:, None]
    others = torch.where(_is_target(z, target), -torch.inf, _logits(z, bias, token_weight.dtype))
    m = others.amax(dim=1, keepdim=True)
    s = (others - m).exp().sum(dim=1, keepdim=True)
    s = torch.where(m == -torch.inf, 0, s)

    margin = torch.where(at_target == torch.inf, torch.nan, (m - at_target) + s.log())
    slope = token_weight[:, None] * margin.sigmoid()
    return softplus(margin).squeeze(1), m.clamp(min=torch.finfo(m.dtype).min), slope / s.clamp(min=1), slope


def write_gradient(
    z: Tensor, bias: Tensor | None, target: Tensor, m: Tensor, scale: Tensor, slope: Tensor, out: Tensor
) -> None:
    """Out, which may be z, becomes scale · exp(z - m), and -slope at the target. One read, one write."""
    others = (_logits(z, bias, m.dtype) - m).exp() * scale
    out.copy_(torch.where(_is_target(z, target), -slope, others))


def _logits(z: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return z.to(dtype) if bias is None else z.to(dtype) + bias.to(dtype)


def _is_target(z: Tensor, target: Tensor) -> Tensor:
    return torch.arange(z.shape[1], device=z.device) == target[:, None]  # compared, not scattered: it costs no bytes


@cache
def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile it once for all sizes."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function as one kernel, or raise NoCompilerError."""
    try:
        return kernel(function)(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise NoCompilerError from error


def accumulate_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Total += a @ b, summed in total's dtype, without a temporary as large as it where torch can."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif torch._C._len_torch_dispatch_stack() == 0 and _adds_wide_products(a.device, a.dtype, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # no counter of FLOPs can read this
    else:
        total += a @ b


@cache
def _adds_wide_products(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether torch adds a product of narrow matrices to a wide one there, and rightly: tried once."""
    one, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, dtype=wide, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=wide, out=total)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
