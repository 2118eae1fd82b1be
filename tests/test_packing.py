"""Packing loses and splits nothing, takes sequences in every form people have them, and stays where the data is."""

import array
import random
from collections.abc import Callable
from typing import Any

import fuzz_helpers
import numpy as np
import pytest
import torch
from batches import INTEGERS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from xtloss import collate, global_normalizer, pack, unpack


def listed(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in batch.items()}


@pytest.mark.parametrize('make', [fuzz_helpers.packing, fuzz_helpers.collating])
def test_random_sequences_by_loops(make: Callable[[random.Random], None]) -> None:
    for seed in range(200):
        make(random.Random(seed))


def test_by_hand() -> None:
    x, segment_ids = pack([[1, 2], [3, 4, 5, 6], [7], [8, 9, 10]], max_len=5, pad_value=-1)
    assert x.tolist() == [[3, 4, 5, 6, 7], [8, 9, 10, 1, 2]]
    assert segment_ids.tolist() == [[2, 2, 2, 2, 3], [4, 4, 4, 1, 1]]
    assert listed(collate([[5, 6, 7], [8]], pad_value=9)) == {'x': [[5, 6, 7], [8, 9, 9]], 'lens': [3, 1]}
    assert collate([[5, 6, 7], [8]], max_len=4)['x'].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]


def test_gradients_flow_through_packing() -> None:
    sequences = [torch.randn(length, dtype=torch.float64, requires_grad=True) for length in (2, 3, 1)]
    x, segment_ids = pack(sequences, max_len=4)
    sum((k + 1) * part.sum() for k, part in enumerate(unpack(x, segment_ids))).backward()
    assert [sequence.grad.tolist() for sequence in sequences] == [[1, 1], [2, 2, 2], [3]]


@pytest.mark.parametrize(('pad_value', 'dtype'), [(0, torch.int64), (False, torch.bool), (0.0, torch.float32)])
def test_no_sequences_give_no_rows(pad_value: Any, dtype: torch.dtype) -> None:
    x, segment_ids = pack([], max_len=8, pad_value=pad_value)
    assert x.shape == segment_ids.shape == (0, 8)
    assert x.dtype == dtype
    assert segment_ids.dtype == torch.int64
    assert unpack(x, segment_ids) == []


@pytest.mark.parametrize(('layout', 'name'), [('padded', 'lens'), ('packed', 'segment_ids')])
def test_an_empty_batch_has_no_rows(layout: str, name: str) -> None:
    batch = collate([], layout=layout)
    assert batch['x'].shape == (0, 1)
    assert batch['x'].dtype == batch[name].dtype == torch.int64
    assert batch[name].shape[0] == 0


@pytest.mark.parametrize(
    ('ids', 'want', 'dtypes'),
    [
        # not across the end of a row, nor across padding
        ([[2, 2, 0, 2], [2, 1, 1, 0]], [[5, 6], [0, 1], [3], [4]], INTEGERS),
        # every id but 0 is one of a sequence, the negative ones too
        ([[3, 3, -2, 0], [-1, 0, -2, 1]], [[2], [6], [4], [7], [0, 1]], [torch.int8, torch.int32, torch.int64]),
    ],
)
def test_a_sequence_is_a_run_inside_a_row(ids: Any, want: Any, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        parts = unpack(torch.arange(8).view(2, 4), torch.tensor(ids, dtype=dtype))
        assert [part.tolist() for part in parts] == want


def test_unpack_keeps_many_runs_of_one_id_in_order() -> None:
    """As long as this, a sort that is not stable mixes them up."""
    segment_ids = torch.tensor([2, 1] * 4000).view(8, 1000)
    parts = unpack(torch.arange(8000).view(8, 1000), segment_ids)
    assert torch.cat(parts).tolist() == [*range(1, 8000, 2), *range(0, 8000, 2)]


@pytest.mark.parametrize('dtype', INTEGERS)
def test_integers_of_every_dtype_are_packed_padded_and_taken_apart(dtype: torch.dtype) -> None:
    greatest = torch.iinfo(dtype).max
    sequences = [torch.tensor([greatest, 0, 1], dtype=dtype), torch.tensor([7], dtype=dtype)]
    x, segment_ids = pack(sequences, max_len=5, pad_value=greatest)
    assert x.dtype == dtype
    assert x.tolist() == [[greatest, 0, 1, 7, greatest]]
    assert [part.tolist() for part in unpack(x, segment_ids)] == [[greatest, 0, 1], [7]]
    assert collate(sequences, pad_value=2)['x'].tolist() == [[greatest, 0, 1], [7, 2, 2]]

    ids = torch.tensor([[greatest, greatest, 1], [0, 2, 0]], dtype=dtype)  # ids beyond those of int64 come last too
    assert [part.tolist() for part in unpack(torch.arange(6).view(2, 3), ids)] == [[2], [4], [0, 1]]


def test_a_memory_mapped_corpus_is_read_and_not_written(tmp_path: Any) -> None:
    np.arange(100, dtype='>u2').tofile(tmp_path / 'corpus')
    corpus = np.memmap(tmp_path / 'corpus', dtype='>u2', mode='r')  # read-only, and not in the machine's byte order
    x, _ = pack([corpus[3:6], corpus[9:5:-2]], max_len=5)
    assert x.dtype == torch.uint16
    assert x.tolist() == [[3, 4, 5, 9, 7]]
    x.zero_()
    assert corpus[3] == 3


@pytest.mark.parametrize(
    'sequences',
    [
        [(5, 6, 7), (8,)],
        [range(5, 8), range(8, 9)],
        [array.array('H', [5, 6, 7]), array.array('H', [8])],
        [[np.int64(5), 6, np.uint8(7)], [np.int64(8)]],
        [[torch.tensor(5), torch.tensor(6), torch.tensor(7)], [torch.tensor(8)]],
        [[5, 6, 7], torch.tensor([8])],
        [torch.tensor([5, 6, 7]), np.array([8])],
    ],
)
def test_other_forms_of_integers(sequences: Any) -> None:
    x, segment_ids = pack(sequences, max_len=4)
    assert x.dtype == torch.int64
    assert x.tolist() == [[5, 6, 7, 8]]
    assert segment_ids.tolist() == [[1, 1, 1, 2]]


def test_numbers_of_numpy_are_numbers() -> None:
    sequences = [torch.tensor([1, 2]), torch.tensor([3])]
    for integer in (np.int8, np.uint8, np.int64, np.uint64):
        x, _ = pack(sequences, max_len=integer(4), pad_value=integer(9))
        assert x.tolist() == [[1, 2, 3, 9]]
        assert collate(sequences, max_len=integer(3), pad_value=integer(9))['x'].shape == (2, 3)
        assert pack([[1] * 100] * 2, integer(100))[0].shape == (2, 100)  # of more tokens than int8 can count
        assert global_normalizer(integer(3)).item() == 3
    for floating in (np.float16, np.float32, np.float64, np.longdouble):
        x, _ = pack([t.half() for t in sequences], max_len=4, pad_value=floating(0.5))
        assert x.tolist() == [[1, 2, 3, 0.5]]
        assert global_normalizer(floating(0.5)).item() == 0.5
    assert pack([], max_len=2**31 - 1)[0].shape == (0, 2**31 - 1)


@pytest.mark.parametrize(
    ('numbers', 'dtype'),
    [([1, 2], 'int64'), ([True, False], 'bool'), ([1, 2.5], 'float32'), ([np.float16(1), 0], 'float16')],
)
def test_a_list_becomes_what_torch_makes_of_it(numbers: Any, dtype: str) -> None:
    x, _ = pack([numbers, numbers], max_len=2)
    assert x.dtype == getattr(torch, dtype)
    assert x.tolist() == [numbers, numbers]
    assert pack([[1e39]], max_len=1)[0].isinf().all()


@pytest.mark.parametrize('pad_value', [float('nan'), float('inf'), -float('inf'), 65504, 1, 0.5])
def test_floats_may_be_padded_with_what_their_dtype_holds(pad_value: float) -> None:
    """`collate` too, where frames have one feature."""
    padded = collate([torch.ones(1).half()], max_len=2, pad_value=pad_value)['x']
    for x in (padded, pack([torch.ones(1).half()], max_len=2, pad_value=pad_value)[0]):
        assert torch.equal(x[0, 1].isnan(), torch.tensor(pad_value != pad_value))
        assert pad_value != pad_value or x[0, 1].item() == pad_value


@pytest.mark.parametrize('layout', ['padded', 'packed'])
@pytest.mark.parametrize(
    ('name', 'columns', 'dtype'),
    [
        ('loss_weight', ([1, 1], [1.0, 0.5], [np.float64(1), 2]), torch.float32),
        ('loss_mask', ([1, 0], [True, False]), torch.bool),
        ('mask', ([1, 1], [True, True]), torch.bool),
        ('self_attn_kv_mask', ([0, 1], [False, True]), torch.bool),
        ('x', ([0, 1], [2**31, 3], [np.uint8(1), 2]), torch.int64),
    ],
)
def test_the_dtype_of_lists_does_not_depend_on_the_batch(
    layout: str, name: str, columns: Any, dtype: torch.dtype
) -> None:
    examples = [{'x': [1, 2], name: column} for column in columns]
    for batch in (*([example] for example in examples), examples):
        made = collate(batch, layout=layout)[name]
        assert made.dtype == dtype
        assert made.tolist() == [example[name] for example in batch]


def test_helpers_follow_the_data_and_not_the_default_device() -> None:
    tensors = [torch.tensor([1, 2]), torch.tensor([3])]
    lists = [tensor.tolist() for tensor in tensors]
    with torch.device('meta'):
        for sequences in (tensors, lists, [tensor.numpy() for tensor in tensors]):
            x, segment_ids = pack(sequences, max_len=4)
            assert x.tolist() == [[1, 2, 3, 0]]
            assert [part.tolist() for part in unpack(x, segment_ids)] == lists
            assert listed(collate(sequences)) == {'x': [[1, 2], [3, 0]], 'lens': [2, 1]}
        assert [t.device.type for t in (*pack([], max_len=4), *collate([]).values())] == ['cpu'] * 4
        assert global_normalizer(3).item() == 3
        assert global_normalizer(torch.tensor(3.0, device='cpu')).item() == 3


def test_tensors_without_values_are_laid_out() -> None:
    meta = [torch.empty(2, device='meta'), torch.empty(3, device='meta')]
    for t in (*pack(meta, max_len=4), *collate(meta, max_len=4).values()):
        assert t.is_meta
        assert t.shape[0] == 2
    parts = unpack(torch.empty(1, 4, 7, device='meta'), torch.tensor([[2, 2, 2, 1]]))
    assert [tuple(part.shape) for part in parts] == [(1, 7), (3, 7)]
    assert global_normalizer(torch.empty((), device='meta')).is_meta
    with FakeTensorMode():
        x, segment_ids = pack([torch.ones(2), torch.ones(3)], max_len=4)
        assert x.shape == segment_ids.shape == (2, 4)
        assert collate([torch.ones(2), torch.ones(3)], layout='packed')['x'].shape == (2, 3)


@pytest.mark.parametrize('dtype', [*INTEGERS, *fuzz_helpers.FLOATS])
def test_a_normalizer_of_every_dtype_is_float32_at_least(dtype: torch.dtype) -> None:
    total = global_normalizer(torch.tensor(100).to(dtype))
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert total.item() == 100


@pytest.mark.parametrize('value', [7e4, float('nan'), -float('inf'), -3.0])
def test_a_broken_tensor_stays_visible(value: float) -> None:
    total = torch.tensor(value).half()
    assert torch.equal(global_normalizer(total), total.float()) or total.isnan()
    assert global_normalizer(total).isnan() == total.isnan()
