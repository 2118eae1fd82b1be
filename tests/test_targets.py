"""Which targets count, how many each sequence has, and where the network's outputs lie that predict them."""

import pytest
import torch
from batches import RULES, random_batch
from hypothesis import given
from hypothesis import strategies as st
from oracle import counted_targets, sequences

from xtloss.packing.layout import Layout
from xtloss.weighting.targets import Outputs, count_targets
from xtloss.wrappers.unpad import pays, plan_rows


@given(seed=st.integers(0, 2**32 - 1), b=st.integers(0, 4), n=st.integers(1, 9), using=st.sets(st.sampled_from(RULES)))
def test_the_oracle_counts_the_same(seed: int, b: int, n: int, using: set[str]) -> None:
    batch, prepended = random_batch(seed, b, n, using), seed % 3
    x, rules = batch.pop('x'), batch
    got = count_targets(x, **rules, **({'ignore_index': -100} if 'ignore' in using else {}), prepended=prepended)
    want = counted_targets(x, prepend_len=prepended, **rules)
    assert got.counted.tolist() == want
    groups = [[place for place in run if want[place[0]][place[1]]] for run in sequences(x, rules.get('segment_ids'))]
    assert sorted(length for row in got.lengths.tolist() for length in row if length) == sorted(
        filter(None, map(len, groups))
    )
    for group in groups:
        assert all(got.length[place].item() == len(group) for place in group)


@pytest.mark.parametrize('features', [(), (2,)])
def test_outputs_in_the_rows_of_the_batch(features: tuple[int, ...]) -> None:
    """Two embeddings before rows of four tokens: the outputs 2, 3 and 4 of six predict the three targets."""
    out = torch.arange(12.0).view(2, 6, *[1] * len(features)).expand(2, 6, *features)
    first = out if not features else out[..., 0]
    targets = Outputs().to_targets(out, (2, 3))
    assert targets.shape == (2, 3, *features)
    assert torch.equal(targets, out[:, 2:5])
    wanted = torch.where(torch.tensor([False, False, True, True, True, False]), first, 0).flatten()
    assert torch.equal(Outputs().at_outputs(first[:, 2:5], (2, 6)), wanted)


@pytest.mark.parametrize('features', [(), (2,)])
def test_outputs_at_places(features: tuple[int, ...]) -> None:
    """Two rows became one of five tokens: those of four targets lie at 3, 0 and 1, and one lies nowhere."""
    out = torch.arange(1.0, 6.0).view(1, 5, *[1] * len(features)).expand(1, 5, *features)
    outputs = Outputs(torch.tensor([[3, 0], [1, 5]]))
    wanted = torch.tensor([[4.0, 1.0], [2.0, 0.0]]).view(2, 2, *[1] * len(features)).expand(2, 2, *features)
    assert torch.equal(outputs.to_targets(out, (2, 2)), wanted)
    targets = torch.tensor([[7.0, 8.0], [9.0, 10.0]])
    assert outputs.at_outputs(targets, (1, 5)).tolist() == [8.0, 9.0, 0.0, 7.0, 0.0]


@pytest.mark.parametrize(
    ('rows', 'width', 'sequences', 'packs'),
    [
        (1, 512, 2, False),  # one row costs as much as two
        (1, 512, 3, True),
        (2, 256, 3, False),
        (2, 256, 4, True),
        (4, 0, 4, False),
        (3, 1024, 9, False),
        (3, 1024, 10, True),
    ],
)
def test_rows_are_shared_where_that_saves_more_than_the_mask_costs(
    rows: int, width: int, sequences: int, packs: bool
) -> None:
    assert pays(Layout([], [], [], (rows, width)), sequences) == packs


def test_one_row_where_the_network_takes_one() -> None:
    x, lens = torch.arange(12).view(3, 4), torch.tensor([4, 2, 4])
    plan = plan_rows(x, {'lens': lens}, one_row=True)
    assert plan is not None
    assert plan.source.tolist() == [[0, 1, 2, 3, 8, 9, 10, 11, 4, 5]]
    assert plan_rows(x, {'lens': torch.full((3,), 4)}, one_row=False) is None
