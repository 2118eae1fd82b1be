"""A collate for `DataLoader`, in the padded and in the packed layout.

Dims: s sequences, t tokens of all of them together, b rows, n positions in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xtloss.packing.layout import (
    Layout,
    best_fit_decreasing,
    check_max_len,
    concatenate,
    is_sequence,
    sequence_lengths,
    sequence_numbers,
    token_index,
)

LAYOUTS = ('padded', 'packed')


def collate(
    examples: Sequence[Any], *, layout: str = 'padded', max_len: int | None = None, pad_value: float = 0
) -> dict[str, Tensor]:
    """Make a batch of examples, ready for ``wrapper(**batch)`` and ``wrapper.loss_normalizer(**batch)``.

        >>> packed = partial(collate, layout='packed', max_len=1024)
        >>> loader = DataLoader(dataset, batch_size=32, collate_fn=packed)

    An example is a sequence of token ids, as in `pack`, or a dict with the ids under ``'x'`` and whatever else there is
    for each token under the name that the wrapper gives it: ``{'x': ids, 'loss_mask': is_answer}``. The batch has the
    same keys, each (b, n).

    Args:
        examples: s sequences, or s dicts of them with the same keys.
        layout: ``'padded'``, a row for each sequence, on its left: adds ``lens``, (b,) int64.
            ``'packed'``, as `pack` does it: adds ``segment_ids``, (b, n) int64.
        max_len: n; the longest of the sequences where it is None.
        pad_value: of ``x``; everything else is padded with 0 (False).

    Raises:
        TypeError, ValueError: as `pack`; an unknown layout; dicts of other keys than the first or without ``'x'``; a
            length other than that of ``x``.

    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be one of {", ".join(LAYOUTS)}, got {layout!r}')
    if max_len is not None:
        check_max_len(max_len)

    columns = by_key(examples)
    lengths = sequence_lengths('x', columns['x'], max_len)
    for name, sequences in columns.items():
        for k, length in enumerate(sequence_lengths(name, sequences)):
            if length != lengths[k]:
                raise ValueError(f'{name}[{k}] must have {lengths[k]} tokens like x[{k}], got {length}')

    n = max(lengths, default=1) if max_len is None else max_len
    index = token_index(best_fit_decreasing(lengths, n) if layout == 'packed' else one_to_a_row(lengths, n))
    batch = {}
    for name, sequences in columns.items():
        tokens = concatenate(name, sequences, pad_value if name == 'x' else 0)
        batch[name] = tokens[index.to(tokens.device)]

    device = batch['x'].device
    if layout == 'packed':
        return {**batch, 'segment_ids': sequence_numbers(lengths)[index].to(device)}
    return {**batch, 'lens': torch.tensor(lengths, dtype=torch.int64, device=device)}


def one_to_a_row(lengths: Sequence[int], max_len: int) -> Layout:
    """Plan the rows of the padded layout."""
    s = len(lengths)
    return Layout(list(lengths), list(range(s)), [0] * s, (s, max_len))


def by_key(examples: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Turn a list of dicts into a dict of lists; sequences that are no dicts are ``'x'``."""
    if not is_sequence(examples) or not examples or not isinstance(examples[0], Mapping):
        return {'x': examples}
    keys = examples[0].keys() | {'x'}
    for k, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise TypeError(f'examples[{k}] must be a dict like examples[0], got {type(example).__name__}')
        if example.keys() != keys:
            raise ValueError(f'examples[{k}] must have the keys {sorted(keys)}, got {sorted(example)}')
    return {key: [example[key] for example in examples] for key in examples[0]}
