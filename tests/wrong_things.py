"""Wrong things to hand to an argument, by what the argument is, each with the error and the message it must give.

In a message `{}` is the name of the argument, and … whatever stands there. A wrong value stands for its kind.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ALL_DTYPES = [
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.complex128,
]  # fmt: skip
KINDS = {'bool': ALL_DTYPES[:1], 'integer': ALL_DTYPES[1:9], 'floating point': ALL_DTYPES[9:13]}
NOTHING_LIKE_IT = ['text', b'bytes', 1j, [1], (1,), {'a': 1}, {1}, range(2), np.ones(2), object(), int, len]
NO_NAMES = [value for value in NOTHING_LIKE_IT if not isinstance(value, str)]
NUMBERS = [3, 1.5, np.int64(3), np.float32(1.5), Fraction(1, 2)]
FLAGS = [True]


class Wrong(NamedTuple):
    """A value, and what it must raise."""

    value: Any
    error: type[Exception]
    message: str


def of_type(rule: str, *values: Any) -> list[Wrong]:
    """Objects of a wrong type."""
    return [Wrong(value, TypeError, f'{{}} must be {rule}, got {type(value).__name__}') for value in values]


def of_value(rule: str, *values: Any) -> list[Wrong]:
    """Numbers or names out of range."""
    return [Wrong(value, ValueError, f'{{}} must be {rule}, got {value}') for value in values]


def of_dtype(rule: str, good: Tensor, *dtypes: torch.dtype) -> list[Wrong]:
    """Tensors of wrong dtypes, sparse and nested ones."""
    wrong = [
        Wrong(good.to(dtype), TypeError, f'{{}} must be {rule}, got {str(dtype).removeprefix("torch.")}')
        for dtype in dtypes
    ]
    wrong.append(Wrong(good.to_sparse(), TypeError, '{} must be a dense tensor, got a sparse_coo one'))
    if good.ndim:
        nested = torch.nested.as_nested_tensor([good, good])
        wrong.append(Wrong(nested, TypeError, '{} must be a dense tensor, got a nested one'))
    return wrong


def tensors(
    good: Tensor, kind: str, rule: str, *shapes: tuple[int, ...], like: str | None = 'x', optional: bool = True
) -> list[Wrong]:
    """For a tensor of this kind: no tensor, each other dtype, sparse and nested ones, each of these shapes, 'meta'."""
    wrong = of_type(f'{kind}, a tensor', *NOTHING_LIKE_IT, *NUMBERS, *FLAGS, *([] if optional else [None]))
    wrong += of_dtype(kind, good, *(dtype for dtype in ALL_DTYPES if dtype not in KINDS[kind]))
    for shape in shapes:
        wrong.append(Wrong(good.new_ones(shape), ValueError, f'{{}} must have shape {rule}, got {shape}'))
    if like is not None:
        wrong.append(Wrong(good.to('meta'), ValueError, f'{{}} must be on cpu like {like}, got meta'))
    return wrong


def numbers(rule: str, *out_of_range: Any, optional: bool = True) -> list[Wrong]:
    """For a number or a 0-dim tensor of one."""
    wrong = of_type('a number or a 0-dim tensor', *NOTHING_LIKE_IT, *FLAGS, *([] if optional else [None]))
    no_numbers = (torch.bool, torch.float8_e4m3fn, torch.complex64, torch.complex128)
    wrong += of_dtype('floating point or integer', torch.tensor(1), *no_numbers)
    for shape in ((1,), (4,), (2, 2)):
        wrong.append(Wrong(torch.ones(shape), ValueError, f'{{}} must have shape (), got {shape}'))
    return wrong + of_value(rule, *out_of_range)


FLAG = of_type('bool', *NOTHING_LIKE_IT, *NUMBERS, None, torch.tensor(True), torch.tensor([True]))
GIVEN_FLAG = [row for row in FLAG if row.value is not None]  # of an argument that may be left out
NO_INTEGERS = [*NOTHING_LIKE_IT, *FLAGS, 2.0, np.float64(2), float('nan'), torch.tensor(2)]
CHUNK_SIZE = [*of_type('int', *NO_INTEGERS), *of_value('>= 1', 0, -1, -(10**30), np.int64(0))]
MAX_LEN = CHUNK_SIZE
NORMALIZER = [
    *numbers(
        '> 0 and finite in float32',
        *(0, 0.0, -1, -1.5, float('nan'), float('inf'), -float('inf'), 1e-50, 1e39, 10**400, Fraction(-1, 2)),
        *(np.float32('nan'), np.float16('inf'), np.int64(0)),
    ),
    Wrong(torch.tensor(1.0, device='meta'), ValueError, '{} must be on cpu like x, got meta'),
]
TOTAL = numbers(
    '>= 0 and finite',
    *(-1, -1.5, float('nan'), float('inf'), -float('inf'), 10**400, np.float32('nan'), np.float16('inf')),
    optional=False,
)
OUT_OF_RANGE = (1.5, -0.1, 2, float('nan'), float('inf'), 10**400, np.float32('nan'), Fraction(3, 2))
WEIGHTING = [
    *of_type('a name or a number', *NO_NAMES, *FLAGS, torch.tensor(0.5)),
    *of_value('in [0, 1] where it is a number', *OUT_OF_RANGE),
    *(
        Wrong(name, ValueError, '{} must be one of token, sequence, square, padded, sequence_sum, …, got ' + repr(name))
        for name in ('text', '', 'tokens', 'Token', '0.5')
    ),
]
FUSED = [
    *of_type("bool or 'auto'", *NO_NAMES, *NUMBERS, None, torch.tensor(True)),
    *(Wrong(name, ValueError, f"{{}} must be True, False or 'auto', got {name!r}") for name in ('text', '', 'Auto')),
]
PAD_VALUE = [
    *(Wrong(value, TypeError, '{} must be an integer for int64 sequences') for value in (*NOTHING_LIKE_IT, None)),
    *(
        Wrong(value, TypeError, f'{{}} must be an integer for int64 sequences, got {value}')
        for value in (0.0, 1.5, float('nan'), np.float32(1), Fraction(1, 2))
    ),
    *of_value('in [-9223372036854775808, 9223372036854775807] for int64 sequences', 2**63, -(10**30)),
]
MODULE = of_type('a torch.nn.Module', *NOTHING_LIKE_IT, *NUMBERS, *FLAGS, None, torch.ones(2), torch.nn.Linear)
