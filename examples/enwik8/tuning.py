"""The learning rate that suits each weighting: what was measured at each of several, over the tuning seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from enwik8.comparison import OVER_SEQUENCES, OVER_TOKENS, RIGHT
from enwik8.report import Report, Row
from rich import box
from rich.table import Table

FACTOR = 2.0  # between a rate at the edge of a grid and the next one beyond
ANSWERS, PROSE, OVER_SQUARE = 'answers', 'prose', 'all: weighing √length'


def aims(weighting: str, rows: Sequence[Row]) -> dict[str, float]:
    """Return what a rate is chosen by, the lower the better, and what is said beside it.

    Of answers it is their bits; of plain text the mean that the weighting optimises. It is the same measure for every
    weighting where there are answers, because they are what is asked for.
    """
    first, everything = rows[0], rows[-1]
    if first.lengths == ANSWERS:
        return {ANSWERS: first.over_tokens, PROSE: rows[1].over_tokens}
    if everything.right is not None:
        return {ANSWERS: everything.over_tokens, RIGHT: 100 * everything.right}
    optimised = {
        'sequence': {OVER_SEQUENCES: everything.over_sequences},
        'square': {OVER_SQUARE: everything.over_square or math.inf},
    }
    return optimised.get(weighting, {}) | {OVER_TOKENS: everything.over_tokens}


@dataclass(frozen=True)
class Tuning:
    """What one weighting measured at each learning rate, in ascending order; nothing where the training diverged."""

    weighting: str
    measured: dict[float, dict[str, float]]

    @classmethod
    def of_reports(cls, weighting: str, runs: dict[float, list[list[Report]]]) -> Tuning:
        """Return the means over the runs of each rate, of their last reports; one that diverged has none."""
        measured: dict[float, dict[str, float]] = {}
        for rate, of_rate in sorted(runs.items()):
            found = [aims(weighting, reports[-1].rows) for reports in of_rate if reports]
            is_whole = len(found) == len(of_rate)
            measured[rate] = {name: fmean(each[name] for each in found) for name in found[0]} if is_whole else {}
        return cls(weighting, measured)

    @property
    def names(self) -> list[str]:
        """Name what was measured, first what the rate is chosen by; nothing where every training diverged."""
        return list(dict.fromkeys(name for found in self.measured.values() for name in found))

    def best(self, name: str) -> float:
        """Return the rate at which something was best."""
        sign = -1 if name == RIGHT else 1
        return min(self.measured, key=lambda rate: sign * self.measured[rate].get(name, sign * math.inf))

    @property
    def rate(self) -> float:
        """The rate of the weighting; the lowest where every training diverged."""
        return self.best(self.names[0]) if self.names else min(self.measured)

    def beyond(self) -> float | None:
        """Return the rate to try next, where the best is at the edge of those that were tried."""
        lowest, highest = min(self.measured), max(self.measured)
        return lowest / FACTOR if self.rate == lowest else highest * FACTOR if self.rate == highest else None

    def sentence(self) -> str:
        """Say which rate was chosen, by what, and which would have been by what is said beside it."""
        chosen, *beside = self.names
        others = ''.join(f"; '{name}' is best at {self.best(name):g}" for name in beside)
        edge = ', at the edge of the grid: the best may lie beyond' if self.beyond() is not None else ''
        return f"'{self.weighting}' trains at {self.rate:g}, the best by '{chosen}'{edge}{others}."


def table_of_rates(tunings: Iterable[Tuning], seeds: Sequence[int]) -> Table:
    """Return a line for each weighting and measure, a column for each learning rate, the best with a *."""
    tunings = list(tunings)
    title = f'Learning rates, mean over the tuning seeds {", ".join(map(str, seeds))}: bits per byte, held out'
    made = Table(title=title, title_justify='left', title_style='bold', box=box.SIMPLE_HEAD, collapse_padding=True)
    rates = sorted({rate for tuning in tunings for rate in tuning.measured})
    for column in ('', '', *(f'{rate:g}' for rate in rates)):
        made.add_column(column, no_wrap=bool(column), justify='right' if column else 'left')
    for tuning in tunings:
        for name in tuning.names:
            cells = []
            for rate in rates:
                value = tuning.measured.get(rate, {}).get(name)
                shown = f'{value:.3f}' if value is not None else 'diverged' if rate in tuning.measured else ''
                cells.append(f'{shown}{"*" if rate == tuning.best(name) else " "}')
            made.add_row(tuning.weighting, name, *cells)
    return made
