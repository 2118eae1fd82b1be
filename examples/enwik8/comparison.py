"""Runs that differ in weighting and seed: what they measured, as tables, sentences, numbers and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enwik8.over_seeds import Difference, Spread, difference, slope, spread
from enwik8.report import Row, place
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from palette import WEIGHTINGS
from rich import box
from rich.console import Console
from rich.table import Table

OVER_TOKENS, OVER_SEQUENCES = 'all: over tokens', 'all: over sequences'
RIGHT = 'answers that are right, %'


@dataclass(frozen=True)
class Comparison:
    """The reports of every run by weighting and seed, each with the step it was made after."""

    task: str
    weightings: Sequence[str]
    seeds: Sequence[int]
    curves: dict[tuple[str, int], list[tuple[int, list[Row]]]]

    def names(self) -> list[str]:
        """Name what was measured: percents, and bits per byte."""
        found = dict.fromkeys(name for curve in self.curves.values() for name in measures(curve[-1][1]))
        means = [RIGHT, OVER_TOKENS, OVER_SEQUENCES]
        return [*(name for name in means if name in found), *sorted((set(found) - set(means)), key=place)]

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
        half = self.steps() / 2
        curves = [self.curves[weighting, seed] for seed in self.seeds]
        return [slope([(step / 100, rows[-1].over_tokens) for step, rows in c if step >= half]) for c in curves]

    def steps(self) -> int:
        """Return how many steps a run took."""
        return self.curves[self.weightings[0], self.seeds[0]][-1][0]

    def results(self) -> dict[str, Any]:
        """Return every number, for a file."""
        others = self.weightings[1:]
        return {
            'steps': self.steps(),
            'measured': {n: {w: self.values(w, n) for w in self.weightings} for n in self.names()},
            'spread': {n: {w: self.spread(w, n)._asdict() for w in self.weightings} for n in self.names()},
            'difference': {n: {w: self.difference(w, n)._asdict() for w in others} for n in self.names()},
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
    for row in rows[:-1]:
        if row.right is not None:
            found[RIGHT] = 100 * row.right
    return found | {OVER_TOKENS: rows[-1].over_tokens, OVER_SEQUENCES: rows[-1].over_sequences}


# in words


def report(comparison: Comparison, console: Console) -> None:
    """Print the table, and one sentence for each weighting."""
    console.print(table(comparison))
    for weighting in comparison.weightings[1:]:
        console.print(sentence(comparison, weighting), highlight=False)
    for weighting in comparison.weightings:
        found = [value for value in comparison.slopes(weighting) if value is not None]
        if found:
            console.print(
                f"'{weighting}' changed by {signed(spread(found).mean)} bits per byte over tokens per 100 steps "
                'in the second half.',
                highlight=False,
            )


def table(comparison: Comparison) -> Table:
    """Return one line for each measure: mean ± deviation of each weighting, difference [interval] of all but one."""
    first, *others = comparison.weightings
    title = f'{comparison.task}, {comparison.steps():,} steps, {len(comparison.seeds)} seeds: bits per byte, held out'
    made = Table(title=title, title_justify='left', title_style='bold', box=box.SIMPLE_HEAD, collapse_padding=True)
    made.add_column('', no_wrap=True)
    for column in (*comparison.weightings, *(f'{weighting} - {first}' for weighting in others)):
        made.add_column(column, justify='right')
    for name in comparison.names():
        spreads = [shown_spread(comparison.spread(weighting, name)) for weighting in comparison.weightings]
        differences = [shown_difference(comparison.difference(weighting, name)) for weighting in others]
        made.add_row(name if not name[0].isdigit() else f'{name} bytes', *spreads, *differences)
    made.caption = (
        'mean ± standard deviation over seeds; difference paired by seed [95% interval], * where it excludes 0'
    )
    return made


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
        is_good = found.mean > 0 if name == RIGHT else found.mean < 0
        shown = f'{name} ({signed(found.mean)})'
        (better if found.is_distinct and is_good else worse if found.is_distinct else neither).append(shown)
    parts = {'better': better, 'worse': worse, 'not to be told from the noise of seeds': neither}
    said = '; '.join(f'{part}: {", ".join(names)}' for part, names in parts.items() if names)
    return f"'{weighting}' against '{first}': {said}."


# as a picture


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the loss by length and its difference; where there are answers, how both kinds were learned."""
    figure = Figure(figsize=(10, 4.2), layout='constrained')
    left, right = figure.subplots(1, 2)
    if RIGHT in comparison.names():
        draw_curves(left, comparison, RIGHT, 'answers that are right, % of those held out')
        draw_curves(right, comparison, 'prose', 'bits per byte of held-out prose')
    else:
        draw_by_length(left, comparison)
        draw_differences(right, comparison)
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
    lines, names = left.get_legend_handles_labels()
    figure.legend(lines, names, frameon=False, ncols=len(names), loc='outside upper center')
    figure.savefig(path, dpi=144)


def draw_line(
    axes: Axes, where: Sequence[float], middle: Sequence[float], low: Sequence[float], high: Sequence[float], name: str
) -> None:
    """Draw a weighting's line and its band."""
    colour = WEIGHTINGS[name]
    axes.plot(where, middle, marker='o', markersize=4, color=colour, label=f"'{name}'")
    axes.fill_between(where, low, high, color=colour, alpha=0.2, linewidth=0)


def draw_curves(axes: Axes, comparison: Comparison, name: str, what: str) -> None:
    """Draw a measure by step, ± the deviation over seeds."""
    steps = [step for step, _ in comparison.curves[comparison.weightings[0], comparison.seeds[0]]]
    for weighting in comparison.weightings:
        found = [comparison.spread(weighting, name, at) for at in range(len(steps))]
        draw_spreads(axes, steps, found, weighting)
    axes.set_xlabel('optimizer steps')
    axes.set_ylabel(f'{what}\nmean ± standard deviation over seeds')


def draw_spreads(axes: Axes, where: Sequence[float], found: Sequence[Spread], weighting: str) -> None:
    """Draw means with a band of their deviations."""
    low = [mean - (deviation or 0) for mean, deviation in found]
    high = [mean + (deviation or 0) for mean, deviation in found]
    draw_line(axes, where, [mean for mean, _ in found], low, high, weighting)


def draw_by_length(axes: Axes, comparison: Comparison) -> None:
    """Draw the loss by length, ± the deviation over seeds."""
    lengths = [name for name in comparison.names() if name[0].isdigit()]
    for weighting in comparison.weightings:
        draw_spreads(axes, range(len(lengths)), [comparison.spread(weighting, n) for n in lengths], weighting)
    name_lengths(axes, lengths)
    axes.set_ylabel('bits per byte\nmean ± standard deviation over seeds')


def draw_differences(axes: Axes, comparison: Comparison) -> None:
    """Draw the difference to the first weighting by length, with its interval."""
    first, *others = comparison.weightings
    lengths = [name for name in comparison.names() if name[0].isdigit()]
    axes.axhline(0, color=WEIGHTINGS[first])
    for weighting in others:
        found = [comparison.difference(weighting, name) for name in lengths]
        low = [each.mean if each.low is None else each.low for each in found]
        high = [each.mean if each.high is None else each.high for each in found]
        draw_line(axes, range(len(lengths)), [each.mean for each in found], low, high, weighting)
    name_lengths(axes, lengths)
    axes.set_ylabel(f"difference to '{first}' in bits per byte\nmean and 95% interval over seeds")


def name_lengths(axes: Axes, lengths: Sequence[str]) -> None:
    """Name the lengths below the axis."""
    axes.set_xticks(range(len(lengths)), [name.replace(' to ', '–') for name in lengths])
    axes.set_xlabel('length of the held-out sequence in bytes')
