"""Show what each weighting would do to your data, before anything is trained.

    python examples/explain_weighting.py                                # two sequences, of 3 targets and of 1
    python examples/explain_weighting.py --lens 900 40 12 3
    python examples/explain_weighting.py --file book.txt                # its lines; raw, .gz or .zip
    python examples/explain_weighting.py --file chats.jsonl             # {"prompt": "2 + 2?", "answer": "4"}

Prints the share of the loss that each sequence, each of its tokens and each range of lengths has under every
weighting, as if all sequences were one batch. Leaves shares.csv and shares.png in runs/NAME/.

s - sequences with a target
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import tyro
from command_line import UsageError, judge, one_line_errors, writable_folder
from enwik8.text import read_text
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from palette import WEIGHTINGS
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

POWERS = {'token': 0.0, 'square': 0.5, 'sequence': 1.0, 'padded': 0.0, 'sequence_sum': 0.0}  # p
FACTOR = 4  # a range of lengths ends at so many times its first
FEW = 12  # so many sequences, or different lengths, are listed one by one
SMALL = 0.001  # a table whose shares under 'token' are all below this counts in millionths, not in percent
SAME, SIMILAR = 1.5, 4.0  # factors between lengths: up to there the choice hardly matters, matters little


@dataclass(frozen=True)
class Config:
    """Show the share of the loss that each sequence, token and range of lengths has under every weighting."""

    lens: tuple[int, ...] = (3, 1)
    """Targets of each sequence."""
    file: Path | None = None
    """Instead: a text, each non-blank line a sequence, a byte a token; or a .jsonl with a prompt and an answer in each
    line, strings (a byte a token) or lists of token ids, of which the answer alone is to be learned."""
    prompt: str = 'prompt'
    """The name of the prompt in a .jsonl."""
    answer: str = 'answer'
    """The name of the answer."""
    max_len: int | None = None
    """Cut sequences there, tokens of prompt and answer together."""
    name: str = 'weighting'
    """The results go to runs/NAME, over those of an earlier run."""


class Data(NamedTuple):
    """Sequences that have a target."""

    targets: Tensor  # (s,) int64: L, what counts of each
    row: int  # targets of a padded row, as long as the longest sequence
    empty: int  # sequences without a target, left out


# what there is to weigh


def read(config: Config) -> Data:
    """Return the number of targets of every sequence. Raises `UsageError`."""
    if config.file is None:
        pairs = [(1, length) for length in config.lens]  # a token that is no target, and the targets
    elif config.file.suffix == '.jsonl':
        pairs = read_jsonl(config.file, config.prompt, config.answer)
    else:
        pairs = [(0, len(line)) for line in read_text(str(config.file)).split(b'\n') if line.strip()]
    if config.max_len is not None:
        pairs = [(min(p, config.max_len), min(p + a, config.max_len) - min(p, config.max_len)) for p, a in pairs]
    targets = [answer if prompt else max(0, answer - 1) for prompt, answer in pairs]  # the first token is no target
    counted = [length for length in targets if length]
    if not counted:
        raise UsageError('no sequence has a target: each needs two tokens, or a prompt and an answer')
    row = max(prompt + answer for prompt, answer in pairs) - 1
    return Data(torch.tensor(counted), row, len(targets) - len(counted))


def read_jsonl(path: Path, prompt: str, answer: str) -> list[tuple[int, int]]:
    """Return the lengths of prompt and answer of each line. Raises `UsageError`, which names the line."""
    pairs = []
    for number, line in enumerate(read_text(str(path)).split(b'\n'), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise UsageError(f'must be an object, got {type(record).__name__}')
            pairs.append((length_of(record, prompt, '--prompt'), length_of(record, answer, '--answer')))
        except (ValueError, UsageError) as error:  # no JSON; no prompt or answer
            raise UsageError(f'{path}, line {number}: {error}') from error
    return pairs


def length_of(record: dict[str, Any], name: str, option: str) -> int:
    """Return how many tokens a value has: the bytes of a string, the items of a list. Raises `UsageError`."""
    if name not in record:
        raise UsageError(f'{option} {name} is not among its names: {", ".join(record) or "it has none"}')
    value = record[name]
    if not isinstance(value, str | list):
        raise UsageError(f'{name} must be a string or a list of token ids, got {type(value).__name__}')
    return len(value.encode()) if isinstance(value, str) else len(value)


# what it weighs


def share_of_a_token(data: Data, weighting: str) -> Tensor:
    """Return w / Z, (s,) float64: the share that each target of a sequence of L targets has in the loss of the batch.

    w = L^-p,    Z = Σ w, but s × row for 'padded', and s for 'sequence_sum'
    """
    L, s = data.targets.double(), len(data.targets)
    w = L ** -POWERS[weighting]
    Z = {'padded': (s + data.empty) * data.row, 'sequence_sum': s}.get(weighting) or (L * w).sum()
    return w / Z


def spread(targets: Tensor) -> str:
    """Say how far the lengths are apart, and what that means."""
    L = targets.sort().values
    cut = len(L) // 20 if len(L) >= 20 else 0  # 5% at either end
    low, high = int(L[cut]), int(L[len(L) - 1 - cut])
    who = '90% of your sequences' if cut else 'All sequences'
    factor = high / low
    if factor <= SAME:
        meaning = 'the choice hardly matters'
    elif factor <= SIMILAR:
        meaning = 'the choice matters a little'
    else:
        meaning = 'the choice matters'
    return (
        f'{who} are within a factor of {factor:,.1f} ({low:,} to {high:,} targets): {meaning}. '
        f"Under 'token' the longest of these weighs {factor:,.1f} times as much as the shortest, "
        f"under 'square' {factor**0.5:,.1f} times, under 'sequence' the same."
    )


# what is shown


class Group(NamedTuple):
    """Some of the sequences."""

    name: str
    members: Tensor  # (s,) bool


def groups_of(targets: Tensor) -> list[Group]:
    """Group the sequences by length: few lengths one by one, many in ranges. None of them is empty."""
    lengths = targets.unique().tolist()
    if len(lengths) <= FEW:
        return [Group(f'{length:,}', targets == length) for length in lengths]
    low, groups = 1, []
    while low <= lengths[-1]:
        members = (targets >= low) & (targets < FACTOR * low)
        if members.any():
            groups.append(Group(f'{low:,}-{min(FACTOR * low - 1, lengths[-1]):,}', members))
        low *= FACTOR
    return groups


def table(title: str, data: Data, groups: list[Group], share: Callable[[Tensor, Tensor], float]) -> Table:
    """Return one line for each group, one column for each weighting.

    `share` makes a number of the members' shares of a token and of their targets, (members,) each.
    """
    made = Table(title_justify='left', title_style='bold', box=box.SIMPLE_HEAD, collapse_padding=True)
    for column in ('targets', 'sequences', *POWERS):
        made.add_column(column, justify='right', no_wrap=True)
    of_tokens = [share_of_a_token(data, weighting) for weighting in POWERS]
    found = [[share(each[members], data.targets[members]) for each in of_tokens] for _, members in groups]
    parts = 100 if max(of_group[0] for of_group in found) >= SMALL else 1_000_000  # 'token' is the first weighting
    made.title = f'{title}, in {"percent" if parts == 100 else "millionths"} of the loss'
    for (name, members), shares in zip(groups, found, strict=True):
        made.add_row(name, f'{int(members.sum()):,}', *(readable(parts * share) for share in shares))
    return made


def readable(number: float) -> str:
    """Return a number with three digits, or with all before the point."""
    return f'{number:.3g}' if number < 999.5 else f'{number:,.0f}'


def tables(data: Data) -> list[Table]:
    """Return the tables of sequences, of tokens and of lengths."""
    groups = groups_of(data.targets)
    each = 'each sequence' if len(groups) == len(data.targets.unique()) else 'a sequence, mean'
    everything = [*groups, Group('all', torch.ones_like(data.targets, dtype=torch.bool))]
    return [
        table(f'Share of {each}', data, groups, lambda share, L: (share * L).mean().item()),
        table(f'Share of {each.replace("sequence", "token")}', data, groups, lambda share, L: share.mean().item()),
        table('Share of all sequences of a length', data, everything, lambda share, L: (share * L).sum().item()),
    ]


def scales(data: Data) -> str:
    """Say why the shares of two weightings do not sum to 100%."""
    total = {w: (share_of_a_token(data, w) * data.targets).sum().item() for w in ('padded', 'sequence_sum')}
    padded, summed = total['padded'], total['sequence_sum']
    return (
        "'padded' and 'sequence_sum' weigh all tokens alike, as 'token' does. Their shares sum to "
        f'{readable(100 * padded)}% and {readable(100 * summed)}%, as their losses are {readable(padded)} and '
        f"{readable(summed)} times that of 'token': 'padded' divides by the padding too, 'sequence_sum' by the number "
        'of sequences.'
    )


def draw(data: Data, path: Path) -> None:
    """Draw how each weighting divides the loss among the lengths: its bars sum to 100%."""
    groups = groups_of(data.targets)
    names = {'token': "'token', 'padded', 'sequence_sum'", 'square': "'square'", 'sequence': "'sequence'"}
    figure = Figure(figsize=(max(6, 2 * len(groups) + 1), 4), layout='constrained')
    axes = figure.add_subplot()
    width = 0.84 / len(names)
    for index, (weighting, name) in enumerate(names.items()):
        loss = share_of_a_token(data, weighting) * data.targets  # (s,)
        heights = [loss[group.members].sum().item() for group in groups]
        where = [group + width * (index - 1) for group in range(len(groups))]
        bars = axes.bar(where, heights, width, label=name, color=WEIGHTINGS[weighting])
        axes.bar_label(bars, [f'{readable(100 * height)}%' for height in heights], fontsize=8, padding=2)
    axes.set_xticks(range(len(groups)), [f'{name}\n× {int(members.sum()):,}' for name, members in groups])
    axes.set_xlabel('targets of a sequence\n× sequences')
    axes.set_ylabel('part of the whole loss')
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.margins(y=0.12)
    axes.spines[['top', 'right']].set_visible(False)
    figure.legend(frameon=False, ncols=3, loc='outside upper center')
    figure.savefig(path, dpi=144)


def write_csv(data: Data, path: Path) -> None:
    """Write each sequence: its targets, its share, and that of each of its tokens, under every weighting."""
    shares = [share_of_a_token(data, weighting) for weighting in POWERS]
    columns = [data.targets, *(column for share in shares for column in (share * data.targets, share))]
    with open(path, 'w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(('targets', *(f'{w} {what}' for w in POWERS for what in ('sequence', 'token'))))
        rows.writerows(zip(*(column.tolist() for column in columns), strict=True))


def explain(config: Config) -> None:
    """Read, print, write and draw."""
    judge(config)
    data = read(config)
    folder = writable_folder(Path('runs') / config.name)
    console = Console()
    for made in tables(data):
        console.print(made)
    if data.empty:
        console.print(f'left out, for want of a target: {data.empty:,}')
    console.print(spread(data.targets), highlight=False)
    console.print(scales(data), highlight=False)
    write_csv(data, folder / 'shares.csv')
    draw(data, folder / 'shares.png')
    console.print(f'\n{folder}: shares.csv, with every sequence, and shares.png', highlight=False)


def main(args: Sequence[str] | None = None) -> None:
    """Explain as the command line says."""
    with one_line_errors(Path(__file__).name):
        explain(tyro.cli(Config, args=args))


if __name__ == '__main__':
    main()
