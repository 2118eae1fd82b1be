"""What holds of every call, float64, values and gradients: it is right, and is one loss however it is batched.

Random calls and their networks are those of `fuzz`. They know no positions and have no dropout, so that a sequence may
be moved. 2,000 examples of each law: ``XTLOSS_EXAMPLES=2000 pytest tests/test_laws.py``.
"""

import math
import random
from typing import Any, NamedTuple

import fuzz
import fuzz_calls
import pytest
import torch
from batches import random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import EXACT, NETWORKS, assert_same_gradients, decoder, value_and_gradients
from oracle import counted_targets
from soak import growth, held, outcomes
from torch import Tensor, nn
from torch.nn.functional import pad

from xtloss import AutoregressiveWrapper, pack

Call = dict[str, Any]
KINDS = st.sampled_from(['ar', 'unpadded', 'xl', 'continuous'])
SEEDS = st.integers(0, 2**32)
WEIGHTINGS = st.one_of(st.sampled_from(fuzz_calls.WEIGHTINGS), st.floats(0, 1))
FUSED = st.sampled_from(['auto', True, False])


def random_call(kind: str, seed: int, *without: str) -> Call:
    """A call of `fuzz` that is not refused, with none of the arguments of these names, and no normalizer."""
    torch.manual_seed(seed % 2**32)
    kind = 'ar' if kind == 'unpadded' else kind
    call = fuzz_calls.random_arguments(random.Random(seed), kind)
    refused = {'ar': {'seq_start_pos'} if 'segment_ids' in call else set(), 'xl': {'segment_ids', 'seq_start_pos'}}
    known = {'x', 'loss_weight', *fuzz.COUNTING} - {*without, *refused.get(kind, {'segment_ids'})}
    return {name: value for name, value in call.items() if name in known}


def wrapper_of(kind: str, weighting: Any, fused: Any) -> nn.Module:
    options = {} if kind == 'continuous' else {'fused': fused}
    if kind == 'unpadded':
        kind, options = 'ar', {**options, 'unpad': True}
    return fuzz.OURS[kind](fuzz.network(kind), loss_weighting=weighting, **options)


def rows(call: Call, which: Any) -> Call:
    """The call with these rows only, in this order."""

    def wide(t: Tensor) -> Tensor:  # old torches cannot index unsigned integers
        return t if t.is_floating_point() else t.long()

    return {name: wide(value)[which].to(value.dtype) for name, value in call.items()}


def counted(call: Call) -> Tensor:
    """(b, n-1), by the oracle."""
    x = call['x'].long() if call['x'].ndim == 2 else torch.zeros(call['x'].shape[:2])
    table = counted_targets(x, **{name: call[name] for name in fuzz.COUNTING if name in call})
    return torch.tensor(table, dtype=torch.bool).reshape(x.shape[0], x.shape[1] - 1)


def assert_same(wrapper: nn.Module, *calls: Call, want: tuple[float, dict[str, Tensor]]) -> None:
    """The loss, or its sum over the calls, and the gradients are those of `want`."""
    got, grads = value_and_gradients(wrapper, *calls)
    assert got == pytest.approx(want[0], rel=1e-9, abs=1e-9)
    assert_same_gradients(grads, want[1], 1e-8, floor=1e-3)


@pytest.mark.parametrize('start', range(0, 500, 100))
def test_random_calls(start: int) -> None:
    """They are right, or refused by the name of an argument; ``python tests/soak.py --calls 500000`` for more."""
    found = outcomes(range(start, start + 100))
    assert found['right'] > 50, found


@pytest.mark.slow
def test_nothing_is_left_behind() -> None:
    seeds = range(100)
    outcomes(seeds)  # what is made once
    before = held()
    outcomes(seeds)
    assert growth(before, held()) is None
    kept = [torch.zeros(10) for _ in range(100)]
    assert growth(before, held()) is not None
    del kept


@given(kind=KINDS, seed=SEEDS, weighting=WEIGHTINGS, fused=FUSED)
def test_neither_order_nor_micro_batches_matter(kind: str, seed: int, weighting: Any, fused: Any) -> None:
    wrapper, call = wrapper_of(kind, weighting, fused), random_call(kind, seed)
    order, cut = torch.randperm(len(call['x'])), random.Random(seed).randint(0, len(call['x']))
    want = value_and_gradients(wrapper, call)
    assert_same(wrapper, rows(call, order), want=want)
    assert_same(wrapper, rows(call, order[:cut]), rows(call, order[cut:]), want=want)


@given(kind=KINDS, seed=SEEDS, weighting=WEIGHTINGS, fused=FUSED, left=st.booleans())
def test_padding_changes_nothing(kind: str, seed: int, weighting: Any, fused: Any, left: bool) -> None:
    """Three more columns, a whole segment of XL's, of whatever content, that `mask` says are padding."""
    if weighting == 'padded':
        weighting = 'token'
    call = random_call(kind, seed)
    b, n = call['x'].shape[:2]
    by_hand = call | {'mask': call.get('mask', torch.ones(b, n, dtype=torch.bool))}
    if left and 'lens' in by_hand:
        by_hand['mask'] = by_hand['mask'] & (torch.arange(n) < by_hand.pop('lens').long()[:, None])
    wider = {}
    for name, value in by_hand.items():
        sides = (3, 0) if left else (0, 3)
        per_token = value.ndim > 1
        features = (0, 0) * (value.ndim - 2)
        wide = value.long() if name in ('x', 'segment_ids') and kind != 'continuous' else value
        wider[name] = pad(wide, (*features, *sides)) if per_token else value
    if left and 'seq_start_pos' in call:
        wider['seq_start_pos'] = call['seq_start_pos'].long() + 3
    wrapper = wrapper_of(kind, weighting, fused)
    assert_same(wrapper, wider, want=value_and_gradients(wrapper, call))


@given(kind=KINDS, seed=SEEDS, weighting=WEIGHTINGS, fused=FUSED, junk=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_does_not_count_does_not_matter(kind: str, seed: int, weighting: Any, fused: Any, junk: float) -> None:
    """Broken weights where nothing counts; broken frames, and ids that do not exist, where there is padding."""
    wrapper, call = wrapper_of(kind, weighting, fused), random_call(kind, seed)
    b, n = call['x'].shape[:2]
    weight = call.get('loss_weight', torch.ones(b, n, dtype=fuzz_calls.DTYPE))
    call['loss_weight'] = weight if weight.ndim == 2 else weight[:, None].repeat(1, n)
    want = value_and_gradients(wrapper, call)

    padding = torch.zeros(b, n, dtype=torch.bool)
    places = torch.arange(n)
    if 'lens' in call:
        padding |= places >= call['lens'].long()[:, None]
    if 'mask' in call:
        padding |= ~call['mask']
    if 'seq_start_pos' in call:
        padding |= places < call['seq_start_pos'].long()[:, None]
    if 'segment_ids' in call:
        padding |= call['segment_ids'].long() == 0
    if kind == 'continuous':
        broken = call['x'].masked_fill(padding[..., None], junk)
    else:
        ids = torch.tensor([-1, 10**12, -(2**63), 2**63 - 1, fuzz_calls.V])[torch.randint(0, 5, (b, n))]
        broken = torch.where(padding, ids, call['x'].long())
    uncounted = pad(~counted(call), (1, 0), value=True)
    assert_same(
        wrapper, call | {'x': broken, 'loss_weight': call['loss_weight'].masked_fill(uncounted, junk)}, want=want
    )


@given(kind=KINDS, seed=SEEDS, fused=FUSED)
def test_sequence_is_the_mean_over_rows_of_the_mean_over_a_row(kind: str, seed: int, fused: Any) -> None:
    call = random_call(kind, seed, 'segment_ids')
    row_loss = wrapper_of(kind, 'token', fused)
    losses = [
        row_loss(**rows(call, slice(row, row + 1))).item() for row in counted(call).any(1).nonzero()[:, 0].tolist()
    ]
    mean = math.fsum(losses) / max(len(losses), 1)
    assert wrapper_of(kind, 'sequence', fused)(**call).item() == pytest.approx(mean, rel=1e-9, abs=1e-9)


# each kind of network: positions, heads and attention


class Sequence(NamedTuple):
    """One sequence: token ids, which of them are targets, and what each weighs; all (length,)."""

    x: Tensor
    loss_mask: Tensor
    loss_weight: Tensor


def draw_sequences(seed: int, count: int) -> list[Sequence]:
    batch = random_batch(seed, count, 8, {'lens', 'loss_mask', 'loss_weight'}, vocab=fuzz_calls.V)
    lengths = batch['lens'].clamp(1, 8).tolist()
    return [Sequence(*(batch[name][row, :end] for name in Sequence._fields)) for row, end in enumerate(lengths)]


def padded(sequences: list[Sequence], width: int, by: str, left: bool = False) -> dict[str, Tensor]:
    """The call for these sequences as rows of `width`, the padding told to the wrapper `by` one of its arguments."""
    fill = Sequence(torch.tensor(3), torch.tensor(True), torch.tensor(7.0, dtype=torch.float64))
    call = {}
    for name, value in fill._asdict().items():
        call[name] = value.repeat(len(sequences), width)
        for row, sequence in enumerate(sequences):
            here = getattr(sequence, name)
            call[name][row, slice(width - len(here), None) if left else slice(len(here))] = here

    lens = torch.tensor([len(sequence.x) for sequence in sequences], dtype=torch.long)
    start = width - lens if left else torch.zeros_like(lens)
    real = (torch.arange(width) >= start[:, None]) & (torch.arange(width) < (start + lens)[:, None])
    told = {'lens': lens, 'mask': real, 'seq_start_pos': start}
    if by == 'ignore_index':
        call['x'] = call['x'].masked_fill(~real, -100)
        return call
    return call | {by: told[by]}


def packed(sequences: list[Sequence], width: int) -> dict[str, Tensor]:
    """The call for these sequences as rows of `width`, as many of them in a row as fit."""
    call = {name: pack([getattr(s, name) for s in sequences], width)[0] for name in Sequence._fields}
    return call | {'segment_ids': pack([s.x for s in sequences], width)[1]}


@pytest.mark.parametrize('fused', ['auto', False], ids=['auto', 'not fused'])
@pytest.mark.parametrize('name', NETWORKS)
@settings(max_examples=6)
@given(seed=SEEDS, count=st.integers(1, 5), weighting=WEIGHTINGS)
def test_every_layout_is_one_loss(name: str, fused: str | bool, seed: int, count: int, weighting: str | float) -> None:
    options, left_by = NETWORKS[name], 'seq_start_pos' if name == 'absolute' else 'mask'
    wrapper = AutoregressiveWrapper(
        decoder(num_tokens=fuzz_calls.V, dtype=torch.float64, **EXACT, **options), loss_weighting=weighting, fused=fused
    )
    sequences, choose = draw_sequences(seed, count), random.Random(seed)
    longest = max(len(sequence.x) for sequence in sequences)

    def width(of: list[Sequence]) -> int:  # 'padded' counts the padding: it keeps the promise for one padded size
        return 12 if weighting == 'padded' else max(len(sequence.x) for sequence in of) + choose.randrange(4)

    shuffled = choose.sample(sequences, count)
    cuts = sorted(choose.sample(range(1, count), choose.randrange(count))) if count > 1 else []
    parts = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    layouts = {
        'right, by lens': [padded(sequences, width(sequences), 'lens')],
        'right, by mask': [padded(sequences, width(sequences), 'mask')],
        'right, by ignore_index': [padded(sequences, width(sequences), 'ignore_index')],
        'left': [padded(sequences, width(sequences), left_by, left=True)],
        'another order': [padded(shuffled, width(shuffled), 'lens')],
        'micro-batches': [padded(part, width(part), 'lens') for part in parts],
        'micro-batches, left': [padded(part, width(part), left_by, left=True) for part in parts],
        'row by row': [padded([sequence], width([sequence]), 'mask') for sequence in sequences],
        'with an empty one': [padded(sequences, width(sequences), 'lens'), padded([], longest, 'lens')],
    }

    if weighting != 'padded':  # packing takes padding away
        layouts['packed'] = [packed(shuffled, longest + choose.randrange(9))]
        layouts['packed micro-batches'] = [packed(part, longest + choose.randrange(9)) for part in parts]

    want, wanted = value_and_gradients(wrapper, padded(sequences, 12 if weighting == 'padded' else longest, 'lens'))
    for layout, calls in layouts.items():
        got, grads = value_and_gradients(wrapper, *calls)
        assert got == pytest.approx(want, rel=1e-9, abs=1e-9), layout
        assert_same_gradients(grads, wanted, 1e-9, floor=1e-4)
