"""Which targets count, and how many each sequence has."""

from batches import RULES, random_batch
from hypothesis import given
from hypothesis import strategies as st
from oracle import counted_targets, sequences

from xtloss.weighting.targets import count_targets


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
