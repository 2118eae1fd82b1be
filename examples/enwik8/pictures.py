"""The pictures of a comparison of weightings: what was measured of each by length, by step and by learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from enwik8.comparison import RIGHT, RIGHT_OF, Comparison, is_length
from enwik8.over_seeds import Spread
from enwik8.tuning import Tuning
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from palette import WEIGHTINGS


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the loss by length and its difference; where there are answers, how both kinds were learned."""
    figure = Figure(figsize=(10, 4.2), layout='constrained')
    left, right = figure.subplots(1, 2)
    if RIGHT in comparison.names():
        draw_curves(left, comparison, RIGHT, 'answers that are right, % of those held out')
        if 'prose' in comparison.names():
            draw_curves(right, comparison, 'prose', 'bits per byte of held-out prose')
        else:
            draw_by_length(right, comparison, RIGHT_OF, 'answers that are right, %')
    else:
        draw_by_length(left, comparison)
        draw_differences(right, comparison)
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
        if '%' in axes.get_ylabel():  # a band of deviations may go beyond what a percentage can be
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -2), min(high, 102))
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
    for weighting in comparison.weightings:
        shortest = min((comparison.curves[weighting, seed] for seed in comparison.seeds), key=len)
        steps = [step for step, _ in shortest]  # of runs until they are flat, the end is where the first one ends
        found = [comparison.spread(weighting, name, at) for at in range(len(steps))]
        draw_spreads(axes, steps, found, weighting)
    axes.set_xlabel('optimizer steps')
    axes.set_ylabel(f'{what}\nmean ± standard deviation over seeds')


def draw_spreads(axes: Axes, where: Sequence[float], found: Sequence[Spread], weighting: str) -> None:
    """Draw means with a band of their deviations."""
    low = [mean - (deviation or 0) for mean, deviation in found]
    high = [mean + (deviation or 0) for mean, deviation in found]
    draw_line(axes, where, [mean for mean, _ in found], low, high, weighting)


def draw_by_length(axes: Axes, comparison: Comparison, ends: str = '', what: str = 'bits per byte') -> None:
    """Draw the loss by length, or a measure whose name ends so, ± the deviation over seeds."""
    lengths = [name for name in comparison.names() if name[0].isdigit() and is_length(name) == (ends == '')]
    for weighting in comparison.weightings:
        draw_spreads(axes, range(len(lengths)), [comparison.spread(weighting, n) for n in lengths], weighting)
    name_lengths(axes, [name.removesuffix(ends) for name in lengths], 'answer' if ends else 'sequence')
    axes.set_ylabel(f'{what}\nmean ± standard deviation over seeds')


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
    name_lengths(axes, lengths, 'sequence')
    axes.set_ylabel(f"difference to '{first}' in bits per byte\nmean and 95% interval over seeds")


def name_lengths(axes: Axes, lengths: Sequence[str], of: str) -> None:
    """Name the lengths below the axis."""
    axes.set_xticks(range(len(lengths)), [name.replace(' to ', '–') for name in lengths])
    axes.set_xlabel(f'length of the held-out {of} in bytes')


def draw_rates(tunings: Sequence[Tuning], path: Path) -> None:
    """Draw over the learning rates what each was chosen by, and what is said beside it; the chosen one has a ring."""
    figure = Figure(figsize=(10, 4.2), layout='constrained')
    chosen, beside = figure.subplots(1, 2)
    rates = sorted({rate for tuning in tunings for rate in tuning.measured})
    for tuning in tunings:
        for axes, name in zip((chosen, beside), (tuning.names[0], tuning.names[-1]), strict=True):
            points = [(rate, found[name]) for rate, found in tuning.measured.items() if found]
            label = f"'{tuning.weighting}'" + (f', {name.replace("all: ", "")}' if name != RIGHT else '')
            axes.plot(*zip(*points, strict=True), marker='o', color=WEIGHTINGS[tuning.weighting], label=label)
            own = tuning.rate, tuning.measured[tuning.rate][name]
            axes.plot(*own, marker='o', markersize=13, fillstyle='none', color=WEIGHTINGS[tuning.weighting])
    for axes, title in ((chosen, 'what its rate is chosen by'), (beside, 'beside it')):
        axes.set_xscale('log', base=2)
        axes.set_xticks(rates, [f'{rate:g}' for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel('learning rate')
        axes.set_ylabel(RIGHT if axes is beside and RIGHT in tunings[0].names else 'bits per byte')
        axes.set_title(title, loc='left')
        axes.legend(frameon=False)
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=144)
