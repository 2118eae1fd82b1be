"""Runs that differ in weighting and seed: what they measured, as tables, sentences and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from enwik8.over_seeds import Difference, Spread, difference, slope, spread
from enwik8.report import Row, place
from rich import box
from rich.console import Console
from rich.table import Table

OVER_TOKENS, OVER_SEQUENCES = 'all: over tokens', 'all: over sequences'
RIGHT = 'answers that are right, %'
RIGHT_OF = ' bytes: right, %'  # of some lengths


@dataclass(frozen=True)
class Comparison:
    """The reports of every run by weighting and seed, each with the step it was made after.

    Runs that were trained until they were flat end at different steps; each is compared by its last report.
    """

    task: str
    rates: str
    weightings: Sequence[str]
    seeds: Sequence[int]
    curves: dict[tuple[str, int], list[tuple[int, list[Row]]]]
    over_questions: dict[str, tuple[int, Difference]]  # of the answers that are right, by all weightings but the first

    def names(self) -> list[str]:
        """Name what was measured: percents, and bits per byte."""
        found = dict.fromkeys(name for curve in self.curves.values() for name in measures(curve[-1][1]))
        means = [RIGHT, OVER_TOKENS, OVER_SEQUENCES]
        others = sorted(set(found) - set(means), key=lambda name: (place(name), name))
        return [*(name for name in means if name in found), *others]

    def values(self, weighting: str, name: str, at: int = -1) -> list[float]:
        """Return what was measured for each seed, at the last report or another."""
        return [measures(self.curves[weighting, seed][at][1])[name] for seed in self.seeds]

    def spread(self, weighting: str, name: str, at: int = -1) -> Spread:
        """Return a measure over the seeds."""
        return spread(self.values(weighting, name, at))

    def difference(self, weighting: str, name: str) -> Difference:
        """Return a measure's difference to the first weighting."""
        return difference(self.values(weighting, name), self.values(self.weightings[0], name))

    def slopes(self, weighting: str) -> list[float | None]:
        """Return bits per byte over tokens per 100 steps, a line through the reports of the second half of each run."""
        curves = [self.curves[weighting, seed] for seed in self.seeds]
        return [
            slope([(step / 100, rows[-1].over_tokens) for step, rows in curve if step >= curve[-1][0] / 2])
            for curve in curves
        ]

    def steps(self, weighting: str) -> list[int]:
        """Return how many steps the run of each seed took."""
        return [self.curves[weighting, seed][-1][0] for seed in self.seeds]

    def results(self) -> dict[str, Any]:
        """Return every number, for a file."""
        others = self.weightings[1:]
        return {
            'rates': self.rates,
            'steps': {w: self.steps(w) for w in self.weightings},
            'measured': {n: {w: self.values(w, n) for w in self.weightings} for n in self.names()},
            'spread': {n: {w: self.spread(w, n)._asdict() for w in self.weightings} for n in self.names()},
            'difference': {n: {w: self.difference(w, n)._asdict() for w in others} for n in self.names()},
            'over_questions': {w: found._asdict() for w, (_, found) in self.over_questions.items()},
            'slope_per_100_steps': {w: self.slopes(w) for w in self.weightings},
            'reports': [
                {'weighting': w, 'seed': s, 'step': step, 'rows': [row._asdict() for row in rows]}
                for (w, s), curve in self.curves.items()
                for step, rows in curve
            ],
        }


def measures(rows: Sequence[Row]) -> dict[str, float]:
    """Return the numbers of a report by name: bits per byte, and the percentage of answers that are right."""
    found = {row.lengths: row.over_tokens for row in rows[:-1]}
    for row in rows:
        if row.right is not None:
            found[RIGHT if row.lengths in ('answers', 'all') else f'{row.lengths}{RIGHT_OF}'] = 100 * row.right
    return found | {OVER_TOKENS: rows[-1].over_tokens, OVER_SEQUENCES: rows[-1].over_sequences}


# in words


def report(comparison: Comparison, console: Console) -> None:
    """Print the table, and one sentence for each weighting."""
    console.print(table(comparison))
    for weighting in comparison.weightings[1:]:
        console.print(sentence(comparison, weighting), highlight=False)
        if weighting in comparison.over_questions:
            questions, found = comparison.over_questions[weighting]
            shown = f'{shown_difference(found).rstrip()} over {counted(questions, "held-out question")}'
            console.print(f'{RIGHT}: {shown} (bootstrap, of these seeds).', highlight=False)
    for weighting in comparison.weightings:
        found = [value for value in comparison.slopes(weighting) if value is not None]
        if found:
            console.print(
                f"'{weighting}' took {said_steps(comparison.steps(weighting))} and changed by "
                f'{signed(spread(found).mean)} bits per byte over tokens per 100 of them in the second half.',
                highlight=False,
            )


def said_steps(steps: Sequence[int]) -> str:
    """Return a number of steps, or from how many to how many."""
    low, high = min(steps), max(steps)
    return counted(high, 'step') if low == high else f'{low:,} to {counted(high, "step")}'


def counted(number: int, thing: str) -> str:
    """Return '1 seed' or '2 seeds'."""
    return f'{number:,} {thing}{"" if number == 1 else "s"}'


def table(comparison: Comparison) -> Table:
    """Return one line for each measure: mean ± deviation of each weighting, difference [interval] of all but one."""
    first, *others = comparison.weightings
    steps = [step for weighting in comparison.weightings for step in comparison.steps(weighting)]
    size = f'{said_steps(steps)}, {counted(len(comparison.seeds), "seed")}'
    title = f'{comparison.task}, {size}, {comparison.rates}; bits per byte, held out'
    made = Table(title=title, title_justify='left', title_style='bold', box=box.SIMPLE_HEAD, collapse_padding=True)
    made.add_column('', no_wrap=True)
    for column in (*comparison.weightings, *(f'{weighting} - {first}' for weighting in others)):
        made.add_column(column, justify='right')
    for name in comparison.names():
        spreads = [shown_spread(comparison.spread(weighting, name)) for weighting in comparison.weightings]
        differences = [shown_difference(comparison.difference(weighting, name)) for weighting in others]
        made.add_row(f'{name} bytes' if is_length(name) else name, *spreads, *differences)
    made.caption = (
        'mean ± standard deviation over seeds; difference paired by seed [95% interval], * where it excludes 0'
    )
    return made


def is_length(name: str) -> bool:
    """Whether a measure is the bits of sequences of some lengths."""
    return name[0].isdigit() and not name.endswith(RIGHT_OF)


def shown_spread(found: Spread) -> str:
    """Return mean ± deviation."""
    return f'{found.mean:.3f}' + (f' ± {found.deviation:.3f}' if found.deviation is not None else '')


def signed(number: float) -> str:
    """Return a number with its sign."""
    return f'{number:+.3f}'


def shown_difference(found: Difference) -> str:
    """Return the difference and its interval."""
    if found.low is None or found.high is None:
        return signed(found.mean)
    return f'{signed(found.mean)} \\[{signed(found.low)}, {signed(found.high)}]{"*" if found.is_distinct else " "}'


def sentence(comparison: Comparison, weighting: str) -> str:
    """Say what a weighting changed, and what cannot be told from the noise of seeds."""
    first = comparison.weightings[0]
    if len(comparison.seeds) == 1:
        return f"'{weighting}' against '{first}': of one seed, nothing can be told from noise."
    better, worse, neither = [], [], []
    for name in comparison.names():
        found = comparison.difference(weighting, name)
        is_good = found.mean > 0 if name.endswith('%') else found.mean < 0
        shown = f'{name} ({signed(found.mean)})'
        (better if found.is_distinct and is_good else worse if found.is_distinct else neither).append(shown)
    parts = {'better': better, 'worse': worse, 'not to be told from the noise of seeds': neither}
    said = '; '.join(f'{part}: {", ".join(names)}' for part, names in parts.items() if names)
    return f"'{weighting}' against '{first}': {said}."
