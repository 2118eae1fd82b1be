"""Sequences packed several to a row, and back again.

Dims: s sequences, t tokens of all of them together, b rows, n positions in a row.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from xtloss.arguments import SIGNED, check, dtype_name, is_integer, plain

CPU = torch.device('cpu')  # where lists and arrays lie, whatever the default device
MAX_LEN = 2**31 - 1  # flash-attn counts the positions of a row in int32


class Layout(NamedTuple):
    """Sequence k fills positions start[k] … start[k] + length[k] - 1 of row row[k]."""

    length: list[int]
    row: list[int]
    start: list[int]
    shape: tuple[int, int]  # (b, n)


def pack(sequences: Sequence[Any], max_len: int, pad_value: float = 0) -> tuple[Tensor, Tensor]:
    """Pack sequences several to a row, whole, so that little of the batch is padding.

    Best-fit decreasing: the longest sequence goes first (of equal ones, the earlier in the input), into the row with
    the least room that still holds it (of equal ones, the one opened first), else into a new row. The layout depends
    on the lengths alone, so ids, masks and weights of the same sequences pack alike.

        >>> x, segment_ids = pack([[1, 2], [3, 4, 5, 6], [7]], max_len=4)
        >>> x.tolist(), segment_ids.tolist()
        ([[3, 4, 5, 6], [1, 2, 7, 0]], [[2, 2, 2, 2], [1, 1, 3, 0]])

    Args:
        sequences: s of them, each of 1 … max_len tokens and what `torch.as_tensor` takes: a 1-D tensor, a list of
            numbers, a numpy array (one mapped into memory, say, in either byte order).
        max_len: n, in [1, 2^31).
        pad_value: number that the sequences' dtype can hold, put where a row has nothing left to hold.

    Returns:
        x: (b, n), of the dtype that `torch.as_tensor` gives each sequence, on the device of the tensors, else on the
            CPU; where there are no sequences (b = 0), of the dtype that a list of the pad value would get.
        segment_ids: (b, n) int64, 1 + the index in the input of the sequence that lies there, 0 = padding.

    Raises:
        TypeError: sequences of several dtypes, `max_len` no int, `pad_value` no integer among integers.
        ValueError: a sequence is empty, longer than `max_len` or not 1-D; a number out of range.
        What torch raises for what is no sequence of numbers, and for devices that differ.

    Source: best-fit decreasing as in Johnson, "Near-optimal bin packing algorithms", 1973; for language models Ding et
    al., "Fewer truncations improve language modeling", 2024, https://arxiv.org/abs/2404.10830.

    """
    max_len = checked_max_len(max_len)
    tensors = as_tensors('sequences', sequences, max_len)
    lengths = [t.numel() for t in tensors]
    index = token_index(best_fit_decreasing(lengths, max_len))
    x = lay_out(tensors or [torch.tensor([plain(pad_value)], device=CPU)[:0]], index, pad_value)
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
        ValueError: `segment_ids` not (b, n), or `values` not (b, n, ...) with the same b and n.

    """
    sizes = check({'segment_ids': 'integer: b n'}, {'segment_ids': segment_ids})
    check({'values': 'tensor: b n ...'}, {'values': values}, None, **sizes)  # apart, as its device may be another

    ids = as_signed(segment_ids)
    begins = torch.ones_like(ids, dtype=torch.bool)  # (b, n), where a run begins
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    (first,) = rearrange(begins, 'b n -> (b n)').nonzero(as_tuple=True)  # (runs,)
    lengths = first.diff(append=first.new_tensor([ids.numel()]))
    runs = torch.split(rearrange(values, 'b n ... -> (b n) ...'), lengths.tolist())

    numbers = ids[begins].view(segment_ids.dtype).tolist()
    return [runs[k] for k in sorted(range(len(runs)), key=numbers.__getitem__) if numbers[k] != 0]


def best_fit_decreasing(lengths: Sequence[int], max_len: int) -> Layout:
    """Plan the rows of `pack`, in O(s log s); lengths must lie in [1, max_len]."""
    row, start, rows = [0] * len(lengths), [0] * len(lengths), 0
    # Open rows are (positions filled, -row). As lengths only fall, a row that one fits into stays so, and what is left
    # of the best fit has less room than all other fitting rows: those form a stack, the best fit always on top.
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
    if not dtype.is_floating_point and not dtype.is_complex:  # where torch would cut, or wrap, another number
        low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        if not is_integer(pad_value) and not isinstance(pad_value, bool):
            raise TypeError(f'pad_value must be an integer for {dtype_name(dtype)} sequences, got {pad_value}')
        if not low <= plain(pad_value) <= high:
            raise ValueError(f'pad_value must be in [{low}, {high}] for {dtype_name(dtype)} sequences, got {pad_value}')
    padding = sequences[0].new_full((1,), plain(pad_value))
    tokens = torch.cat([as_signed(t) for t in (padding, *sequences)])  # (1 + t,)
    x = tokens[index.to(tokens.device)]
    return x if x.dtype == dtype else x.view(dtype)  # integers alone, as a view in a dtype has no gradient


def as_signed(t: Tensor) -> Tensor:
    """Return the same bits as signed integers: torch can neither index nor compare unsigned ones of 16 bits or more."""
    return t.view(SIGNED[t.dtype]) if t.dtype in SIGNED else t


def as_tensors(
    name: str, sequences: Iterable[Any], max_len: int, dtype_of_lists: torch.dtype | None = None
) -> list[Tensor]:
    """Return sequences as 1-D tensors of 1 … max_len tokens, of one dtype; see `pack` for what it raises."""
    tensors = [as_tensor(f'{name}[{k}]', sequence, dtype_of_lists) for k, sequence in enumerate(sequences)]
    for k, t in enumerate(tensors):
        if t.ndim != 1 or not 1 <= t.numel() <= max_len:
            raise ValueError(f'{name}[{k}] must be 1-D, of 1 to {max_len} tokens, got shape {tuple(t.shape)}')
        if t.dtype != tensors[0].dtype:
            wanted = dtype_name(tensors[0].dtype)
            raise TypeError(f'{name}[{k}] must be {wanted} like {name}[0], got {dtype_name(t.dtype)}')
    return tensors


def as_tensor(name: str, sequence: Any, dtype_of_lists: torch.dtype | None) -> Tensor:
    """Return what `torch.as_tensor` makes of a sequence; of a list, in its dtype where there is one."""
    if isinstance(sequence, Tensor):
        return sequence
    if hasattr(sequence, '__array_interface__'):  # torch warns of read-only arrays, and takes no other byte order
        return torch.as_tensor(sequence.astype(sequence.dtype.newbyteorder('=')), device=CPU)
    t = torch.as_tensor(sequence, device=CPU)
    if dtype_of_lists is None:
        return t
    if t.is_floating_point() and t.numel() > 0 and not dtype_of_lists.is_floating_point:  # torch would cut 2.5 to 2
        raise TypeError(f'{name} must hold numbers of {dtype_name(dtype_of_lists)}, got {dtype_name(t.dtype)}')
    return t.to(dtype_of_lists)


def checked_max_len(max_len: int) -> int:
    """Return it as Python's int; raise TypeError or ValueError unless it is a width that a row can have."""
    check({'max_len': 'count'}, {'max_len': max_len})
    if max_len > MAX_LEN:
        raise ValueError(f'max_len must be at most {MAX_LEN}, got {max_len}')
    return int(max_len)
