"""Numbers at the edge: certain margins, infinite and NaN logits, mixed dtypes. Broken ones stay broken, to be seen."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_problem import assert_near, use_loop
from networks import Stub, assert_same_gradients, decoder, gradients
from torch import Tensor

from xtloss import AutoregressiveWrapper, linear_cross_entropy
from xtloss.losses.cross_entropy import composite_cross_entropy, cross_entropy, softplus

MARGINS = (-700.0, -80.0, -21.0, -1.0, -0.0, 0.0, 1e-3, 1.0, 19.0, 20.5, 21.0, 30.0, 80.0, 700.0)


def derivatives(x: float) -> list[float]:
    """softplus and its first three derivatives, with e = exp(-|x|), so that nothing is 1 minus a number near 1."""
    e = math.exp(-abs(x))
    small, large = e / (1 + e), 1 / (1 + e)
    slope, rest = (large, small) if x >= 0 else (small, large)
    return [max(x, 0) + math.log1p(e), slope, slope * rest, slope * rest * (rest - slope)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_softplus_and_its_derivatives_are_exact_at_any_margin(dtype: torch.dtype) -> None:
    x = torch.tensor(MARGINS, dtype=dtype, requires_grad=True)
    want = torch.tensor([derivatives(t) for t in x.tolist()], dtype=torch.float64).t()
    found = [softplus(x)]
    for _ in range(3):
        found.append(torch.autograd.grad(found[-1].sum(), x, create_graph=True)[0])
    eps = torch.finfo(dtype).eps
    for got, exact, atol in zip(found, want, [1e-37, 1e-37, 1e-37, eps], strict=True):  # the third crosses 0
        torch.testing.assert_close(got.double(), exact, rtol=8 * eps, atol=atol)


@pytest.mark.parametrize('margin', [20.5, 25.0, 40.0, -25.0])
@pytest.mark.parametrize('path', ['fused', 'accelerated', 'not fused', 'composite', 'compiled', 'wrapper'])
def test_losses_at_margins_beyond_20(path: str, margin: float) -> None:
    logits = torch.tensor([[0.0, margin]], dtype=torch.float64, requires_grad=True)
    nll, slope, *_ = derivatives(margin)
    loss, grad = LOSSES[path](logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(nll, rel=1e-14)
    assert grad.tolist()[0] == pytest.approx([-slope, slope], rel=1e-14)


ONE = torch.tensor([True])


def fused(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The logits come as the bias of a head that gives 0."""
    bias = logits.detach()[0].clone().requires_grad_()
    nothing = torch.zeros(1, 2, dtype=bias.dtype), torch.zeros(len(bias), 2, dtype=bias.dtype)
    loss, token_loss = linear_cross_entropy(*nothing, target, torch.ones(1), bias=bias)
    return token_loss, torch.autograd.grad(loss, bias)[0][None]


def on_an_accelerator(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        use_loop(patch, 'accelerator')
        return fused(logits, target)


def through(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def solve(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        nll = function(logits, target, ONE)
        return nll.detach(), torch.autograd.grad(nll.sum(), logits)[0]

    return solve


def wrapper_of(logits: Tensor) -> AutoregressiveWrapper:
    """Around a network that gives them for both tokens of a row, whose second is the target."""
    return AutoregressiveWrapper(Stub(torch.stack((logits, logits), dim=1)))


LOSSES = {
    'fused': fused,
    'accelerated': on_an_accelerator,
    'not fused': through(cross_entropy),
    'composite': through(composite_cross_entropy),
    'wrapper': through(lambda *given: wrapper_of(given[0])(given[1].expand(1, 2))[None]),
    'compiled': through(torch.compile(cross_entropy, backend='aot_eager', fullgraph=True)),
}
BROKEN = (0.0, 1.5, math.inf, -math.inf, math.nan, 3e38, -3e38)


@pytest.mark.parametrize('path', LOSSES)
@pytest.mark.parametrize('v', [1, 2, 3])
def test_what_is_broken_in_cross_entropy_is_broken_here(v: int, path: str) -> None:
    """Loss and gradient are those of F.cross_entropy, for every pattern of logits; a NaN gradient has NaN somewhere."""
    for logits in itertools.product(BROKEN, repeat=v):
        z, target = torch.tensor([logits], requires_grad=True), torch.tensor([0])
        want = F.cross_entropy(z, target, reduction='none')
        (want_grad,) = torch.autograd.grad(want.sum(), z)
        got, grad = LOSSES[path](z, target)
        torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-6, equal_nan=True, msg=f'{logits}')
        if want_grad.isnan().any():
            assert grad.isnan().any(), logits
        else:
            torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6, msg=f'{logits}')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('chunk', [None, 2])
def test_a_product_that_overflows_at_the_target_is_seen(dtype: torch.dtype, chunk: int | None) -> None:
    large = torch.finfo(dtype).max ** 0.5 * 2
    embed = torch.full((5, 1), large, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[large], [1.0], [-1.0]], dtype=dtype, requires_grad=True)
    token_loss = F.cross_entropy(embed @ weight.t(), target := torch.tensor([0, 1, 2, 0, 1]), reduction='none')
    assert token_loss.isnan().all()
    loss, ours = linear_cross_entropy(embed, weight, target, torch.ones(5), chunk_size=chunk)
    assert loss.isnan()
    assert ours.isnan().all()
    assert all(grad.isnan().any() for grad in torch.autograd.grad(loss, (embed, weight)))


@pytest.mark.parametrize(
    ('trunk', 'head'),
    [*itertools.permutations([torch.bfloat16, torch.float32, torch.float64], 2), (torch.bfloat16, torch.float16)],
)
def test_products_run_in_the_wider_dtype(trunk: torch.dtype, head: torch.dtype) -> None:
    embed, weight = torch.randn(9, 8).to(trunk).requires_grad_(), torch.randn(7, 8).to(head).requires_grad_()
    target, wide = torch.randint(0, 7, (9,)), torch.promote_types(trunk, head)
    loss, token_loss = linear_cross_entropy(embed, weight, target, torch.ones(9), chunk_size=4)
    e, w = embed.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = F.cross_entropy(e @ w.t(), target, reduction='none')
    assert loss.dtype == token_loss.dtype == wide
    assert_near(token_loss, want.detach(), 32 * torch.finfo(wide).eps)
    for t, reference in ((embed, e), (weight, w)):
        (grad,) = torch.autograd.grad(loss, t, retain_graph=True)
        (exact,) = torch.autograd.grad(want.sum(), reference, retain_graph=True)
        assert_near(grad, exact, 32 * torch.finfo(wide).eps + torch.finfo(t.dtype).eps)


@pytest.mark.parametrize('network', [{}, {'tie_embedding': True, 'tie_embedding_scale': 0.3}])
def test_a_wide_head_on_a_narrow_trunk(network: dict[str, Any]) -> None:
    """The loss of the same network whose embeddings are widened before the head."""
    net, x = decoder(**network).bfloat16(), torch.randint(0, 11, (3, 9))
    head = net.token_emb.emb if network else net.to_logits
    head.float()
    if network:  # the trunk itself stays narrow
        net.post_emb_norm = torch.nn.Identity()
        net.token_emb.register_forward_hook(lambda _, __, out: out.bfloat16())
    embeds = net(x, return_embeddings=True)
    logits = embeds[:, :-1].float() @ head.weight.t() * network.get('tie_embedding_scale', 1.0)
    want = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    wrapper = AutoregressiveWrapper(net, fused=True)
    loss = wrapper(x)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert_same_gradients(gradients(loss, wrapper.net), gradients(want, wrapper.net), 1e-2)
    (grad,) = torch.autograd.grad(wrapper(x), head.weight)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_narrow_logits_are_rounded_once(dtype: torch.dtype) -> None:
    """Losses and gradients are worked out in float32, chunk by chunk; gradients are then of the dtype of the logits."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 50, generator=draw).to(dtype).requires_grad_()
    target, counted = torch.randint(50, (40,), generator=draw), torch.rand(40, generator=draw) > 0.3
    loss = cross_entropy(logits, target, counted)
    (grad,) = torch.autograd.grad(loss.sum(), logits)

    exact = logits.detach().double().requires_grad_()
    want = F.cross_entropy(exact, target, reduction='none') * counted
    (want_grad,) = torch.autograd.grad(want.sum(), exact)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-6, atol=1e-6)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), want_grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_the_composite_looks_at_each_row_alone() -> None:
    """Rows that are thousands apart, and one that does not count."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, generator=draw) + torch.tensor([[0.0], [3e3], [-3e3], [0.0]])
    target, counted = torch.tensor([0, 1, 2, 3]), torch.tensor([True, True, True, False])
    want = F.cross_entropy(logits.double(), target, reduction='none') * counted
    torch.testing.assert_close(composite_cross_entropy(logits, target, counted).double(), want, rtol=1e-3, atol=0)
