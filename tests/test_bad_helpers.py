"""What lies inside sequences and examples may be wrong too: the errors of pack and collate beside the table's."""

import numpy as np
import pytest
import torch

from xtloss import collate, pack

LONG, SHORT = torch.arange(5), torch.arange(2)
HUGE = 10**30


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (([SHORT, 3], 4), r'sequences\[1\] must be a tensor or a list of numbers, got int'),
        ((['text'], 4), r'sequences\[0\] must be a tensor or a list of numbers, got str'),
        (([SHORT, [3]], 4), r'sequences\[1\] must be a tensor of int64 like sequences\[0\], got a list'),
        (([[3], SHORT], 4), r'sequences\[1\] must be a list like sequences\[0\], got a tensor of int64'),
        (
            ([SHORT, SHORT.bool()], 4),
            r'sequences\[1\] must be a tensor of int64 like sequences\[0\], got a tensor of bo',
        ),
        (([['a'], ['b']], 4), r'sequences must hold numbers'),
        (([], 4, None), r'pad_value must be a number, got NoneType'),
        (([SHORT.bool()], 4, 0.0), r'pad_value must be an integer for bool sequences, got 0.0'),
        (([SHORT * 1.0], 4, 1j), r'pad_value must be a number, got complex'),
        (([SHORT * 1j], 4), r'sequences\[0\] must hold real numbers, got complex64'),
        (([SHORT.to_sparse()], 4), r'sequences\[0\] must be a dense tensor, got a sparse_coo one'),
        (([[1j]], 4), r'sequences must hold numbers, got complex'),
        (([[1, None]], 4), r'sequences must hold numbers, got NoneType'),
        (([[torch.tensor(1)]], 4), r'sequences must hold numbers, got Tensor'),
        (([None], 4), r'sequences\[0\] must be a tensor or a list of numbers, got NoneType'),
        (([(i for i in range(2))], 4), r'sequences\[0\] must be a tensor or a list of numbers, got generator'),
        (((i for i in [[1]]), 4), r'sequences must be a list of tensors or of lists, got generator'),
        (([np.int64(3)], 4), r'sequences\[0\] must be a tensor or a list of numbers, got int64'),
        (([np.ones(2), [1.0]], 4), r'sequences\[1\] must be a tensor of float64 like sequences\[0\], got a list'),
        (([np.array(['a'])], 4), r'sequences\[0\] must hold numbers that torch has a dtype for, got <U1'),
        (([np.array([None])], 4), r'sequences\[0\] must hold numbers that torch has a dtype for, got object'),
        (([SHORT[:0], SHORT.bool()], 0), r'sequences\[1\] must be a tensor of int64 like'),  # types come first
    ],
)
def test_pack_refuses_wrong_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        pack(*arguments)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (([SHORT, LONG], 4), r'sequences\[1\] must have at most max_len = 4 tokens, got 5'),
        (([SHORT, SHORT[:0]], 4), r'sequences\[1\] must have at least 1 token, got 0'),
        (([[1], []], 4), r'sequences\[1\] must have at least 1 token, got 0'),
        (([torch.tensor(1)], 4), r'sequences\[0\] must be 1-D, got shape \(\)'),
        (([[[1, 2]]], 4), r'sequences must be lists of numbers, got lists of shape \(2,\) in them'),
        (([SHORT, SHORT.to('meta')], 4), r'sequences\[1\] must be on cpu like sequences\[0\], got meta'),
        (([SHORT.to(torch.uint8)], 4, -1), r'pad_value must be in \[0, 255\] for uint8 sequences, got -1'),
        (([SHORT.bool()], 4, -100), r'pad_value must be in \[0, 1\] for bool sequences, got -100'),
        (([SHORT.to(torch.uint16)], 4, 2**16), r'pad_value must be in \[0, 65535\] for uint16 sequences, got 65536'),
        (([SHORT.half()], 4, 1e60), r'pad_value must be in \[-65504.0, 65504.0\] for float16 sequences, got 1e\+60'),
        (([SHORT.bfloat16()], 4, 10**400), r'pad_value must be in .* for bfloat16 sequences, got 1000'),
        (([], 4, HUGE), r'pad_value must hold numbers of int64, got 1000'),
        (([[HUGE]], 4), r'sequences must hold numbers of int64, got 1000'),
        (([[1e60, 1]], 4), r'sequences must hold numbers of float32, got 1e\+60'),
        (([np.ones((2, 2))], 4), r'sequences\[0\] must be 1-D, got shape \(2, 2\)'),
    ],
)
def test_pack_refuses_wrong_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(*arguments)


@pytest.mark.parametrize(
    ('examples', 'options', 'error', 'message'),
    [
        ([SHORT, LONG], {'max_len': 4}, ValueError, r'x\[1\] must have at most max_len = 4 tokens, got 5'),
        ([{'x': SHORT}, SHORT], {}, TypeError, r'examples\[1\] must be a dict like examples\[0\], got Tensor'),
        ([SHORT, {'x': SHORT}], {}, TypeError, r'x\[1\] must be a tensor or a list of numbers, got dict'),
        (
            [{'x': SHORT}, {'x': SHORT, 'loss_mask': SHORT.bool()}],
            {},
            ValueError,
            r"examples\[1\] must have the keys \['x'\], got \['loss_mask', 'x'\]",
        ),
        (
            [{'x': SHORT, 'loss_mask': LONG.bool()}],
            {'layout': 'packed'},
            ValueError,
            r'loss_mask\[0\] must have 2 tokens like x\[0\], got 5',
        ),
        (
            [{'x': SHORT, 'score': torch.ones(2, 3)}],
            {},
            ValueError,
            r'^score\[0\] must be 1-D, got shape \(2, 3\)',
        ),
        ([], {'pad_value': 0.5}, TypeError, r'pad_value must be an integer for int64 sequences, got 0.5'),
        ([{'x': SHORT, 'lens': SHORT}], {}, ValueError, r"examples\[0\] must not have the key 'lens'"),
        ([{'x': SHORT, 'lens': SHORT}], {'layout': 'packed'}, ValueError, r"must not have the key 'lens'"),
        ([{'x': SHORT, 'segment_ids': SHORT}], {}, ValueError, r"must not have the key 'segment_ids'"),
        ([{'x': SHORT, 'segment_ids': SHORT}], {'layout': 'packed'}, ValueError, r"not have the key 'segment_ids'"),
        ([{'x': SHORT}, {'x': SHORT, 3: SHORT}], {}, TypeError, r'examples\[1\] must have strings as keys, got int'),
        ([{'x': [1, 2.0]}], {}, TypeError, r'x must hold integers, got float'),
        ([{'x': [True]}], {}, TypeError, r'x must hold integers, got bool'),
        (
            [{'x': SHORT, 'loss_weight': 2.0}],
            {},
            TypeError,
            r'loss_weight\[0\] must be a tensor or a list .*, got float',
        ),
        ([{'x': [1], 'loss_weight': [True]}], {}, TypeError, r'loss_weight must hold numbers, got bool'),
        ([{'x': [1], 'loss_weight': [1e60]}], {}, ValueError, r'loss_weight must hold numbers of float32, got 1e\+60'),
        ([{'x': [1], 'loss_mask': [1.0]}], {}, TypeError, r'loss_mask must hold bools, or 0 and 1, got float'),
        ([{'x': [1], 'loss_mask': [2]}], {}, ValueError, r'loss_mask must hold numbers of bool, got 2'),
        ([{'x': [1], 'score': [0.5]}], {}, TypeError, r'score must be tensors or arrays where it holds floats'),
    ],
)
def test_collate_refuses_bad_input(examples, options, error, message):
    with pytest.raises(error, match=message):
        collate(examples, **options)
