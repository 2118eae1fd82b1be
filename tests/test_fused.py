"""Head and loss in one: `linear_cross_entropy` on its own, the wrapper that decides to use it, and both compiled."""

import copy
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import x_transformers
from networks import Stub, assert_same_gradients, decoder, gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper, linear_cross_entropy
from xtloss.cross_entropy import composite_cross_entropy, cross_entropy
from xtloss.fused import compiled_loss_and_grads
from xtloss.head import why_not_linear

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ('embed', 'weight', 'bias')
WEIGHTINGS = ('token', 'sequence', 'square', 'padded', 'sequence_sum', 0.3)


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


class Operations(TorchDispatchMode):
    """Counts the operations that touch a tensor with a side of `vocab`, by name and shapes, forward and backward.

    `largest` is the most elements that the storage of any tensor held, `names` counts all operations.
    """

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.largest = vocab, 0
        self.seen: Counter[tuple[str, tuple[tuple[int, ...], ...]]] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        self.names[name] += 1
        self.largest = max([self.largest, *(t.untyped_storage().nbytes() // t.element_size() for t in tensors)])
        shapes = tuple(sorted(tuple(t.shape) for t in tensors))
        if any(self.vocab in shape for shape in shapes):
            self.seen[name, shapes] += 1
        return out

    @property
    def products(self) -> int:
        """Matrix products with the head, or with something as wide as it."""
        names = {'mm', 'addmm', 'addmm_', 'bmm', 'baddbmm', 'baddbmm_', 'linear', 'matmul', '_addmm_activation'}
        return sum(count for (name, _), count in self.seen.items() if name in names)


# values and gradients


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
def test_values_and_gradients(size: tuple[int, int, int, int | None], dtype: torch.dtype, bias: bool) -> None:
    *shape, chunk = size
    p = problem(*shape, dtype=dtype, bias=bias)
    want, wide = oracle(p), torch.promote_types(dtype, torch.float32)
    loss, token_loss = p.solve(chunk_size=chunk)
    loss.backward()

    assert loss.dtype == token_loss.dtype == wide
    assert loss.shape == ()
    assert not token_loss.requires_grad
    assert p.token_weight.grad is None
    tolerance = 4 * torch.finfo(dtype).eps  # of the products' dtype, times the few units that logits are large
    if dtype == wide:
        tolerance *= 8  # sums over tokens and words, too
    assert_near(token_loss, want.token_loss, tolerance)
    total = (p.token_weight.double() * want.token_loss).abs().sum().item()
    assert abs(loss.item() - want.loss) <= tolerance * total
    for name in NAMES[: len(p.inputs)]:
        given = getattr(p, name)
        assert given.grad.dtype == dtype
        assert_near(given.grad, want.grads[name], tolerance)


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


def test_token_weights_are_constants() -> None:
    p = problem(9, 3, 7)
    p.token_weight.requires_grad_()
    loss, _ = p.solve()
    assert torch.autograd.grad(loss, (p.embed, p.token_weight), allow_unused=True)[1] is None
    frozen = Problem(*(t.detach() for t in p[:4]), p.token_weight)
    assert not frozen.solve()[0].requires_grad


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


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('chunk', [None, 1, 3])
def test_gradcheck(chunk: int | None, bias: bool) -> None:
    p = problem(5, 3, 4, bias=bias)

    def loss(embed: Tensor, weight: Tensor, offset: Tensor | None = None) -> Tensor:
        return Problem(embed, weight, offset, p.target, p.token_weight).solve(chunk_size=chunk)[0]

    assert torch.autograd.gradcheck(loss, p.inputs)


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


@pytest.mark.parametrize('offset', [0.0, 60.0, -60.0])
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


def test_certain_predictions_through_the_wrapper() -> None:
    logits, x = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    logits[:, :-1].scatter_(2, x[:, 1:, None], 24.0)
    flat = Problem(logits[:, :-1].flatten(0, 1), torch.eye(11), None, x[:, 1:].flatten(), torch.full((8,), 1 / 8))
    logits.requires_grad_()
    loss = AutoregressiveWrapper(Stub(logits), fused=False)(x)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(oracle(flat).loss, rel=1e-5)
    torch.testing.assert_close(grad[:, :-1].flatten(0, 1).double(), oracle(flat).embed, rtol=1e-5, atol=0)


# only the work that is needed, and no logits


@pytest.mark.parametrize('needed', list(itertools.product([True, False], repeat=3)))
def test_frozen_parts_cost_nothing(needed: tuple[bool, bool, bool]) -> None:
    v = 65
    p = problem(8, 16, v)
    for t, flag in zip(p.inputs, needed, strict=True):
        t.requires_grad_(flag)
    with Operations(v) as seen:
        loss, _ = p.solve()
        if any(needed):
            loss.backward()
    assert seen.products == 1 + needed[0] + needed[1]
    assert loss.requires_grad == any(needed)
    for name, flag in zip(NAMES, needed, strict=True):
        grad = getattr(p, name).grad
        assert (grad is not None) == flag
        if flag:
            assert_near(grad, oracle(p).grads[name], 1e-12)


@pytest.mark.parametrize('off', [torch.no_grad, torch.inference_mode])
def test_no_gradient_work_without_gradients(off: Callable[[], Any]) -> None:
    p = problem(8, 16, 65)
    with Operations(65) as seen, off():
        loss, token_loss = p.solve()
    assert seen.products == 1
    assert loss.item() == pytest.approx(oracle(p).loss, rel=1e-12)
    assert_near(token_loss, oracle(p).token_loss, 1e-12)
    assert not loss.requires_grad


@pytest.mark.parametrize('network', [{}, {'tie_embedding': True}])
def test_products_of_a_training_step(network: dict[str, Any]) -> None:
    """Three with the head, two where the network or the head is frozen, one in evaluation; none for what is masked."""
    v = 1009
    net, x = decoder(num_tokens=v, **network), torch.randint(0, v, (3, 9))
    wrapper = AutoregressiveWrapper(net, fused=True)
    head = net.token_emb.emb.weight if network else net.to_logits.weight

    def products(**call: Any) -> int:
        with Operations(v) as seen:
            loss = wrapper(x, **call)
            if loss.requires_grad:
                loss.backward()
        assert not any(16 in shape and shape[0] > 24 for (_, shapes) in seen.seen for shape in shapes if v not in shape)
        return seen.products

    assert products() == 3
    assert products(lens=torch.tensor([9, 2, 0])) == 3
    with torch.no_grad():
        assert products() == 1
    head.requires_grad_(False)
    assert products() == 2
    for p in net.parameters():
        p.requires_grad_(p is head and not network)
    assert products() == (1 if network else 2)


def test_only_counted_rows_reach_the_head() -> None:
    v = 1009
    net, x = decoder(num_tokens=v), torch.randint(0, v, (3, 9))
    with Operations(v) as seen:
        AutoregressiveWrapper(net, fused=True)(x, lens=torch.tensor([9, 2, 0])).backward()
    rows = {shape[0] for _, shapes in seen.seen for shape in shapes if shape[1:] == (v,)}
    assert rows - {16} == {8 + 1}  # 16: the head, transposed


def test_no_tensor_of_logits_size() -> None:
    n, d, v, chunk = 67, 8, 509, 16
    p = problem(n, d, v, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        with Operations(v) as seen, torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32):
            p.solve(chunk_size=chunk)[0].backward()
        assert seen.largest == chunk * v
    with Operations(v) as seen:
        F.cross_entropy(F.linear(p.embed, p.weight, p.bias), p.target).backward()
    assert seen.largest >= n * v


@pytest.mark.parametrize('fused', [True, False])
def test_every_weighting_runs_the_same_operations(fused: bool) -> None:
    v = 1009
    net, x, lens = decoder(num_tokens=v), torch.randint(0, v, (3, 9)), torch.tensor([9, 4, 6])

    def operations(weighting: str | float, fused: bool = fused, **call: Any) -> Counter[Any]:
        with Operations(v) as seen:
            gradients(AutoregressiveWrapper(net, loss_weighting=weighting, fused=fused)(x, lens=lens, **call), net)
        return seen.seen

    want = operations('token')
    assert want.total() > 10
    assert want != operations('token', fused=not fused)
    for weighting in WEIGHTINGS:
        assert operations(weighting) == want
        assert operations(weighting, loss_weight=torch.randn(3, 9), normalizer=torch.tensor(2.0)) == want


def test_one_host_sync() -> None:
    """The indices of the counted rows, in the forward pass of the fused path. No other value is read."""
    net, x = decoder(), torch.randint(0, 11, (3, 9))
    call = {'lens': torch.tensor([9, 4, 6]), 'loss_mask': torch.rand(3, 9) < 0.8, 'normalizer': torch.tensor(2.0)}

    def syncs(wrapper: nn.Module, **call: Any) -> Counter[str]:
        with Operations(11) as seen:
            wrapper(x, **call).backward()
        reads = ('nonzero', '_local_scalar_dense', 'is_nonzero', 'masked_select', 'unique', '_unique2', 'equal')
        return Counter({name: seen.names[name] for name in reads if name in seen.names})

    usual = syncs(x_transformers.AutoregressiveWrapper(net))
    assert syncs(AutoregressiveWrapper(net, fused=False), **call) == usual
    assert syncs(AutoregressiveWrapper(net, fused=True), **call) == usual + Counter(nonzero=1)


# a second backward, a second derivative


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


def test_gradients_accumulate() -> None:
    p = problem(7, 3, 5)
    loss, _ = p.solve()
    loss.backward(retain_graph=True)
    (loss * 4).backward()
    for name in NAMES:
        assert_near(getattr(p, name).grad, 5 * oracle(p).grads[name], 1e-12)


def test_backward_twice_needs_retain_graph() -> None:
    loss, _ = problem(7, 3, 5).solve()
    loss.backward()
    with pytest.raises(RuntimeError, match='backward through the graph a second time'):
        loss.backward()


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


FUSED_FALSE = r'fused=False'


def functions(p: Problem) -> dict[str, Callable[[], Any]]:
    """What asks for more than a gradient."""

    def loss(embed: Tensor) -> Tensor:
        return p._replace(embed=embed).solve()[0]

    return {
        'create_graph': lambda: torch.autograd.grad(loss(p.embed), p.embed, create_graph=True),
        'hessian': lambda: torch.autograd.functional.hessian(loss, p.embed),
        'func.grad': lambda: torch.func.grad(loss)(p.embed),
        'func.vmap': lambda: torch.func.vmap(loss)(p.embed[None]),
        'func.jvp': lambda: torch.func.jvp(loss, (p.embed,), (p.embed,)),
        'func.jacrev': lambda: torch.func.jacrev(loss)(p.embed),
        'func.hessian': lambda: torch.func.hessian(loss)(p.embed),
    }


@pytest.mark.filterwarnings('ignore:`torch.jit.script` is deprecated')  # torch's own jvp uses it
@pytest.mark.parametrize('name', functions(problem(0, 1, 1)))
def test_more_than_a_gradient_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=FUSED_FALSE):
        functions(problem(7, 3, 5))[name]()


def test_second_derivatives_through_the_wrapper() -> None:
    net, x = decoder(dtype=torch.float64), torch.randint(0, 11, (3, 9))
    embed, direction = net.token_emb.emb.weight, torch.randn(11, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=FUSED_FALSE):
        torch.autograd.grad(AutoregressiveWrapper(net)(x), embed, create_graph=True)

    def hessian_product(wrapper: nn.Module) -> Tensor:
        (grad,) = torch.autograd.grad(wrapper(x), embed, create_graph=True)
        (second,) = torch.autograd.grad(grad, embed, direction)
        return second

    want = hessian_product(x_transformers.AutoregressiveWrapper(net))
    assert want.abs().max() > 1e-3
    assert_near(hessian_product(AutoregressiveWrapper(net, fused=False)), want, 1e-9)


@pytest.mark.parametrize('weighting', ['token', 'sequence'])
def test_transforms_of_the_wrapper(weighting: str) -> None:
    net, x = decoder(), torch.randint(0, 11, (3, 9))
    call = {'lens': torch.tensor([9, 3, 5])} if weighting == 'sequence' else {}
    params = {f'net.{name}': p.detach() for name, p in net.named_parameters()}

    def loss(fused: str | bool, params: dict[str, Tensor], x: Tensor, call: dict[str, Tensor]) -> Tensor:
        wrapper = AutoregressiveWrapper(net, loss_weighting=weighting, fused=fused)
        return torch.func.functional_call(wrapper, params, (x,), call)

    for fused in ('auto', True):
        with pytest.raises(RuntimeError, match=FUSED_FALSE):
            torch.func.grad(loss, argnums=1)(fused, params, x, call)
        with pytest.raises(RuntimeError, match=FUSED_FALSE):
            torch.func.vmap(loss, in_dims=(None, None, 0, None))(fused, params, x[None], call)

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


# bad arguments


OK = problem(4, 3, 7)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({'embed': [[1.0]]}, TypeError, r'embed must be .*tensor.*, got list'),
    ({'embed': torch.zeros(4, 3).long()}, TypeError, r'embed must be floating point, got int64'),
    ({'weight': torch.zeros(7, 3).bool()}, TypeError, r'weight must be floating point, got bool'),
    ({'target': torch.zeros(4)}, TypeError, r'target must be integer, got float32'),
    ({'target': torch.zeros(4).bool()}, TypeError, r'target must be integer, got bool'),
    ({'token_weight': torch.ones(4).long()}, TypeError, r'token_weight must be floating point, got int64'),
    ({'token_weight': 1.0}, TypeError, r'token_weight must be .*tensor.*, got float'),
    ({'bias': torch.zeros(7).int()}, TypeError, r'bias must be floating point, got int32'),
    ({'bias': True}, TypeError, r'bias must be .*tensor.*, got bool'),
    ({'chunk_size': 2.0}, TypeError, r'chunk_size must be int, got float'),
    ({'chunk_size': True}, TypeError, r'chunk_size must be int, got bool'),
    ({'chunk_size': '8'}, TypeError, r'chunk_size must be int, got str'),
    ({'weight': torch.zeros(7, 4), 'target': torch.zeros(4)}, TypeError, r'target must be integer, got float32'),
    ({'embed': torch.zeros(2, 2, 3)}, ValueError, r'embed must have shape \(N, d\), got \(2, 2, 3\)'),
    ({'weight': torch.zeros(7, 4)}, ValueError, r'weight must have shape \(vocab, 3\).*, got \(7, 4\)'),
    ({'weight': torch.zeros(3)}, ValueError, r'weight must have shape \(vocab, 3\).*, got \(3,\)'),
    ({'target': torch.zeros(5).long()}, ValueError, r'target must have shape \(4,\) like embed, got \(5,\)'),
    ({'target': torch.zeros(4, 1).long()}, ValueError, r'target must have shape \(4,\) like embed, got \(4, 1\)'),
    ({'token_weight': torch.zeros(())}, ValueError, r'token_weight must have shape \(4,\) like embed, got \(\)'),
    ({'bias': torch.zeros(8)}, ValueError, r'bias must have shape \(7,\) like weight, got \(8,\)'),
    ({'chunk_size': 0}, ValueError, r'chunk_size must be >= 1, got 0'),
    ({'weight': torch.zeros(7, 3, device='meta')}, ValueError, r'weight must be on cpu like embed, got meta'),
    ({'target': OK.target.to('meta')}, ValueError, r'target must be on cpu like embed, got meta'),
    ({'bias': torch.zeros(7, device='meta')}, ValueError, r'bias must be on cpu like embed, got meta'),
]


@pytest.mark.parametrize(('change', 'error', 'message'), BAD)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f'^{message}$'):
        linear_cross_entropy(**OK._asdict() | change)
    linear_cross_entropy(**OK._asdict())


# narrow dtypes


def autocast_errors(
    dtype: torch.dtype, network: dict[str, Any], scale: float = 1.0, sharpness: float = 1.0
) -> dict[str, Counter[str]]:
    """Errors of upstream's wrapper and of ours under the same autocast, added up over a few seeds.

    Squared distances from float64 of the loss, of all gradients, and of the head's; how many gradients are lost to 0,
    and how many are not finite. The loss is multiplied by `scale` before the backward pass, the gradients divided by it
    after. The head is multiplied by `sharpness`, which makes most words improbable.
    """
    v, b, n = 1500, 3, 30
    wrappers = {
        'upstream': x_transformers.AutoregressiveWrapper,
        'ours': lambda net: AutoregressiveWrapper(net, fused=True),
    }
    found = {name: Counter() for name in wrappers}
    for seed in range(4):

        def make(dtype: torch.dtype, seed: int = seed) -> TransformerWrapper:
            net = decoder(num_tokens=v, dim=32, seed=seed, dtype=dtype, **network)
            head = net.token_emb.emb if network else net.to_logits
            head.weight.data.mul_(sharpness)
            return net

        x = torch.randint(0, v, (b, n))
        loss = x_transformers.AutoregressiveWrapper(exact := make(torch.float64))(x)
        want_loss, want = loss.item(), gradients(loss, exact)
        for name, cls in wrappers.items():
            wrapper = cls(make(torch.float32))
            with torch.autocast('cpu', dtype=dtype):
                loss = wrapper(x)
            found[name]['loss'] += (loss.item() - want_loss) ** 2
            for parameter, grad in gradients(loss * scale, wrapper.net).items():
                off, exactly = grad.double() / scale - want[parameter], want[parameter]
                found[name]['infinite'] += (~grad.isfinite()).sum().item()
                found[name]['lost'] += ((grad == 0) & (exactly != 0)).sum().item()
                found[name]['gradient'] += off.square().sum().item()
                if parameter in ('to_logits.weight', 'token_emb.emb.weight'):
                    found[name]['head'] += off.square().sum().item()
    return found


@pytest.mark.parametrize('network', [{}, {'tie_embedding': True}])
def test_bf16_autocast_is_no_further_from_float64_than_upstreams(network: dict[str, Any]) -> None:
    errors = autocast_errors(torch.bfloat16, network)
    for what in ('loss', 'gradient', 'head'):
        assert errors['ours'][what] ** 0.5 <= 1.05 * errors['upstream'][what] ** 0.5, what


@pytest.mark.parametrize('network', [{}, {'tie_embedding': True}])
@pytest.mark.parametrize('sharpness', [1.0, 10.0])
def test_fp16_autocast_with_a_scaled_loss_keeps_what_upstream_keeps(network: dict[str, Any], sharpness: float) -> None:
    """Upstream 2.31 makes the loss in fp16, which a scale of 65536 takes to infinity: it is given half of that."""
    errors = autocast_errors(torch.float16, network, 65536.0, sharpness)
    assert errors['ours']['infinite'] == 0
    if errors['upstream']['infinite']:
        errors['upstream'] = autocast_errors(torch.float16, network, 32768.0, sharpness)['upstream']
    assert errors['upstream']['infinite'] == 0
    for what in ('loss', 'gradient', 'head'):
        assert errors['ours'][what] ** 0.5 <= 1.05 * errors['upstream'][what] ** 0.5, what
    assert errors['ours']['lost'] <= errors['upstream']['lost']


# where the wrapper fuses, and where it does not


@pytest.fixture
def fusings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The shapes of embed, one for each time that the wrapper fused head and loss."""
    seen = []

    def spy(embed: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen.append(tuple(embed.shape))
        return linear_cross_entropy(embed, *args, **kwargs)

    monkeypatch.setattr('xtloss.token_losses.linear_cross_entropy', spy)
    return seen


class LoRALinear(nn.Linear):
    """Adds a product of two thin matrices to the weight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.a, self.b = nn.Parameter(torch.randn(2, self.in_features)), nn.Parameter(torch.randn(self.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.t() @ self.b.t()


class OwnNetwork(TransformerWrapper):
    """A subclass, which may do anything in its forward."""


def own_network() -> TransformerWrapper:
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
    return OwnNetwork(num_tokens=11, max_seq_len=32, attn_layers=layers)


def with_head(head: Callable[[], nn.Module]) -> Callable[[], TransformerWrapper]:
    return lambda: decoder(to_logits=head())


def after(change: Callable[[TransformerWrapper], Any], **network: Any) -> Callable[[], TransformerWrapper]:
    """A network that was changed after it was built."""

    def make() -> TransformerWrapper:
        net = decoder(**network)
        change(net)
        return net

    return make


def copied(change_copy: bool) -> TransformerWrapper:
    """A copy of a network with a tied head: its head reads the weight of the original."""
    original = decoder(tie_embedding=True)
    clone = copy.deepcopy(original)
    with torch.no_grad():
        (clone if change_copy else original).token_emb.emb.weight.mul_(2)
    return clone


def doubled(_: nn.Module, __: Any, output: Any) -> Any:
    return (output[0] * 2, output[1]) if isinstance(output, tuple) else output * 2


X = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(1))
PREPENDED = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(2))

# networks and calls that are fused
PLAIN: dict[str, tuple[Callable[[], TransformerWrapper], dict[str, Any]]] = {
    'plain': (decoder, {}),
    'lens': (decoder, {'lens': torch.tensor([9, 1, 4])}),
    'bias': (with_head(lambda: nn.Linear(16, 11)), {}),
    'more words than tokens': (lambda: decoder(logits_dim=13), {}),
    'tied': (lambda: decoder(tie_embedding=True), {}),
    'tied, own scale': (lambda: decoder(tie_embedding=True, tie_embedding_scale=0.5), {}),
    'tied, l2norm': (lambda: decoder(tie_embedding=True, l2norm_embed=True), {}),
    'scale set later': (
        after(lambda net: setattr(net, 'tie_embedding_scale', 3.0), tie_embedding_scale=1.0, tie_embedding=True),
        {},
    ),
    'memory tokens': (lambda: decoder(num_memory_tokens=2), {}),
    'wider embeddings': (lambda: decoder(emb_dim=24), {}),
    'prepend_embeds': (decoder, {'prepend_embeds': PREPENDED, 'lens': torch.tensor([9, 2, 4])}),
    'hooks on the layers': (after(lambda net: net.attn_layers.register_forward_hook(doubled)), {}),
    'head replaced by a linear one': (after(lambda net: setattr(net, 'to_logits', nn.Linear(16, 11))), {}),
    'arguments that are None': (decoder, {'to_logits_kwargs': None, 'return_logit_entropies': None, 'pos': None}),
}

# networks and calls that are not, and what a ValueError says
LOGITS: dict[str, tuple[Callable[[], TransformerWrapper], dict[str, Any], str]] = {
    'deep head': (with_head(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 11))), {}, 'head is a Sequential'),
    'LoRA': (with_head(lambda: LoRALinear(16, 11)), {}, 'head is a LoRALinear'),
    'function': (lambda: decoder(to_logits=lambda x: x[..., :11]), {}, 'head is a function'),
    'hook on the head': (after(lambda net: net.to_logits.register_forward_hook(doubled)), {}, 'head has hooks'),
    'pre-hook on the head': (
        after(lambda net: net.to_logits.register_forward_pre_hook(lambda _, args: (args[0] * 2,))),
        {},
        'head has hooks',
    ),
    'backward hook on the head': (
        after(lambda net: net.to_logits.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))),
        {},
        'head has hooks',
    ),
    'backward pre-hook on the head': (
        after(lambda net: net.to_logits.register_full_backward_pre_hook(lambda m, go: (go[0] * 2,))),
        {},
        'head has hooks',
    ),
    'other forward of the head': (
        after(lambda net: setattr(net.to_logits, 'forward', lambda x: x[..., :11])),
        {},
        'head has .*another forward',
    ),
    'hook on the network': (after(lambda net: net.register_forward_hook(doubled)), {}, 'network has hooks'),
    'pre-hook on the network': (
        after(lambda net: net.register_forward_pre_hook(lambda _, args: (args[0].flip(0),))),
        {},
        'network has hooks',
    ),
    'weight_norm': (after(lambda net: parametrizations.weight_norm(net.to_logits)), {}, 'Parametrized'),
    'spectral_norm': (after(lambda net: spectral_norm(net.to_logits)), {}, 'head has hooks'),
    'pruned': (after(lambda net: prune.l1_unstructured(net.to_logits, 'weight', 5)), {}, 'head has hooks'),
    'mixture of softmax': (lambda: decoder(mixture_of_softmax=True), {}, 'mixture_of_softmax'),
    'sigsoftmax': (lambda: decoder(sigsoftmax_logits=True), {}, 'sigsoftmax_logits'),
    'looped': (lambda: decoder(looped=True, layers_pre_and_post_norm=True), {}, 'looped'),
    'attn_pool': (lambda: decoder(attn_pool=True), {}, 'attn_pool'),
    'squeeze_out_last_dim': (lambda: decoder(squeeze_out_last_dim=True), {}, 'squeeze_out_last_dim'),
    'subclassed network': (own_network, {}, 'network is a OwnNetwork'),
    'copy of a tied network': (lambda: copied(change_copy=False), {}, 'tied'),
    'copy of a tied network, changed': (lambda: copied(change_copy=True), {}, 'tied'),
    'head of another network': (
        after(lambda net: setattr(net, 'to_logits', decoder(tie_embedding=True, seed=4).to_logits), tie_embedding=True),
        {},
        'tied',
    ),
    'return_outputs': (decoder, {'return_outputs': True}, 'return_outputs'),
    'return_logit_entropies': (decoder, {'return_logit_entropies': True}, 'return_logit_entropies'),
    'to_logits_kwargs': (decoder, {'to_logits_kwargs': {}}, 'to_logits_kwargs'),
}

# the same, but x-transformers' own loss cannot be had of them, or not in every release
NO_LOSS: dict[str, tuple[Callable[[], TransformerWrapper], dict[str, Any], str]] = {
    'num_output_heads': (lambda: decoder(num_output_heads=2), {}, 'num_output_heads'),
    'use_cls_token': (lambda: decoder(use_cls_token=True), {}, 'use_cls_token'),
    'average_pool_embed': (lambda: decoder(average_pool_embed=True), {}, 'average_pool_embed'),
    'return_only_embed': (lambda: decoder(return_only_embed=True), {}, 'return_only_embed'),
    'return_logits_and_embeddings': (decoder, {'return_logits_and_embeddings': True}, 'return_logits_and_embeddings'),
    'excise_prepend_embeds': (decoder, {'excise_prepend_embeds': True}, 'excise_prepend_embeds'),
    'return_embeddings': (decoder, {'return_embeddings': True}, 'return_embeddings'),
    'an argument of the future': (decoder, {'head_temperature': 2.0}, 'head_temperature'),
    'not x-transformers': (lambda: Stub(torch.zeros(3, 9, 11)), {}, 'network is a Stub'),
}


def built(make: Callable[[], TransformerWrapper]) -> TransformerWrapper:
    """The network, from a seed; skipped where this release of x-transformers lacks an option."""
    torch.manual_seed(3)
    try:
        return make()
    except TypeError as error:
        if 'unexpected keyword argument' not in str(error):
            raise
        pytest.skip(f'x-transformers has no such option: {error}')


def loss_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def assert_like_upstream(make: Callable[[], TransformerWrapper], call: dict[str, Any], fused: str | bool) -> None:
    """Loss and gradients are upstream's, whatever the decision was."""
    ours, theirs = AutoregressiveWrapper(built(make), fused=fused), x_transformers.AutoregressiveWrapper(built(make))
    losses = []
    for wrapper in (ours, theirs):
        torch.manual_seed(5)
        losses.append(loss_of(wrapper(X, **call)))
    tolerance = 1e-4 if ours.net.looped else 1e-5
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=tolerance)
    assert_same_gradients(gradients(losses[0], ours), gradients(losses[1], theirs), tolerance)


@pytest.mark.parametrize('name', PLAIN)
def test_what_is_fused(name: str, fusings: list[tuple[Any, ...]]) -> None:
    make, call = PLAIN[name]
    call = {k: v for k, v in call.items() if k not in ('to_logits_kwargs', 'return_logit_entropies')}
    assert_like_upstream(make, call, fused=True)
    assert_like_upstream(make, call, fused='auto')
    AutoregressiveWrapper(built(make), fused='auto')(X, **PLAIN[name][1] | call)
    assert len(fusings) == 3


@pytest.mark.parametrize('name', LOGITS)
def test_what_takes_the_logits_path(name: str, fusings: list[tuple[Any, ...]]) -> None:
    make, call, reason = LOGITS[name]
    assert_like_upstream(make, call, fused='auto')
    assert not fusings
    with pytest.raises(ValueError, match=rf'^fused=True, but .*{reason}'):
        AutoregressiveWrapper(built(make), fused=True)(X, **call)


@pytest.mark.parametrize('name', NO_LOSS)
def test_what_is_not_fused_either(name: str) -> None:
    make, call, reason = NO_LOSS[name]
    net = built(make)
    assert reason in why_not_linear(net, list(call))
    with pytest.raises(ValueError, match=rf'^fused=True, but .*{reason}'):
        AutoregressiveWrapper(net, fused=True)(X, **call)


def test_false_never_fuses(fusings: list[tuple[Any, ...]]) -> None:
    AutoregressiveWrapper(decoder(), fused=False)(X)
    assert not fusings


def test_the_original_of_a_copy_is_fused_still(fusings: list[tuple[Any, ...]]) -> None:
    original = AutoregressiveWrapper(decoder(tie_embedding=True), fused=True)
    copy.deepcopy(original)
    original(X)
    assert len(fusings) == 1


def test_a_hook_that_is_removed_is_forgotten(fusings: list[tuple[Any, ...]]) -> None:
    wrapper = AutoregressiveWrapper(decoder())
    handle = wrapper.net.to_logits.register_forward_hook(doubled)
    wrapper(X)
    assert not fusings
    handle.remove()
    wrapper(X)
    assert len(fusings) == 1


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path / 'store'), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.usefixtures('process_group')
def test_a_sharded_weight_is_not_fused(tied: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    net = decoder(tie_embedding=tied)
    holder = net.token_emb.emb if tied else net.to_logits
    assert why_not_linear(net, []) is None
    holder.weight = nn.Parameter(distribute_tensor(holder.weight.detach(), init_device_mesh('cpu', (1,)), [Shard(0)]))
    assert 'DTensor' in why_not_linear(net, [])
    with pytest.raises(ValueError, match='DTensor'):
        AutoregressiveWrapper(net, fused=True)(X)


# compiled


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """`torch.compile` without graph breaks, so that no data-dependent read passes."""
    torch._dynamo.reset()
    yield lambda function, backend='aot_eager', **options: torch.compile(
        function, fullgraph=True, backend=backend, **options
    )
    torch._dynamo.reset()


MASKED = {'lens': torch.tensor([9, 3, 0]), 'loss_mask': torch.arange(9).expand(3, 9) % 4 != 1}
COMPILED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    'plain': ({}, {}, {}),
    'masked': ({}, {'loss_weighting': 'sequence'}, MASKED | {'loss_weight': torch.linspace(-1, 2, 27).view(3, 9)}),
    'tied': ({'tie_embedding': True}, {'loss_weighting': 0.3}, MASKED | {'normalizer': torch.tensor(3.0)}),
    'prepended': ({}, {}, MASKED | {'prepend_embeds': PREPENDED}),
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


@pytest.mark.parametrize('frozen', ['head', 'trunk'])
def test_compiled_with_frozen_parts(frozen: str, compiled: Callable[..., Any]) -> None:
    wrapper = AutoregressiveWrapper(decoder(), fused=True)
    for name, p in wrapper.named_parameters():
        p.requires_grad_(('to_logits' in name) == (frozen == 'trunk'))
    assert_same_gradients(gradients(compiled(wrapper)(X), wrapper), gradients(wrapper(X), wrapper), 1e-5)


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


def test_compiled_without_gradients(compiled: Callable[..., Any]) -> None:
    wrapper = AutoregressiveWrapper(decoder(), fused=True)
    with torch.no_grad():
        assert compiled(wrapper)(X).item() == pytest.approx(wrapper(X).item(), rel=1e-5)


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


def test_compiled_function(compiled: Callable[..., Any]) -> None:
    p = problem(9, 3, 7)
    loss, token_loss = compiled(Problem.solve)(p, chunk_size=2)
    assert loss.item() == pytest.approx(oracle(p).loss, rel=1e-12)
    assert_near(token_loss, oracle(p).token_loss, 1e-12)
    for _ in range(2):  # again, with retain_graph
        for name, grad in zip(NAMES, torch.autograd.grad(loss * 3, p.inputs, retain_graph=True), strict=True):
            assert_near(grad, 3 * oracle(p).grads[name], 1e-12)


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
    torch.library.opcheck(compiled_loss_and_grads, arguments)
