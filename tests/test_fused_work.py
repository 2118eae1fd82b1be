"""Head and loss in one do what is needed and no more: products, memory, operations, host syncs."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import x_transformers
from fused_problem import LOOPS, NAMES, Operations, assert_near, oracle, problem, use_loop
from hypothesis import example, given
from hypothesis import strategies as st
from networks import WEIGHTINGS, decoder, gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xtloss import AutoregressiveWrapper
from xtloss.losses.cross_entropy import cross_entropy
from xtloss.losses.linear_cross_entropy import default_chunk_size


@pytest.mark.parametrize(('loop', 'dtype'), [*itertools.product(LOOPS, [torch.float64]), (LOOPS[1], torch.float16)])
@pytest.mark.parametrize('needed', list(itertools.product([True, False], repeat=3)))
def test_frozen_parts_cost_nothing(
    needed: tuple[bool, bool, bool], loop: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_loop(monkeypatch, loop)
    v = 65
    p = problem(8, 16, v, dtype=dtype)
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
            assert_near(grad, oracle(p).grads[name], 1e-12 if dtype == torch.float64 else 6e-3)


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


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_logits_are_written_by_columns_of_whole_cache_lines(dtype: torch.dtype) -> None:
    n, d, v, chunk = 50, 8, 509, 21
    written: list[Tensor] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.out and out.shape[1] == v:
                written.append(out)
            return out

    with Products():
        problem(n, d, v, dtype=dtype).solve(chunk_size=chunk)
    assert [len(logits) for logits in written] == [21, 21, 8]
    for logits in written:
        down, along = logits.stride()
        assert down == 1
        assert chunk <= along < chunk + 64 // dtype.itemsize
        assert along * dtype.itemsize % 64 == logits.data_ptr() % 64 == 0


def test_logits_are_read_in_quarters() -> None:
    """Forward and backward, so that what is made beside them is no larger than one."""
    logits, target = torch.randn(99, 7, requires_grad=True), torch.randint(0, 7, (99,))
    with Operations(7) as seen:
        cross_entropy(logits, target, torch.ones(99).bool()).sum().backward()
    assert seen.names['exp_'] == 4 + 4


@example(n=4096, v=33_554, d=512, dtype=torch.float32, accelerated=False)  # 500 rows fit, 512 do not
@example(n=4096, v=1_000_000, d=8, dtype=torch.float32, accelerated=False)  # one block is too much
@example(n=4096, v=60_000, d=1024, dtype=torch.float32, accelerated=True)  # the gradient is larger than 64 MiB
@given(
    st.integers(0, 20_000),
    st.integers(1, 60_000),
    st.integers(1, 1024),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    st.booleans(),
)
def test_default_chunks_are_bounded_alike_and_as_few_as_can_be(
    n: int, v: int, d: int, dtype: torch.dtype, accelerated: bool
) -> None:
    """At most 64 MiB, or the gradient of the weight; a CPU goes beyond 64 MiB for the sake of 384 rows alone."""
    weight = torch.empty(v, d, dtype=dtype, device='meta')

    def fits(rows: int) -> bool:
        size, gradient = rows * v * dtype.itemsize, v * d * dtype.itemsize
        return rows == 1 or size <= 64 * 2**20 or (size <= gradient and (accelerated or rows <= 384))

    rows = default_chunk_size(n, weight, dtype, accelerated=accelerated)
    assert fits(rows)
    if not fits(64):
        assert not fits(rows + 1)
        return
    assert rows % 64 == 0 < rows
    chunks = max(1, -(-n // rows))
    assert (rows - 64) * chunks < max(n, 1)  # none is smaller than the others by more than it must
    if chunks > 1:
        assert not fits(-(-n // (64 * (chunks - 1))) * 64)


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
