"""One loss, however the sequences are batched: padded on either side, in any order, in micro-batches, packed."""

import random
from typing import NamedTuple

import pytest
import torch
from batches import random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import EXACT, NETWORKS, WEIGHTINGS, assert_same_gradients, decoder, value_and_gradients
from torch import Tensor

from xtloss import AutoregressiveWrapper, pack

VOCAB = 11


class Sequence(NamedTuple):
    """One sequence: token ids, which of them are targets, and what each weighs; all (length,)."""

    x: Tensor
    loss_mask: Tensor
    loss_weight: Tensor


def draw_sequences(seed: int, count: int) -> list[Sequence]:
    batch = random_batch(seed, count, 8, {'lens', 'loss_mask', 'loss_weight'}, vocab=VOCAB)
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
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 5),
    weighting=st.one_of(st.sampled_from(WEIGHTINGS), st.floats(0, 1)),
)
def test_every_layout_is_one_loss(name: str, fused: str | bool, seed: int, count: int, weighting: str | float) -> None:
    options, left_by = NETWORKS[name], 'seq_start_pos' if name == 'absolute' else 'mask'
    wrapper = AutoregressiveWrapper(
        decoder(num_tokens=VOCAB, dtype=torch.float64, **EXACT, **options), loss_weighting=weighting, fused=fused
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


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('name', ['absolute', 'rotary', 'looped'])
def test_single_precision(name: str, weighting: str | float) -> None:
    options, left_by = NETWORKS[name], 'seq_start_pos' if name == 'absolute' else 'mask'
    wrapper = AutoregressiveWrapper(decoder(num_tokens=VOCAB, **options), loss_weighting=weighting)
    sequences = draw_sequences(11, 6)
    want, wanted = value_and_gradients(wrapper, padded(sequences, 12, 'lens'))
    tolerance = 1e-4 if name == 'looped' else 1e-5
    for calls in (
        [padded(sequences, 12, left_by, left=True)],
        [padded(sequences[:2], 12, 'mask'), padded(sequences[2:], 12, left_by, left=True)],
    ):
        got, grads = value_and_gradients(wrapper, *calls)
        assert got == pytest.approx(want, rel=tolerance)
        assert_same_gradients(grads, wanted, tolerance)
