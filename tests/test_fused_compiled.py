"""Head and loss in one under torch.compile."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_problem import NAMES, Problem, assert_near, oracle, problem
from networks import assert_same_gradients, decoder, gradients
from torch._dynamo.testing import CompileCounterWithBackend

from xtloss import AutoregressiveWrapper
from xtloss.losses.linear_cross_entropy import loss_and_grads_in_graph

FUSED_FALSE = r'fused=False'
X = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(1))
PREPENDED = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def compiled(whole_graphs: None) -> Callable[..., Any]:
    """`torch.compile` without graph breaks, so that no data-dependent read passes."""
    return lambda function, backend='aot_eager', **options: torch.compile(
        function, fullgraph=True, backend=backend, **options
    )


MASKED = {'lens': torch.tensor([9, 3, 0]), 'loss_mask': torch.arange(9).expand(3, 9) % 4 != 1}
COMPILED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    'plain': ({}, {}, {}),
    'masked': ({}, {'loss_weighting': 'sequence'}, MASKED | {'loss_weight': torch.linspace(-1, 2, 27).view(3, 9)}),
    'tied': ({'tie_embedding': True}, {'loss_weighting': 0.3}, MASKED | {'normalizer': torch.tensor(3.0)}),
    'prepended': ({}, {}, MASKED | {'prepend_embeds': PREPENDED, 'normalizer': 2.5}),
    'nothing counted': ({}, {}, {'lens': torch.zeros(3).long()}),
    'not fused': ({}, {'fused': False}, MASKED),
}


@pytest.mark.parametrize('name', COMPILED)
def test_compiled_is_eager(name: str, compiled: Callable[..., Any]) -> None:
    network, options, call = COMPILED[name]
    wrapper = AutoregressiveWrapper(decoder(**network), **{'fused': True} | options)
    (loss, parts), (want, want_parts) = (f(X, **call, return_breakdown=True) for f in (compiled(wrapper), wrapper))
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for part, want_part in zip(parts, want_parts, strict=True):
        torch.testing.assert_close(part, want_part, rtol=1e-5, atol=1e-6)
    got = gradients(loss, wrapper)
    assert got.keys() == dict(wrapper.named_parameters()).keys()
    assert_same_gradients(got, gradients(want, wrapper), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('frozen', ['head', 'trunk'])
def test_compiled_with_frozen_parts(frozen: str, compiled: Callable[..., Any]) -> None:
    wrapper = AutoregressiveWrapper(decoder(), fused=True)
    for name, p in wrapper.named_parameters():
        p.requires_grad_(('to_logits' in name) == (frozen == 'trunk'))
    assert_same_gradients(gradients(compiled(wrapper)(X), wrapper), gradients(wrapper(X), wrapper), 1e-5)


@pytest.mark.slow
def test_compiled_with_nan_where_nothing_counts(compiled: Callable[..., Any]) -> None:
    wrapper = AutoregressiveWrapper(decoder(), fused=True)
    want = wrapper(X, **MASKED)
    want_grads = gradients(want, wrapper)
    holes = torch.arange(9) >= MASKED['lens'][:, None] - 1
    wrapper.net.attn_layers.register_forward_hook(
        lambda _, __, out: (out[0].masked_fill(holes[..., None], math.nan), out[1])
    )
    loss = compiled(wrapper)(X, **MASKED)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert_same_gradients(gradients(loss, wrapper), want_grads, 1e-5)


@pytest.mark.slow
def test_compiled_without_gradients(compiled: Callable[..., Any]) -> None:
    wrapper = AutoregressiveWrapper(decoder(), fused=True)
    with torch.no_grad():
        assert compiled(wrapper)(X).item() == pytest.approx(wrapper(X).item(), rel=1e-5)


@pytest.mark.slow
def test_compiled_under_autocast(compiled: Callable[..., Any]) -> None:
    wrapper = AutoregressiveWrapper(decoder(), fused=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, want = compiled(wrapper)(X, **MASKED), wrapper(X, **MASKED)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-2)
    assert_same_gradients(gradients(loss, wrapper), gradients(want, wrapper), 5e-2)


def test_ten_normalizers_compile_once(compiled: Callable[..., Any]) -> None:
    wrapper = AutoregressiveWrapper(decoder(), fused=True)
    counter = CompileCounterWithBackend('eager')
    fast = compiled(wrapper, backend=counter)
    plain = wrapper(X, normalizer=1.0).item()
    for z in range(1, 11):
        assert fast(X, normalizer=torch.tensor(float(z))).item() == pytest.approx(plain / z, rel=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize('chunk_size', [2, None])
def test_compiled_function(chunk_size: int | None, compiled: Callable[..., Any]) -> None:
    p = problem(9, 3, 7)
    loss, token_loss = compiled(Problem.solve)(p, chunk_size=chunk_size)
    assert loss.item() == pytest.approx(oracle(p).loss, rel=1e-12)
    assert_near(token_loss, oracle(p).token_loss, 1e-12)
    for _ in range(2):  # again, with retain_graph
        for name, grad in zip(NAMES, torch.autograd.grad(loss * 3, p.inputs, retain_graph=True), strict=True):
            assert_near(grad, 3 * oracle(p).grads[name], 1e-12)


@pytest.mark.slow
def test_second_derivative_of_a_compiled_wrapper_is_refused(compiled: Callable[..., Any]) -> None:
    """Where autograd runs the graph; where torch compiles the backward pass too, it refuses by itself."""
    net = decoder()
    loss = compiled(AutoregressiveWrapper(net, fused=True), backend='eager')(X)
    with pytest.raises(RuntimeError, match=FUSED_FALSE):
        torch.autograd.grad(loss, net.token_emb.emb.weight, create_graph=True)


@pytest.mark.parametrize('needed', [[True, True, True], [True, False, False], [False, False, False]])
def test_the_compiled_operation_is_a_good_one(needed: list[bool]) -> None:
    p = problem(9, 3, 7, dtype=torch.float32)
    inputs = [t.detach().requires_grad_(flag) for t, flag in zip(p.inputs, needed, strict=True)]
    arguments = (*inputs, p.target, p.token_weight, 4, torch.float32, needed)
    torch.library.opcheck(loss_and_grads_in_graph, arguments)
