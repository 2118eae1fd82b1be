"""The check of arguments by itself: kinds, dims that bind, numbers. Errors of the callables: `test_bad_input.py`."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from xtloss.arguments import INTEGERS, check, is_integer, is_number, widened

X = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ('value', 'integer', 'number'),
    [
        (True, False, False),
        (3, True, True),
        (np.int8(3), True, True),
        (np.uint64(3), True, True),
        (0.5, False, True),
        (np.float16(0.5), False, True),
        (np.longdouble(0.5), False, True),
        (Fraction(1, 2), False, True),
        (1j, False, False),
        (np.complex64(1), False, False),
        ('1', False, False),
        (None, False, False),
        (torch.tensor(1), False, False),
    ],
)
def test_what_is_an_integer_and_a_number(value: Any, integer: bool, number: bool) -> None:
    assert (is_integer(value), is_number(value)) == (integer, number)


def test_lists_of_tensors() -> None:
    rules, mem = {'x': 'integer: b n', 'mems': 'list of floating point: b m d'}, torch.ones(2, 5, 4)
    check(rules, {'x': X, 'mems': [mem, None, mem]})
    check(rules, {'x': X, 'mems': ()})
    with pytest.raises(TypeError, match=r'^mems must be a list of tensors, got Tensor$'):
        check(rules, {'x': X, 'mems': mem})
    with pytest.raises(ValueError, match=r'^mems\[1\] must have shape \(2, 5, 4\) like x, got \(2, 4, 4\)$'):
        check(rules, {'x': X, 'mems': [mem, mem[:, 1:]]})


def test_numbers() -> None:
    rules = {'x': 'integer: b n', 'normalizer': 'number', 'steps': 'count', 'flag': 'flag'}
    for normalizer in (
        1, 2.5, np.float16(3), np.int64(4), Fraction(1, 2), torch.tensor(7e4).half(), torch.tensor(float('nan')),
        *(torch.tensor(3).to(dtype) for dtype in INTEGERS),
    ):  # fmt: skip
        check(rules, {'x': X, 'normalizer': normalizer, 'steps': np.uint8(1), 'flag': False})
    for wrong in (0, -1.0, float('nan'), float('inf'), 1e39, 1e-50, np.float16('inf')):
        with pytest.raises(ValueError, match=r'^normalizer must be > 0 and finite in float32, got '):
            check(rules, {'x': X, 'normalizer': wrong})
    with pytest.raises(ValueError, match=r'^normalizer must have shape \(\), got \(1,\)$'):
        check(rules, {'normalizer': torch.ones(1)})
    with pytest.raises(ValueError, match=r'^steps must be >= 1, got 0$'):
        check(rules, {'steps': 0})


def test_widened_integers_neither_wrap_nor_change() -> None:
    wide = widened(torch.tensor([65535], dtype=torch.uint16))
    assert (wide - 65536).tolist() == [-1]
    assert wide.dtype == torch.int64
    mask = torch.tensor([True])
    assert widened(mask) is mask


def test_float_normalizers_are_traced() -> None:
    def divided(x: torch.Tensor, normalizer: float) -> torch.Tensor:
        check({'x': 'integer: b n', 'normalizer': 'number'}, {'x': x, 'normalizer': normalizer})
        return x.sum() / normalizer

    compiled = torch.compile(divided, fullgraph=True, backend='eager')
    for normalizer in (1.5, 2.5, 3.5, 7, 8, 9):
        assert compiled(X + 1, normalizer).item() == pytest.approx(6 / normalizer)
