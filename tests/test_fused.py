"""`linear_cross_entropy` against plain formulas in float64: values, gradients, certain predictions, bad arguments."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fused_problem import LOOPS, NAMES, Problem, assert_near, assert_right, oracle, problem, use_loop
from torch import Tensor

from xtloss.losses.cross_entropy import composite_cross_entropy, cross_entropy

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


SIZES = [  # N, d, V, chunk: no row, one row, chunks that do and do not divide N, larger than N, one word
    (0, 3, 7, None),
    (0, 3, 7, 2),
    (1, 1, 2, None),
    (1, 5, 7, 1),
    (5, 3, 7, 2),
    (6, 3, 7, 2),
    (7, 4, 1, 3),
    (37, 16, 65, 8),
    (37, 16, 65, 64),
    (67, 33, 129, None),
]


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('loop', LOOPS)
def test_values_and_gradients(
    size: tuple[int, int, int, int | None],
    dtype: torch.dtype,
    bias: bool,
    loop: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_loop(monkeypatch, loop)
    assert_right(dtype, bias, *size, roundings=4 if loop == 'cpu' else 6)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_targets_of_any_integer_dtype(dtype: torch.dtype) -> None:
    p = problem(9, 3, 7)
    assert p._replace(target=p.target.to(dtype)).solve()[0].item() == p.solve()[0].item()


def test_weights_of_another_dtype_and_strided_tensors() -> None:
    p = problem(9, 4, 7, dtype=torch.float32)
    loose = [torch.stack((t, t * 9), dim=-1).detach()[..., 0].requires_grad_() for t in p.inputs]
    turned = loose[1].detach().t().contiguous().t().requires_grad_()
    q = Problem(loose[0], turned, loose[2], p.target, p.token_weight.double())
    assert not any(t.is_contiguous() for t in q.inputs)
    loss, _ = q.solve(chunk_size=4)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracle(p).loss, rel=1e-5)
    for t, want in zip(q.inputs, oracle(p)[2:], strict=True):
        assert_near(t.grad, want, 1e-5)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('alone', [False, True])
@pytest.mark.parametrize('dtype', DTYPES)
def test_gradient_of_token_weights(dtype: torch.dtype, alone: bool, compiled: bool) -> None:
    """nll, in every dtype, beside the other gradients or where nothing else has one, and again with retain_graph."""
    p = problem(9, 3, 7, dtype=torch.float32 if dtype == torch.float64 else dtype)
    p = p._replace(token_weight=p.token_weight.detach().to(dtype).requires_grad_())
    if alone:
        p = Problem(*(t.detach() for t in p[:4]), p.token_weight)
    torch._dynamo.reset()
    solve = torch.compile(Problem.solve, backend='aot_eager', fullgraph=True) if compiled else Problem.solve
    loss, _ = solve(p, chunk_size=4)
    for scale in (1.0, -3.0):
        (grad,) = torch.autograd.grad(loss * scale, p.token_weight, retain_graph=True)
        assert grad.dtype == dtype
        assert_near(grad, scale * oracle(p).token_loss, 4 * torch.finfo(dtype).eps + 4 * torch.finfo(p.embed.dtype).eps)
    torch._dynamo.reset()


def test_backward_again() -> None:
    p = problem(7, 3, 5)
    want = oracle(p).grads
    loss, _ = p.solve(chunk_size=2)

    first = torch.autograd.grad(loss * 3, p.inputs, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for scale in (2.0, -0.5):
        for name, grad in zip(NAMES, torch.autograd.grad(loss * scale, p.inputs, retain_graph=True), strict=True):
            assert_near(grad, scale * want[name], 1e-12)
    for name, grad, copied in zip(NAMES, first, kept, strict=True):
        assert torch.equal(grad, copied)
        assert_near(grad, 3 * want[name], 1e-12)

    torch.autograd.grad(loss, p.embed)
    with pytest.raises(RuntimeError, match='backward through the graph a second time'):
        torch.autograd.grad(loss, p.embed)


def test_a_weight_that_was_changed_before_the_second_backward_is_noticed() -> None:
    p = problem(7, 3, 5)
    loss, _ = p.solve()
    loss.backward(retain_graph=True)
    with torch.no_grad():
        p.weight.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_zero_weights_are_exact() -> None:
    """A row that weighs nothing leaves no trace, not even by rounding."""
    p = problem(9, 3, 7, dtype=torch.float32)
    p.solve()[0].backward()
    assert not p.embed.grad[p.token_weight == 0].any()
    q = p._replace(token_weight=torch.zeros(9))
    grads = torch.autograd.grad(q.solve()[0], q.inputs)
    assert not any(grad.any() for grad in grads)


def test_words_that_cannot_be() -> None:
    """Logits of -inf, by a bias that forbids words: their probability and their gradient are 0."""
    p = problem(9, 3, 7, dtype=torch.float32)
    p = p._replace(target=torch.randint(0, 4, (9,)))
    q = p._replace(bias=p.bias.detach().index_fill(0, torch.tensor([4, 5, 6]), -math.inf).requires_grad_())
    grads = torch.autograd.grad(q.solve()[0], q.inputs)
    small = Problem(p.embed, p.weight[:4], p.bias[:4], p.target, p.token_weight)
    assert q.solve()[0].item() == pytest.approx(oracle(small).loss, rel=1e-5)
    assert_near(grads[0], oracle(small).embed, 1e-5)
    assert not grads[1][4:].any()
    assert not grads[2][4:].any()


def certain(n: int, d: int, v: int, probability: float) -> Problem:
    """Float32 rows whose target has that probability, but for the rounding of embed to float32."""
    weight, target = torch.randn(v, d).double(), torch.randint(0, v, (n,))
    embed, margin = torch.randn(n, d).double(), math.log1p(-probability) - math.log(probability)
    rows = torch.arange(n)
    for _ in range(100):
        z = embed @ weight.t()
        others = z.index_put((rows, target), torch.tensor(-math.inf).double()).logsumexp(dim=1)
        off = others - z[rows, target] - margin
        embed = embed + 0.5 * (off / weight[target].square().sum(dim=1))[:, None] * weight[target]
    token_weight = torch.rand(n) + 0.5  # none is 0: every row must be exact
    return Problem(embed.float().requires_grad_(), weight.float().requires_grad_(), None, target, token_weight)


@pytest.mark.parametrize('chunk', [None, 7])
def test_certain_predictions_through_the_head(chunk: int | None) -> None:
    p = certain(32, 64, 200, 1 - 1e-9)
    want = oracle(p)
    assert want.token_loss.log10().add(9).abs().max() < 0.01
    assert (F.cross_entropy(p.embed @ p.weight.t(), p.target, reduction='none') == 0).any()

    loss, token_loss = p.solve(chunk_size=chunk)
    loss.backward()
    assert loss.item() == pytest.approx(want.loss, rel=1e-4)
    torch.testing.assert_close(token_loss.double(), want.token_loss, rtol=1e-4, atol=0)
    for row in range(32):
        assert_near(p.embed.grad[row], want.embed[row], 1e-4)
    for word in p.target.unique():
        assert_near(p.weight.grad[word], want.weight[word], 1e-4)


@pytest.mark.parametrize('offset', [0.0, 1000.0, -1000.0])
@pytest.mark.parametrize('function', [cross_entropy, composite_cross_entropy])
def test_certain_predictions_given_the_logits(function: Callable[..., Tensor], offset: float) -> None:
    t, v = 32, 200
    target, rows = torch.randint(0, v, (t,)), torch.arange(t)
    logits = torch.randn(t, v).double() * 2
    others = logits.index_put((rows, target), torch.tensor(-math.inf).double()).logsumexp(dim=1)
    logits[rows, target] = others - math.log(1e-9)
    logits = (logits + offset).float().requires_grad_()
    assert not F.cross_entropy(logits, target, reduction='none').any()

    want = oracle(Problem(logits.detach(), torch.eye(v), None, target, torch.ones(t)))
    nll = function(logits, target, torch.ones(t, dtype=torch.bool))
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    torch.testing.assert_close(nll.double(), want.token_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), want.embed, rtol=1e-5, atol=0)  # of every word


OK = problem(4, 3, 7)


@pytest.mark.parametrize('wrong', [-100, -1, 7])
def test_targets_that_are_no_words_are_refused(wrong: int) -> None:
    with pytest.raises(RuntimeError, match=r'^index -?\d+ is out of bounds'):
        OK._replace(target=torch.full_like(OK.target, wrong)).solve()


@pytest.mark.parametrize('chunk_size', [np.int64(2), np.uint8(3)])
def test_chunk_sizes_of_any_integer(chunk_size: Any) -> None:
    assert OK.solve(chunk_size=chunk_size)[0].item() == pytest.approx(OK.solve()[0].item(), rel=1e-12)
