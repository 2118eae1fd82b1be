"""Cross-entropy of each target from logits, exact where a prediction is nearly certain.

With D = logsumexp(other logits) - logit(target), nll = softplus(D) and the target's gradient is -sigmoid(D): neither
is ever the difference of nearly equal numbers (Barron, Gnanapragasam & Tschannen, A Fix for Softmax and Cross-Entropy,
2026, https://jonbarron.info/softmaxfix/).

Dims: t tokens, r tokens of a chunk, v vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from xtloss.arguments import loss_dtype

CHUNK_BYTES = 64 * 2**20  # of logits at once: enough for efficient matrix products, little beside all logits


def chunks(n: int, chunk_size: int) -> Iterator[slice]:
    """Return slices that cover n tokens, chunk_size at a time."""
    return (slice(start, min(start + chunk_size, n)) for start in range(0, n, chunk_size))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact at any x, as are its derivatives of every order; F.softplus is linear above 20."""
    positive = x >= 0
    return torch.where(positive, x, 0) + torch.where(positive, -x, x).exp().log1p()


def exp_others_(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place, z (r, v) becomes exp(z - m), m its row's largest other logit, and 0 at the target, (r,).

    Returns D, m and s, the row sum of the new z, each (r, 1): logsumexp(other logits) = m + log(s). Where there are
    none, s = 0 and D = -inf; else s >= 1. An infinite logit of the target makes D NaN, as `F.cross_entropy` is.
    """
    target = target[:, None]
    z_target = z.gather(1, target)
    z.scatter_(1, target, -torch.inf)
    m = z.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
    z.sub_(m).exp_()
    s = z.sum(dim=1, keepdim=True)
    margin = (m - z_target) + s.log()
    return margin.masked_fill_(z_target == torch.inf, torch.nan), m, s


def cross_entropy(logits: Tensor, target: Tensor, counted: Tensor, *, composite: bool = False) -> Tensor:
    """Return the nll of each target in nats, (t,), 0 where it is not counted; whatever the logits are there.

    Equals ``torch.where(counted, F.cross_entropy(logits, target, reduction='none'), 0)`` in float32 or wider, for
    logits (t, v), target (t,) in [0, v) and counted (t,) bool. No more than the logits and one tensor of their size are
    alive at once. With `composite`, and under torch.compile, it is made of plain operations: slower, in more memory,
    but open to torch.func, batched and forward-mode derivatives, which torch refuses of the other.
    """
    if composite or torch.compiler.is_compiling():
        return composite_cross_entropy(logits, target, counted)
    return _CrossEntropy.apply(logits, target, counted)


def composite_cross_entropy(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Compute the same from plain operations, which compilers and every kind of derivative know."""
    z = torch.where(counted[:, None], logits, 0).to(loss_dtype(logits.dtype))  # (t, v)
    z_target = z.gather(1, target[:, None])  # (t, 1)
    others = z.masked_fill(torch.arange(z.shape[1], device=z.device) == target[:, None], -torch.inf)
    m = others.detach().amax(dim=1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
    s = (others - m).exp().sum(dim=1, keepdim=True)
    log_s = torch.where(s == 0, 1, s).log().masked_fill(s == 0, -torch.inf)  # log(0) has no gradient
    overflow = torch.zeros_like(z_target).masked_fill(z_target == torch.inf, torch.nan)  # added: its gradient is NaN
    margin = (m - z_target) + log_s + overflow
    return torch.where(counted, softplus(margin.squeeze(1)), 0)


class _CrossEntropy(Function):
    """Saves the logits and three numbers a token; the backward exponentiates again, straight into the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        t, v = logits.shape
        dtype = loss_dtype(logits.dtype)
        margin, m, s = (torch.empty(t, 1, dtype=dtype, device=logits.device) for _ in range(3))

        for chunk in chunks(t, _chunk_size(t, v, dtype)):
            z = logits[chunk].to(dtype, copy=True).masked_fill_(~counted[chunk, None], 0)  # (r, v)
            margin[chunk], m[chunk], s[chunk] = exp_others_(z, target[chunk])

        ctx.save_for_backward(logits, target, counted, margin, m, s)
        return torch.where(counted, softplus(margin).squeeze(1), 0)

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor, None, None]:
        logits, target, counted, margin, m, s = ctx.saved_tensors

        if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated again
            nll = composite_cross_entropy(logits, target, counted)
            (grad,) = torch.autograd.grad(nll, logits, grad_nll, create_graph=True)
            return grad, None, None

        (t, v), dtype = logits.shape, loss_dtype(logits.dtype)
        grad = torch.empty_like(logits)
        slope = torch.where(counted[:, None], margin.sigmoid() * grad_nll[:, None], 0)  # (t, 1), of the other logits

        for chunk in chunks(t, _chunk_size(t, v, dtype)):
            z = grad[chunk] if logits.dtype == dtype else torch.empty_like(grad[chunk], dtype=dtype)  # (r, v)
            z.copy_(logits[chunk]).masked_fill_(~counted[chunk, None], 0)
            z.sub_(m[chunk]).exp_().mul_(slope[chunk] / s[chunk].clamp(min=1))
            z.scatter_(1, target[chunk, None], -slope[chunk])
            if logits.dtype != dtype:
                grad[chunk] = z
        return grad, None, None


def _chunk_size(t: int, v: int, dtype: torch.dtype) -> int:
    return max(1, min(CHUNK_BYTES // (v * dtype.itemsize), -(-t // 4)))  # a quarter of the logits at most
