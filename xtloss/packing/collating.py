"""A collate for `DataLoader`, in the padded and in the packed layout.

Dims: s sequences, t tokens of all of them together, b rows, n positions in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xtloss.checks import ARGUMENTS, check_integer
from xtloss.packing.layout import best_fit_decreasing, lay_out, one_to_a_row, sequence_numbers, token_index
from xtloss.packing.sequences import (
    CPU,
    as_tensors,
    check_max_len,
    check_pad_type,
    is_sequence,
    token_counts,
)

LAYOUTS = ('padded', 'packed')
MADE_HERE = ('lens', 'segment_ids')

# what the wrapper wants under a name: lists become that, and not what the numbers of one batch happen to be
KINDS = {name: kind for name, (kind, _) in ARGUMENTS.items()} | {'x': 'integer', 'self_attn_kv_mask': 'bool'}


def collate(
    examples: Sequence[Any], *, layout: str = 'padded', max_len: int | None = None, pad_value: float = 0
) -> dict[str, Tensor]:
    """Make a batch of examples, ready for ``wrapper(**batch)`` and ``wrapper.loss_normalizer(**batch)``.

        >>> collate([[1, 2, 3], [4]])
        {'x': tensor([[1, 2, 3],
                [4, 0, 0]]), 'lens': tensor([3, 1])}
        >>> packed = partial(collate, layout='packed', max_len=1024)
        >>> loader = DataLoader(dataset, batch_size=32, collate_fn=packed)

    An example is a sequence of token ids, as in `pack`, or a dict with the ids under ``'x'`` and whatever else there is
    for each token under the name that the wrapper gives it: ``{'x': ids, 'loss_mask': is_answer}``. The batch has the
    same keys, each (b, n).

    Tensors and numpy arrays keep their dtype. Lists get one that does not depend on the numbers of the batch: ``x``
    int64, ``mask``, ``loss_mask`` and ``self_attn_kv_mask`` bool (of bools, or of 0 and 1), ``loss_weight`` float32.
    Under another name they become int64, or bool where all of them are bools, and no floats are taken.

    Args:
        examples: s sequences, or s dicts of them with the same keys.
        layout: ``'padded'``, a row for each sequence, on its left: adds ``lens``, (b,) int64.
            ``'packed'``, as `pack` does it: adds ``segment_ids``, (b, n) int64.
        max_len: n; the longest of the sequences where it is None.
        pad_value: of ``x``, a number of its dtype; everything else is padded with 0 (False).

    Raises:
        TypeError, ValueError: as `pack`; an unknown layout; dicts of other keys than the first, or none ``'x'``, or
            ``'lens'`` or ``'segment_ids'``, which are made here; a length other than that of ``x``.

    """
    if not isinstance(layout, str):
        raise TypeError(f'layout must be a string, got {type(layout).__name__}')
    check_pad_type(pad_value)
    if max_len is not None:
        check_integer('max_len', max_len)
    columns = {name: as_column(name, sequences) for name, sequences in by_key(examples).items()}
    check_pad_type(pad_value, columns['x'][0].dtype if columns['x'] else torch.int64)
    if max_len is not None:
        max_len = check_max_len(max_len)
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be one of {", ".join(LAYOUTS)}, got {layout!r}')
    lengths = token_counts('x', columns['x'], max_len)
    for name, sequences in columns.items():
        for k, length in enumerate(token_counts(name, sequences)):
            if length != lengths[k]:
                raise ValueError(f'{name}[{k}] must have {lengths[k]} tokens like x[{k}], got {length}')

    n = max(lengths, default=1) if max_len is None else max_len
    index = token_index(best_fit_decreasing(lengths, n) if layout == 'packed' else one_to_a_row(lengths, n))
    empty = torch.empty(0, dtype=torch.int64, device=CPU)
    batch = {
        name: lay_out(sequences or [empty], index, pad_value if name == 'x' else 0)
        for name, sequences in columns.items()
    }
    device = batch['x'].device
    if layout == 'packed':
        return {**batch, 'segment_ids': sequence_numbers(lengths)[index].to(device)}
    return {**batch, 'lens': torch.tensor(lengths, dtype=torch.int64, device=CPU).to(device)}


def as_column(name: str, sequences: Any) -> list[Tensor]:
    """The sequences under a name as tensors, lists in the dtype that goes with the name."""
    tensors = as_tensors(name, sequences, KINDS.get(name))
    if name not in KINDS and tensors and tensors[0].is_floating_point() and is_sequence(sequences[0]):
        raise TypeError(f'{name} must be tensors or arrays where it holds floats, got lists, in which 1 is an integer')
    return tensors


def by_key(examples: Any) -> dict[str, Any]:
    """Turn a list of dicts into a dict of lists; sequences that are no dicts are ``'x'``."""
    if not is_sequence(examples):
        raise TypeError(
            'examples must be a list of dicts; without dicts x must be a list of tensors or of lists, got '
            + type(examples).__name__
        )
    if not examples or not isinstance(examples[0], Mapping):
        return {'x': examples}
    for k, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise TypeError(f'examples[{k}] must be a dict like examples[0], got {type(example).__name__}')
        for key in example:
            if not isinstance(key, str):
                raise TypeError(f'examples[{k}] must have strings as keys, got {type(key).__name__}')
    keys = examples[0].keys() | {'x'}
    for k, example in enumerate(examples):
        if example.keys() != keys:
            raise ValueError(f'examples[{k}] must have the keys {sorted(keys)}, got {sorted(example)}')
    for name in MADE_HERE:
        if name in keys:
            raise ValueError(f'examples[0] must not have the key {name!r}, which collate makes, got {sorted(keys)}')
    return {key: [example[key] for example in examples] for key in examples[0]}
