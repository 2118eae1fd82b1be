"""Sequences as people have them, tensors, numpy arrays or lists of numbers: checked, and made tensors of one dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from xtloss.checks import FLOATS, INTEGERS, SIGNED, check_dense, dtype_name, is_flag, is_integer, is_number, plain

CPU = torch.device('cpu')  # where lists and arrays lie, whatever the default device
MAX_LEN = 2**31 - 1  # what reads packed rows counts positions in int32

# the dtype that lists of a kind become, whatever the numbers of this batch; None: what torch makes of the numbers
DTYPE_OF_LISTS = {'integer': torch.int64, 'bool': torch.bool, 'floating point': torch.float32}


def as_tensors(name: str, sequences: Any, kind: str | None = None) -> list[Tensor]:
    """Return sequences as tensors of one dtype: tensors and arrays in their own, lists in that of `kind`.

    Raises:
        TypeError: not a list; not sequences of numbers; a list among tensors, or tensors of several dtypes.
        ValueError: a number that the dtype of the lists cannot hold.

    """
    if not is_sequence(sequences):
        raise TypeError(f'{name} must be a list of tensors or of lists, got {type(sequences).__name__}')
    sequences = [from_array(f'{name}[{k}]', s) if is_array(s) else s for k, s in enumerate(sequences)]
    for k, sequence in enumerate(sequences):
        if not isinstance(sequence, Tensor) and not is_sequence(sequence):
            raise TypeError(f'{name}[{k}] must be a tensor or a list of numbers, got {type(sequence).__name__}')
        if described(sequence) != described(sequences[0]):
            raise TypeError(f'{name}[{k}] must be {described(sequences[0])} like {name}[0], got {described(sequence)}')
        if isinstance(sequence, Tensor):
            check_dense(f'{name}[{k}]', sequence)
            if sequence.dtype not in (torch.bool, *INTEGERS, *FLOATS):
                raise TypeError(f'{name}[{k}] must hold real numbers, got {dtype_name(sequence.dtype)}')
    if sequences and isinstance(sequences[0], Tensor):
        return sequences
    lengths = [len(sequence) for sequence in sequences]
    return list(from_numbers(name, list(chain.from_iterable(sequences)), kind).split(lengths))


def from_array(name: str, array: Any) -> Tensor:
    """Copy a numpy array, be it read-only, mapped into memory, or of the other byte order."""
    try:
        return torch.as_tensor(array.astype(array.dtype.newbyteorder('=')), device=CPU)
    except TypeError as error:
        raise TypeError(f'{name} must hold numbers that torch has a dtype for, got {array.dtype}') from error


def from_numbers(name: str, numbers: Sequence[Any], kind: str | None = None) -> Tensor:
    """Return a list of numbers as a 1-D tensor: of a kind, in its dtype; else int64, or bool, or the default float."""
    examples = list(dict(zip(map(type, numbers), numbers, strict=True)).values())  # one of each type: quick
    for example in examples:
        check_number(name, example, kind)
    if any(type(example) not in (bool, int, float) for example in examples):
        numbers = [plain(number) for number in numbers]

    if kind is not None:
        dtype = DTYPE_OF_LISTS[kind]
    elif examples and all(is_flag(example) for example in examples):
        dtype = torch.bool
    elif all(is_integer(example) or is_flag(example) for example in examples):
        dtype = torch.int64
    else:
        dtype = torch.get_default_dtype()

    unfit = {number for number in set(numbers) if not fits(number, dtype)}
    if unfit:
        raise ValueError(f'{name} must hold numbers of {dtype_name(dtype)}, got {unfit.pop()}')
    return torch.tensor(numbers, dtype=dtype, device=CPU)


def check_number(name: str, value: Any, kind: str | None) -> None:
    """Raise TypeError unless it is a number, of this kind if there is one; ValueError for a list."""
    if is_sequence(value):
        raise ValueError(f'{name} must be lists of numbers, got lists of shape ({len(value)},) in them')
    legal, rule = {
        None: (is_number(value) or is_flag(value), 'numbers'),
        'integer': (is_integer(value), 'integers'),
        'bool': (is_flag(value) or is_integer(value), 'bools, or 0 and 1'),
        'floating point': (is_number(value), 'numbers'),
    }[kind]
    if not legal:
        raise TypeError(f'{name} must hold {rule}, got {type(value).__name__}')


def fits(number: float, dtype: torch.dtype) -> bool:
    """Whether the dtype can hold it: as what it is, but for rounding."""
    low, high = limits(dtype)
    return low <= number <= high or (dtype.is_floating_point and (abs(number) == math.inf or number != number))


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """The least and the greatest finite number of a dtype."""
    if dtype == torch.bool:
        return 0, 1
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return info.min, info.max


def token_counts(name: str, sequences: Sequence[Tensor], max_len: int | None = None) -> list[int]:
    """Check that each is 1-D, in one place, and of 1 … max_len tokens; return how many each has."""
    for k, sequence in enumerate(sequences):
        if sequence.ndim != 1:
            raise ValueError(f'{name}[{k}] must be 1-D, got shape {tuple(sequence.shape)}')
        if sequence.device != sequences[0].device:
            raise ValueError(f'{name}[{k}] must be on {sequences[0].device} like {name}[0], got {sequence.device}')
        if len(sequence) == 0:
            raise ValueError(f'{name}[{k}] must have at least 1 token, got 0')
        if max_len is not None and len(sequence) > max_len:
            raise ValueError(f'{name}[{k}] must have at most max_len = {max_len} tokens, got {len(sequence)}')
    return [len(sequence) for sequence in sequences]


def is_sequence(value: Any) -> bool:
    """Lists and their like; a string is text, not yet tokens."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def is_array(value: Any) -> bool:
    """An array of numpy, and none of its numbers."""
    return hasattr(value, '__array_interface__') and not is_number(value) and not is_flag(value)


def described(sequence: Any) -> str:
    """What sequences must be alike in, as people write it."""
    return f'a tensor of {dtype_name(sequence.dtype)}' if isinstance(sequence, Tensor) else 'a list'


def check_max_len(max_len: int) -> int:
    """Return it as an int; raise ValueError unless it is a length of a row."""
    if max_len < 1:
        raise ValueError(f'max_len must be >= 1, got {max_len}')
    if max_len > MAX_LEN:
        raise ValueError(f'max_len must be at most {MAX_LEN}, got {max_len}')
    return int(max_len)


def check_pad_type(pad_value: Any, dtype: torch.dtype | None = None) -> None:
    """Raise TypeError unless it is a number, of a kind that this dtype holds."""
    if not (is_number(pad_value) or is_flag(pad_value)):
        raise TypeError(f'pad_value must be a number, got {type(pad_value).__name__}')
    if dtype is not None and not dtype.is_floating_point and not (is_integer(pad_value) or is_flag(pad_value)):
        raise TypeError(f'pad_value must be an integer for {dtype_name(dtype)} sequences, got {pad_value}')


def check_pad_range(pad_value: float, dtype: torch.dtype) -> None:
    """Raise ValueError unless this dtype can hold the number."""
    if not fits(plain(pad_value), dtype):
        low, high = limits(dtype)
        raise ValueError(f'pad_value must be in [{low}, {high}] for {dtype_name(dtype)} sequences, got {pad_value}')


def bits(t: Tensor) -> Tensor:
    """The same bits as signed integers, where t is of unsigned ones that torch can neither index nor compare."""
    return t.view(SIGNED[t.dtype]) if t.dtype in SIGNED else t
