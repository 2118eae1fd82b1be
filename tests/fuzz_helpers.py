"""Random sequences packed and collated, against loops. What is refused is in `bad_cases.py`."""

import random
from typing import Any

import torch
from torch import Tensor
from wrong_things import KINDS

from xtloss import collate, pack, unpack

INTEGERS, FLOATS = KINDS['integer'], KINDS['floating point']


def random_sequences(draw: random.Random, max_len: int, dtype: torch.dtype, form: str) -> list[Any]:
    """Of one dtype, as tensors, numpy arrays or lists."""
    lengths = [draw.randint(1, max_len) for _ in range(draw.choice([0, draw.randint(1, 40)]))]
    made = [torch.randint(0, 50, (length,)).to(dtype) for length in lengths]
    return [t.tolist() if form == 'list' else t.numpy() if form == 'array' else t for t in made]


def as_list(sequence: Any) -> list[Any]:
    return sequence if isinstance(sequence, list) else sequence.tolist()


def rows_by_definition(lengths: list[int], max_len: int) -> list[list[int]]:
    """Best-fit decreasing: which sequences, from 0 on, lie in which row."""
    rows: list[list[int]] = []
    for k in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        room = [max_len - sum(lengths[j] for j in row) for row in rows]
        fits = [(left, row) for row, left in enumerate(room) if left >= lengths[k]]
        if fits:
            rows[min(fits)[1]].append(k)
        else:
            rows.append([k])
    return rows


def check_packed(x: Tensor, ids: Tensor, sequences: list[Any], max_len: int, pad_value: Any) -> None:
    rows = rows_by_definition([len(sequence) for sequence in sequences], max_len)
    want = [[token for k in row for token in as_list(sequences[k])] for row in rows]
    numbers = [[k + 1 for k in row for _ in range(len(sequences[k]))] for row in rows]
    assert x.tolist() == [row + [pad_value] * (max_len - len(row)) for row in want]
    assert ids.tolist() == [row + [0] * (max_len - len(row)) for row in numbers]
    assert ids.dtype == torch.int64


def packing(draw: random.Random) -> None:
    """And taking apart: all of it, some of the rows, and features of it that are not contiguous."""
    form, max_len, pad_value = draw.choice(['tensor', 'list', 'array']), draw.randint(1, 24), draw.choice([0, 1])
    # numpy has no bfloat16
    dtypes = {
        'list': [torch.bool, torch.int64, torch.float32],
        'array': [torch.bool, *INTEGERS, torch.float16, *FLOATS[2:]],
    }
    dtype = draw.choice(dtypes.get(form, [torch.bool, *INTEGERS, *FLOATS]))
    sequences = random_sequences(draw, max_len, dtype, form)
    x, ids = pack(sequences, max_len, pad_value)
    check_packed(x, ids, sequences, max_len, pad_value)
    assert x.dtype == (dtype if sequences else torch.int64)

    assert all(part.dtype == x.dtype for part in unpack(x, ids))
    for some in (slice(None), slice(1, None)):
        there = sorted({*ids[some].flatten().tolist()} - {0})
        assert [part.tolist() for part in unpack(x[some], ids[some])] == [as_list(sequences[k - 1]) for k in there]
    features = torch.randn(2, *x.shape).permute(1, 2, 0)
    parts = unpack(features, ids.to(draw.choice(INTEGERS)))
    assert len(parts) == len(sequences)
    assert all(torch.equal(part, features[ids == k + 1]) for k, part in enumerate(parts))


def collating(draw: random.Random) -> None:
    form, layout = draw.choice(['tensor', 'list', 'array']), draw.choice(['padded', 'packed'])
    dtype = torch.int64 if form == 'list' else draw.choice([*INTEGERS, torch.float32])
    keys = draw.sample(['loss_mask', 'loss_weight', 'mask'], draw.randint(0, 3))
    ids = random_sequences(draw, draw.randint(1, 24), dtype, form)
    longest = max(map(len, ids), default=1)
    n, pad_value = draw.choice([longest, longest + 3]), draw.choice([0, 7])
    examples = [{'x': x, **{key: [draw.randint(0, 1) for _ in x] for key in keys}} for x in ids]
    max_len = None if n == longest and draw.random() < 0.5 else n
    batch = collate(examples if keys else ids, layout=layout, max_len=max_len, pad_value=pad_value)

    keys = keys if ids else []
    assert batch.keys() == {'x', *keys, 'segment_ids' if layout == 'packed' else 'lens'}
    assert batch['x'].dtype == (dtype if ids else torch.int64)
    for key in ('x', *keys):
        sequences = ids if key == 'x' else [example[key] for example in examples]
        padding = pad_value if key == 'x' else 0
        if layout == 'packed':
            check_packed(batch[key], batch['segment_ids'], sequences, n, padding)
        else:
            assert batch[key].tolist() == [as_list(s) + [padding] * (n - len(s)) for s in sequences]
            assert batch['lens'].tolist() == [len(s) for s in sequences]
