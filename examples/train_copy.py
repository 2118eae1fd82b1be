"""Train an encoder-decoder to copy sequences of very different lengths, under two weightings of its loss.

    python examples/train_copy.py

`XTransformer` builds its wrapper itself: `upgrade_` gives it a weighting in one line. A run leaves config.json,
metrics.json and accuracy_by_length.png in runs/NAME/.

b - sequences in a batch
n - tokens of a source
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import tyro
from command_line import UsageError, judge, one_line_errors, say, writable_folder
from matplotlib.figure import Figure
from palette import WEIGHTINGS
from torch import Generator, Tensor, nn
from torch.optim import Adam
from tqdm import tqdm
from x_transformers import XTransformer

from xtloss import upgrade_

START, FIRST = 0, 1  # the token a target starts with, and the first of those that are copied
IGNORE = -100  # what is no target, as x-transformers has it
EDGES = (1, 3, 9, 25, 65)  # tokens; a bucket holds the lengths from one edge up to the next
PICTURE = 'accuracy_by_length.png'


@dataclass(frozen=True)
class Config:
    """Train the same model on the same batches once for each weighting; compare what it can copy. About a minute."""

    weightings: tuple[Literal['token', 'sequence', 'square', 'padded', 'sequence_sum'], ...] = ('token', 'sequence')
    """The longest sequences have most of the tokens, the shortest are most of the sequences."""
    num_tokens: int = 16
    """Different tokens to copy."""
    dim: int = 64
    depth: int = 2
    heads: int = 4
    batch_size: int = 32
    learning_rate: float = 1e-3
    measure_after: tuple[int, ...] = (100, 300)
    """Optimizer steps after which accuracy is measured; a training ends after the last."""
    held_out: int = 1024
    """Sequences to measure on."""
    seed: int = 0
    """Of the parameters and of the sequences, which are the same for every weighting."""
    name: str = 'copy'
    """The results go to runs/NAME, over those of an earlier run."""


class Batch(NamedTuple):
    """Sources, and their copies to be made."""

    src: Tensor  # (b, n)
    mask: Tensor  # (b, n), True = real token
    tgt: Tensor  # (b, 1 + n): START, the source, IGNORE


def draw(count: int, num_tokens: int, generator: Generator) -> Batch:
    """Draw sequences with lengths from 1 to 64, all scales alike: as many of 1 token as of 32 to 64."""
    longest = EDGES[-1] - 1
    lens = (math.log(longest + 1) * torch.rand(count, generator=generator)).exp().long().clamp(1, longest)
    src = torch.randint(FIRST, FIRST + num_tokens, (count, longest), generator=generator)
    mask = torch.arange(longest) < lens[:, None]
    tgt = torch.cat((torch.full((count, 1), START), src.masked_fill(~mask, IGNORE)), dim=1)
    return Batch(src.masked_fill(~mask, START), mask, tgt)


def build_model(config: Config) -> XTransformer:
    """Build the model; the same parameters for the same seed."""
    torch.manual_seed(config.seed)
    common = {
        'num_tokens': FIRST + config.num_tokens,
        'max_seq_len': EDGES[-1],
        'depth': config.depth,
        'heads': config.heads,
        'attn_dim_head': config.dim // config.heads,
        'attn_flash': True,
        'verbose': False,
    }
    parts = {f'{part}_{option}': value for part in ('enc', 'dec') for option, value in common.items()}
    return XTransformer(dim=config.dim, tie_token_emb=True, ignore_index=IGNORE, pad_value=START, **parts)


class Row(NamedTuple):
    """Of the sequences of some lengths: the part of tokens, and of whole sequences, that are copied right."""

    lengths: str
    sequences: int
    tokens: float
    whole: float


@torch.no_grad()
def measure(model: nn.Module, batch: Batch) -> list[Row]:
    """Return a row for each bucket of lengths that is not empty, and one for all.

    A token is right if it is the likeliest after the right ones before it. So greedy decoding gives exactly the
    sequences all of whose tokens are right.
    """
    # XTransformer's forward asks for no logits: its parts are driven
    encoded = model.encoder(batch.src, mask=batch.mask, return_embeddings=True)
    _, (logits, _) = model.decoder(batch.tgt, context=encoded, context_mask=batch.mask, return_outputs=True)
    right = logits.argmax(dim=-1) == batch.tgt[:, 1:]  # (b, n)
    lens, tokens = batch.mask.sum(dim=1), right.sum(dim=1)  # (b,); what is IGNORE is never right

    buckets = {f'{low} to {high - 1}': (lens >= low) & (lens < high) for low, high in pairwise(EDGES)}
    return [
        Row(
            name,
            int(chosen.sum()),
            (tokens[chosen].sum() / lens[chosen].sum()).item(),
            (tokens == lens)[chosen].float().mean().item(),
        )
        for name, chosen in (buckets | {'all': lens > 0}).items()
        if chosen.any()
    ]


def train(label: str, model: nn.Module, config: Config, held_out: Batch) -> dict[int, list[Row]]:
    """Train one model on batches that hang on the seed alone; return what it can copy after each `measure_after`."""
    generator = Generator().manual_seed(config.seed)
    optimizer = Adam(model.parameters(), lr=config.learning_rate)
    measured = {}
    bar = tqdm(range(1, max(config.measure_after) + 1), desc=label, disable=None)
    for step in bar:
        batch = draw(config.batch_size, config.num_tokens, generator)
        loss = model(batch.src, batch.tgt, mask=batch.mask)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f'{loss.item():.3f}', refresh=False)
        if not loss.isfinite():
            raise UsageError(f'the loss is not finite at step {step}: --learning-rate may be too large')
        if step in config.measure_after:
            measured[step] = measure(model, held_out)
            say(f'{label}, {step} steps: {measured[step][-1].tokens:.1%} of the tokens are copied right')
    return measured


def table(reports: dict[str, list[Row]]) -> str:
    """Return the accuracies as text, aligned, one column for each weighting."""
    width = max(8, *map(len, reports))
    names = '  '.join(f'{name:>{width}}' for name in reports)
    head = f'{"":>6}  {"":>9}  {"tokens right":^{len(names)}}    {"whole sequences":^{len(names)}}'
    lines = [head, f'{"tokens":>6}  {"sequences":>9}  {names}    {names}']
    lines.append('-' * len(lines[-1]))
    for rows in zip(*reports.values(), strict=True):
        tokens = '  '.join(f'{row.tokens:>{width}.1%}' for row in rows)
        whole = '  '.join(f'{row.whole:>{width}.1%}' for row in rows)
        lines.append(f'{rows[0].lengths:>6}  {rows[0].sequences:>9,}  {tokens}    {whole}'.replace(' to ', '..'))
    return '\n'.join(lines)


def draw_by_length(measured: dict[int, dict[str, list[Row]]], path: Path) -> None:
    """Draw the part of tokens that each weighting's model copies right, by length of the sequence, a panel a moment."""
    figure = Figure(figsize=(5.5 * len(measured) + 1, 4), layout='constrained')
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axes, (step, reports) in zip(panels, measured.items(), strict=True):
        width = 0.8 / len(reports)
        for index, (name, rows) in enumerate(reports.items()):
            where = [group + width * (index - (len(reports) - 1) / 2) for group in range(len(rows))]
            colour = WEIGHTINGS[name]
            bars = axes.bar(where, [100 * row.tokens for row in rows], width, label=name, color=colour)
            axes.bar_label(bars, fmt='%.1f', fontsize=8, padding=2)  # as many digits as the table has
        axes.set_xticks(range(len(rows)), [row.lengths for row in rows])
        axes.set_xlabel('tokens of the sequence')
        axes.set_title(f'after {step} steps')
        axes.spines[['top', 'right']].set_visible(False)
    panels[0].set_ylabel('tokens copied right, %')
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, ncols=len(reports), loc='outside upper center')
    figure.savefig(path, dpi=144)


def compare(config: Config) -> None:
    """Train once for each weighting, measure, and draw."""
    judge(config)
    if config.dim % config.heads:
        raise UsageError(f'--dim must be a multiple of --heads, got {config.dim} and {config.heads}')
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings
    folder = writable_folder(Path('runs') / config.name)
    (folder / 'config.json').write_text(json.dumps(asdict(config), indent=2) + '\n')

    held_out = draw(config.held_out, config.num_tokens, Generator().manual_seed(config.seed + 1))
    trained = {
        weighting: train(weighting, upgrade_(build_model(config), loss_weighting=weighting), config, held_out)
        for weighting in config.weightings
    }
    measured = {
        step: {weighting: rows[step] for weighting, rows in trained.items()}
        for step in sorted(set(config.measure_after))
    }

    for step, reports in measured.items():
        print(f'\nafter {step} steps\n{table(reports)}')
    as_json = {
        step: {weighting: [row._asdict() for row in rows] for weighting, rows in reports.items()}
        for step, reports in measured.items()
    }
    (folder / 'metrics.json').write_text(json.dumps(as_json, indent=2) + '\n')
    draw_by_length(measured, folder / PICTURE)
    print(f'\n{folder}: config.json, metrics.json, {PICTURE}')


def main(args: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    with one_line_errors(Path(__file__).name):
        compare(tyro.cli(Config, args=args))


if __name__ == '__main__':
    main()
