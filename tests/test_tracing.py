"""Plain Python at trace time: what is asked of an object is asked of that very object, once for each compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import x_transformers
from networks import decoder
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from xtloss import AutoregressiveWrapper, upgrade_
from xtloss.tracing import constant

X = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(1))
asked: list[Any] = []


@constant
def size(module: nn.Module) -> int | None:
    """What torch.compile could not trace: it reads tensors and writes to a list."""
    asked.append(module)
    return int(module.weight.sum().item()) if hasattr(module, 'weight') else None


@constant
def kind(module: nn.Module) -> str:
    """What reads no tensor: under torch.export without a compiler they have no values."""
    asked.append(module)
    return type(module).__name__


class Doubles(nn.Linear):
    """Multiplies by two, by its name."""

    def forward(self, x: Tensor) -> Tensor:
        """2 · x."""
        return x * (2 if kind(self) == 'Doubles' else 1)


class Sized(nn.Module):
    """Multiplies by what it found out about a part of itself."""

    def __init__(self, weight: float) -> None:
        """Its part holds nothing but `weight`."""
        super().__init__()
        self.part = nn.Module()
        self.part.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        """x · size."""
        return x * (size(self.part) or 1)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing asked, nothing compiled."""
    torch._dynamo.reset()
    asked.clear()
    yield
    torch._dynamo.reset()


def whole(module: nn.Module, counter: Any = 'eager') -> Callable[..., Any]:
    return torch.compile(module, fullgraph=True, backend=counter)


def test_asked_once_for_each_compilation() -> None:
    module, counter = Sized(3.0), CompileCounterWithBackend('eager')
    compiled = whole(module, counter)
    assert [compiled(torch.ones(())).item() for _ in range(3)] == [3, 3, 3]
    assert asked == [module.part]
    assert counter.frame_count == 1
    assert module(torch.ones(())).item() == 3  # not compiled
    assert asked == [module.part] * 2


def test_another_object_compiles_anew() -> None:
    module, other = Sized(3.0), Sized(5.0)
    compiled = whole(module)
    assert compiled(torch.ones(())).item() == 3
    module.part = other.part
    assert compiled(torch.ones(())).item() == 5
    module.part = nn.Module()
    assert compiled(torch.ones(())).item() == 1
    assert whole(other)(torch.ones(())).item() == 5


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_another_object(duplicate: Callable[[Sized], Sized]) -> None:
    module = Sized(3.0)
    whole(module)(torch.ones(()))
    copied = duplicate(module)
    copied.part.weight.data.fill_(7)
    assert whole(copied)(torch.ones(())).item() == 7
    assert copied.state_dict().keys() == Sized(3.0).state_dict().keys()


@pytest.mark.parametrize('strict', [True, False])
def test_exported(strict: bool) -> None:
    module = Doubles(2, 2)
    exported = torch.export.export(module, (torch.ones(2),), strict=strict).module()
    assert exported(torch.ones(2)).tolist() == [2, 2]
    assert asked
    assert all(type(module) is Doubles for module in asked)


def plain(**options: Any) -> nn.Module:
    return AutoregressiveWrapper(decoder(**options), fused='auto')


def upgraded(**options: Any) -> nn.Module:
    return upgrade_(x_transformers.AutoregressiveWrapper(decoder(**options)))


@pytest.mark.usefixtures('whole_graphs')
@pytest.mark.parametrize('made', [plain, upgraded])
def test_a_wrapper_whose_network_is_replaced(made: Callable[..., nn.Module]) -> None:
    wrapper = made()
    compiled = whole(wrapper)
    for net in (wrapper.net, decoder(to_logits=nn.Sequential(nn.Linear(16, 11))), decoder(seed=1)):
        wrapper.net = net
        assert compiled(X).item() == pytest.approx(wrapper(X).item(), rel=1e-5)
