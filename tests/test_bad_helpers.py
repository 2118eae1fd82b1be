"""Every error of the helpers, pack, unpack, collate, global_normalizer and linear_cross_entropy: type and message."""

from typing import Any

import numpy as np
import pytest
import torch

from xtloss import collate, global_normalizer, linear_cross_entropy, pack, unpack

LONG, SHORT = torch.arange(5), torch.arange(2)
HUGE = 10**30


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((torch.zeros(2, 3), 4), r'sequences must be a list of tensors or of lists, got Tensor'),
        (('text', 4), r'sequences must be a list of tensors or of lists, got str'),
        (([SHORT, 3], 4), r'sequences\[1\] must be a tensor or a list of numbers, got int'),
        ((['text'], 4), r'sequences\[0\] must be a tensor or a list of numbers, got str'),
        (([SHORT, [3]], 4), r'sequences\[1\] must be a tensor of int64 like sequences\[0\], got a list'),
        (([[3], SHORT], 4), r'sequences\[1\] must be a list like sequences\[0\], got a tensor of int64'),
        (
            ([SHORT, SHORT.bool()], 4),
            r'sequences\[1\] must be a tensor of int64 like sequences\[0\], got a tensor of bo',
        ),
        (([['a'], ['b']], 4), r'sequences must hold numbers'),
        (([SHORT], 4.0), r'max_len must be an int, got float'),
        (([SHORT], True), r'max_len must be an int, got bool'),
        (([SHORT], 4, 'pad'), r'pad_value must be a number, got str'),
        (([], 4, None), r'pad_value must be a number, got NoneType'),
        (([SHORT], 4, 0.0), r'pad_value must be an integer for int64 sequences, got 0.0'),
        (([SHORT.bool()], 4, 0.0), r'pad_value must be an integer for bool sequences, got 0.0'),
        (([SHORT], 4, np.float32(1)), r'pad_value must be an integer for int64 sequences, got 1.0'),
        (([SHORT], 4, float('nan')), r'pad_value must be an integer for int64 sequences, got nan'),
        (([SHORT * 1.0], 4, 1j), r'pad_value must be a number, got complex'),
        (([SHORT], np.float64(4)), r'max_len must be an int, got float64'),
        (([SHORT], np.bool_(1)), r'max_len must be an int, got bool'),
        (([SHORT], torch.tensor(4)), r'max_len must be an int, got Tensor'),
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
        (([torch.zeros(2, 3)], 4), r'sequences\[0\] must be 1-D, got shape \(2, 3\)'),
        (([torch.tensor(1)], 4), r'sequences\[0\] must be 1-D, got shape \(\)'),
        (([[[1, 2]]], 4), r'sequences must be lists of numbers, got lists of shape \(2,\) in them'),
        (([SHORT, SHORT.to('meta')], 4), r'sequences\[1\] must be on cpu like sequences\[0\], got meta'),
        (([SHORT], 0), r'max_len must be >= 1, got 0'),
        (([SHORT.to(torch.uint8)], 4, -1), r'pad_value must be in \[0, 255\] for uint8 sequences, got -1'),
        (([SHORT.bool()], 4, -100), r'pad_value must be in \[0, 1\] for bool sequences, got -100'),
        (([SHORT], 4, 2**63), r'pad_value must be in \[-9223372036854775808, 9223372036854775807\] for int64'),
        (([SHORT.to(torch.uint16)], 4, 2**16), r'pad_value must be in \[0, 65535\] for uint16 sequences, got 65536'),
        (([SHORT.half()], 4, 1e60), r'pad_value must be in \[-65504.0, 65504.0\] for float16 sequences, got 1e\+60'),
        (([SHORT.bfloat16()], 4, 10**400), r'pad_value must be in .* for bfloat16 sequences, got 1000'),
        (([], 4, HUGE), r'pad_value must hold numbers of int64, got 1000'),
        (([SHORT], HUGE), r'max_len must be at most 2147483647, got 1000'),
        (([SHORT], np.int64(2**40)), r'max_len must be at most 2147483647, got 1099511627776'),
        (([SHORT], np.int8(-1)), r'max_len must be >= 1, got -1'),
        (([[HUGE]], 4), r'sequences must hold numbers of int64, got 1000'),
        (([[1e60, 1]], 4), r'sequences must hold numbers of float32, got 1e\+60'),
        (([np.ones((2, 2))], 4), r'sequences\[0\] must be 1-D, got shape \(2, 2\)'),
    ],
)
def test_pack_refuses_wrong_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(*arguments)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (([1], torch.ones(1, 1, dtype=torch.int64)), TypeError, r'values must be a tensor, got list'),
        ((torch.ones(1, 1), [[1]]), TypeError, r'segment_ids must be integer, a tensor, got list'),
        ((torch.ones(1, 1), torch.ones(1, 1)), TypeError, r'segment_ids must be integer, got float32'),
        ((torch.ones(3), torch.ones(3).long()), ValueError, r'segment_ids must have shape \(b, n\), got \(3,\)'),
        (
            (torch.ones(2, 4), torch.ones(2, 5).long()),
            ValueError,
            r'values must have shape \(2, 5, ...\) like segment_ids, got \(2, 4\)',
        ),
        (
            (torch.ones(1, 1).to_sparse(), torch.ones(1, 1).long()),
            TypeError,
            r'values must be a dense tensor, got a sp',
        ),
        (
            (torch.ones(1, 1), torch.ones(1, 1).long().to_sparse()),
            TypeError,
            r'segment_ids must be a dense tensor, got',
        ),
        (
            (torch.ones(1, 1), torch.ones(1, 1).to('meta').long()),
            ValueError,
            r'segment_ids must be on a device .* meta',
        ),
    ],
)
def test_unpack_refuses_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        unpack(*arguments)


@pytest.mark.parametrize(
    ('examples', 'options', 'error', 'message'),
    [
        ([SHORT], {'layout': 'sparse'}, ValueError, r"layout must be one of padded, packed, got 'sparse'"),
        ([SHORT], {'max_len': 1.5}, TypeError, r'max_len must be an int, got float'),
        ([SHORT, LONG], {'max_len': 4}, ValueError, r'x\[1\] must have at most max_len = 4 tokens, got 5'),
        ([{'x': SHORT}, SHORT], {}, TypeError, r'examples\[1\] must be a dict like examples\[0\], got Tensor'),
        ([SHORT, {'x': SHORT}], {}, TypeError, r'x\[1\] must be a tensor or a list of numbers, got dict'),
        ([{'y': SHORT}], {}, ValueError, r"examples\[0\] must have the keys \['x', 'y'\], got \['y'\]"),
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
        ({'x': [1]}, {}, TypeError, r'x must be a list of tensors or of lists, got dict'),
        (None, {}, TypeError, r'examples must be a list of dicts; .*, got NoneType'),
        ([SHORT], {'layout': 3}, TypeError, r'layout must be a string, got int'),
        ([SHORT], {'max_len': HUGE}, ValueError, r'max_len must be at most 2147483647, got 1000'),
        ([SHORT], {'pad_value': '0'}, TypeError, r'pad_value must be a number, got str'),
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


@pytest.mark.parametrize(
    ('total', 'error', 'message'),
    [
        (None, TypeError, r'total must be a number or a 0-dim tensor, got NoneType'),
        (True, TypeError, r'total must be a number or a 0-dim tensor, got bool'),
        (np.bool_(1), TypeError, r'total must be a number or a 0-dim tensor, got bool'),
        (1j, TypeError, r'total must be a number or a 0-dim tensor, got complex'),
        ([1.0], TypeError, r'total must be a number or a 0-dim tensor, got list'),
        (torch.tensor(True), TypeError, r'total must be floating point or integer, got bool'),
        (torch.tensor(1j), TypeError, r'total must be floating point or integer, got complex64'),
        (torch.ones(1), ValueError, r'total must have shape \(\), got \(1,\)'),
        (-1, ValueError, r'total must be >= 0 and finite, got -1'),
        (np.float32('nan'), ValueError, r'total must be >= 0 and finite, got nan'),
        (np.float16('inf'), ValueError, r'total must be >= 0 and finite, got inf'),
        (10**400, ValueError, r'total must be >= 0 and finite, got 1000'),
    ],
)
def test_global_normalizer_refuses_bad_input(total: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f'^{message}'):
        global_normalizer(total)


EMBED, HEAD, IDS, WEIGHTS = torch.ones(4, 3), torch.ones(5, 3), torch.ones(4).long(), torch.ones(4)


@pytest.mark.parametrize(
    ('argument', 'value', 'error', 'message'),
    [
        ('embed', [[1.0]], TypeError, r'embed must be floating point, a tensor, got list'),
        ('embed', IDS, TypeError, r'embed must be floating point, got int64'),
        ('embed', EMBED.to_sparse(), TypeError, r'embed must be a dense tensor, got a sparse_coo one'),
        ('weight', None, TypeError, r'weight must be floating point, a tensor, got NoneType'),
        ('target', WEIGHTS, TypeError, r'target must be integer, got float32'),
        ('target', IDS.bool(), TypeError, r'target must be integer, got bool'),
        ('token_weight', IDS, TypeError, r'token_weight must be floating point, got int64'),
        ('bias', 1.0, TypeError, r'bias must be floating point, a tensor, got float'),
        ('chunk_size', 2.0, TypeError, r'chunk_size must be int, got float'),
        ('chunk_size', True, TypeError, r'chunk_size must be int, got bool'),
        ('embed', EMBED[0], ValueError, r'embed must have shape \(N, d\), got \(3,\)'),
        ('weight', torch.ones(5, 2), ValueError, r'weight must have shape \(vocab, 3\) as embed is wide, got \(5, 2\)'),
        ('target', IDS[:3], ValueError, r'target must have shape \(4,\) like embed, got \(3,\)'),
        ('token_weight', WEIGHTS[None], ValueError, r'token_weight must have shape \(4,\) like embed, got \(1, 4\)'),
        ('bias', WEIGHTS, ValueError, r'bias must have shape \(5,\) like weight, got \(4,\)'),
        ('target', IDS.to('meta'), ValueError, r'target must be on cpu like embed, got meta'),
        ('chunk_size', 0, ValueError, r'chunk_size must be >= 1, got 0'),
        ('chunk_size', -3, ValueError, r'chunk_size must be >= 1, got -3'),
    ],
)
def test_linear_cross_entropy_refuses_bad_input(
    argument: str, value: Any, error: type[Exception], message: str
) -> None:
    call = {'embed': EMBED, 'weight': HEAD, 'target': IDS, 'token_weight': WEIGHTS} | {argument: value}
    with pytest.raises(error, match=f'^{message}$'):
        linear_cross_entropy(**call)
