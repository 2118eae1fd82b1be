"""A short form of the soak: random calls are right, or refused by the name of an argument, and leave nothing behind."""

import pytest
import torch
from soak import growth, held, outcomes

CALLS, BLOCK = 500, 100  # python tests/soak.py --calls 500000 for more


@pytest.mark.parametrize('start', range(0, CALLS, BLOCK))
def test_random_calls(start: int) -> None:
    found = outcomes(range(start, start + BLOCK))
    assert found['right'] > 0.5 * BLOCK, found


@pytest.mark.slow
def test_nothing_is_left_behind() -> None:
    seeds = range(100)
    outcomes(seeds)  # what is made once
    before = held()
    outcomes(seeds)
    assert growth(before, held()) is None


@pytest.mark.slow
def test_growth_is_seen() -> None:
    memory, tensors = held()
    kept = [torch.zeros(10) for _ in range(100)]
    assert growth((memory, tensors), held()) is not None
    assert growth((memory, tensors), (memory + 33, tensors)) is not None
    assert len(kept) == 100
