"""Which targets count, and how many each sequence has."""

import itertools

import pytest
from batches import RULES, random_batch
from oracle import counted_targets, sequences

from xtloss.weighting.targets import count_targets

SUBSETS = [set(some) for k in range(len(RULES) + 1) for some in itertools.combinations(RULES, k)]


@pytest.mark.parametrize('using', SUBSETS, ids=lambda using: ' '.join(sorted(using)) or 'no rule')
def test_the_oracle_counts_the_same(using: set[str]) -> None:
    shapes = [(0, 3), (2, 1), (4, 2), (4, 9)]
    for prepended, (b, n) in itertools.product(range(3), shapes):
        batch = random_batch(b + n + prepended, b, n, using)
        x, rules = batch.pop('x'), batch
        got = count_targets(x, **rules, **({'ignore_index': -100} if 'ignore' in using else {}), prepended=prepended)
        want = counted_targets(x, prepend_len=prepended, **rules)
        assert got.counted.tolist() == want
        runs = sequences(x, rules.get('segment_ids'))
        groups = [[place for place in run if want[place[0]][place[1]]] for run in runs]
        lengths = [length for row in got.lengths.tolist() for length in row if length]
        assert sorted(lengths) == sorted(filter(None, map(len, groups)))
        for group in groups:
            assert all(got.length[place].item() == len(group) for place in group)
