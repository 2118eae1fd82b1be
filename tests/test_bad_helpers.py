"""What lies inside sequences and examples may be wrong too: the errors of pack and collate beside the table's."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from xtloss import collate, pack, unpack

LONG, SHORT = torch.arange(5), torch.arange(2)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (([[1, 2], [2.5]], 4), TypeError, 'sequences[1] must be int64 like sequences[0], got float32'),
        (([SHORT, SHORT.bool()], 4), TypeError, 'sequences[1] must be int64 like sequences[0], got bool'),
        (([SHORT, SHORT.to('meta')], 4), RuntimeError, ''),  # torch's, as it is
        (([np.ones(2), [1.0]], 4), TypeError, 'sequences[1] must be float64 like sequences[0], got float32'),
        (([SHORT, LONG], 4), ValueError, 'sequences[1] must be 1-D, of 1 to 4 tokens, got shape (5,)'),
        (
            ([[1], []], 4),
            ValueError,
            'sequences[1] must be 1-D, of 1 to 4 tokens, got shape (0,)',
        ),  # not: an empty list is float32
        (([SHORT, 3], 4), ValueError, 'sequences[1] must be 1-D, of 1 to 4 tokens, got shape ()'),
        (([b'bytes'], 8), TypeError, 'new(): invalid data type'),  # torch's, as it is
        ((b'bytes', 8), ValueError, 'sequences[0] must be 1-D'),
        (([SHORT], 2**31), ValueError, 'max_len must be at most 2147483647, got 2147483648'),
        (([], 4, None), TypeError, ''),
        (([SHORT], None), TypeError, ''),
        # torch takes all of these, and puts another number there
        (([SHORT.to(torch.uint8)], 4, -1), ValueError, 'pad_value must be in [0, 255] for uint8 sequences, got -1'),
        (([SHORT.bool()], 4, -100), ValueError, 'pad_value must be in [0, 1] for bool sequences, got -100'),
        (([SHORT.bool()], 4, 0.0), TypeError, 'pad_value must be an integer for bool sequences, got 0.0'),
        (([SHORT], 4, 0.5), TypeError, 'pad_value must be an integer for int64 sequences, got 0.5'),
        (([SHORT.to(torch.uint64)], 4, -1), ValueError, 'pad_value must be in [0, 18446744073709551615] for uint64'),
        (([SHORT * 1.0], 4, 1j), TypeError, ''),
    ],
)
def test_pack_refuses(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match='^' + re.escape(message)):
        pack(*arguments)


@pytest.mark.parametrize('arguments', [(None, SHORT[None]), (SHORT[None], None)])
def test_unpack_refuses_none(arguments: Any) -> None:
    with pytest.raises(TypeError, match=r'must be (a tensor|integer, a tensor), got NoneType'):
        unpack(*arguments)


@pytest.mark.parametrize(
    ('examples', 'options', 'error', 'message'),
    [
        ([SHORT, LONG], {'max_len': 4}, ValueError, 'x[1] must be 1-D, of 1 to 4 tokens, got shape (5,)'),
        ([{'x': SHORT, 'mask': LONG.bool()}], {}, ValueError, 'mask[0] must have 2 tokens like x[0], got 5'),
        (
            [{'x': SHORT, 'score': torch.ones(2, 3)}],
            {},
            ValueError,
            'score[0] must be 1-D, of 1 to',
        ),
        (
            [{'x': SHORT, 'loss_weight': 2.0}],
            {},
            ValueError,
            'loss_weight[0] must be 1-D, of 1 to',
        ),
        ([], {'pad_value': 0.5}, TypeError, 'pad_value must be an integer for int64 sequences, got 0.5'),
        # keys that would be lost without a word
        (
            [{'x': SHORT}, {'x': SHORT, 'mask': SHORT.bool()}],
            {},
            ValueError,
            "examples[1] must have the keys ['x'], got",
        ),
        ([SHORT, {'x': SHORT, 'mask': SHORT}], {}, ValueError, "examples[1] must have the keys ['x'], got"),
        ([{'x': SHORT, 'lens': SHORT}], {'layout': 'packed'}, ValueError, "examples[0] must have the keys ['x'], got"),
        ([{'x': SHORT, 'segment_ids': SHORT}], {}, ValueError, "examples[0] must have the keys ['x'], got"),
        # floats that would be cut; an empty list is none of them
        ([[1, 2], []], {}, ValueError, 'x[1] must be 1-D, of 1 to'),
        ([[1, 2], [1, 2.5]], {}, TypeError, 'x[1] must hold numbers of int64, got float32'),
        ([{'x': [1], 'loss_mask': [0.5]}], {}, TypeError, 'loss_mask[0] must hold numbers of bool, got float32'),
    ],
)
def test_collate_refuses(examples: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match='^' + re.escape(message)):
        collate(examples, **options)
