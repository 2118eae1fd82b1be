"""What can be said of numbers that were measured once for each seed: their spread, and a difference with its interval.

The interval is Student's, of the differences paired by seed, at 95%. It covers what the seed decides, initial weights
and batches, and nothing else: not the choice of text, of model, or of held-out sequences. Of answers there is another
one, over the questions that are held out, which covers their choice and not the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from random import Random
from statistics import fmean, stdev
from typing import NamedTuple

# the 97.5% quantile of Student's t for 1 to 10 degrees of freedom
T = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)
Z = 1.959964  # of the normal distribution
RESAMPLES = 2000


class Spread(NamedTuple):
    """The mean over seeds, and the standard deviation (None of one seed)."""

    mean: float
    deviation: float | None


class Difference(NamedTuple):
    """The mean of a paired difference, and its interval at 95% (None of one seed)."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_distinct(self) -> bool:
        """Whether the interval excludes 0. What never differs is not distinct."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation, of n - 1 degrees of freedom."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)


def difference(values: Sequence[float], base: Sequence[float]) -> Difference:
    """Return the mean of values - base, paired by seed, ± t · deviation / √seeds."""
    mean, deviation = spread([value - other for value, other in zip(values, base, strict=True)])
    if deviation is None:
        return Difference(mean, None, None)
    half = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return Difference(mean, mean - half, mean + half)


def difference_over_groups(groups: Iterable[Sequence[float]]) -> Difference:
    """Return the mean of all values of all groups, and its interval at 95% over the groups.

    It is the percentile bootstrap: as many groups are drawn again, with replacement, 2,000 times.
    """
    pairs = [(sum(group), len(group)) for group in groups]
    random = Random(0)

    def mean(drawn: Sequence[tuple[float, int]]) -> float:
        return sum(total for total, _ in drawn) / sum(count for _, count in drawn)

    means = sorted(mean(random.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    tail = RESAMPLES // 40  # 2.5%
    return Difference(mean(pairs), means[tail], means[-1 - tail])


def t_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t, right to 0.0002.

    Past the table it is Abramowitz and Stegun's 26.7.5, a series in 1 / freedom.
    """
    if freedom <= len(T):
        return T[freedom - 1]
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the least-squares slope of y over x; None of one point."""
    if len(points) < 2:
        return None
    x, y = (fmean(column) for column in zip(*points, strict=True))
    return sum((at - x) * (value - y) for at, value in points) / sum((at - x) ** 2 for at, _ in points)
