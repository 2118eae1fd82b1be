"""The arguments of `linear_cross_entropy`, what it is to give of them, by which loop, and what operations it takes."""

import functools
import math
import warnings
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xtloss import linear_cross_entropy
from xtloss.losses import chunked

NAMES = ('embed', 'weight', 'bias')
LOOPS = ('cpu', 'accelerator')


class Problem(NamedTuple):
    """The arguments of `linear_cross_entropy`."""

    embed: Tensor  # (N, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    target: Tensor  # (N,)
    token_weight: Tensor  # (N,)

    @property
    def inputs(self) -> list[Tensor]:
        return [t for t in self[:3] if t is not None]

    def solve(self, **options: Any) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(self.embed, self.weight, self.target, self.token_weight, bias=self.bias, **options)


def problem(n: int, d: int, v: int, *, dtype: torch.dtype = torch.float64, bias: bool = True) -> Problem:
    """Logits of a few units; weights of both signs, every third 0."""
    token_weight = torch.randn(n, dtype=torch.float64)
    token_weight[::3] = 0
    embed, weight, offset = torch.randn(n, d), torch.randn(v, d) * 2 / d**0.5, torch.randn(v)
    leaves = [t.to(dtype).requires_grad_() for t in (embed, weight, offset)]
    target = torch.randint(0, v, (n,))
    return Problem(leaves[0], leaves[1], leaves[2] if bias else None, target, token_weight.to(leaves[0].dtype))


class Solution(NamedTuple):
    """What `linear_cross_entropy` is to give, in float64."""

    loss: float
    token_loss: Tensor
    embed: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def grads(self) -> dict[str, Tensor]:
        return dict(zip(NAMES, self[2:], strict=True))


def oracle(p: Problem) -> Solution:
    """Plain formulas in float64, exact for certain predictions too: nothing is 1 minus a number near 1.

    With r[i,j] = exp(z[i,j] - z[i,target]): nll[i] = log(1 + Σ r), over j != target; p[i,j] = r[i,j] / exp(nll[i]).
    """
    x, w = p.embed.detach().double(), p.weight.detach().double()
    z = x @ w.t() + (0 if p.bias is None else p.bias.detach().double())
    rows = torch.arange(len(x))
    r = (z - z[rows, p.target][:, None]).exp()
    r[rows, p.target] = 0
    nll = torch.log1p(r.sum(dim=1))
    g = r / nll.exp()[:, None]
    g[rows, p.target] = torch.expm1(-nll)  # p[target] - 1
    g = g * p.token_weight.double()[:, None]
    return Solution(math.fsum((p.token_weight.double() * nll).tolist()), nll, g @ w, g.t() @ x, g.sum(dim=0))


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """max|Δ| / max|want| is within `tolerance`."""
    assert got.shape == want.shape
    off, scale = (got.double() - want).abs(), want.abs()
    if want.numel():
        assert off.max() <= tolerance * scale.max(), f'{off.max():.1e} off at a scale of {scale.max():.1e}'


def assert_right(dtype: torch.dtype, bias: bool, *size: Any, roundings: int = 4) -> None:
    """Loss, token losses and all gradients are the oracle's, but for so many roundings of narrow logits."""
    *shape, chunk = size
    p = problem(*shape, dtype=dtype, bias=bias)
    p.token_weight.requires_grad_()
    want, wide = oracle(p._replace(token_weight=p.token_weight.detach())), torch.promote_types(dtype, torch.float32)
    loss, token_loss = p.solve(chunk_size=chunk)
    loss.backward()

    assert loss.dtype == token_loss.dtype == wide
    assert loss.shape == ()
    assert not token_loss.requires_grad
    # of the products' dtype, times the few units that logits are large; wide ones also for sums over tokens and words
    tolerance = (32 if dtype == wide else roundings) * torch.finfo(dtype).eps
    assert_near(token_loss, want.token_loss, tolerance)
    assert_near(p.token_weight.grad, want.token_loss, tolerance)
    total = (p.token_weight.detach().double() * want.token_loss).abs().sum().item()
    assert abs(loss.item() - want.loss) <= tolerance * total
    for name in NAMES[: len(p.inputs)]:
        given = getattr(p, name)
        assert given.grad.dtype == dtype
        assert_near(given.grad, want.grads[name], tolerance)


def use_loop(patch: pytest.MonkeyPatch, loop: str) -> None:
    """Have this one of `LOOPS` solve everything. What it would compile runs as it is written."""
    patch.setattr(chunked, 'is_accelerated', lambda embed: loop == 'accelerator')
    patch.setattr(chunked, 'compiled', lambda function: function)


class Operations(TorchDispatchMode):
    """Counts the operations that touch a tensor with a side of `vocab`, by name and shapes, forward and backward.

    `names` counts all operations.
    """

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.seen: Counter[tuple[str, tuple[tuple[int, ...], ...]]] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        self.names[name] += 1
        shapes = tuple(sorted(tuple(t.shape) for t in tensors))
        if any(self.vocab in shape for shape in shapes):
            self.seen[name, shapes] += 1
        return out

    @property
    def products(self) -> int:
        """Matrix products with the head, or with something as wide as it."""
        names = {'mm', 'addmm', 'addmm_', 'bmm', 'baddbmm', 'baddbmm_', 'linear', 'matmul', '_addmm_activation'}
        return sum(count for (name, _), count in self.seen.items() if name in names)


@functools.cache
def has_compiler() -> bool:
    """Whether torch.compile makes kernels for the CPU here."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of torch's own
        try:
            torch.compile(lambda t: t.exp(), dynamic=True)(torch.zeros(3))
        except Exception:
            return False
        finally:
            torch._dynamo.reset()
    return True
