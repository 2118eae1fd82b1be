"""What a model costs in bits per byte, over bytes, over sequences and by length; as a table and as a picture.

The figures do not depend on the weighting a model was trained with, so runs can be compared:

    python examples/enwik8/report.py runs/token runs/sequence

prints the last tables of runs and draws them into one picture.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this file is a script, its own folder alone is searched
import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import tyro
from command_line import UsageError, one_line_errors, writable_folder
from matplotlib.figure import Figure
from palette import CYCLE, label
from torch import Tensor, nn

EDGES = (2, 8, 32, 128, 512, 2048, 8192)  # bytes; a bucket holds the lengths from one edge up to the next
ANSWER_EDGES = (4, 10, 16, 22, 28)  # bytes of an answer, where all sequences are answers
METRICS, PICTURE = 'metrics.jsonl', 'loss_by_length.png'  # files of a run


class SequenceCost(NamedTuple):
    """One sequence: its length in bytes, the bytes predicted, and the bits they cost together.

    Of an answer, whether each of its bytes was the most likely one: it would have been generated, byte by byte.
    """

    length: int
    targets: int
    bits: float
    is_right: bool = False

    @property
    def is_answer(self) -> bool:
        """Whether it begins with bytes that are no targets."""
        return self.targets < self.length - 1


class Row(NamedTuple):
    """A group of sequences; bits per byte as the mean over all its bytes and as the mean of its sequences' means."""

    lengths: str
    sequences: int
    targets: int
    over_tokens: float
    over_sequences: float
    right: float | None = None  # the part of them that was right, of answers
    over_square: float | None = None  # the mean of its sequences' means, each weighing √targets


@torch.no_grad()
def costs(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Iterator[SequenceCost]:
    """Yield the cost of every sequence that has a target, from batches of token ids x (b, n) and lengths lens (b,)."""
    for batch in batches:
        has_answers = 'loss_mask' in batch
        _, *outputs, breakdown = model(**batch, return_outputs=has_answers, return_breakdown=True)
        is_target = breakdown.weight > 0  # (b, n-1)
        targets = is_target.sum(dim=-1)  # (b,)
        bits = breakdown.token_loss.double().sum(dim=-1) / math.log(2)  # (b,)
        is_right = torch.zeros_like(targets, dtype=torch.bool)
        if has_answers:
            [(logits, _)] = outputs
            is_right = ((logits.argmax(dim=-1) == batch['x'][:, 1:]) | ~is_target).all(dim=-1)
        columns = (batch['lens'], targets, bits, is_right)
        for cost in zip(*(column.tolist() for column in columns), strict=True):
            if cost[1] > 0:
                yield SequenceCost(*cost)


def report(costs: Iterable[SequenceCost], longest: int | None = None) -> list[Row]:
    """Return one row for each bucket of lengths that is not empty, and one for all sequences.

    `longest` is where sequences were cut: the last bucket ends there. Where there are answers beside prose, they are
    the first row and the prose is the second; answers alone are told apart by their own length, without the question.
    """
    costs = list(costs)
    answers = [cost for cost in costs if cost.is_answer]
    if answers and len(answers) < len(costs):
        kinds = {'answers': answers, 'prose': [cost for cost in costs if not cost.is_answer]}
        return [summary(name, group) for name, group in (kinds | {'all': costs}).items()]
    edges = [edge for edge in (ANSWER_EDGES if answers else EDGES) if longest is None or edge <= longest]
    if not answers:
        edges.append(longest + 1 if longest else 1 << 62)
    groups: dict[str, list[SequenceCost]] = {}
    for low, high in pairwise(edges):
        name = f'{low} or more' if high == 1 << 62 else f'{low} to {high - 1}'
        groups[name] = [cost for cost in costs if low <= (cost.targets if answers else cost.length) < high]
    return [summary(name, group) for name, group in (groups | {'all': costs}).items() if group]


def summary(name: str, costs: list[SequenceCost]) -> Row:
    """Return the means over some sequences."""
    targets = sum(cost.targets for cost in costs)
    over_tokens = sum(cost.bits for cost in costs) / targets
    over_sequences = sum(cost.bits / cost.targets for cost in costs) / len(costs)
    right = sum(cost.is_right for cost in costs) / len(costs) if all(cost.is_answer for cost in costs) else None
    over_square = sum(cost.bits / cost.targets**0.5 for cost in costs) / sum(cost.targets**0.5 for cost in costs)
    return Row(name, len(costs), targets, over_tokens, over_sequences, right, over_square)


def table(rows: list[Row]) -> str:
    """Return the rows as text, aligned."""
    head = f'{"length in bytes":>15}  {"sequences":>9}  {"bytes":>9}  {"over tokens":>11}  {"over sequences":>14}'
    body = ('{:>15}  {:>9,}  {:>9,}  {:>11.3f}  {:>14.3f}'.format(*row[:5]) for row in rows)
    title = 'bits per byte, mean'.rjust(len(head))
    right = (f'{100 * row.right:.1f}% of the {row.lengths} are right' for row in rows if row.right is not None)
    return '\n'.join((title, head, '-' * len(head), *body, *right))


def draw_by_length(reports: dict[str, list[Row]], path: Path) -> None:
    """Draw each run's bits per byte by length of sequence, beside its means over tokens and over sequences."""
    names = {row.lengths for rows in reports.values() for row in rows} - {'all'}
    lengths = sorted(names, key=place)
    groups = [*lengths, 'all: over tokens', 'all: over sequences']
    figure = Figure(figsize=(len(groups) * max(1.4, 0.6 * len(reports)) + 2, 4.5), layout='constrained')
    axes = figure.add_subplot()
    width = 0.8 / len(reports)
    for index, (name, rows) in enumerate(reports.items()):
        height = {row.lengths: row.over_tokens for row in rows}
        height['all: over tokens'] = height.pop('all')
        height['all: over sequences'] = rows[-1].over_sequences
        where = [group + width * (index - (len(reports) - 1) / 2) for group in map(groups.index, height)]
        colour = CYCLE[index % len(CYCLE)]
        bars = axes.bar(where, list(height.values()), width, label=label(name), color=colour)
        axes.bar_label(bars, fmt='%.3f', fontsize=8, padding=2)  # as many digits as the table has
    axes.axvline(len(lengths) - 0.5, color='grey', linewidth=0.8)
    axes.set_xticks(range(len(groups)), [group.replace(': ', ':\n') for group in groups])
    axes.set_xlabel('length of the held-out sequence in bytes')
    axes.set_ylabel('bits per byte')
    axes.margins(y=0.12)
    axes.spines[['top', 'right']].set_visible(False)
    columns = max(1, int(figure.get_figwidth() / 4))  # the longest label takes less than 4 inches
    figure.legend(frameon=False, ncols=min(columns, len(reports)), loc='outside upper center')
    figure.savefig(path, dpi=144)


def place(lengths: str) -> tuple[int, str]:
    """Return by what groups of sequences are sorted: by length; answers before prose."""
    first = lengths.split()[0]
    return (int(first), '') if first.isdigit() else (0, first)


class Report(NamedTuple):
    """A report in a run's metrics, and the steps it was made after."""

    step: int
    rows: list[Row]
    seconds: float  # since the report before, or since the process was started


def reports_of(run: Path) -> list[Report]:
    """Return the reports of a run, finished or not, by step. Raises `UsageError` where there is none to be read."""
    found = []
    for line in (run / METRICS).read_text(errors='replace').splitlines():
        try:
            record = json.loads(line)
            if 'bits_per_byte' in record:
                rows = [Row(**row) for row in record['bits_per_byte']]
                found.append(Report(record.get('step', 0), rows, record.get('seconds', 0.0)))
        except (ValueError, TypeError, KeyError):  # a run that was stopped ends in half a line
            continue
    if not found or not found[-1].rows:
        raise UsageError(f'{run / METRICS} holds no report: the run stopped before its first validation')
    return found


def labels(reports: dict[Path, Report]) -> list[str]:
    """Name the runs: by their folders, by whole paths where names repeat; with the step where they differ in it."""
    names = [run.name for run in reports]
    paths = [name if names.count(name) == 1 else str(run) for name, run in zip(names, reports, strict=True)]
    steps = [report.step for report in reports.values()]
    differ = len(set(steps)) > 1
    return [f'{path}, step {step:,}' if differ else path for path, step in zip(paths, steps, strict=True)]


def main(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path('runs', PICTURE)) -> None:
    """Compare runs of train_enwik8.py.

    Args:
        runs: their folders, runs/NAME
        out: the picture to write, a .png
    """
    if not runs:
        raise UsageError('name the folder of a run, or of several')
    if out.suffix != '.png':
        raise UsageError(f'--out must end in .png, got {out}')
    writable_folder(out.parent)
    found = {run: reports_of(run)[-1] for run in dict.fromkeys(runs)}
    reports = dict(zip(labels(found), (report.rows for report in found.values()), strict=True))
    for name, rows in reports.items():
        print(f'\n{name}\n{table(rows)}')
    draw_by_length(reports, out)
    print(f'\n{out}')


if __name__ == '__main__':
    with one_line_errors('report.py'):
        tyro.cli(main)
