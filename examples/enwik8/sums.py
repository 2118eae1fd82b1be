"""Sums of two numbers of 1 to 12 digits, made without a text: an answer is right when all of it is.

`a97b50`, then a byte that no question holds, then `a6b6c0`: 59 + 07 = 66. A letter names each place, from the last
digit on, then come the digits of both numbers there, or that of their sum, so that a digit of the answer needs nothing
that comes after it. Both numbers have d digits, zeros in front of the shorter one, and the answer has d + 1, so it
needs no end. Of a sum the answer alone is learned.

The letters are the index hints of Zhou et al., What Algorithms can Transformers Learn?, 2023,
https://arxiv.org/abs/2310.16028. Without them a small network has hardly a sum right after 2,300 steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from random import Random
from string import ascii_lowercase

from command_line import UsageError
from enwik8.mixed import END, Answer

DIGITS = 12  # of the longest numbers; as many sums have 1 digit as have 12
PER_LENGTH = 1_000_000  # sums to train on; of few digits, many are the same
HELD_OUT = 20  # one sum in so many
HELD_OUT_PER_LENGTH = 100  # drawn, and fewer where they repeat
LONGEST = 3 * DIGITS + len(END) + 2 * (DIGITS + 1)  # bytes


def split_sums(text: bytes, max_len: int) -> tuple[Sequence[bytes], list[bytes]]:
    """Return sums to train on and others that are held out; no text is needed. Raises `UsageError`."""
    if max_len < LONGEST:
        raise UsageError(f'--seq-len must be at least {LONGEST - 1} for sums, got {max_len - 1}')
    held_out: dict[bytes, None] = {}
    for digits in range(1, DIGITS + 1):
        random = Random(digits)
        held_out |= dict.fromkeys(draw_sum(digits, random, is_held_out=True) for _ in range(HELD_OUT_PER_LENGTH))
    return Sums(), list(held_out)


class Sums(Sequence[bytes]):
    """Sums to train on, as many of each length; that of an index is always the same."""

    def __len__(self) -> int:
        """How many there are."""
        return DIGITS * PER_LENGTH

    def __getitem__(self, index: int) -> bytes:
        """Return a sum."""
        index = range(len(self))[index]  # IndexError where there is none, as a Sequence must
        return draw_sum(1 + index % DIGITS, Random(index), is_held_out=False)


def draw_sum(digits: int, random: Random, is_held_out: bool) -> Answer:
    """Draw two numbers until their sum is on the wanted side."""
    while True:
        a, b = random.randrange(10**digits), random.randrange(10**digits)
        question = written(zip(of_places(a, digits), of_places(b, digits), strict=True))
        if (zlib.crc32(question) % HELD_OUT == 0) == is_held_out:
            return Answer(question + END + written(of_places(a + b, digits + 1)))


def of_places(number: int, digits: int) -> str:
    """Write a number from its last digit to its first."""
    return f'{number:0{digits}}'[::-1]


def written(places: Iterable[Iterable[str]]) -> bytes:
    """Write what is at each place after its letter."""
    return ''.join(letter + ''.join(digits) for letter, digits in zip(ascii_lowercase, places)).encode()  # noqa: B905
