"""The loop of accelerators, forced on a CPU: few compilations, else one warning; `test_fused.py` has its values."""

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fused_problem import NAMES, Problem, assert_near, assert_right, has_compiler, oracle, problem, use_loop
from torch._dynamo.testing import CompileCounterWithBackend

from xtloss.losses import chunked
from xtloss.losses.cross_entropy import softplus

COMPILED = chunked.compiled


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Any device is an accelerator, unless it lacks a compiler."""
    chunked.has_compiler.cache_clear()
    use_loop(monkeypatch, 'accelerator')
    monkeypatch.setattr(chunked, 'is_accelerated', lambda embed: chunked.has_compiler(embed.device.type))
    yield monkeypatch
    chunked.has_compiler.cache_clear()


@pytest.mark.filterwarnings('ignore')  # torch's own, of its compiler
@pytest.mark.skipif(not has_compiler(), reason='no compiler')
@pytest.mark.parametrize(('dtype', 'bias'), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)])
def test_really_compiled(dtype: torch.dtype, bias: bool, forced: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    forced.setattr(chunked, 'compiled', COMPILED)
    assert_right(dtype, bias, 37, 16, 65, 8, roundings=6)
    torch._dynamo.reset()


def test_token_counts_do_not_compile_again(forced: pytest.MonkeyPatch) -> None:
    """Ten batches, of chunks that end with shorter ones: two compilations of each function at most."""
    torch._dynamo.reset()
    counters: dict[Callable[..., Any], CompileCounterWithBackend] = {}

    @functools.cache
    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        counters[function] = CompileCounterWithBackend('eager')
        return torch.compile(function, backend=counters[function], dynamic=True, fullgraph=True)

    forced.setattr(chunked, 'compiled', compiled)
    for n in (40, 37, 64, 1, 2, 33, 100, 65, 7, 50):
        assert_right(torch.float32, False, n, 8, 33, 32)
    assert counters.keys() == {softplus, chunked.row_terms, chunked.write_gradient}
    assert all(counter.frame_count <= 2 for counter in counters.values())
    torch._dynamo.reset()


@pytest.mark.slow
def test_beyond_the_limit_of_compilations(forced: pytest.MonkeyPatch) -> None:
    """Where dynamo compiles no more for other dtypes, biases and chunks of one token, they run, with no warning."""
    torch._dynamo.reset()
    compiled = torch.compile
    forced.setattr(torch, 'compile', lambda function, **options: compiled(function, backend='eager', **options))
    forced.setattr(chunked, 'compiled', functools.cache(COMPILED.__wrapped__))
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        for dtype, bias in itertools.product([torch.float32, torch.bfloat16, torch.float16], [False, True]):
            assert_right(dtype, bias, 9, 3, 7, 4, roundings=6)
    assert chunked.has_compiler('cpu')
    torch._dynamo.reset()


def test_no_compiler_is_said_once(forced: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def fails(function: Callable[..., Any]) -> Callable[..., Any]:
        calls['compiled'] += 1
        raise RuntimeError('Cannot find a working triton installation')

    forced.setattr(chunked, 'compiled', fails)
    with pytest.warns(RuntimeWarning, match='no compiler for cpu: .*Cannot find a working triton'):
        assert_right(torch.float32, True, 9, 3, 7, 4)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert_right(torch.bfloat16, True, 9, 3, 7, 4, roundings=6)
    assert calls['compiled'] == 1


@pytest.mark.parametrize(
    ('error', 'trivial'), [(RuntimeError, False), (torch.OutOfMemoryError, False), (torch.OutOfMemoryError, True)]
)
def test_other_errors_are_no_lack_of_a_compiler(
    error: type[Exception], trivial: bool, forced: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error('it failed')

    forced.setattr(chunked, 'compiled', lambda function: function if function is softplus and not trivial else fails)
    with pytest.raises(error, match='it failed'):
        problem(9, 3, 7).solve()
    forced.setattr(chunked, 'compiled', lambda function: function)
    assert chunked.has_compiler('cpu')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_logits_stay_in_the_dtype_of_the_product(dtype: torch.dtype, forced: pytest.MonkeyPatch) -> None:
    """And their gradient is written over them, but in float16, whose products run in float32."""
    seen = []
    forced.setattr(chunked, 'compiled', lambda function: lambda *args: (seen.append(args), function(*args))[1])
    problem(8, 4, 65, dtype=dtype).solve()
    (z, *_), (again, *_, out) = (args for args in seen if len(args) > 1)
    assert z is again
    assert z.dtype == dtype
    assert out is z if dtype != torch.float16 else out.dtype == torch.float32


@pytest.mark.usefixtures('forced')
def test_inside_a_compiled_graph() -> None:
    """There it is one node, whose loop runs when the graph does."""
    torch._dynamo.reset()
    p = problem(37, 8, 65, dtype=torch.float32)
    loss, _ = torch.compile(Problem.solve, backend='aot_eager', fullgraph=True)(p)
    for name, grad in zip(NAMES, torch.autograd.grad(loss, p.inputs), strict=True):
        assert_near(grad, oracle(p).grads[name], 1e-5)
    torch._dynamo.reset()
