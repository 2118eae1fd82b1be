"""A second backward works; torch.func works where nothing is fused."""

import pytest
import torch
import x_transformers
from fused_problem import NAMES, assert_near, oracle, problem
from networks import assert_same_gradients, decoder, gradients
from torch import Tensor

from xtloss import AutoregressiveWrapper
from xtloss.losses.cross_entropy import cross_entropy


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


@pytest.mark.parametrize('fused', ['auto', False])
def test_the_wrapper_backward_again(fused: str | bool) -> None:
    wrapper, x = AutoregressiveWrapper(decoder(dtype=torch.float64), fused=fused), torch.randint(0, 11, (3, 9))
    loss, named = wrapper(x, lens=torch.tensor([9, 3, 5])), dict(wrapper.named_parameters())
    first = torch.autograd.grad(loss, named.values(), retain_graph=True)
    second = torch.autograd.grad(loss * 2, named.values())
    for one, two in zip(first, second, strict=True):
        assert_near(two, 2 * one, 1e-12)


@pytest.mark.parametrize('weighting', ['token', 'sequence'])
def test_transforms_of_the_wrapper(weighting: str) -> None:
    net, x = decoder(), torch.randint(0, 11, (3, 9))
    call = {'lens': torch.tensor([9, 3, 5])} if weighting == 'sequence' else {}
    params = {f'net.{name}': p.detach() for name, p in net.named_parameters()}

    def loss(fused: str | bool, params: dict[str, Tensor], x: Tensor, call: dict[str, Tensor]) -> Tensor:
        wrapper = AutoregressiveWrapper(net, loss_weighting=weighting, fused=fused)
        return torch.func.functional_call(wrapper, params, (x,), call)

    for fused in ('auto', True):
        with pytest.raises(RuntimeError, match='functorch transforms'):
            torch.func.grad(loss, argnums=1)(fused, params, x, call)

    def plain(x: Tensor, call: dict[str, Tensor]) -> dict[str, Tensor]:
        wrapper = AutoregressiveWrapper(net, loss_weighting=weighting)
        return {name: g.detach() for name, g in gradients(wrapper(x, **call), wrapper).items()}

    assert_same_gradients(torch.func.grad(loss, argnums=1)(False, params, x, call), plain(x, call), 1e-5)
    rows, row_calls = x[:, None], {name: t[:, None] for name, t in call.items()}
    each = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, None, 0, 0))
    by_row = each(False, params, rows, row_calls)
    for row in range(3):
        want = plain(rows[row], {name: t[row] for name, t in row_calls.items()})
        assert_same_gradients({name: g[row] for name, g in by_row.items()}, want, 1e-5)


@pytest.mark.parametrize('tied', [False, True])
def test_functional_call_alone_is_no_transform(tied: bool) -> None:
    net, x = decoder(tie_embedding=tied), torch.randint(0, 11, (3, 9))
    params = {f'net.{name}': (p.detach() * 1.1).requires_grad_() for name, p in net.named_parameters()}
    losses = [
        torch.func.functional_call(cls(net), params, (x,))
        for cls in (AutoregressiveWrapper, x_transformers.AutoregressiveWrapper)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    grads = [dict(zip(params, torch.autograd.grad(loss, params.values()), strict=True)) for loss in losses]
    assert_same_gradients(grads[0], grads[1], 1e-5)


def test_gradgradcheck_of_the_logits_path() -> None:
    logits, target = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (5,))
    counted = torch.tensor([True, False, True, True, False])
    assert torch.autograd.gradcheck(cross_entropy, (logits, target, counted))
    assert torch.autograd.gradgradcheck(cross_entropy, (logits, target, counted))
