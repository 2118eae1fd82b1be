"""From text to batches: bytes -> sequences -> training and held-out ones -> padded rows of token ids.

A token is a byte. No line of the held-out sequences occurs in the training ones, so what is repeated throughout a
text, like mark-up, is never scored as if it were new.

b - sequences in a batch
n - positions, the length of the longest sequence of a batch
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from enwik8.mixed import Answer, counted, split_mixed
from enwik8.sums import split_sums
from enwik8.text import BUILTIN, DataError, find_text
from torch import Generator, Tensor

from xtloss import collate

HELD_OUT = 20  # one sequence in so many


class Split(NamedTuple):
    """Training sequences and held-out ones, each a string of bytes."""

    train: Sequence[bytes]
    held_out: list[bytes]


def split_text(text: bytes, kind: str, max_len: int, max_held_out: int) -> Split:
    """Make sequences of at most `max_len` bytes by `kind`: 'lines', 'pages', 'windows', 'mixed' or 'sums'.

    Which are held out, and which `max_held_out` of those are kept, follows from their checksums: it is the same
    for every seed. Answers are all kept: they are short, and the part of them that is right is told by their number.

    Raises `DataError` where the text is too short for one sequence on either side.
    """
    train, held_out = SPLITS[kind](text, max_len)
    for side, sequences in (('train on', train), ('hold out', held_out)):
        if not any(len(sequence) > 1 for sequence in sequences):  # one byte predicts nothing
            raise DataError(
                f'too little text: {len(text):,} bytes hold no {kind} to {side} (of {max_len} bytes or less)'
            )
    answers = [sequence for sequence in held_out if isinstance(sequence, Answer)]
    others = sorted((sequence for sequence in held_out if not isinstance(sequence, Answer)), key=zlib.crc32)
    return Split(train, sorted([*answers, *others[:max_held_out]], key=zlib.crc32))


def split_lines(text: bytes, max_len: int) -> Split:
    """Each distinct non-blank line is a sequence, as long as it is; longer lines end at `max_len`."""
    return hold_out([line[:max_len] for line in text.split(b'\n') if line.strip()])


def split_pages(text: bytes, max_len: int) -> Split:
    """Each <page> is a sequence; longer pages end at `max_len`. Held-out pages lose the lines seen in training."""
    train, held_out = hold_out([page[:max_len] for page in re.findall(rb'<page>.*?</page>', text, flags=re.DOTALL)])
    seen = {line for page in train for line in page.split(b'\n')}
    held_out = [without_lines(page, seen) for page in held_out]
    return Split(train, [page for page in held_out if page.strip()])


def split_windows(text: bytes, max_len: int) -> Split:
    """Every crop of `max_len` bytes is a sequence; the end of the text is held out, less the lines seen before it."""
    middle = text.rfind(b'\n', 0, len(text) - len(text) // HELD_OUT) + 1  # between two lines
    held_out = without_lines(text[middle:], set(text[:middle].split(b'\n')))
    starts = range(0, len(held_out) - max_len + 1, max_len - 1)  # they share a byte: the last target, the next input
    return Split(Windows(text[:middle], max_len), [held_out[start : start + max_len] for start in starts])


SPLITS = {
    'lines': split_lines, 'pages': split_pages, 'windows': split_windows, 'mixed': split_mixed, 'sums': split_sums
}  # fmt: skip


def source_of(data: str, kind: str, say: Callable[[str], object] = print) -> str:
    """Return the source of a text by `find_text`, but look for none where the sequences need none."""
    return BUILTIN if kind == 'sums' else find_text(data, say=say)


def hold_out(sequences: Sequence[bytes]) -> Split:
    """Drop repetitions, then hold out one sequence in `HELD_OUT`, at least one: those of the lowest checksums."""
    distinct = list(dict.fromkeys(sequences))
    by_checksum = sorted(distinct, key=zlib.crc32)
    held_out = by_checksum[: max(1, len(distinct) // HELD_OUT)]
    chosen = set(held_out)
    return Split([sequence for sequence in distinct if sequence not in chosen], held_out)


def without_lines(text: bytes, seen: Collection[bytes]) -> bytes:
    """Return the text without the lines that are in `seen`."""
    return b'\n'.join(line for line in text.split(b'\n') if line not in seen)


class Windows(Sequence[bytes]):
    """Every run of `size` bytes in a text, by its start."""

    def __init__(self, text: bytes, size: int) -> None:
        self.text, self.size = text, size

    def __len__(self) -> int:
        """How many starts there are."""
        return max(0, len(self.text) - self.size + 1)

    def __getitem__(self, start: int) -> bytes:
        """Return the window that starts there."""
        start = range(len(self))[start]  # IndexError where there is none, as a Sequence must
        return self.text[start : start + self.size]


def draw(sequences: Sequence[bytes], count: int, generator: Generator) -> list[bytes]:
    """Draw sequences at random, with replacement, as upstream draws its crops."""
    return [sequences[index] for index in torch.randint(len(sequences), (count,), generator=generator).tolist()]


def to_batch(sequences: Sequence[bytes], layout: str = 'padded', row_len: int | None = None) -> dict[str, Tensor]:
    """Return what the wrapper's forward takes: token ids, x (b, n) int64, and lens (b,) or segment_ids (b, n).

    'padded': a row for each sequence; 'packed': rows of `row_len` tokens, each of several sequences. Where there are
    answers to titles, also loss_mask (b, n).
    """
    examples = [{'x': torch.tensor(list(sequence))} for sequence in sequences]
    if any(isinstance(sequence, Answer) for sequence in sequences):
        examples = [
            example | {'loss_mask': torch.tensor(counted(sequence))}
            for example, sequence in zip(examples, sequences, strict=True)
        ]
    return collate(examples, layout=layout, max_len=row_len if layout == 'packed' else None)
