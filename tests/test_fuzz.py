"""A short form of the fuzz: random calls of the three wrappers are right, or refused by the name of an argument."""

import pytest
from fuzz import outcomes

CALLS, BLOCK = 300, 50  # python tests/fuzz.py --calls 41000 for more


@pytest.mark.parametrize('start', range(0, CALLS, BLOCK))
def test_random_calls(start: int) -> None:
    found = outcomes(range(start, start + BLOCK))
    assert found['right'] > 0.7 * BLOCK, found
