"""Sequences packed several to a row, and back again.

Dims: s sequences, t tokens of all of them together, b rows, n positions in a row.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtloss.checks import check_dtype, dtype_name


class Layout(NamedTuple):
    """Sequence k fills positions start[k] … start[k] + length[k] - 1 of row row[k]."""

    length: list[int]
    row: list[int]
    start: list[int]
    shape: tuple[int, int]  # (b, n)


def pack(
    sequences: Sequence[Tensor] | Sequence[Sequence[float]], max_len: int, pad_value: float = 0
) -> tuple[Tensor, Tensor]:
    """Pack sequences several to a row, whole, so that little of the batch is padding.

    Best-fit decreasing: the longest sequence goes first (of equal ones, the earlier in the input), into the row with
    the least room that still holds it (of equal ones, the one opened first), else into a new row. The layout depends
    on the lengths alone, so ids, masks and weights of the same sequences pack alike.

        >>> x, segment_ids = pack([[1, 2], [3, 4, 5, 6], [7]], max_len=4)
        >>> x.tolist(), segment_ids.tolist()
        ([[3, 4, 5, 6], [1, 2, 7, 0]], [[2, 2, 2, 2], [1, 1, 3, 0]])

    Args:
        sequences: s 1-D tensors of one dtype and device, or s lists of numbers, each of 1 … max_len tokens.
        max_len: n, at least 1.
        pad_value: number of the sequences' dtype, put where a row has nothing left to hold.

    Returns:
        x: (b, n), dtype and device of the tensors; of lists, the dtype ``torch.tensor`` gives their numbers, and
            where there are no sequences (b = 0) the one it gives the pad value.
        segment_ids: (b, n) int64, 1 + the index in the input of the sequence that lies there, 0 = padding.

    Raises:
        TypeError: not such sequences, mixed dtypes, `max_len` no int, `pad_value` of another kind than the sequences.
        ValueError: a sequence is empty, longer than `max_len`, not 1-D or on another device; a number out of range.

    Source: best-fit decreasing as in Johnson, "Near-optimal bin packing algorithms", 1973; for language models Ding et
    al., "Fewer truncations improve language modeling", 2024, https://arxiv.org/abs/2404.10830.

    """
    check_max_len(max_len)
    lengths = sequence_lengths('sequences', sequences, max_len)
    index = token_index(best_fit_decreasing(lengths, max_len))
    x = concatenate('sequences', sequences, pad_value)
    index = index.to(x.device)
    return take(x, index), sequence_numbers(lengths).to(x.device)[index]


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens[index]; torch 2.6 cannot index the wider unsigned dtypes."""
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
    return tokens.view(signed.get(tokens.dtype, tokens.dtype))[index].view(tokens.dtype)


def unpack(values: Tensor, segment_ids: Tensor) -> list[Tensor]:
    """Take rows apart again: the list of sequences, in the order `pack` was given them.

    A sequence is one contiguous run of equal non-zero ids inside a row; they are sorted by id. Of some of the rows that
    `pack` made, a micro-batch say, these are the sequences that lie there.

    Args:
        values: (b, n, ...) of any dtype: what there is of each token, be it an id, a loss or features.
        segment_ids: (b, n) integer, 0 = padding.

    Returns:
        list of (length, ...), views of `values` where that is contiguous. Reads `segment_ids` on the host.

    Raises:
        TypeError: `values` no tensor, `segment_ids` no tensor of integers.
        ValueError: `segment_ids` not (b, n), or `values` not (b, n, ...) with the same b and n.

    """
    if not isinstance(values, Tensor):
        raise TypeError(f'values must be a tensor, got {type(values).__name__}')
    check_dtype('segment_ids', segment_ids, 'integer')
    if segment_ids.ndim != 2:
        raise ValueError(f'segment_ids must have shape (b, n), got {tuple(segment_ids.shape)}')
    if values.shape[:2] != segment_ids.shape:
        b, n = segment_ids.shape
        raise ValueError(f'values must have shape ({b}, {n}, ...) like segment_ids, got {tuple(values.shape)}')

    begins = torch.ones_like(segment_ids, dtype=torch.bool)  # (b, n), where a run begins
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = begins.flatten().nonzero().squeeze(-1)  # (runs,)
    lengths = first.diff(append=first.new_tensor([segment_ids.numel()]))
    runs = torch.split(values.flatten(0, 1), lengths.tolist())

    ids = take(segment_ids.flatten(), first).long()
    order = ids.argsort(stable=True)
    return [runs[k] for k in order[ids[order] != 0].tolist()]


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


def token_index(layout: Layout) -> Tensor:
    """(b, n) int64: which token of the sequences, end to end, lies where, from 1 on; 0 = padding."""
    length, row, start = (torch.tensor(column, dtype=torch.int64) for column in layout[:3])  # (s,)
    b, n = layout.shape
    t = sum(layout.length)
    shift = row * n + start - (length.cumsum(0) - length)  # (s,), from a token's place in the line to that in the batch
    place = torch.arange(t) + shift.repeat_interleave(length, output_size=t)  # (t,)
    return torch.zeros(b * n, dtype=torch.int64).index_copy(0, place, torch.arange(1, t + 1)).view(b, n)


def sequence_numbers(lengths: Sequence[int]) -> Tensor:
    """(1 + t,) int64: 0 for the padding, then for each token the number of its sequence, from 1 on."""
    return torch.arange(len(lengths) + 1).repeat_interleave(torch.tensor([1, *lengths]))


def concatenate(name: str, sequences: Sequence[Any], pad_value: float) -> Tensor:
    """(1 + t,): the padding, then all sequences end to end."""
    if not isinstance(pad_value, int | float):
        raise TypeError(f'pad_value must be a number, got {type(pad_value).__name__}')
    if not sequences:
        tokens = torch.tensor([pad_value])[:0]
    elif isinstance(sequences[0], Tensor):
        tokens = torch.cat(list(sequences))
    else:
        try:
            tokens = torch.tensor(list(chain.from_iterable(sequences)))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f'{name} must hold numbers: {error}') from error
        if tokens.ndim != 1:
            raise ValueError(f'{name} must be lists of numbers, got lists of shape {tuple(tokens.shape[1:])} in them')
    check_pad_value(pad_value, tokens.dtype)
    return torch.cat([tokens.new_full((1,), pad_value), tokens])


def sequence_lengths(name: str, sequences: Any, max_len: int | None = None) -> list[int]:
    """Check that these are sequences of one kind, and return their lengths, in [1, max_len]."""
    if not is_sequence(sequences):
        raise TypeError(f'{name} must be a list of tensors or of lists, got {type(sequences).__name__}')
    first = sequences[0] if sequences else None
    for k, sequence in enumerate(sequences):
        if not isinstance(sequence, Tensor) and not is_sequence(sequence):
            raise TypeError(f'{name}[{k}] must be a tensor or a list of numbers, got {type(sequence).__name__}')
        if getattr(sequence, 'dtype', None) != getattr(first, 'dtype', None):
            raise TypeError(f'{name}[{k}] must be {kind(first)} like {name}[0], got {kind(sequence)}')

    lengths = []
    for k, sequence in enumerate(sequences):
        if isinstance(sequence, Tensor) and sequence.ndim != 1:
            raise ValueError(f'{name}[{k}] must be 1-D, got shape {tuple(sequence.shape)}')
        if isinstance(sequence, Tensor) and sequence.device != sequences[0].device:
            raise ValueError(f'{name}[{k}] must be on {sequences[0].device} like {name}[0], got {sequence.device}')
        length = len(sequence)
        if length == 0:
            raise ValueError(f'{name}[{k}] must have at least 1 token, got 0')
        if max_len is not None and length > max_len:
            raise ValueError(f'{name}[{k}] must have at most max_len = {max_len} tokens, got {length}')
        lengths.append(length)
    return lengths


def is_sequence(value: Any) -> bool:
    """Lists and their like; a string is text, not yet tokens."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def kind(sequence: Any) -> str:
    """What sequences must be alike in, as people write it."""
    return f'a tensor of {dtype_name(sequence.dtype)}' if isinstance(sequence, Tensor) else 'a list'


def check_max_len(max_len: Any) -> None:
    """Raise TypeError unless it is an int, ValueError unless >= 1."""
    if not isinstance(max_len, int) or isinstance(max_len, bool):
        raise TypeError(f'max_len must be an int, got {type(max_len).__name__}')
    if max_len < 1:
        raise ValueError(f'max_len must be >= 1, got {max_len}')


def check_pad_value(pad_value: Any, dtype: torch.dtype) -> None:
    """Raise TypeError or ValueError unless this dtype can hold the number."""
    if dtype.is_floating_point:
        return
    if isinstance(pad_value, float):
        raise TypeError(f'pad_value must be an integer for {dtype_name(dtype)} sequences, got {pad_value}')
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not low <= pad_value <= high:
        raise ValueError(f'pad_value must be in [{low}, {high}] for {dtype_name(dtype)} sequences, got {pad_value}')
