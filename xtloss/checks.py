"""Bad input is refused before the network runs: type and dtype first, then shape, device and range.

Dims: b batch, n positions, d features. No check reads a tensor's values, which would stall a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {'bool': (torch.bool,), 'integer': INTEGERS, 'floating point': FLOATS}

# the per-token and per-row arguments all wrappers share: what they are made of, how many dims of x they may have
ARGUMENTS: dict[str, tuple[str, tuple[int, ...]]] = {
    'lens': ('integer', (1,)),
    'mask': ('bool', (2,)),
    'loss_mask': ('bool', (2,)),
    'loss_weight': ('floating point', (1, 2)),
    'seq_start_pos': ('integer', (1,)),
    'segment_ids': ('integer', (2,)),
}


def check_batch(
    x: Tensor,
    *,
    kind: str = 'integer',
    normalizer: Any = None,
    counts: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
    **arguments: Any,
) -> None:
    """Check x, (b, n) of token ids or (b, n, d) of features, the arguments named in `ARGUMENTS`, and `normalizer`.

    `counts` are whole numbers >= 1. `notes` end the message about the shape of an argument.

    Raises:
        TypeError: an argument of the wrong type or dtype; these are looked for first.
        ValueError: of the wrong shape, device or range. Every message names the argument, the rule and what came.

    """
    given = {name: value for name, value in arguments.items() if value is not None}

    check_dtype('x', x, kind)
    for name, value in given.items():
        check_dtype(name, value, ARGUMENTS[name][0])
    check_normalizer_type(normalizer)
    for name, value in (counts or {}).items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f'{name} must be int, got {type(value).__name__}')

    dims = 'b n' if kind == 'integer' else 'b n d'
    if x.ndim != len(dims.split()) or x.shape[1] == 0:
        raise ValueError(f'x must have shape ({", ".join(dims.split())}) with n >= 1, got {tuple(x.shape)}')

    for name, value in given.items():
        shapes = [tuple(x.shape[:ndim]) for ndim in ARGUMENTS[name][1]]
        if tuple(value.shape) not in shapes:
            note = (notes or {}).get(name, '')
            raise ValueError(
                f'{name} must have shape {" or ".join(map(str, shapes))} like x, got {tuple(value.shape)}{note}'
            )
        if value.device != x.device:
            raise ValueError(f'{name} must be on {x.device} like x, got {value.device}')
    check_normalizer_range(normalizer, x.device)
    for name, value in (counts or {}).items():
        if value < 1:
            raise ValueError(f'{name} must be >= 1, got {value}')


def refuse_arguments(arguments: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raise ValueError, with the reason, for an argument that is given and may not be."""
    for name, reason in reasons.items():
        if arguments.get(name) is not None:
            raise ValueError(f'{name} cannot be given here: {reason}')


def check_dtype(name: str, value: Any, kind: str) -> None:
    """Raise TypeError unless `value` is a tensor of this kind of dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f'{name} must be {kind}, a tensor, got {type(value).__name__}')
    if value.dtype not in DTYPES[kind]:
        raise TypeError(f'{name} must be {kind}, got {dtype_name(value.dtype)}')


def check_normalizer_type(normalizer: Any) -> None:
    """Raise TypeError unless it is None, a number, or a tensor of numbers."""
    if isinstance(normalizer, Tensor):
        if normalizer.dtype not in FLOATS + INTEGERS:
            raise TypeError(f'normalizer must be floating point or integer, got {dtype_name(normalizer.dtype)}')
    elif normalizer is not None and (isinstance(normalizer, bool) or not isinstance(normalizer, (int, float))):
        raise TypeError(f'normalizer must be a number or a 0-dim tensor, got {type(normalizer).__name__}')


def check_normalizer_range(normalizer: Tensor | float | None, device: torch.device) -> None:
    """Raise ValueError unless it is None, a finite number > 0, or a 0-dim tensor on the device or on the CPU."""
    if isinstance(normalizer, Tensor):
        if normalizer.ndim > 0:
            raise ValueError(f'normalizer must have shape (), got {tuple(normalizer.shape)}')
        if normalizer.device not in (device, torch.device('cpu')):
            raise ValueError(f'normalizer must be on {device} like x, got {normalizer.device}')
    elif normalizer is not None and not 0 < normalizer < math.inf:
        raise ValueError(f'normalizer must be > 0 and finite, got {normalizer}')


def dtype_name(dtype: torch.dtype) -> str:
    """float32, as people write it."""
    return str(dtype).removeprefix('torch.')


def check_flags(**flags: Any) -> None:
    """Raise TypeError for what is no bool."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f'{name} must be bool, got {type(value).__name__}')


def check_prepend_embeds(prepend_embeds: Any, x: Tensor, width: int | None) -> None:
    """Raise TypeError or ValueError unless it is (b, p, d), floating point, and as wide as the network's embeddings."""
    check_dtype('prepend_embeds', prepend_embeds, 'floating point')
    d = 'd' if width is None else width
    shape = tuple(prepend_embeds.shape)
    if len(shape) != 3 or shape[0] != x.shape[0] or (width is not None and shape[2] != width):
        raise ValueError(f'prepend_embeds must have shape ({x.shape[0]}, p, {d}), got {shape}')
    if prepend_embeds.device != x.device:
        raise ValueError(f'prepend_embeds must be on {x.device} like x, got {prepend_embeds.device}')
