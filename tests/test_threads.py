"""Two threads that train one wrapper, each with batches of its own."""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from modes import KINDS, batch, ours
from networks import ScaledLinear, assert_same_gradients, gradients
from torch import Tensor


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures('eager_threads')
@pytest.mark.parametrize('fused', ['auto', False])
@pytest.mark.parametrize('kind', KINDS)
def test_two_threads(kind: str, fused: bool | str) -> None:
    """Each with batches of its own, through one wrapper; packed rows for the first time in both at once."""
    calls = [batch(kind, seed=seed) for seed in range(6)]

    def make() -> Any:
        wrapper = ours(kind, fused=fused)
        if kind == 'packed':
            linear = wrapper.net.attn_layers.layers[0][1].to_out
            scaled = ScaledLinear(linear.in_features, linear.out_features, bias=False).double()
            scaled.load_state_dict(linear.state_dict())
            wrapper.net.attn_layers.layers[0][1].to_out = scaled
        return wrapper

    def run(wrapper: Any, call: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = wrapper(**call)
        return {'loss': loss.detach(), **gradients(loss, wrapper)}

    alone = make()
    want = [run(alone, call) for call in calls]
    dtype = torch.get_default_dtype()
    for _ in range(4):
        wrapper = make()
        objects = {name: (type(m), id(m), set(vars(m))) for name, m in wrapper.named_modules()}
        parameters = {name: id(p) for name, p in wrapper.named_parameters()}
        together = threading.Barrier(2)

        def half(first: int, wrapper: Any = wrapper, together: threading.Barrier = together) -> list[dict[str, Tensor]]:
            together.wait()
            return [run(wrapper, call) for call in calls[first::2]]

        with ThreadPoolExecutor(2) as pool:
            halves = list(pool.map(half, range(2)))
        for index, found in enumerate(want):
            got = halves[index % 2][index // 2]
            assert got['loss'].item() == pytest.approx(found['loss'].item(), rel=1e-12)
            assert_same_gradients(got, found, 1e-9)
        assert {name: (type(m), id(m), set(vars(m))) for name, m in wrapper.named_modules()} == objects
        assert {name: id(p) for name, p in wrapper.named_parameters()} == parameters
        assert all(torch.equal(p, alone.get_parameter(name)) for name, p in wrapper.named_parameters())
        assert torch.get_default_dtype() == dtype
