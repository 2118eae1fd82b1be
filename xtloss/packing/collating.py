"""A collate for `DataLoader`, in the padded and in the packed layout.

Dims: s sequences, t tokens of all of them together, b rows, n positions in a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xtloss.arguments import ARGUMENTS
from xtloss.packing import layout as laying
from xtloss.packing.layout import CPU, MAX_LEN, as_tensors, lay_out

LAYOUTS = {'padded': laying.one_to_a_row, 'packed': laying.best_fit_decreasing}
DTYPES = {'integer': torch.int64, 'bool': torch.bool, 'floating point': torch.float32}  # of lists, by their kind


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
    int64; ``mask``, ``loss_mask`` and ``self_attn_kv_mask`` bool, False for 0; ``loss_weight`` float32. Floats are
    refused where they would be cut. Under a name that is no argument of the wrapper they are what torch makes of them.

    Whether packed rows will pay can be told from the lengths: a token costs up to 1 + n / 512 times as much in them, as
    they come with a mask of all pairs, so mean(lengths) · (1 + n / 512) must be less than max(lengths). Lengths that
    are alike gain nothing. The wrapper's ``unpad=True`` decides by itself for each padded batch.

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
    if not isinstance(layout, str) or layout not in LAYOUTS:
        error = ValueError if isinstance(layout, str) else TypeError
        raise error(f'layout must be one of {", ".join(LAYOUTS)}, got {layout!r}')
    limit = MAX_LEN if max_len is None else laying.checked_max_len(max_len)
    columns = {
        name: as_tensors(name, sequences, limit, dtype_of_lists(name)) for name, sequences in by_name(examples).items()
    }
    lengths = [t.numel() for t in columns['x']]
    for name, tensors in columns.items():
        for k, t in enumerate(tensors):
            if t.numel() != lengths[k]:
                raise ValueError(f'{name}[{k}] must have {lengths[k]} tokens like x[{k}], got {t.numel()}')

    n = max(lengths, default=1) if max_len is None else limit
    index = laying.token_index(LAYOUTS[layout](lengths, n))
    columns['x'] = columns['x'] or [torch.empty(0, dtype=torch.int64, device=CPU)]
    batch = {name: lay_out(tensors, index, pad_value if name == 'x' else 0) for name, tensors in columns.items()}
    device = batch['x'].device
    if layout == 'packed':
        return {**batch, 'segment_ids': laying.sequence_numbers(lengths)[index].to(device)}
    return {**batch, 'lens': torch.tensor(lengths, dtype=torch.int64, device=CPU).to(device)}


def by_name(examples: Sequence[Any]) -> dict[str, list[Any]]:
    """Turn a list of examples into the list of what is under each name; a sequence that is no dict is an ``'x'``."""
    rows = [example if isinstance(example, Mapping) else {'x': example} for example in examples]
    wanted = {'x', *(rows[0] if rows else ())} - {'lens', 'segment_ids'}  # which are made here
    for k, row in enumerate(rows):
        if row.keys() != wanted:
            raise ValueError(f'examples[{k}] must have the keys {sorted(wanted)}, got {sorted(row)}')
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else wanted)}


def dtype_of_lists(name: str) -> torch.dtype | None:
    """Return the dtype that the wrapper wants under a name, whatever the numbers of this batch; None: no argument."""
    rule = 'integer' if name == 'x' else ARGUMENTS[name].rule if name in ARGUMENTS else ''
    return DTYPES.get(rule.partition(':')[0])
