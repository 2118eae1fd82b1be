"""Copies of a wrapper, by whatever way, are wrappers of their own, with tied heads too: files, moving averages."""

import copy
import pickle
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import torch
from modes import KINDS, batch, ours
from networks import assert_same_gradients, gradients
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

kinds = pytest.mark.parametrize('kind', KINDS)


def assert_same(got: Tensor, wrapper: nn.Module, want: Tensor, other: nn.Module, tolerance: float = 1e-9) -> None:
    """Two losses, each of a module with parameters of the same names, and their gradients."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0, check_dtype=False)
    assert_same_gradients(gradients(got, wrapper), gradients(want, other), tolerance, floor=1e-3)


def saved(value: Any, **options: Any) -> Any:
    file = BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def reloaded(wrapper: Any, kind: str, network: dict[str, Any]) -> Any:
    other = ours(kind, **network)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state_dict(saved(wrapper.state_dict(), weights_only=True))
    return other


COPIES: dict[str, Callable[[Any, str, dict[str, Any]], Any]] = {
    'deepcopy': lambda wrapper, *_: copy.deepcopy(wrapper),
    'deepcopy of a copy': lambda wrapper, *_: copy.deepcopy(copy.deepcopy(wrapper)),
    'inside a parent': lambda wrapper, *_: copy.deepcopy(nn.ModuleList([wrapper]))[0],
    'pickle': lambda wrapper, *_: pickle.loads(pickle.dumps(wrapper)),
    'torch.save': lambda wrapper, *_: saved(wrapper, weights_only=False),
    'state_dict': reloaded,
    'AveragedModel': lambda wrapper, *_: AveragedModel(wrapper).module,
}


CASES = [(kind, False, 'auto') for kind in KINDS]
CASES += [(kind, True, fused) for kind in KINDS if kind != 'continuous' for fused in (True, False)]


@pytest.mark.parametrize(('kind', 'tied', 'fused'), CASES)
@pytest.mark.parametrize('how', COPIES)
def test_copies(kind: str, tied: bool, fused: str | bool, how: str) -> None:
    """Of a wrapper that was used; its options go along, and neither moves or gets gradients when the other does."""
    # of flash attention pickle cannot take a part
    network: dict[str, Any] = {'layers_attn_flash': False, **({'tie_embedding': True} if tied else {})}
    wrapper, call = ours(kind, fused=fused, **network), batch(kind)
    before = wrapper(**call)
    before.backward()
    other = COPIES[how](wrapper, kind, network)
    assert_same(other(**call), other, wrapper(**call), wrapper, 1e-12)
    assert not gradients(other(**call), wrapper)
    assert list(other.state_dict()) == list(wrapper.state_dict())
    with torch.no_grad():
        for p in wrapper.parameters():
            p.mul_(1.5)
    torch.testing.assert_close(other(**call), before, rtol=1e-12, atol=0)
    wrapper.loss_weighting = 'sequence'
    assert how == 'state_dict' or COPIES[how](wrapper, kind, network).loss_weighting == 'sequence'
    assert other.loss_weighting is None


@kinds
def test_moving_averages(kind: str) -> None:
    """The average after three steps is the one worked out by hand, and its loss that of a wrapper with such weights."""
    wrapper, call, decay = ours(kind), batch(kind), 0.75
    average = AveragedModel(wrapper, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer, by_hand = torch.optim.SGD(wrapper.parameters(), lr=0.5), []
    for step in range(3):
        wrapper(**call).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(wrapper)
        now = [p.detach().clone() for p in wrapper.parameters()]
        by_hand = now if step == 0 else [decay * a + (1 - decay) * p for a, p in zip(by_hand, now, strict=True)]
    other = ours(kind)
    with torch.no_grad():
        for p, a in zip(other.parameters(), by_hand, strict=True):
            p.copy_(a)
    assert_same(average(**call), average.module, other(**call), other)
