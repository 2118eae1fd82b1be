"""Packing loses nothing, splits nothing, and lays rows out by the lengths alone; collate makes both kinds of batch."""

from functools import partial

import pytest
import torch
from fuzz_helpers import check_packed
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from xtloss.packing.collating import collate
from xtloss.packing.layout import pack, unpack

DTYPES = [torch.int64, torch.int32, torch.uint8, torch.uint16, torch.bool, torch.float32, torch.bfloat16, torch.float64]


@st.composite
def lengths_and_max_len(draw):
    max_len = draw(st.integers(1, 24))
    return draw(st.lists(st.integers(1, max_len), max_size=40)), max_len


def random_sequences(lengths, dtype=torch.int64):
    return [torch.randint(0, 200, (length,)).to(dtype) for length in lengths]


@given(lengths_and_max_len())
def test_layout_is_best_fit_decreasing(case):
    lengths, max_len = case
    sequences = random_sequences(lengths)
    check_packed(*pack(sequences, max_len), sequences, max_len, 0)


@given(lengths_and_max_len(), st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4))
def test_unpack_gives_every_sequence_back_in_order(case, dtypes):
    lengths, max_len = case
    layouts = []
    for dtype in dtypes:
        sequences = random_sequences(lengths, dtype)
        x, segment_ids = pack(sequences, max_len, pad_value=1)
        back = unpack(x, segment_ids)
        assert len(back) == len(sequences)
        assert all(one.dtype == dtype and torch.equal(one, other) for one, other in zip(back, sequences, strict=True))
        if lengths:
            assert x.dtype == dtype
            assert torch.all(x.float()[segment_ids == 0] == 1)
        layouts.append(segment_ids)
    assert all(torch.equal(layout, layouts[0]) for layout in layouts)


@given(lengths_and_max_len())
def test_lists_pack_like_tensors(case):
    lengths, max_len = case
    for dtype in (torch.int64, torch.bool, torch.float32):
        sequences = random_sequences(lengths or [1], dtype)
        x, segment_ids = pack([sequence.tolist() for sequence in sequences], max_len)
        assert x.dtype == dtype
        assert torch.equal(x, pack(sequences, max_len)[0])
        assert torch.equal(segment_ids, pack(sequences, max_len)[1])


def test_a_row_by_hand():
    x, segment_ids = pack([[1, 2], [3, 4, 5, 6], [7], [8, 9, 10]], max_len=5, pad_value=-1)
    assert x.tolist() == [[3, 4, 5, 6, 7], [8, 9, 10, 1, 2]]
    assert segment_ids.tolist() == [[2, 2, 2, 2, 3], [4, 4, 4, 1, 1]]


def test_gradients_flow_through_packing():
    sequences = [torch.randn(length, dtype=torch.float64, requires_grad=True) for length in (2, 3, 1)]
    x, segment_ids = pack(sequences, max_len=4)
    sum((k + 1) * part.sum() for k, part in enumerate(unpack(x, segment_ids))).backward()
    assert [sequence.grad.tolist() for sequence in sequences] == [[1, 1], [2, 2, 2], [3]]


@pytest.mark.parametrize(('pad_value', 'dtype'), [(0, torch.int64), (False, torch.bool), (0.0, torch.float32)])
def test_no_sequences_give_no_rows(pad_value, dtype):
    x, segment_ids = pack([], max_len=8, pad_value=pad_value)
    assert x.shape == segment_ids.shape == (0, 8)
    assert x.dtype == dtype
    assert segment_ids.dtype == torch.int64
    assert unpack(x, segment_ids) == []


# unpack


def test_unpack_takes_features_and_non_contiguous_values():
    sequences = random_sequences([3, 1, 2, 4])
    x, segment_ids = pack(sequences, max_len=5)
    features = torch.stack([x, -x]).permute(1, 2, 0)  # (b, n, 2)
    assert not features.is_contiguous()
    for part, sequence in zip(unpack(features, segment_ids), sequences, strict=True):
        assert torch.equal(part, torch.stack([sequence, -sequence], dim=-1))


def test_unpack_of_some_rows_gives_the_sequences_there():
    sequences = random_sequences([5, 2, 5, 3])
    x, segment_ids = pack(sequences, max_len=5)
    assert segment_ids.tolist() == [[1] * 5, [3] * 5, [4, 4, 4, 2, 2]]
    parts = unpack(x[1:], segment_ids[1:])
    assert [part.tolist() for part in parts] == [sequences[k].tolist() for k in (1, 2, 3)]


def test_unpack_keeps_runs_of_one_id_apart():
    """A sequence is a run inside a row: not across the end of a row, nor across padding."""
    segment_ids = torch.tensor([[2, 2, 0, 2], [2, 1, 1, 0]], dtype=torch.int32)
    values = torch.arange(8).view(2, 4)
    assert [part.tolist() for part in unpack(values, segment_ids)] == [[5, 6], [0, 1], [3], [4]]


@pytest.mark.parametrize('dtype', [torch.int8, torch.int32, torch.int64])
def test_unpack_sorts_negative_ids_among_the_others(dtype):
    """Every id but 0 is one of a sequence."""
    segment_ids = torch.tensor([[3, 3, -2, 0], [-1, 0, -2, 1]], dtype=dtype)
    values = torch.arange(8).view(2, 4)
    assert [part.tolist() for part in unpack(values, segment_ids)] == [[2], [6], [4], [7], [0, 1]]


def test_unpack_keeps_many_runs_of_one_id_in_order():
    """As long as this, a sort that is not stable mixes them up."""
    segment_ids = torch.tensor([2, 1] * 4000).view(8, 1000)
    parts = unpack(torch.arange(8000).view(8, 1000), segment_ids)
    assert torch.cat(parts).tolist() == [*range(1, 8000, 2), *range(0, 8000, 2)]


# collate


def test_padded_batch():
    batch = collate([[5, 6, 7], [8]], pad_value=9)
    assert {name: value.tolist() for name, value in batch.items()} == {'x': [[5, 6, 7], [8, 9, 9]], 'lens': [3, 1]}
    assert batch['lens'].dtype == torch.int64
    assert collate([[5, 6, 7], [8]], max_len=4)['x'].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]


@given(lengths_and_max_len())
def test_packed_batch_is_what_pack_makes(case):
    lengths, max_len = case
    ids, masks, weights = (random_sequences(lengths, dtype) for dtype in (torch.int64, torch.bool, torch.float32))
    examples = [
        {'x': x, 'loss_mask': mask, 'loss_weight': weight} for x, mask, weight in zip(ids, masks, weights, strict=True)
    ]
    batch = collate(examples, layout='packed', max_len=max_len, pad_value=3)
    expected, segment_ids = pack(ids, max_len, pad_value=3)
    assert torch.equal(batch['x'], expected)
    assert torch.equal(batch['segment_ids'], segment_ids)
    assert list(batch) == (['x', 'loss_mask', 'loss_weight'] if lengths else ['x']) + ['segment_ids']
    for name, sequences in (('loss_mask', masks), ('loss_weight', weights)):
        if lengths:
            assert torch.equal(batch[name], pack(sequences, max_len)[0])


def test_padded_companions_are_padded_with_zero():
    examples = [{'x': [5, 6], 'loss_mask': [False, True]}, {'x': [7], 'loss_mask': [True]}]
    batch = collate(examples, pad_value=9)
    assert batch['x'].tolist() == [[5, 6], [7, 9]]
    assert batch['loss_mask'].tolist() == [[False, True], [True, False]]
    assert batch['loss_mask'].dtype == torch.bool


def test_rows_are_as_long_as_the_longest_sequence_by_default():
    assert collate([[1, 2], [3], [4]], layout='packed')['x'].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(('layout', 'name'), [('padded', 'lens'), ('packed', 'segment_ids')])
def test_an_empty_batch_has_no_rows(layout, name):
    batch = collate([], layout=layout)
    assert batch['x'].shape == (0, 1)
    assert batch['x'].dtype == batch[name].dtype == torch.int64
    assert batch[name].shape[0] == 0


def test_data_loader():
    loader = DataLoader(random_sequences([3, 2, 1, 3]), batch_size=3, collate_fn=partial(collate, layout='packed'))
    assert [tuple(batch['x'].shape) for batch in loader] == [(2, 3), (1, 3)]
