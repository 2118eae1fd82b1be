"""Head and loss in one pass over chunks of N tokens: three matrix products, and logits for one chunk at a time."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from xtloss.arguments import check, loss_dtype
from xtloss.losses import chunked
from xtloss.losses.chunked import LossAndGrads, Problem
from xtloss.losses.cross_entropy import CHUNK_BYTES

RULES = {
    'embed': 'floating point: N d',
    'weight': 'floating point: vocab d',
    'target': 'integer: N',
    'token_weight': 'floating point: N',
    'bias': 'floating point: vocab',
    'chunk_size': 'count',
}
NO_SECOND_DERIVATIVE = 'linear_cross_entropy has no second derivative: build the wrapper with fused=False'


def linear_cross_entropy(
    embed: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of a linear head, without the (N, vocab) logits.

    Equals, but for memory, time and the precision of nearly certain predictions::

        nll = F.cross_entropy(F.linear(embed, weight, bias), target, reduction='none')
        return (token_weight * nll).sum(), nll.detach()

    The mean over all targets, say:

        >>> embed, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
        >>> target = torch.tensor([0, 8, 2, 3, 3, 5])
        >>> loss, token_loss = linear_cross_entropy(embed, weight, target, torch.full((6,), 1 / 6))
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(embed @ weight.t(), target))
        True

    Logits exist for ``chunk_size`` tokens at a time. Their gradients are made in the same pass, with one exponential
    per logit, and only for those of ``embed``, ``weight`` and ``bias`` that need one. The products run in the wider of
    the dtypes of ``embed`` and ``weight``, under autocast in its own; sums and exponentials are made in float32 or
    wider always.

    Args:
        embed: (N, d), floating point.
        weight: (vocab, d), floating point.
        target: (N,), any integer dtype, in [0, vocab). Nothing is ignored: leave out rows without a target, or let
            them weigh 0 with any target. Only the values can tell, which are not read: as in F.cross_entropy, a CPU
            raises where it meets another target, and a GPU stops with a device-side assertion.
        token_weight: (N,), floating point, any sign; its gradient is nll.
        bias: (vocab,), floating point.
        chunk_size: tokens a chunk; by default its logits take 64 MiB at most, or as much as the gradient of ``weight``.

    Returns:
        loss: 0-dim, Σ token_weight · nll, in nats; float32, or float64 where embed or weight is.
        token_loss: (N,), nll, detached, for every row.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: of the wrong shape or device.
        RuntimeError: of torch, under torch.func, forward-mode or batched derivatives; when it is differentiated twice;
            on a CPU, a target outside [0, vocab).

    Source: D = logsumexp(other logits) - logit(target), nll = softplus(D), gradient of the target -sigmoid(D): Barron,
    Gnanapragasam & Tschannen, A Fix for Softmax and Cross-Entropy, 2026, https://jonbarron.info/softmaxfix/. Gradients
    in the forward pass: Hsu et al., Liger Kernel, 2024, https://arxiv.org/abs/2410.10989.

    """
    options = {name: value for name, value in {'bias': bias, 'chunk_size': chunk_size}.items() if value is not None}
    check(RULES, {'embed': embed, 'weight': weight, 'target': target, 'token_weight': token_weight, **options})

    device, dtype = embed.device.type, torch.promote_types(embed.dtype, weight.dtype)  # of the products
    if device != 'meta' and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    inputs = embed, weight, bias
    needs_grad = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
    settings = int(chunk_size or 0), dtype, needs_grad
    tensors = *inputs, target.long(), token_weight.to(loss_dtype(dtype))

    if torch.compiler.is_compiling():
        loss, token_loss, *_ = loss_and_grads_in_graph(*tensors, *settings)
        return loss, token_loss.detach()
    return _LinearCrossEntropy.apply(*tensors, *settings)


def default_chunk_size(n: int, weight: Tensor, dtype: torch.dtype, *, accelerated: bool) -> int:
    """Return how many tokens a chunk has: their logits take `CHUNK_BYTES` at most, or as much as the gradient."""
    block = 64  # of tokens, for the tiles that products are made of
    of_token, gradient = max(1, weight.shape[0]) * dtype.itemsize, weight.numel() * weight.dtype.itemsize
    most = max(CHUNK_BYTES // of_token, gradient // of_token if accelerated else min(384, gradient // of_token), 1)
    if most < block:
        return most
    count = max(1, -(-n // (most // block * block)))
    return max(1, -(-n // (count * block))) * block


def loss_and_grads(*args: Any, **kwargs: Any) -> LossAndGrads:
    """Solve a `Problem` by the loop for its device, in the dtypes that it names, whatever autocast is on."""
    p = Problem(*args, **kwargs)
    accelerated, device = chunked.is_accelerated(p.embed), p.embed.device.type
    if not p.chunk_size:
        kept = chunked.gradient_dtype(p.dtype) if accelerated else loss_dtype(p.dtype)  # what logits are kept in
        p = p._replace(chunk_size=default_chunk_size(len(p.embed), p.weight, kept, accelerated=accelerated))
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        return chunked.loop_of_accelerator(p) if accelerated else chunked.loop_of_cpu(p)


class _LinearCrossEntropy(Function):
    """Hands the gradients of the forward pass over to the first backward, and makes them anew for a later one."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        loss, token_loss, *grads = loss_and_grads(*args)
        tensors, ctx.options = args[:5], args[5:]
        ctx.save_for_backward(*tensors, token_loss)
        ctx.grads = grads
        ctx.mark_non_differentiable(token_loss)
        return loss, token_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError(NO_SECOND_DERIVATIVE)

        # scaled in place and let go, so that autograd need not copy the largest of them, (v, d)
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # an earlier backward had them, with retain_graph
            grads = loss_and_grads(*ctx.saved_tensors[:5], *ctx.options)[2:]
        of_weight = ctx.saved_tensors[5] * grad_loss if ctx.needs_input_grad[4] else None
        return *(None if grad is None else grad.mul_(grad_loss) for grad in grads), None, of_weight, *[None] * 3


@torch.library.custom_op(
    'xtloss::linear_cross_entropy',
    mutates_args=(),
    schema='(Tensor embed, Tensor weight, Tensor? bias, Tensor target, Tensor token_weight, SymInt chunk_size, '
    'ScalarType dtype, bool[] needs_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
)
def loss_and_grads_in_graph(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """`loss_and_grads` as one node of a compiled graph, not a loop unrolled; empty where no gradient is needed."""
    loss, token_loss, *grads = loss_and_grads(*args, **kwargs)
    return loss, token_loss, *(loss.new_empty(0) if grad is None else grad for grad in grads)


@loss_and_grads_in_graph.register_fake
def _(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    token_loss, *grads = chunked.new_results(Problem(*args, **kwargs))
    return token_loss.new_empty(()), token_loss, *(token_loss.new_empty(0) if g is None else g for g in grads)


def _save_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.needs_grad = inputs[-1]


def _scale_grads(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    token_loss, *grads = ctx.saved_tensors
    scaled = (grad * grad_loss if needed else None for grad, needed in zip(grads, ctx.needs_grad, strict=True))
    return *scaled, None, token_loss * grad_loss, *[None] * 3


loss_and_grads_in_graph.register_autograd(_scale_grads, setup_context=_save_grads)
