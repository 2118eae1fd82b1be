"""What a model costs in bits per byte, over bytes, over sequences and by length; as a table and as a picture.

The figures do not depend on the weighting a model was trained with, so runs can be compared:

    python examples/enwik8_report.py runs/token runs/sequence

prints the tables of finished runs and draws them into one picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

EDGES = (2, 8, 32, 128, 512, 2048, 8192)  # bytes; a bucket holds the lengths from one edge up to the next
METRICS, PICTURE = 'metrics.jsonl', 'loss_by_length.png'  # files of a run


class SequenceCost(NamedTuple):
    """One sequence: its length in bytes, the bytes predicted, and the bits they cost together."""

    length: int
    targets: int
    bits: float


class Row(NamedTuple):
    """A group of sequences; bits per byte as the mean over all its bytes and as the mean of its sequences' means."""

    lengths: str
    sequences: int
    targets: int
    over_tokens: float
    over_sequences: float


@torch.no_grad()
def costs(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Iterator[SequenceCost]:
    """Yield the cost of every sequence that has a target, from batches of token ids x (b, n) and lengths lens (b,)."""
    for batch in batches:
        _, breakdown = model(**batch, return_breakdown=True)
        targets = (breakdown.weight > 0).sum(dim=-1)  # (b,)
        bits = breakdown.token_loss.double().sum(dim=-1) / math.log(2)  # (b,)
        for cost in zip(batch['lens'].tolist(), targets.tolist(), bits.tolist(), strict=True):
            if cost[1] > 0:
                yield SequenceCost(*cost)


def report(costs: Iterable[SequenceCost]) -> list[Row]:
    """Return one row for each bucket of lengths that is not empty, and one for all sequences."""
    costs = list(costs)
    buckets = {f'{low} to {high - 1}': range(low, high) for low, high in pairwise(EDGES)}
    buckets[f'{EDGES[-1]} or more'] = range(EDGES[-1], 1 << 62)
    groups = {name: [cost for cost in costs if cost.length in lengths] for name, lengths in buckets.items()}
    return [summary(name, group) for name, group in (groups | {'all': costs}).items() if group]


def summary(name: str, costs: list[SequenceCost]) -> Row:
    """Return the two means over some sequences."""
    targets = sum(cost.targets for cost in costs)
    over_tokens = sum(cost.bits for cost in costs) / targets
    over_sequences = sum(cost.bits / cost.targets for cost in costs) / len(costs)
    return Row(name, len(costs), targets, over_tokens, over_sequences)


def table(rows: list[Row]) -> str:
    """Return the rows as text, aligned."""
    head = f'{"length in bytes":>15}  {"sequences":>9}  {"bytes":>9}  {"over tokens":>11}  {"over sequences":>14}'
    body = ('{:>15}  {:>9,}  {:>9,}  {:>11.3f}  {:>14.3f}'.format(*row) for row in rows)
    title = 'bits per byte, mean'.rjust(len(head))
    return '\n'.join((title, head, '-' * len(head), *body))


def draw_by_length(reports: dict[str, list[Row]], path: Path) -> None:
    """Draw each run's bits per byte by length of sequence, beside its means over tokens and over sequences."""
    names = {row.lengths for rows in reports.values() for row in rows} - {'all'}
    lengths = sorted(names, key=lambda name: int(name.split()[0]))
    groups = [*lengths, 'all: over tokens', 'all: over sequences']
    figure = Figure(figsize=(1.4 * len(groups) + 2, 4.5), layout='constrained')
    axes = figure.add_subplot()
    width = 0.8 / len(reports)
    for index, (name, rows) in enumerate(reports.items()):
        height = {row.lengths: row.over_tokens for row in rows}
        height['all: over tokens'] = height.pop('all')
        height['all: over sequences'] = rows[-1].over_sequences
        where = [group + width * (index - (len(reports) - 1) / 2) for group in map(groups.index, height)]
        bars = axes.bar(where, list(height.values()), width, label=name)
        axes.bar_label(bars, fmt='%.2f', fontsize=8, padding=2)
    axes.axvline(len(lengths) - 0.5, color='grey', linewidth=0.8)
    axes.set_xticks(range(len(groups)), [group.replace(': ', ':\n') for group in groups])
    axes.set_xlabel('length of the held-out sequence in bytes')
    axes.set_ylabel('bits per byte')
    axes.margins(y=0.12)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, ncols=len(reports), loc='lower center', bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=144)


def last_report(run: Path) -> list[Row]:
    """Return the last report in a run's metrics."""
    records = map(json.loads, (run / METRICS).read_text().splitlines())
    return [Row(**row) for row in [record['bits_per_byte'] for record in records if 'bits_per_byte' in record][-1]]


def main(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path(PICTURE)) -> None:
    """Compare finished runs.

    Args:
        runs: their folders, runs/NAME
        out: the picture to write
    """
    reports = {run.name: last_report(run) for run in runs}
    for name, rows in reports.items():
        print(f'\n{name}\n{table(rows)}')
    draw_by_length(reports, out)
    print(f'\n{out}')


if __name__ == '__main__':
    tyro.cli(main)
