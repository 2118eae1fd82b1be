"""Short answers among long texts: name the language of a title, and learn prose, one to one.

Articles end in lines like [[de:Anarchismus]]: a title, and the code of the language it is in. An answer is a title, a
byte that no text holds, and the code. Of an answer the code alone is learned; of prose, everything.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence

from enwik8.text import DataError

END = b'\0'  # of a title
LANGUAGES = 20  # the most frequent of those with a code of two letters: an answer is two bytes, and needs no end
PROSE = 128  # bytes: a shorter line is none
TITLES_HELD_OUT, PROSE_HELD_OUT = 5, 20  # one in so many

INTERWIKI = re.compile(rb'\[\[([a-z]{2}):([^\[\]|]+)\]\]')
ANY_INTERWIKI = re.compile(rb'\[\[[a-z][a-z-]+:')  # in lines that are no prose


class Answer(bytes):
    """A title, `END`, and the code of its language."""


def split_mixed(text: bytes, max_len: int) -> tuple[Sequence[bytes], list[bytes]]:
    """Return answers and prose to train on, drawn alike, and those held out.

    A title that is held out occurs nowhere in the answers to train on, whichever its language.

    Raises `DataError` where the text has no titles, or no prose, for both.
    """
    lines = [line for line in dict.fromkeys(map(bytes.strip, text.split(b'\n'))) if END not in line]
    pairs = [(match[2], match[1]) for line in lines if (match := INTERWIKI.fullmatch(line))]
    codes = {code for code, _ in Counter(code for _, code in pairs).most_common(LANGUAGES)}
    fitting = [(title, code) for title, code in pairs if code in codes and len(title) + 3 <= max_len]
    titles = held_out_of([title for title, _ in fitting], TITLES_HELD_OUT)
    long_lines = [line[:max_len] for line in lines if len(line) >= PROSE and not ANY_INTERWIKI.search(line)]
    prose = held_out_of(long_lines, PROSE_HELD_OUT)

    train = [Answer(title + END + code) for title, code in fitting if title not in titles]
    held_out = [Answer(title + END + code) for title, code in fitting if title in titles]
    train_prose = list(dict.fromkeys(line for line in long_lines if line not in prose))
    if not (train and held_out):
        raise DataError('too few lines like [[de:Titel]], which mixed asks for: enwik8 has them, its first 4 MB too')
    if not (train_prose and prose):
        raise DataError(f'too little prose for mixed: two lines of {PROSE} bytes at least, without a [[de:Titel]]')
    return OneToOne(train, train_prose), [*held_out, *sorted(prose)]


def held_out_of(sequences: Sequence[bytes], one_in: int) -> set[bytes]:
    """Return one in so many of the distinct sequences, at least one: those of the lowest checksums."""
    distinct = sorted(set(sequences), key=lambda sequence: (zlib.crc32(sequence), sequence))
    return set(distinct[: max(1, len(distinct) // one_in)])


class OneToOne(Sequence[bytes]):
    """Sequences of two kinds, each kind as often as the other, the sequences of a kind alike."""

    def __init__(self, first: Sequence[bytes], second: Sequence[bytes]) -> None:
        self.kinds = first, second

    def __len__(self) -> int:
        """How often both kinds fit into one another, twice."""
        return 2 * len(self.kinds[0]) * len(self.kinds[1])

    def __getitem__(self, index: int) -> bytes:
        """Return a sequence, of the first kind where the index is even."""
        index = range(len(self))[index]  # IndexError where there is none, as a Sequence must
        kind = self.kinds[index % 2]
        return kind[index // 2 % len(kind)]


def counted(sequence: bytes) -> list[bool]:
    """Return which bytes of a sequence are learned: what comes after the title, or everything."""
    start = sequence.find(END) + 1 if isinstance(sequence, Answer) else 0
    return [position >= start for position in range(len(sequence))]


def guesses(answers: Sequence[bytes], seen: Sequence[bytes]) -> tuple[float, float]:
    """Return the part of answers that two who cannot read would have right.

    One always says the most frequent code of `seen`; the other knows every title, and names one of its languages, for
    some have several: more than that nobody has right.
    """
    [(most, _)] = Counter(answer.partition(END)[2] for answer in seen).most_common(1)
    of_most = sum(answer.endswith(END + most) for answer in answers)
    titles = {answer.partition(END)[0] for answer in answers}
    return of_most / len(answers), len(titles) / len(answers)
