"""A batch of no rows: one row in which nothing counts stands in for it, so that the loss is 0 and in the graph.

x-transformers cannot run on no rows, and a data-parallel rank that got none must take part in the backward all the
same. The row moves no buffer and no random stream.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar('T')


def add_row(value: Any) -> Any:
    """Give each tensor of no rows in a tree one: zeros, or True where it is a mask."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 0:
        row = torch.full((1, *value.shape[1:]), value.dtype == torch.bool, dtype=value.dtype, device=value.device)
        return torch.cat((value, row))
    return _map(add_row, value)


def drop_row(value: Any) -> Any:
    """Take the row of each tensor in a tree away again, by selection: what lies there does not matter."""
    if isinstance(value, Tensor):
        return value[:0] if value.ndim > 0 and value.shape[0] == 1 else value
    return _map(drop_row, value)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: function(element) for key, element in value.items()}
    if isinstance(value, tuple) and hasattr(value, '_fields'):
        return type(value)(*map(function, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(function, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value))
        return dataclasses.replace(value, **{name: function(getattr(value, name)) for name in fields})
    return value


def on_a_stand_in(wrapper: Any, loss: Callable[..., T], x: Tensor, given: dict[str, Any]) -> T:
    """Return what ``loss(x, given, network)`` returns of a batch of no rows, though the network cannot run on it.

    `given` are the arguments of a wrapper's forward. Z is 0 where it gives none.
    """
    nothing = torch.zeros(1, x.shape[1], dtype=torch.bool, device=x.device)
    zero = torch.zeros((), device=x.device)
    rows = {name: add_row(value) for name, value in given.items()}
    given = {'normalizer': zero, **rows, 'loss_mask': nothing}
    with kept_random_streams(wrapper):
        result: T = drop_row(loss(add_row(x), given, with_copied_buffers(wrapper.net)))
    return result


@contextmanager
def kept_random_streams(module: nn.Module) -> Iterator[None]:
    """Put the random streams of Python, of the CPU and of the module's devices back as they were."""
    if torch.compiler.is_compiling():  # a compiled graph draws from a stream of its own
        yield
        return
    devices = {p.device for p in module.parameters() if p.device.type not in ('cpu', 'meta')}
    kind = next(iter(devices)).type if devices else 'cuda'
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=list(devices), device_type=kind):
            yield
    finally:
        random.setstate(state)


def with_copied_buffers(net: nn.Module) -> Callable[..., Any]:
    """Return what calls a network as it is, but writes into copies of its buffers."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    if not buffers:
        return net
    return lambda *args, **kwargs: torch.func.functional_call(net, buffers, args, kwargs)
