"""Random batches: one generator for the tests of the equation, the laws, the layouts and the fuzz."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

RULES = ('ignore', 'lens', 'mask', 'loss_mask', 'seq_start_pos', 'segment_ids')  # what says which targets count
WEIGHTS = ('loss_weight', 'row_weight')
INTEGERS = [getattr(torch, f'{u}int{size}') for u in ('', 'u') for size in (8, 16, 32, 64)]


def subsets(names: Sequence[str]) -> st.SearchStrategy[set[str]]:
    """Each as likely as every other, where hypothesis' own sets are small."""
    bits = st.integers(0, 2 ** len(names) - 1)
    return bits.map(lambda chosen: {name for k, name in enumerate(names) if chosen >> k & 1})


class Batch(dict[str, Any]):
    """Keyword arguments of a wrapper's forward, drawn at random."""

    def without(self, *names: str) -> dict[str, Any]:
        """All arguments but these."""
        return {k: v for k, v in self.items() if k not in names}


def random_batch(
    seed: int,
    b: int,
    n: int,
    using: set[str],
    *,
    vocab: int = 11,
    features: int | None = None,
    ignore_index: int = -100,
    every_dtype: bool = False,
) -> Batch:
    """Token ids (b, n), or frames (b, n, features) in float64, with what `using` names of `RULES` and `WEIGHTS`.

    A mask has holes; 'right mask' and 'left mask' are of padding. Lengths may be longer than the rows, and ids of
    segments may be negative and come again. With `every_dtype` each integer tensor is of a random dtype, where it fits.
    """
    draw = torch.Generator().manual_seed(seed)

    def flags(p: float) -> Tensor:
        return torch.rand(b, n, generator=draw) < p

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    batch = Batch(x=integers(0, vocab, b, n) if features is None else weights(b, n, features))
    if 'ignore' in using:
        batch['x'] = batch['x'].masked_fill(flags(0.2), ignore_index)
    if 'lens' in using:
        batch['lens'] = integers(0, n + 2, b)
    if 'mask' in using:
        batch['mask'] = flags(0.8)
    if {'right mask', 'left mask'} & using:
        right = torch.arange(n) < integers(0, n + 1, b, 1)
        batch['mask'] = right if 'right mask' in using else right.flip(1)
    if 'loss_mask' in using:
        batch['loss_mask'] = flags(0.7)
    if 'loss_weight' in using:
        batch['loss_weight'] = weights(b, n)
    if 'row_weight' in using:
        batch['loss_weight'] = weights(b)
    if 'seq_start_pos' in using:
        batch['seq_start_pos'] = integers(0, n + 1, b)
    if 'segment_ids' in using:
        batch['segment_ids'] = (flags(0.4).cumsum(-1) + integers(-2, 2, b, 1)) * flags(0.9)
    if every_dtype:
        for name, value in batch.items():
            if value.dtype == torch.int64 and not (name == 'x' and 'ignore' in using):
                batch[name] = value.to(INTEGERS[int(integers(0, len(INTEGERS)))])
    return batch
