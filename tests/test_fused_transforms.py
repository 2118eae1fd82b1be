"""Every kind of derivative, whenever it begins, is right or refused: never silently another number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import x_transformers
from fused_problem import assert_near
from networks import assert_same_gradients, decoder, gradients
from torch import Tensor, nn
from torch.autograd import forward_ad

from xtloss import AutoregressiveWrapper, linear_cross_entropy
from xtloss.losses.cross_entropy import cross_entropy

X = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(1))
HEAD = 'net.to_logits.weight'

pytestmark = [
    pytest.mark.filterwarnings('ignore:`torch.jit.script` is deprecated'),
    pytest.mark.filterwarnings('ignore:Attempted to insert a get_attr Node'),  # torch.func.linearize, of its own graph
]

Loss = Callable[[Tensor], Tensor]
DRAW = torch.Generator().manual_seed(0)
EMBED, MATRIX, BIAS, WEIGHT = (torch.randn(s, generator=DRAW).double() for s in ((7, 4), (5, 4), (5,), (7,)))
TARGET, ALL = torch.randint(0, 5, (7,), generator=DRAW), torch.ones(7, dtype=torch.bool)
AT, TANGENT = torch.tensor([0.9, 1.1, -0.7, 1.3]).double(), torch.tensor([0.5, -1.0, 2.0, 0.3]).double()


def of_logits(nll: Callable[[Tensor], Tensor]) -> Loss:
    def loss(t: Tensor) -> Tensor:
        logits = F.linear(t[0] * EMBED, t[1] * MATRIX, t[2] * BIAS)
        return (t[3] * WEIGHT * nll(logits)).sum()

    return loss


LOSSES: dict[str, Loss] = {  # of four numbers, by which all inputs are multiplied
    'plain': of_logits(lambda logits: F.cross_entropy(logits, TARGET, reduction='none')),
    'fused': lambda t: linear_cross_entropy(t[0] * EMBED, t[1] * MATRIX, TARGET, t[3] * WEIGHT, bias=t[2] * BIAS)[0],
    'logits': of_logits(lambda logits: cross_entropy(logits, TARGET, ALL)),
    'composite': of_logits(lambda logits: cross_entropy(logits, TARGET, ALL, composite=True)),
}


def two(f: Loss) -> Loss:
    return lambda t: torch.stack([f(t), 3 * f(t)])


def leaf() -> Tensor:
    return AT.clone().requires_grad_()


def batched(f: Loss, count: int = 2, **options: Any) -> tuple[Tensor, Tensor]:
    t = leaf()
    return torch.autograd.grad(two(f)(t), t, torch.eye(2)[-count:].double(), is_grads_batched=True, **options)[0], t


def batched_twice(f: Loss) -> Tensor:
    grad, t = batched(f, create_graph=True)
    return torch.autograd.grad(grad[1].square().sum(), t)[0]


def vmap_of_the_backward(f: Loss, *, again: bool = False) -> Tensor:
    t = leaf()
    losses = two(f)(t)
    if again:
        losses.sum().backward(retain_graph=True)
    backward = torch.func.vmap(lambda seed: torch.autograd.grad(losses, t, seed, retain_graph=True)[0])
    return backward(torch.eye(2).double())


def double_backward(f: Loss) -> Tensor:
    t = leaf()
    (grad,) = torch.autograd.grad(f(t), t, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), t)[0]


def dual_level(f: Loss) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(AT, TANGENT))).tangent


def dual_level_and_backward(f: Loss) -> Tensor:
    t = leaf()
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(torch.autograd.grad(f(forward_ad.make_dual(t, TANGENT)), t)[0]).tangent


def dual_level_of_the_backward(f: Loss, *, again: bool = False) -> Tensor:
    t = leaf()
    loss = f(t)
    if again:
        loss.backward(retain_graph=True)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 2.0))
        return forward_ad.unpack_dual(torch.autograd.grad(loss, t, seed)[0]).tangent


def dual_level_of_a_double_backward(f: Loss) -> Tensor:
    t = leaf()
    (grad,) = torch.autograd.grad(f(t), t, create_graph=True)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(grad), TANGENT)
        return forward_ad.unpack_dual(torch.autograd.grad(grad, t, seed)[0]).tangent


api, func = torch.autograd.functional, torch.func
DERIVATIVES: dict[str, Callable[[Loss], Tensor]] = {
    'create_graph': double_backward,
    'is_grads_batched': lambda f: batched(f)[0],
    'is_grads_batched, by one': lambda f: batched(f, 1)[0],
    'is_grads_batched, twice': batched_twice,
    'vmap of the backward': vmap_of_the_backward,
    'vmap of a second backward': lambda f: vmap_of_the_backward(f, again=True),
    'jacobian': lambda f: api.jacobian(two(f), AT),
    'jacobian, vectorized': lambda f: api.jacobian(two(f), AT, vectorize=True),
    'jacobian, forward': lambda f: api.jacobian(two(f), AT, vectorize=True, strategy='forward-mode'),
    'hessian': lambda f: api.hessian(f, AT),
    'hessian, vectorized': lambda f: api.hessian(f, AT, vectorize=True),
    'hessian, forward': lambda f: api.hessian(f, AT, vectorize=True, outer_jacobian_strategy='forward-mode'),
    'hvp': lambda f: api.hvp(f, AT, TANGENT)[1],
    'vhp': lambda f: api.vhp(f, AT, TANGENT)[1],
    'jvp': lambda f: api.jvp(f, AT, TANGENT)[1],
    'dual_level': dual_level,
    'dual_level, then backward': dual_level_and_backward,
    'dual_level of the backward': dual_level_of_the_backward,
    'dual_level of a second backward': lambda f: dual_level_of_the_backward(f, again=True),
    'dual_level of a double backward': dual_level_of_a_double_backward,
    'func.grad': lambda f: func.grad(f)(AT),
    'func.vmap': lambda f: func.vmap(f)(torch.stack([AT, TANGENT])),
    'func.vmap of one': lambda f: func.vmap(f)(AT[None]),
    'func.vmap of grad': lambda f: func.vmap(func.grad(f))(torch.stack([AT, TANGENT])),
    'func.linearize': lambda f: func.linearize(f, AT)[1](TANGENT),
    'func.jvp': lambda f: func.jvp(f, (AT,), (TANGENT,))[1],
    'func.jvp of grad': lambda f: func.jvp(func.grad(f), (AT,), (TANGENT,))[1],
    'func.grad of jvp': lambda f: func.grad(lambda t: func.jvp(f, (t,), (TANGENT,))[1])(AT),
    'func.vjp': lambda f: func.vjp(f, AT)[1](torch.ones(()).double())[0],
    'func.jacrev': lambda f: func.jacrev(two(f))(AT),
    'func.jacfwd': lambda f: func.jacfwd(two(f))(AT),
    'func.hessian': lambda f: func.hessian(f)(AT),
}


NO_MORE_THAN_A_GRADIENT = {'jacobian', 'dual_level of the backward', 'dual_level of a second backward'}
OF_SECOND_ORDER = {'create_graph', 'is_grads_batched, twice', 'hessian', 'hvp', 'vhp', 'jvp'}


@pytest.mark.parametrize('name', DERIVATIVES)
@pytest.mark.parametrize('loss', ['fused', 'logits', 'composite'])
def test_every_derivative_is_right_or_refused(loss: str, name: str) -> None:
    want = DERIVATIVES[name](LOSSES['plain'])
    assert want.abs().max() > 1e-6
    try:
        got = DERIVATIVES[name](LOSSES[loss])
    except RuntimeError as refusal:
        assert loss == 'fused' or (loss == 'logits' and name not in OF_SECOND_ORDER)
        said_by_us = 'fused=False' in str(refusal)
        assert said_by_us or name not in OF_SECOND_ORDER
    else:
        assert loss != 'fused' or name in NO_MORE_THAN_A_GRADIENT
        assert_near(got, want, 1e-9)


@pytest.mark.parametrize('name', DERIVATIVES)
def test_every_derivative_of_a_wrapper_that_does_not_fuse_is_upstreams(name: str) -> None:
    net = decoder(dtype=torch.float64)

    def derivative(wrapper: nn.Module) -> Tensor:
        head = wrapper.get_parameter(HEAD).detach()
        return DERIVATIVES[name](lambda t: func.functional_call(wrapper, {HEAD: head * (t.sum() + t[0] ** 2)}, (X,)))

    want = derivative(x_transformers.AutoregressiveWrapper(net))
    assert want.abs().max() > 1e-6
    assert_near(derivative(AutoregressiveWrapper(net, fused=False)), want, 1e-9)


@pytest.mark.parametrize('fused', [True, False])
def test_a_loss_weight_of_nan_where_nothing_counts_gets_zero(fused: bool) -> None:
    weight = torch.ones(3, 9).index_fill(1, torch.tensor([0, 7, 8]), torch.nan).requires_grad_()
    call = {'lens': torch.tensor([7, 4, 6])}
    (grad,) = torch.autograd.grad(AutoregressiveWrapper(decoder(), fused=fused)(X, loss_weight=weight, **call), weight)
    assert grad.isfinite().all()
    assert not grad[:, [0, 7, 8]].any()
    assert grad[:, 1].all()


@pytest.mark.parametrize('tied', [False, True])
def test_functional_call_alone_is_no_transform(tied: bool) -> None:
    """Head and loss are one, of the parameters that were handed in."""
    net = decoder(tie_embedding=tied, dtype=torch.float64)
    params = {f'net.{name}': (p.detach() * 1.1).requires_grad_() for name, p in net.named_parameters()}
    got, want = (
        func.functional_call(cls(net), params, (X,))
        for cls in (AutoregressiveWrapper, x_transformers.AutoregressiveWrapper)
    )
    assert_near(got, want, 1e-7)
    grads = [dict(zip(params, torch.autograd.grad(loss, params.values()), strict=True)) for loss in (got, want)]
    assert_same_gradients(grads[0], grads[1], 1e-6)


@pytest.mark.parametrize('weighting', ['token', 'sequence'])
def test_gradients_of_each_row_by_vmap(weighting: str) -> None:
    """As the rows have them one by one, where nothing is fused; refused where head and loss are one."""
    net, call = decoder(dtype=torch.float64), {'lens': torch.tensor([9, 3, 5])}
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss(fused: str | bool, params: dict[str, Tensor], x: Tensor, call: dict[str, Tensor]) -> Tensor:
        wrapper = AutoregressiveWrapper(net, loss_weighting=weighting, fused=fused)
        return func.functional_call(wrapper, {f'net.{name}': p for name, p in params.items()}, (x,), call)

    for fused in ('auto', True):
        with pytest.raises(RuntimeError, match='functorch transforms'):
            func.grad(loss, argnums=1)(fused, params, X, call)
    rows, row_calls = X[:, None], {name: t[:, None] for name, t in call.items()}
    found = func.vmap(func.grad(loss, argnums=1), in_dims=(None, None, 0, 0))(False, params, rows, row_calls)
    for row in range(3):
        want = loss(False, dict(net.named_parameters()), rows[row], {name: t[row] for name, t in row_calls.items()})
        assert_same_gradients({name: g[row] for name, g in found.items()}, gradients(want, net), 1e-9)


def test_second_derivatives_where_some_targets_do_not_count() -> None:
    logits, counted = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.arange(5) % 3 != 1
    assert torch.autograd.gradgradcheck(cross_entropy, (logits, torch.randint(0, 4, (5,)), counted))
