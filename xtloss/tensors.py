"""Tensors, and trees of them: dicts, lists, tuples and dataclasses, as a network takes and returns them."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from xtloss.arguments import INTEGERS


def has_values(t: Tensor) -> bool:
    """Tell whether there is something to read: neither on the meta device, nor where shapes alone are traced."""
    return not t.is_meta and not is_fake(t)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a tree of dicts, lists, tuples and dataclasses with each tensor in it replaced by the function's."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = (map_tensors(function, part) for part in value)
        return type(value)(*parts) if hasattr(value, '_fields') else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{field.name: map_tensors(function, getattr(value, field.name)) for field in fields(value)}
        )
    return value


def widened(t: Tensor) -> Tensor:
    """Return integers as int64, with which torch can compute, and nothing wraps; other tensors as they are."""
    return t.long() if t.dtype in INTEGERS else t


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of losses, weights and sums: float32, or wider where the logits are wider."""
    return torch.promote_types(dtype, torch.float32)
