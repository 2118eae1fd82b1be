"""Random calls of the functions beside the wrappers, against loops: what `tests/fuzz.py` is for the wrappers."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import wrong_things as wrong
from torch import Tensor

from xtloss import collate, global_normalizer, linear_cross_entropy, pack, unpack

INTEGERS, FLOATS = wrong.KINDS['integer'], wrong.KINDS['floating point']
JUNK = [*wrong.NOTHING_LIKE_IT, *wrong.NUMBERS, *wrong.FLAGS, None]


def try_one(seed: int) -> str:
    """Make a call and hold it to the loops; return what it was, or raise AssertionError."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    make = draw.choice([packing, collating, head_and_loss, normalizing])
    try:
        return make(draw)
    except Exception as error:
        raise AssertionError(f'seed {seed}: {error!r} in {make.__name__}') from error


def refuses(name: str, row: wrong.Wrong, function: Callable[..., Any], call: dict[str, Any]) -> str:
    """Call with one argument spoilt."""
    call = {**call, name: row.value}
    try:
        function(**call)
    except (TypeError, ValueError) as error:
        if type(error) is row.error and name in str(error):
            return 'refused'
        raise
    raise AssertionError(f'not refused: {name} of {call}')


def row_of_junk(draw: random.Random, *legal: type) -> wrong.Wrong:
    return wrong.Wrong(draw.choice([value for value in JUNK if not isinstance(value, legal)]), TypeError, '')


def random_sequences(draw: random.Random, kind: str) -> list[Any]:
    """Of one dtype, as tensors, arrays or lists."""
    lengths = [draw.randint(1, 9) for _ in range(draw.randint(0, 9))]
    if kind == 'list':
        return [[draw.randint(0, 50) for _ in range(length)] for length in lengths]
    dtype = draw.choice([torch.bool, *INTEGERS, *FLOATS])
    made = [torch.randint(0, 50, (length,)).to(dtype) for length in lengths]
    return [t.numpy() for t in made] if kind == 'array' and dtype != torch.bfloat16 else made


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


def packing(draw: random.Random) -> str:
    sequences = random_sequences(draw, draw.choice(['tensor', 'list', 'array']))
    call = {'sequences': sequences, 'max_len': draw.randint(9, 20), 'pad_value': draw.choice([0, 1])}
    what = draw.random()
    if what < 0.15:
        call['sequences'] = [torch.arange(3)]
        name = draw.choice(['max_len', 'pad_value'])
        return refuses(name, draw.choice(wrong.MAX_LEN if name == 'max_len' else wrong.PAD_VALUE), pack, call)
    if what < 0.3 and sequences:
        k = draw.randrange(len(sequences))
        sequences[k] = draw.choice([sequences[k][:0], torch.ones(2, 2), 3, 'text', None])
        try:
            pack(**call)
        except (TypeError, ValueError, RuntimeError) as error:  # which torch raises of what is no sequence
            if 'sequences[' in str(error) or sequences[k] in ('text', None):
                return 'refused'
            raise
        raise AssertionError(f'not refused: {call}')

    x, ids = pack(**call)
    check_packed(x, ids, sequences, call['max_len'], call['pad_value'])
    assert [t.tolist() for t in unpack(x, ids)] == [as_list(sequence) for sequence in sequences]
    features = torch.randn(*x.shape, 2)
    unpacked = unpack(features, ids.to(draw.choice(INTEGERS)))
    assert all(torch.equal(t, features[ids == k + 1]) for k, t in enumerate(unpacked))
    if what > 0.9:
        name, rows = draw.choice([('values', row_of_junk(draw, Tensor)), ('segment_ids', row_of_junk(draw, Tensor))])
        return refuses(name, rows, unpack, {'values': x, 'segment_ids': ids})
    return 'right'


def collating(draw: random.Random) -> str:
    kind, layout = draw.choice(['tensor', 'list']), draw.choice(['padded', 'packed'])
    ids, keys = random_sequences(draw, kind), draw.sample(['loss_mask', 'loss_weight', 'mask'], draw.randint(0, 3))
    if kind == 'tensor' and ids:
        ids = [t.to(torch.int64) for t in ids]
    examples = [{'x': x, **{key: [draw.randint(0, 1) for _ in x] for key in keys}} for x in ids]
    call = {'layout': layout, 'max_len': draw.choice([None, 9, 15]), 'pad_value': draw.choice([0, 7])}
    if draw.random() < 0.15:
        rows = {'layout': row_of_junk(draw, str), 'max_len': draw.choice(wrong.MAX_LEN)}
        name = draw.choice([*rows, 'pad_value'])
        return refuses(name, rows.get(name) or draw.choice(wrong.PAD_VALUE), collate, {'examples': examples, **call})

    plain = draw.random() < 0.3 or not examples
    batch = collate(ids if plain else examples, **call)
    keys = [] if plain else keys
    assert batch.keys() == {'x', *keys, 'segment_ids' if layout == 'packed' else 'lens'}
    n = call['max_len'] or max(map(len, ids), default=1)
    for key in ('x', *keys):
        sequences = ids if key == 'x' else [example[key] for example in examples]
        padding = call['pad_value'] if key == 'x' else 0
        if layout == 'packed':
            check_packed(batch[key], batch['segment_ids'], sequences, n, padding)
        else:
            assert batch[key].tolist() == [as_list(s) + [padding] * (n - len(s)) for s in sequences]
            assert batch['lens'].tolist() == [len(s) for s in sequences]
    return 'right'


def spoil(draw: random.Random, name: str, value: Any) -> wrong.Wrong:
    """For an argument of `linear_cross_entropy`."""
    if name == 'chunk_size':
        return draw.choice(wrong.CHUNK_SIZE)
    legal = INTEGERS if name == 'target' else FLOATS
    dtype = draw.choice([dtype for dtype in wrong.ALL_DTYPES if dtype not in legal])
    rows = [
        row_of_junk(draw, *((type(None),) if name == 'bias' else ())),
        wrong.Wrong(value.detach().to(dtype), TypeError, ''),
        wrong.Wrong(value[None], ValueError, ''),
        wrong.Wrong(value.detach().to('meta'), ValueError, ''),  # of embed, which the others must be like
    ]
    return draw.choice(rows[:3] if name == 'embed' else rows)


def head_and_loss(draw: random.Random) -> str:
    n, d, v = draw.choice([0, 1, 2, 7]), draw.randint(1, 4), draw.randint(1, 9)
    tensors: dict[str, Any] = {name: torch.randn(*shape, dtype=torch.float64, requires_grad=True) for name, shape in {
        'embed': (n, d), 'weight': (v, d), 'token_weight': (n,), 'bias': (v,),
    }.items() if name != 'bias' or draw.random() < 0.5}  # fmt: skip
    target = torch.randint(0, v, (n,))
    sizes = {'chunk_size': draw.randint(1, 9)} if draw.random() < 0.7 else {}
    call = {**tensors, 'target': target.to(draw.choice(INTEGERS)), **sizes}
    if draw.random() < 0.25:
        name = draw.choice(list(call))
        return refuses(name, spoil(draw, name, call[name]), linear_cross_entropy, call)

    loss, token_loss = linear_cross_entropy(**call)
    nll = F.cross_entropy(F.linear(tensors['embed'], tensors['weight'], tensors.get('bias')), target, reduction='none')
    want = (tensors['token_weight'] * nll).sum()
    assert torch.allclose(loss, want, rtol=1e-9, atol=1e-9)
    assert torch.allclose(token_loss, nll, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(of, list(tensors.values())) for of in (loss, want)]
    for got, right in zip(*grads, strict=True):
        assert torch.allclose(got, right, rtol=1e-9, atol=1e-9)
    return 'right'


def normalizing(draw: random.Random) -> str:
    if draw.random() < 0.3:
        return refuses('total', draw.choice(wrong.TOTAL), global_normalizer, {})
    number = draw.choice([0, 3, 2.5, np.float32(2.5), np.int64(7), torch.tensor(2.5), torch.tensor(3)])
    if isinstance(number, Tensor):
        number = number.to(draw.choice([*INTEGERS, *FLOATS]))
    total = global_normalizer(number)
    assert total.item() == number
    assert total.ndim == 0
    wide = torch.float64 if not isinstance(number, Tensor) or number.dtype == torch.float64 else torch.float32
    assert total.dtype == wide
    return 'right'
