"""Sequences packed several to a row, and back again.

Dims: s sequences, t tokens of all of them together, b rows, n positions in a row.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtloss.checks import check_dense, check_dtype, check_integer, plain
from xtloss.packing.sequences import (
    CPU,
    as_tensors,
    bits,
    check_max_len,
    check_pad_range,
    check_pad_type,
    from_numbers,
    token_counts,
)


class Layout(NamedTuple):
    """Sequence k fills positions start[k] … start[k] + length[k] - 1 of row row[k]."""

    length: list[int]
    row: list[int]
    start: list[int]
    shape: tuple[int, int]  # (b, n)


def pack(
    sequences: Sequence[Tensor] | Sequence[Sequence[float]] | Sequence[Any], max_len: int, pad_value: float = 0
) -> tuple[Tensor, Tensor]:
    """Pack sequences several to a row, whole, so that little of the batch is padding.

    Best-fit decreasing: the longest sequence goes first (of equal ones, the earlier in the input), into the row with
    the least room that still holds it (of equal ones, the one opened first), else into a new row. The layout depends
    on the lengths alone, so ids, masks and weights of the same sequences pack alike.

        >>> x, segment_ids = pack([[1, 2], [3, 4, 5, 6], [7]], max_len=4)
        >>> x.tolist(), segment_ids.tolist()
        ([[3, 4, 5, 6], [1, 2, 7, 0]], [[2, 2, 2, 2], [1, 1, 3, 0]])

    Args:
        sequences: s 1-D tensors of one dtype and device, s numpy arrays (mapped into memory, say), or s lists of
            numbers, each of 1 … max_len tokens.
        max_len: n, in [1, 2^31).
        pad_value: number of the sequences' dtype, put where a row has nothing left to hold.

    Returns:
        x: (b, n), dtype and device of the tensors; of arrays, theirs, on the CPU; of lists, on the CPU, bool where all
            numbers are, int64 where all are whole, else the default dtype; where there are no sequences (b = 0), the
            dtype that a list of the pad value would get.
        segment_ids: (b, n) int64, 1 + the index in the input of the sequence that lies there, 0 = padding.

    Raises:
        TypeError: not such sequences, mixed or complex dtypes, `max_len` no int, `pad_value` of another kind.
        ValueError: a sequence is empty, longer than `max_len`, not 1-D or on another device; a number out of range.

    Source: best-fit decreasing as in Johnson, "Near-optimal bin packing algorithms", 1973; for language models Ding et
    al., "Fewer truncations improve language modeling", 2024, https://arxiv.org/abs/2404.10830.

    """
    check_integer('max_len', max_len)
    check_pad_type(pad_value)
    tensors = as_tensors('sequences', sequences)
    check_pad_type(pad_value, tensors[0].dtype if tensors else None)
    max_len = check_max_len(max_len)
    lengths = token_counts('sequences', tensors, max_len)
    index = token_index(best_fit_decreasing(lengths, max_len))
    x = lay_out(tensors or [from_numbers('pad_value', [pad_value])[:0]], index, pad_value)
    return x, sequence_numbers(lengths)[index].to(x.device)


def unpack(values: Tensor, segment_ids: Tensor) -> list[Tensor]:
    """Take rows apart again: the list of sequences, in the order `pack` was given them.

    A sequence is one contiguous run of equal non-zero ids inside a row; they are sorted by id. Of some of the rows that
    `pack` made, a micro-batch say, these are the sequences that lie there.

        >>> x, segment_ids = pack([[1, 2], [3, 4, 5, 6], [7]], max_len=4)
        >>> [sequence.tolist() for sequence in unpack(x, segment_ids)]
        [[1, 2], [3, 4, 5, 6], [7]]

    Args:
        values: (b, n, ...) of any dtype: what there is of each token, be it an id, a loss or features.
        segment_ids: (b, n) integer, 0 = padding.

    Returns:
        list of (length, ...), views of `values` where that is contiguous. Reads `segment_ids` on the host.

    Raises:
        TypeError: `values` no tensor, `segment_ids` no tensor of integers.
        ValueError: `segment_ids` not (b, n) or without values, or `values` not (b, n, ...) with the same b and n.

    """
    if not isinstance(values, Tensor):
        raise TypeError(f'values must be a tensor, got {type(values).__name__}')
    check_dense('values', values)
    check_dtype('segment_ids', segment_ids, 'integer')
    if segment_ids.ndim != 2:
        raise ValueError(f'segment_ids must have shape (b, n), got {tuple(segment_ids.shape)}')
    if values.shape[:2] != segment_ids.shape:
        b, n = segment_ids.shape
        raise ValueError(f'values must have shape ({b}, {n}, ...) like segment_ids, got {tuple(values.shape)}')

    if segment_ids.is_meta:
        raise ValueError('segment_ids must be on a device that holds values, got meta')

    ids = bits(segment_ids)
    begins = torch.ones_like(ids, dtype=torch.bool)  # (b, n), where a run begins
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = begins.flatten().nonzero().squeeze(-1)  # (runs,)
    lengths = first.diff(append=first.new_tensor([ids.numel()]))
    runs = torch.split(values.flatten(0, 1), lengths.tolist())

    numbers = ids.flatten()[first].view(segment_ids.dtype).tolist()
    return [runs[k] for k in sorted(range(len(runs)), key=numbers.__getitem__) if numbers[k] != 0]


def best_fit_decreasing(lengths: Sequence[int], max_len: int) -> Layout:
    """Plan the rows of `pack`, in O(s log s); lengths must lie in [1, max_len]."""
    row, start = [0] * len(lengths), [0] * len(lengths)
    rows = 0
    # Open rows are (positions filled, -row). As lengths only fall, a row that a length fits into stays so, and what is
    # left of the best fit has less room than all other fitting rows: those form a stack, the best fit always on top.
    fitting: list[tuple[int, int]] = []
    waiting: list[tuple[int, int]] = []  # a heap, the one with the most room first

    for k in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):  # equal lengths stay in order
        while waiting and waiting[0][0] + lengths[k] <= max_len:
            fitting.append(heapq.heappop(waiting))
        if not fitting:
            fitting.append((0, -rows))
            rows += 1
        start[k], minus_row = fitting.pop()
        row[k] = -minus_row
        heapq.heappush(waiting, (start[k] + lengths[k], minus_row))

    return Layout(list(lengths), row, start, (rows, max_len))


def one_to_a_row(lengths: Sequence[int], max_len: int) -> Layout:
    """Plan the rows of the padded layout: each sequence on the left of its own."""
    s = len(lengths)
    return Layout(list(lengths), list(range(s)), [0] * s, (s, max_len))


def token_index(layout: Layout) -> Tensor:
    """(b, n) int64: which token of the sequences, end to end, lies where, from 1 on; 0 = padding."""
    length, row, start = (torch.tensor(column, dtype=torch.int64, device=CPU) for column in layout[:3])  # (s,)
    b, n = layout.shape
    t = sum(layout.length)
    shift = row * n + start - (length.cumsum(0) - length)  # (s,), from a token's place in the line to that in the batch
    place = torch.arange(t, device=CPU) + shift.repeat_interleave(length, output_size=t)  # (t,)
    index = torch.zeros(b * n, dtype=torch.int64, device=CPU)
    return index.index_copy(0, place, torch.arange(1, t + 1, device=CPU)).view(b, n)


def sequence_numbers(lengths: Sequence[int]) -> Tensor:
    """(1 + t,) int64: 0 for the padding, then for each token the number of its sequence, from 1 on."""
    repeats = torch.tensor([1, *lengths], device=CPU)
    return torch.arange(len(repeats), device=CPU).repeat_interleave(repeats, output_size=1 + sum(lengths))


def lay_out(sequences: Sequence[Tensor], index: Tensor, pad_value: float) -> Tensor:
    """(b, n): of all sequences end to end, the token that `index` names, from 1 on; the padding where it is 0."""
    dtype = sequences[0].dtype
    check_pad_range(pad_value, dtype)
    padding = sequences[0].new_full((1,), plain(pad_value))
    tokens = torch.cat([bits(t) for t in (padding, *sequences)])  # (1 + t,)
    x = tokens[index.to(tokens.device)]
    return x if x.dtype == dtype else x.view(dtype)  # which cuts off the graph
