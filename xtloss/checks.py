"""Bad input is refused before the network runs: type and dtype first, then shape, device and range.

Dims: b batch, n positions, p prepended embeddings, d features. No check reads a tensor's values, which would stall a
GPU. Numbers may be numpy's, which is not imported for it: its scalars are registered as `numbers`, but for `bool_`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

# torch stores these, and computes little but with the signed integers of the same bits
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *SIGNED)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT32 = torch.finfo(torch.float32)
BUILT_IN = (int, float)  # tuples, as torch.compile knows no unions in torch 2.6
NUMBERS = (*BUILT_IN, Real, torch.SymInt, torch.SymFloat)
WHOLE_NUMBERS = (int, Integral, torch.SymInt)
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
    prepend_embeds: Any = None,
    width: int | None = None,
    counts: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
    **arguments: Any,
) -> None:
    """Check x, (b, n) of token ids or (b, n, d) of features, the arguments named in `ARGUMENTS`, and those here.

    `prepend_embeds` is (b, p, width), of any width where it is None. `counts` are whole numbers >= 1, `flags` bools.
    `notes` end the message about the shape of an argument.

    Raises:
        TypeError: an argument of the wrong type or dtype; these are looked for first.
        ValueError: of the wrong shape, device or range. Every message names the argument, the rule and what came.

    """
    given = {name: value for name, value in arguments.items() if value is not None}
    counts = counts or {}

    check_dtype('x', x, kind)
    for name, value in given.items():
        check_dtype(name, value, ARGUMENTS[name][0])
    if prepend_embeds is not None:
        check_dtype('prepend_embeds', prepend_embeds, 'floating point')
    if normalizer is not None:
        check_number_type('normalizer', normalizer)
    for name, value in counts.items():
        check_integer(name, value)
    for name, value in (flags or {}).items():
        check_flag(name, value)

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
        check_device(name, value, x.device)
    if prepend_embeds is not None:
        check_prepend_embeds(prepend_embeds, x, width)
    check_normalizer_range(normalizer, x.device)
    for name, value in counts.items():
        check_at_least_one(name, value)


def widened(value: Any) -> Any:
    """The same, or all in a dict, tensors of integers as int64, with which torch can compute, and nothing wraps."""
    if isinstance(value, dict):
        return {name: widened(element) for name, element in value.items()}
    return value.long() if isinstance(value, Tensor) and value.dtype in INTEGERS else value


def refuse_arguments(arguments: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raise ValueError, with the reason, for an argument that is given and may not be."""
    for name, reason in reasons.items():
        if arguments.get(name) is not None:
            raise ValueError(f'{name} cannot be given here: {reason}')


def check_known(function: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError, as Python does and with a suggestion, for a keyword that `function` does not know."""
    known = set(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            raise TypeError(
                f"{function} got an unexpected keyword argument '{name}'" + (f', is it {close[0]}?' if close else '')
            )


def keywords(*functions: Callable[..., Any]) -> frozenset[str]:
    """The names under which arguments can be handed to one of these functions, whatever their ``**kwargs`` take."""
    return frozenset(
        name
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != 'self'
    )


def forward_keywords(*modules: Any) -> frozenset[str] | None:
    """The names that the forwards of these modules of x-transformers take; None if one is somebody else's."""
    forwards = []
    for module in modules:
        own = [vars(cls)['forward'] for cls in type(module).__mro__ if 'forward' in vars(cls)]
        if not own or not own[0].__module__.startswith('x_transformers.'):
            return None  # which may take anything
        forwards += own
    return keywords(*forwards)


def check_module(name: str, value: Any) -> None:
    """Raise TypeError unless it is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f'{name} must be a torch.nn.Module, got {type(value).__name__}')


# tensors


def check_dtype(name: str, value: Any, kind: str) -> None:
    """Raise TypeError unless `value` is a dense tensor of this kind of dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f'{name} must be {kind}, a tensor, got {type(value).__name__}')
    if value.dtype not in DTYPES[kind]:
        raise TypeError(f'{name} must be {kind}, got {dtype_name(value.dtype)}')
    check_dense(name, value)


def check_dense(name: str, value: Tensor) -> None:
    """Raise TypeError for a tensor that is sparse or nested."""
    if value.is_nested or value.layout != torch.strided:
        layout = 'nested' if value.is_nested else str(value.layout).removeprefix('torch.')
        raise TypeError(f'{name} must be a dense tensor, got a {layout} one')


def check_device(name: str, value: Tensor, device: torch.device, like: str = 'x') -> None:
    """Raise ValueError unless the tensor is on this device."""
    if value.device != device:
        raise ValueError(f'{name} must be on {device} like {like}, got {value.device}')


def check_prepend_embeds(embeds: Tensor, x: Tensor, width: int | None) -> None:
    """Raise ValueError unless these are (b, p, width) embeddings beside x, of any width where it is None."""
    b = x.shape[0]
    if embeds.ndim != 3 or embeds.shape[0] != b or width not in (None, embeds.shape[2]):
        shape = f'({b}, p, {"d" if width is None else width})'
        raise ValueError(f'prepend_embeds must have shape {shape}, got {tuple(embeds.shape)}')
    check_device('prepend_embeds', embeds, x.device)


def check_key_masks(x: Tensor, masks: Mapping[str, Tensor], prepended: int, least: int, most: int | None) -> None:
    """Raise ValueError for a mask of the keys, bool, that is not (b, `least` to `most`); `prepend_mask` is (b, p)."""
    b = x.shape[0]
    for name, mask in masks.items():
        low, high = (prepended, prepended) if name == 'prepend_mask' else (least, most)
        if (
            mask.ndim != 2
            or mask.shape[0] != b
            or not low <= mask.shape[1] <= (mask.shape[1] if high is None else high)
        ):
            rule = f'({b}, {low})' if low == high else f'({b}, {low} or more)'
            raise ValueError(f'{name} must have shape {rule}, got {tuple(mask.shape)}')
        check_device(name, mask, x.device)


def check_attn_mask(attn_mask: Tensor, x: Tensor) -> None:
    """Raise ValueError unless it has the dims of i queries, k keys, and h heads and b rows where it differs there."""
    if not 2 <= attn_mask.ndim <= 4:
        raise ValueError(f'attn_mask must have shape (i, k), (h, i, k) or (b, h, i, k), got {tuple(attn_mask.shape)}')
    check_device('attn_mask', attn_mask, x.device)


def dtype_name(dtype: torch.dtype) -> str:
    """float32, as people write it."""
    return str(dtype).removeprefix('torch.')


# numbers


def is_flag(value: Any) -> TypeGuard[bool]:
    """A bool of Python or of numpy, whose ``bool_`` is no number to either."""
    return isinstance(value, bool) or (str(getattr(value, 'dtype', '')) == 'bool' and value.ndim == 0)


def is_number(value: Any) -> TypeGuard[float]:
    """A real number of Python or of numpy; no bool, no tensor."""
    return isinstance(value, NUMBERS) and not isinstance(value, bool)


def is_integer(value: Any) -> TypeGuard[int]:
    """An integer of Python or of numpy; no bool, no tensor."""
    return isinstance(value, WHOLE_NUMBERS) and not isinstance(value, bool)


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless it is a bool."""
    if not is_flag(value):
        raise TypeError(f'{name} must be bool, got {type(value).__name__}')


def check_integer(name: str, value: Any) -> None:
    """Raise TypeError unless it is an integer."""
    if not is_integer(value):
        raise TypeError(f'{name} must be int, got {type(value).__name__}')


def check_at_least_one(name: str, value: int) -> None:
    """Raise ValueError unless the integer is >= 1, and one that a tensor may have as its size."""
    if not 1 <= value < 2**63:
        raise ValueError(f'{name} must be >= 1{"" if value < 1 else " and less than 2^63"}, got {value}')


def check_number_type(name: str, value: Any) -> None:
    """Raise TypeError unless it is a number, or a tensor of numbers."""
    if not isinstance(value, Tensor):
        if not is_number(value):
            raise TypeError(f'{name} must be a number or a 0-dim tensor, got {type(value).__name__}')
        return
    if value.dtype not in FLOATS + INTEGERS:
        raise TypeError(f'{name} must be floating point or integer, got {dtype_name(value.dtype)}')
    check_dense(name, value)


def check_normalizer_range(normalizer: Tensor | float | None, device: torch.device) -> None:
    """Raise ValueError unless it is None, a finite number > 0, or a 0-dim tensor on the device or on the CPU."""
    if isinstance(normalizer, Tensor):
        if normalizer.ndim > 0:
            raise ValueError(f'normalizer must have shape (), got {tuple(normalizer.shape)}')
        if normalizer.device not in (device, torch.device('cpu')):
            raise ValueError(f'normalizer must be on {device} like x, got {normalizer.device}')
    elif normalizer is not None and not FLOAT32.tiny <= plain(normalizer) <= FLOAT32.max:  # traced, unlike isfinite
        raise ValueError(f'normalizer must be > 0 and finite in float32, got {normalizer}')


def plain(number: Any) -> float:
    """The number as one of Python's, which can be compared with all others: numpy's float16 cannot."""
    if isinstance(number, BUILT_IN):
        return number
    return int(number) if isinstance(number, Integral) else float(number)
