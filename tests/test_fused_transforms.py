"""Derivatives that are no plain backward pass, whenever they begin: upstream's if not fused, else refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import x_transformers
from fused_problem import assert_near
from networks import decoder
from torch import Tensor, nn
from torch.autograd import forward_ad

from xtloss import AutoregressiveWrapper

FUSED_FALSE = r'fused=False'
X = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(1))
HEAD = 'net.to_logits.weight'

pytestmark = [
    pytest.mark.filterwarnings('ignore:`torch.jit.script` is deprecated'),
    pytest.mark.filterwarnings('ignore:Attempted to insert a get_attr Node'),  # torch.func.linearize, of its own graph
]


class Losses:
    """The loss of a wrapper as a function of its head, and of two heads' worth of losses."""

    def __init__(self, wrapper: nn.Module) -> None:
        self.wrapper = wrapper
        self.head = wrapper.get_parameter(HEAD).detach()
        self.tangent = torch.linspace(-1, 1, self.head.numel(), dtype=self.head.dtype).view_as(self.head)

    def one(self, head: Tensor) -> Tensor:
        return torch.func.functional_call(self.wrapper, {HEAD: head}, (X,))

    def two(self, head: Tensor) -> Tensor:
        return torch.stack([self.one(head), 3 * self.one(head)])

    def leaf(self) -> Tensor:
        return self.head.clone().requires_grad_()


def batched(f: Losses, **options: Any) -> tuple[Tensor, Tensor]:
    head = f.leaf()
    seeds = torch.eye(2, dtype=head.dtype)
    return torch.autograd.grad(f.two(head), head, seeds, is_grads_batched=True, **options)[0], head


def batched_twice(f: Losses) -> Tensor:
    grad, head = batched(f, create_graph=True)
    return torch.autograd.grad(grad[1].square().sum(), head)[0]


def vmap_of_the_backward(f: Losses) -> Tensor:
    head = f.leaf()
    losses = f.two(head)
    return torch.func.vmap(lambda seed: torch.autograd.grad(losses, head, seed, retain_graph=True)[0])(
        torch.eye(2, dtype=head.dtype)
    )


def dual_level(f: Losses) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f.one(forward_ad.make_dual(f.head, f.tangent))).tangent


def dual_level_of_the_backward(f: Losses) -> Tensor:
    head = f.leaf()
    loss = f.one(head)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 2.0))
        return forward_ad.unpack_dual(torch.autograd.grad(loss, head, seed)[0]).tangent


def dual_level_of_a_double_backward(f: Losses) -> Tensor:
    head = f.leaf()
    (grad,) = torch.autograd.grad(f.one(head), head, create_graph=True)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(grad), f.tangent)
        return forward_ad.unpack_dual(torch.autograd.grad(grad, head, seed)[0]).tangent


api = torch.autograd.functional
DERIVATIVES: dict[str, Callable[[Losses], Tensor]] = {
    'is_grads_batched': lambda f: batched(f)[0],
    'is_grads_batched, twice': batched_twice,
    'vmap of the backward': vmap_of_the_backward,
    'jacobian, vectorized': lambda f: api.jacobian(f.two, f.head, vectorize=True),
    'jacobian, forward': lambda f: api.jacobian(f.two, f.head, vectorize=True, strategy='forward-mode'),
    'hessian, vectorized': lambda f: api.hessian(f.one, f.head, vectorize=True),
    'hessian, forward': lambda f: api.hessian(f.one, f.head, vectorize=True, outer_jacobian_strategy='forward-mode'),
    'hvp': lambda f: api.hvp(f.one, f.head, f.tangent)[1],
    'jvp': lambda f: api.jvp(f.one, f.head, f.tangent)[1],
    'dual_level': dual_level,
    'dual_level of the backward': dual_level_of_the_backward,
    'dual_level of a double backward': dual_level_of_a_double_backward,
    'func.linearize': lambda f: torch.func.linearize(f.one, f.head)[1](f.tangent),
    'func.jvp': lambda f: torch.func.jvp(f.one, (f.head,), (f.tangent,))[1],
    'func.vjp': lambda f: torch.func.vjp(f.one, f.head)[1](torch.ones((), dtype=f.head.dtype))[0],
    'func.jacrev': lambda f: torch.func.jacrev(f.two)(f.head),
    'func.jacfwd': lambda f: torch.func.jacfwd(f.two)(f.head),
    'func.hessian': lambda f: torch.func.hessian(f.one)(f.head),
}


@pytest.mark.parametrize('name', DERIVATIVES)
def test_every_derivative_is_upstreams_or_refused(name: str) -> None:
    net = decoder(dtype=torch.float64)
    want = DERIVATIVES[name](Losses(x_transformers.AutoregressiveWrapper(net)))
    assert want.abs().max() > 1e-6
    assert_near(DERIVATIVES[name](Losses(AutoregressiveWrapper(net, fused=False))), want, 1e-9)
    for fused in (True, 'auto'):
        with pytest.raises(RuntimeError, match=FUSED_FALSE):
            DERIVATIVES[name](Losses(AutoregressiveWrapper(net, fused=fused)))


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('shape', [(3,), (3, 9)])
@pytest.mark.parametrize('weighting', ['token', 'sequence', 0.3])
def test_a_loss_weight_gets_its_gradient(weighting: str | float, shape: tuple[int, ...], fused: bool) -> None:
    """ℓ · counted · L^-p / Z, which central differences of a loss that is linear in the weights give exactly."""
    wrapper = AutoregressiveWrapper(decoder(dtype=torch.float64), fused=fused, loss_weighting=weighting)
    call = {'lens': torch.tensor([9, 0, 4]), 'loss_mask': torch.rand(3, 9) < 0.8}
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(wrapper(X, loss_weight=weight, **call), weight)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist():
        more, less = (weight.detach().index_put(tuple(map(torch.tensor, index)), s) for s in (ONE, -ONE))
        want = wrapper(X, loss_weight=more, **call) - wrapper(X, loss_weight=less, **call)
        assert grad[tuple(index)].item() == pytest.approx(want.item() / 2, abs=1e-9)


ONE = torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize('fused', [True, False])
def test_a_loss_weight_of_nan_where_nothing_counts_gets_zero(fused: bool) -> None:
    weight = torch.ones(3, 9).index_fill(1, torch.tensor([0, 7, 8]), torch.nan).requires_grad_()
    call = {'lens': torch.tensor([7, 4, 6])}
    (grad,) = torch.autograd.grad(AutoregressiveWrapper(decoder(), fused=fused)(X, loss_weight=weight, **call), weight)
    assert grad.isfinite().all()
    assert not grad[:, [0, 7, 8]].any()
    assert grad[:, 1].all()


def test_second_derivatives_through_a_loss_weight() -> None:
    net = decoder(dtype=torch.float64)
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def mixed(fused: bool) -> Tensor:
        loss = AutoregressiveWrapper(net, fused=fused)(X, loss_weight=weight)
        (grad,) = torch.autograd.grad(loss, net.to_logits.weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    assert mixed(False).abs().min() > 0
    with pytest.raises(RuntimeError, match=FUSED_FALSE):
        mixed(True)
